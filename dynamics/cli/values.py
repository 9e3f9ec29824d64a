"""The values of the command line's options and arguments: lists, steps, named paths."""

from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

from dynamics.errors import DynamicsError, MissingError

if TYPE_CHECKING:
    from dynamics.runs.run import Run


class StepRange(NamedTuple):
    """A part of "0,100,200:400": as it was written, and its ends, None where left out."""

    text: str
    first: int | None
    last: int | None

    def of(self, run: "Run") -> list[int]:
        """The steps of the run in this range."""
        return [
            step
            for step in run.steps.tolist()
            if (self.first is None or self.first <= step)
            and (self.last is None or step <= self.last)
        ]


def split(text: str | None) -> list[str] | None:
    """The parts of a comma-separated list, None for None."""
    return None if text is None else [each.strip() for each in text.split(",") if each.strip()]


def step_ranges(text: str | None) -> list[StepRange] | None:
    """What "0,100,200:400" asks for; None for None."""
    parts = split(text)
    if parts == []:
        raise DynamicsError("--steps is empty: nothing to measure; leave it out for all.")
    return None if parts is None else [_step_range(part) for part in parts]


def steps_of(run: "Run", ranges: list[StepRange] | None) -> list[int] | None:
    """The steps that these choose; a range takes the steps that the run has there."""
    if ranges is None:
        return None
    chosen: list[int] = []
    for each in ranges:
        if ":" not in each.text and each.first is not None:
            chosen.append(run.check_step(each.first))
            continue
        within = each.of(run)
        if not within:
            known = abridged([str(step) for step in run.steps])
            raise MissingError(f"{run.path} has no step in {each.text}; it has {known}.")
        chosen += within
    return chosen


def steps_so_far(run: "Run", ranges: list[StepRange] | None) -> list[int] | None:
    """The steps that these choose of those that a run in progress has by now."""
    return None if ranges is None else [step for each in ranges for step in each.of(run)]


def named_paths(runs: list[str]) -> dict[str, str]:
    """Name -> path or URL of each NAME=RUN."""
    paths: dict[str, str] = {}
    for each in runs:
        name, equals, path = each.partition("=")
        if not equals or not name or not path:
            raise DynamicsError(f"Expected NAME=RUN, found {each!r}.")
        if name in paths:
            raise DynamicsError(f"The name {name!r} is given twice.")
        paths[name] = path
    return paths


def run_name(run: str) -> str:
    """What a run's path or URL is called, without `.zarr`: the stem of its results' names."""
    path = run.rstrip("/").rpartition("/")[2] if "://" in run else Path(run).resolve().name
    return path.removesuffix(".zarr") or "run"


def abridged(items: list[str], at_most: int = 12) -> str:
    """The items, separated by commas, with dots in place of too many."""
    if len(items) > at_most:
        items = [*items[: at_most - 2], "...", items[-1]]
    return ", ".join(items)


def _step_range(part: str) -> StepRange:
    first, colon, last = part.partition(":")
    try:
        if not colon:
            return StepRange(part, int(part), int(part))
        return StepRange(part, int(first) if first else None, int(last) if last else None)
    except ValueError as error:
        raise DynamicsError(
            f"--steps takes numbers and ranges FIRST:LAST, found {part!r}."
        ) from error
