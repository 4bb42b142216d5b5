"""SIGINT, SIGTERM and SIGHUP as a request to save and stop at the end of the step."""

import signal
import threading
from types import FrameType


class Interrupted(KeyboardInterrupt):
    """A run was asked to stop; what it had done is saved."""

    def __init__(self, signum: int, message: str):
        super().__init__(message)
        self.signum = signum


class Interrupts:
    """Within its `with` block, the first signal is noted in `signum`; a second one kills. SIGHUP
    never does: when a terminal closes, both the system and the shell send it.

    SIGHUP stays ignored under nohup. Outside the main thread, where Python allows no signal
    handlers, it notes nothing.
    """

    SIGNALS = (signal.SIGINT, signal.SIGTERM)
    HANGUP = getattr(signal, "SIGHUP", None)  # not on Windows

    def __init__(self):
        self.signum: int | None = None
        self._previous = {}

    def __enter__(self) -> "Interrupts":
        if threading.current_thread() is threading.main_thread():
            self._previous = {s: signal.signal(s, self._note) for s in self.SIGNALS}
            if self.HANGUP and signal.getsignal(self.HANGUP) != signal.SIG_IGN:
                self._previous[self.HANGUP] = signal.signal(self.HANGUP, self._note)
        return self

    def noted(self) -> int | None:
        """`signum`, also of a signal that came while the thread waited outside Python: its handler
        runs when the next function is called."""
        return self.signum

    def _note(self, signum: int, frame: FrameType | None) -> None:
        self.signum = self.signum or signum
        if signum in self.SIGNALS:
            for again in self.SIGNALS:
                signal.signal(again, self._previous[again])

    def __exit__(self, *exc: object) -> None:
        for signum, handler in self._previous.items():
            signal.signal(signum, handler)
