"""`dynamics analyze --follow`: a line per update, until SIGINT or SIGTERM."""

import json
import signal
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from types import FrameType
from typing import Any

from dynamics import schema
from dynamics.analysis import storage
from dynamics.analysis.following import follow
from dynamics.analysis.selection import Selection
from dynamics.runs.run import Run
from dynamics.schema import Status

_SIGNALS = (signal.SIGINT, signal.SIGTERM)


def follow_and_save(
    open_run: Callable[[], Run],
    output: Path,
    *,
    overwrite: bool,
    say: Callable[[str], None],
    **options: Any,
) -> list[str]:
    """Follow a run, save each analysis of it, and say so, until a signal says to stop.

    Args:
        open_run: opens the run.
        output: where the result goes.
        overwrite: whether it may lose something that is there already.
        say: prints a line.
        options: those of `follow`.

    Returns:
        What is unmeasured in the end: the problems of the last analysis, or why there is none.
    """
    problems: list[str] = []
    missing: str | None = None
    saved = False

    def waiting(reason: str | None) -> None:
        nonlocal missing
        missing = reason
        if reason is not None:
            say(f"waiting: {reason}")

    def before(chosen: Selection) -> None:
        storage.check_update(output, chosen, overwrite=overwrite, rewound=saved)

    with _until_signalled() as stopped:
        for result in follow(
            open_run,
            stopped=stopped,
            waiting=waiting,
            before=before,
            **options,
        ):
            storage.save(result, output, overwrite=overwrite or output.exists())
            saved = True
            problems = json.loads(result.attrs["problems"])
            status = result[schema.STATUS]
            measured, unreadable = (
                int((status == each).any((schema.KIND, schema.MATRIX)).sum())
                for each in (Status.MEASURED, Status.UNREADABLE)
            )
            say(
                f"step {int(result[schema.STEP][-1])}: {measured} steps measured"
                + f", {unreadable} not readable yet" * bool(unreadable)
            )
    if missing is not None:
        return [*problems, missing]
    if not saved:
        return ["Stopped before the first analysis was done; run it again to go on."]
    say(f"Saved to {output}")
    return problems


@contextmanager
def _until_signalled() -> Iterator[Callable[[], bool]]:
    """A function that tells whether one of the signals has come; they do nothing else."""
    received: list[int] = []

    def note(number: int, frame: FrameType | None) -> None:
        received.append(number)

    previous = {each: signal.signal(each, note) for each in _SIGNALS}
    try:
        yield lambda: bool(received)
    finally:
        for each, handler in previous.items():
            signal.signal(each, handler)
