"""What lies beside the checkpoints of a run: named, or its last checkpoint."""

from collections.abc import Iterable
from dataclasses import replace
from pathlib import Path

from dynamics.errors import FormatError
from dynamics.formats.format import Format
from dynamics.formats.readings import NAMED, OF_MODEL, Reading, below, is_told, others_beside
from dynamics.formats.shared.found import CheckpointsFormat, Found, Unopened
from dynamics.formats.shared.full_checkpoints import FullCheckpointsFormat, SeriesFormat
from dynamics.formats.shared.look import few
from dynamics.formats.shared.model_config import ConfigBeside
from dynamics.formats.storage.files import Entry, root_of
from dynamics.formats.storage.model_files import MODEL


def with_others(
    path: Path,
    found: Found,
    format: CheckpointsFormat,
    formats: Iterable[Format],
    *,
    adopt: bool,
) -> Found:
    """What was found, and what lies beside it: named, or the last checkpoint of the run.

    A final model belongs to the run where its own files tell its step.

    Args:
        path: the directory of the run.
        found: its checkpoints.
        format: that of the checkpoints.
        formats: all that are known.
        adopt: whether a model of another format may belong to the run.
    """
    places = format.places(path)
    if set(places) == {path}:
        return found  # what lies in a checkpoint is a part of it
    read = {each.where: step for step, each in found.checkpoints.items()}
    own = Reading(format, path, {**places, **read, **dict.fromkeys(found.clashing)})
    others = [each for each in formats if isinstance(each, CheckpointsFormat)]
    more = _Beside(path, found, format, adopt)
    itself = f"the model in {path.name or path}/ itself"
    has_model = itself in found.passed_over or path in (
        each.where for each in found.checkpoints.values()
    )
    for each in others if not has_model else ():
        if each is not format and is_told(each.holds_beside, path):
            more.add_unnamed(path, itself, each)
            has_model = True
            break
    groups: dict[tuple, list[Entry]] = {}
    for entry, kind in others_beside(own):
        if not {entry.name, below(entry.path, path)} & {*found.passed_over}:
            groups.setdefault(kind, []).append(entry)
    for kind, members in groups.items():
        if kind[0] == OF_MODEL and has_model:
            continue  # it is that model's file
        known = next(
            (
                each
                for one in few(members, path)
                for each in others
                if is_told(each.holds_one, one.path)
            ),
            None,
        )
        for entry in members if known else ():
            assert known is not None
            name = below(entry.path, path)
            if kind[0] == NAMED:
                more.pass_over(name, known)
            elif is_told(known.holds_one, entry.path):
                more.add_unnamed(entry.path, name, known)
    return more.found


class _Beside:
    """What lies beside the checkpoints of a run, added to them one by one."""

    def __init__(self, path: Path, found: Found, format: CheckpointsFormat, adopt: bool):
        self._path = path
        self._format = format
        self._adopt = adopt
        self._checkpoints: dict[int, Unopened] = dict(found.checkpoints)
        self._found = found
        self._has_model = False
        self.names: dict[str, str] = {}

    @property
    def found(self) -> Found:
        """All of it."""
        passed_over = dict(self._found.passed_over)
        if self._has_model:  # its file is not passed over by itself
            passed_over = {name: why for name, why in passed_over.items() if name not in MODEL}
        return replace(
            self._found,
            checkpoints=dict(sorted(self._checkpoints.items())),
            passed_over={**passed_over, **self.names},
        )

    def pass_over(self, name: str, other: CheckpointsFormat) -> None:
        """Name what is a checkpoint of another kind."""
        same = other.name == self._format.name
        self.names[name] = (
            "it does not belong to the series of the others"
            if same
            else f"it is of format {other.name!r}, and the run of format {self._format.name!r}"
        )

    def add_unnamed(self, at: Path, name: str, other: CheckpointsFormat) -> None:
        """Add a checkpoint whose name tells no step at the step that its files tell."""
        self._has_model |= at == self._path
        full = isinstance(self._format, FullCheckpointsFormat) and isinstance(other, SeriesFormat)
        if not full or not (self._adopt or other.name == self._format.name):
            self.pass_over(name, other)
            return
        assert isinstance(other, SeriesFormat)
        try:
            step = other.own_step(at)
        except FormatError as problem:
            self.names[name] = str(problem)
            return
        if step is None:
            self.names[name] = "neither its name nor its files tell a step"
        elif step in self._checkpoints:
            there = below(self._checkpoints[step].where, self._path)
            self.names[name] = f"{there} is of step {step} too"
        else:
            root = root_of(self._path)
            beside = ConfigBeside(self._path, root)
            self._checkpoints[step] = other.checkpoint(at, root, step).with_config(beside)
