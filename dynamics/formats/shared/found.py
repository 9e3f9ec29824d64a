"""The checkpoints that a format found, none of them opened, and the run that they are."""

from abc import abstractmethod
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import ClassVar, NoReturn, Protocol

from dynamics.errors import FormatError
from dynamics.formats.format import Format, OpenOptions
from dynamics.formats.shared.checkpoints import Checkpoint, CheckpointsRun
from dynamics.formats.shared.look import Series, places_of
from dynamics.formats.storage.files import root_of
from dynamics.runs.run import Run


class Unopened(Protocol):
    """A checkpoint that was found."""

    @property
    def where(self) -> Path:
        """Its path, for messages."""

    def open(self, root: Path | None = None, options: OpenOptions | None = None) -> Checkpoint:
        """The checkpoint; no tensor is read yet.

        Args:
            root: the directory that no file may lead out of; its own directory by default.
            options: what the user said.

        Raises:
            FormatError: it is damaged.
        """


@dataclass(frozen=True)
class OpenedBy:
    """A checkpoint that a function opens."""

    where: Path
    opens: Callable[[], Checkpoint]

    def open(self, root: Path | None = None, options: OpenOptions | None = None) -> Checkpoint:
        """See `Unopened.open`."""
        return self.opens()


@dataclass(frozen=True)
class Unreadable:
    """A checkpoint of which only the step is known, and why it cannot be read."""

    where: Path
    problem: FormatError

    def open(self, root: Path | None = None, options: OpenOptions | None = None) -> NoReturn:
        """See `Unopened.open`."""
        raise self.problem


@dataclass(frozen=True)
class Found:
    """The checkpoints of a run.

    Attributes:
        checkpoints: step -> checkpoint.
        passed_over: name -> why it is no checkpoint of the run, for what looks like one.
        is_guess: whether there is one checkpoint, and nothing tells its step.
        clashing: where those lie that claim one step.
    """

    checkpoints: Mapping[int, Unopened]
    passed_over: Mapping[str, str] = field(default_factory=dict)
    is_guess: bool = False
    clashing: Sequence[Path] = ()


def found_in_series(series: Series, checkpoint: Callable[[int, Path], Unopened]) -> Found:
    """The checkpoints of a series. A step that several claim cannot be read.

    Args:
        series: where they lie.
        checkpoint: makes the one at a step and a path.
    """
    found = {step: checkpoint(step, at) for step, at in series.steps.items()}
    for step, clash in series.clashes.items():
        found[step] = Unreadable(series.steps[step], FormatError(clash))
    return Found(found, series.passed_over, series.is_guess, series.clashing)


class CheckpointsFormat(Format):
    """A format whose runs are series of checkpoints.

    Attributes:
        run_class: the class of its runs.
    """

    run_class: ClassVar[type[CheckpointsRun]] = CheckpointsRun

    @abstractmethod
    def found(self, path: Path, options: OpenOptions) -> Found:
        """The checkpoints at a path.

        Args:
            path: where a run lies, or one checkpoint.
            options: what the user said.

        Raises:
            FormatError: it is not clear which the checkpoints are.
        """

    def series(self, path: Path) -> Series | None:
        """Where the checkpoints of a path lie, by names and a few looks; see `find_series`.

        None where there are none, or where only opening them tells.
        """
        return None

    def places(self, path: Path) -> dict[Path, int | None]:
        """Where the checkpoints of a path lie -> their steps, where names tell them.

        Empty where there are none, and where it is only a guess that they are checkpoints.
        """
        return places_of(self.series(path))

    def holds_one(self, path: Path) -> bool:
        """Whether a path, a file or a directory in a run, is one checkpoint. Opens no file."""
        return False

    def holds_beside(self, path: Path) -> bool:
        """Whether the directory of a run, which has checkpoints in it, is one more itself."""
        return False

    def open(self, path: Path, options: OpenOptions) -> Run:
        """See `Format.open`."""
        return self.run_of(path, self.found(path, options), options)

    def run_of(self, path: Path, found: Found, options: OpenOptions) -> CheckpointsRun:
        """The run of checkpoints that were found at or below a path."""
        root = root_of(path if path.is_dir() else path.parent)
        opens = {
            step: partial(each.open, root, options) for step, each in found.checkpoints.items()
        }
        run = self.run_class(path, self.name, opens)
        run.passed_over = {**found.passed_over, **run.passed_over}
        run.places = {s: str(each.where) for s, each in sorted(found.checkpoints.items())}
        return run
