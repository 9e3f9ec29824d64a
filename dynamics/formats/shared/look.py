"""How a checkpoint is told among the entries of a directory, and the series that they make."""

import re
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from pathlib import Path
from typing import TypeVar

from dynamics.errors import FormatError
from dynamics.formats.storage.files import Entry, entries, is_remote

# Directories in which trainers keep their checkpoints.
CONTAINER = re.compile(r"(?:.*[-_])?(?:checkpoint|ckpt|chkpt)s?|models|weights", re.IGNORECASE)
LATEST = re.compile(r"(?:^|.*[^a-z])(?:final|last|best|latest|current)(?:[^a-z].*|$)", re.I)

T = TypeVar("T")


@dataclass(frozen=True)
class Series:
    """The checkpoints that were found.

    Attributes:
        steps: step -> where its checkpoint lies.
        clashes: step -> why its checkpoint is not known: several claim to be it.
        passed_over: name -> why it is no checkpoint of the run, for what looks like one.
        is_guess: whether there is one checkpoint, and nothing tells its step.
        is_sure: whether the names say that their numbers count steps or epochs.
        clashing: where all that claim a step of `clashes` lie.
    """

    steps: dict[int, Path]
    clashes: dict[int, str] = field(default_factory=dict)
    passed_over: dict[str, str] = field(default_factory=dict)
    is_guess: bool = False
    is_sure: bool = True
    clashing: list[Path] = field(default_factory=list)


def places_of(series: Series | None) -> dict[Path, int | None]:
    """Where the checkpoints of a series lie -> their steps, where names tell them.

    Empty where it is only a guess that they are checkpoints.
    """
    if series is None or not series.is_sure:
        return {}
    return {at: None if series.is_guess else step for step, at in series.steps.items()}


@dataclass(frozen=True)
class Look:
    """How one checkpoint of a format looks.

    Attributes:
        holds: whether there is one at a path. Opens no file, or at most one.
        suffixes: how the names of files end that are one by themselves.
        own_step: the step that the files of one tell, None where they tell none. May raise
            FormatError where they are damaged.
        beside: whether the directory of a run has one more in it beside its series; `holds` by
            default.
    """

    holds: Callable[[Path], bool]
    suffixes: tuple[str, ...] = ()
    own_step: Callable[[Path], int | None] = lambda _: None
    beside: Callable[[Path], bool] | None = None

    def holds_at(self, entry: Entry) -> bool:
        """Whether an entry is one. What cannot be listed is none."""
        if not entry.is_dir and not entry.name.endswith(self.suffixes or ("/",)):
            return False
        try:
            if entry.is_dir:
                entries(entry.path)  # one request, which answers all that `holds` asks
            return self.holds(entry.path)
        except (FormatError, OSError):
            return False

    def label(self, entry: Entry) -> str:
        """The part of an entry's name that may carry a step."""
        ends = [each for each in self.suffixes if entry.name.endswith(each)]
        return entry.name.removesuffix(max(ends, key=len)) if ends else entry.name


def few(items: Iterable[T], place: Path, at_most: int = 4) -> list[T]:
    """Some of the items, the first and the last among them: each costs a look, or a request.

    Args:
        items: of any kind.
        place: where they lie.
        at_most: how many over a network; eight times as many on a disk.
    """
    items = list(items)
    most = at_most if is_remote(place) else at_most * 8
    if len(items) <= most:
        return items
    return [items[round(i * (len(items) - 1) / (most - 1))] for i in range(most)]
