"""The memory of the process: how much it can get, and that it keeps what every step uses again."""

import ctypes
import re
import sys
from contextlib import suppress
from pathlib import Path, PurePosixPath

import torch

M_TRIM_THRESHOLD, M_MMAP_THRESHOLD = -1, -3  # malloc.h


def keep_freed_memory() -> None:
    """Ask glibc not to hand freed blocks of up to 1 GB (32 MB in older releases) back to the
    system, for the rest of the process; elsewhere, do nothing.

    A step frees and allocates the same large blocks over and over. By default each comes back as
    fresh pages, at a page fault per 4 KB.
    """
    if sys.platform == "linux":
        mallopt = getattr(ctypes.CDLL(None), "mallopt", None)
        if mallopt is not None:
            if not mallopt(M_MMAP_THRESHOLD, 1 << 30):
                mallopt(M_MMAP_THRESHOLD, 1 << 25)  # the most that older releases accept
            mallopt(M_TRIM_THRESHOLD, (1 << 31) - 1)


def memory_left(device: str, processes: int) -> int:
    """Bytes that each of this machine's `processes` processes can use on its device."""
    if device == "cpu":
        return available_memory() // processes
    free, _ = torch.cuda.mem_get_info(device)
    return free // -(-processes // torch.cuda.device_count())


def release_freed_memory() -> None:
    """Hand what is freed back to the system, so that it does not count as in use."""
    if sys.platform == "linux":
        trim = getattr(ctypes.CDLL(None), "malloc_trim", None)
        if trim is not None:
            trim(0)


def available_memory(root: Path = Path("/")) -> int:
    """Bytes that this process can use: those that Linux has left, or the smallest limit of its
    control groups; no limit on other systems. `root` is where the system's files are."""
    left = _matches(root / "proc/meminfo", r"^MemAvailable:\s+(\d+) kB")
    limits: list[str] = []
    groups = root / "sys/fs/cgroup"
    for own in _matches(root / "proc/self/cgroup", r"^\d+:.*?:/(.*)"):
        own = PurePosixPath(own)  # in a container, often a path that only the host has
        for group in (own, *own.parents):
            limits += _matches(groups / group / "memory.max", r"^(\d+)$")
            limits += _matches(groups / "memory" / group / "memory.limit_in_bytes", r"^(\d+)$")
    return min([1024 * int(kb) for kb in left] + [int(n) for n in limits], default=sys.maxsize)


def anonymous_memory() -> int | None:
    """Bytes in memory that only this process can free, without the pages of files, which Linux
    drops when memory gets short; None on other systems."""
    found = _matches(Path("/proc/self/status"), r"^RssAnon:\s+(\d+) kB")
    return 1024 * int(found[0]) if found else None


def _matches(path: Path, pattern: str) -> list[str]:
    """What the group of a pattern matches in a file; nothing if it cannot be read."""
    with suppress(OSError):
        return re.findall(pattern, path.read_text(encoding="utf-8", errors="replace"), re.MULTILINE)
    return []
