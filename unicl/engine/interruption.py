"""SIGTERM and Ctrl-C become a flag that the training loop reads between two steps."""

import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType


class Interruption:
    """Whether somebody asked the run to stop, and with which signal."""

    signal_name: str | None = None

    def __bool__(self) -> bool:
        return self.signal_name is not None


@contextmanager
def catch_interruption() -> Iterator[Interruption]:
    """Note the first SIGTERM or SIGINT instead of dying; a second one gets its usual effect."""
    interruption = Interruption()
    if threading.current_thread() is not threading.main_thread():
        # Only the main thread may set handlers; a run inside a thread is stopped by its owner.
        yield interruption
        return
    previous = {number: signal.getsignal(number) for number in (signal.SIGTERM, signal.SIGINT)}

    def note(number: int, frame: FrameType | None) -> None:
        interruption.signal_name = signal.Signals(number).name
        for number, handler in previous.items():
            signal.signal(number, handler)

    for number in previous:
        signal.signal(number, note)
    try:
        yield interruption
    finally:
        for number, handler in previous.items():
            signal.signal(number, handler)
