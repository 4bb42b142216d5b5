"""Memory that is used again at every step stays with the process."""

import ctypes
import sys

M_TRIM_THRESHOLD, M_MMAP_THRESHOLD = -1, -3  # malloc.h


def keep_freed_memory() -> None:
    """Ask glibc not to hand freed blocks of up to 1 GB back to the system; elsewhere, do nothing.

    A step frees and allocates the same large blocks over and over. By default each comes back as
    fresh pages, at a page fault per 4 KB.
    """
    if sys.platform == "linux":
        mallopt = getattr(ctypes.CDLL(None), "mallopt", None)
        if mallopt is not None:
            mallopt(M_MMAP_THRESHOLD, 1 << 30)
            mallopt(M_TRIM_THRESHOLD, (1 << 31) - 1)
