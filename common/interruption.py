"""Signals end a command as Ctrl-C does: contexts are left in order, so processes, networks and temporary files go."""

import signal
from types import FrameType

_AGAIN_S = 0.02


def end_on_signals() -> None:
    """From now on SIGTERM, and SIGHUP of a terminal that closes, raise KeyboardInterrupt, as SIGINT does.

    A signal that this process ignores stays ignored: `nohup` asks for that.
    """
    for number in (signal.SIGTERM, signal.SIGHUP):
        if signal.getsignal(number) == signal.SIG_DFL:
            signal.signal(number, interrupt)
    signal.signal(signal.SIGALRM, interrupt)


def interrupt(number: int, frame: FrameType | None) -> None:
    """A handler of signals: raises KeyboardInterrupt, a moment later if it would be lost.

    Python swallows exceptions in finalisers, and the program would just go on. SIGALRM needs the same handler.
    """
    if _in_finaliser(frame):
        signal.setitimer(signal.ITIMER_REAL, _AGAIN_S)
        return
    raise KeyboardInterrupt


def _in_finaliser(frame: FrameType | None) -> bool:
    while frame is not None and frame.f_code.co_name != "__del__":
        frame = frame.f_back
    return frame is not None
