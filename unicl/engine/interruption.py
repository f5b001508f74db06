"""Signals that end a job become a flag that the training loop reads between two steps."""

import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType

_SIGNALS = (signal.SIGTERM, signal.SIGINT, signal.SIGUSR1)


class Interruption:
    """Whether somebody asked the run to stop, and with which signal."""

    signal_number: int = 0
    """0 as long as nobody did."""


@contextmanager
def catch_interruption() -> Iterator[Interruption]:
    """Note the first such signal instead of dying; a second one gets its usual effect.

    SIGTERM is how launchers and Slurm end a job, SIGINT is Ctrl-C, and SIGUSR1 is what a job asks
    Slurm to send some time before its limit (`--signal=USR1@120`).
    """
    interruption = Interruption()
    if threading.current_thread() is not threading.main_thread():
        # Only the main thread may set handlers; a run inside a thread is stopped by its owner.
        yield interruption
        return
    previous = {number: signal.getsignal(number) for number in _SIGNALS}

    def note(number: int, frame: FrameType | None) -> None:
        interruption.signal_number = number
        for number, handler in previous.items():
            signal.signal(number, handler)

    for number in previous:
        signal.signal(number, note)
    try:
        yield interruption
    finally:
        for number, handler in previous.items():
            signal.signal(number, handler)
