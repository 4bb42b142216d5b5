"""SIGINT and SIGTERM as a request to save and stop at the end of the step."""

import signal
import threading
from types import FrameType


class Interrupted(KeyboardInterrupt):
    """A run was asked to stop; what it had done is saved."""

    def __init__(self, signum: int, message: str):
        super().__init__(message)
        self.signum = signum


class Interrupts:
    """Within its `with` block, the first signal is noted in `signum`; a second one kills.

    Outside the main thread, where Python allows no signal handlers, it notes nothing.
    """

    SIGNALS = (signal.SIGINT, signal.SIGTERM)

    def __init__(self):
        self.signum: int | None = None
        self._previous = {}

    def __enter__(self) -> "Interrupts":
        if threading.current_thread() is threading.main_thread():
            self._previous = {s: signal.signal(s, self._note) for s in self.SIGNALS}
        return self

    def _note(self, signum: int, frame: FrameType | None) -> None:
        self.signum = signum
        self._restore()

    def _restore(self) -> None:
        for signum, handler in self._previous.items():
            signal.signal(signum, handler)
        self._previous = {}

    def __exit__(self, *exc: object) -> None:
        self._restore()
