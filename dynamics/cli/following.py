"""`dynamics analyze --follow`: the signals that end it."""

import signal
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from types import FrameType

_SIGNALS = (signal.SIGINT, signal.SIGTERM)


@contextmanager
def until_signalled() -> Iterator[Callable[[], bool]]:
    """A function that tells whether SIGINT or SIGTERM has come. They do nothing else meanwhile."""
    received: list[int] = []

    def note(number: int, frame: FrameType | None) -> None:
        received.append(number)

    previous = {each: signal.signal(each, note) for each in _SIGNALS}
    try:
        yield lambda: bool(received)
    finally:
        for each, handler in previous.items():
            signal.signal(each, handler)
