"""Formats whose checkpoints are complete: every step has the weights of the whole model, by name.

Such a format only says which checkpoints there are (`FullCheckpointsFormat.checkpoints`). The rest
is here: names lose the prefixes of wrappers, a tied weight is measured once, and a checkpoint that
cannot be read is a problem of its step.
"""

from abc import abstractmethod
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NoReturn

import numpy as np

from dynamics import schema
from dynamics.errors import FormatError
from dynamics.formats.format import Format, OpenOptions
from dynamics.formats.shared.evaluations import with_evaluations
from dynamics.formats.storage.files import root_of
from dynamics.formats.storage.tensors import Tensor
from dynamics.runs import parameter_names
from dynamics.runs.attention_config import tied_aliases
from dynamics.runs.origins import ABSENT
from dynamics.runs.run import Dense, Run, matrices_of


@dataclass(frozen=True)
class FullCheckpoint:
    """One checkpoint of a whole model, not opened yet.

    Attributes:
        where: its path, for messages.
        tensors: returns stored name -> tensor; raises FormatError where the checkpoint is damaged.
        attrs: returns what the checkpoint says of its model, {"config": ...}; likewise.
        scalars: returns what was logged, name -> value; likewise.
    """

    where: Path
    tensors: Callable[[], Mapping[str, Tensor]]
    attrs: Callable[[], Mapping[str, Any]] = dict
    scalars: Callable[[], Mapping[str, float]] = dict

    @classmethod
    def unreadable(cls, where: Path, problem: FormatError) -> "FullCheckpoint":
        """A checkpoint of which only the step is known; reading it raises `problem`."""

        def fail() -> NoReturn:
            raise problem

        return cls(where, fail)


class FullCheckpointsFormat(Format):
    """A format whose checkpoints are complete; it says which there are."""

    @abstractmethod
    def checkpoints(self, path: Path, root: Path) -> dict[int, FullCheckpoint]:
        """Step -> checkpoint, none of them opened.

        Args:
            path: where the run lies.
            root: the directory that no file may lead out of.

        Raises:
            FormatError: two checkpoints claim the same step.
        """

    def open(self, path: Path, options: OpenOptions) -> Run:
        """See `Format.open`."""
        return FullCheckpointsRun(path, self.name, self.checkpoints(path, root_of(path)))


class FullCheckpointsRun(Run):
    """A run of complete checkpoints.

    Args:
        path: where it lies.
        format: the name of its format.
        checkpoints: step -> checkpoint.

    Raises:
        FormatError: no checkpoint can be read, or none holds matrices.
    """

    stored_kinds = (schema.WEIGHT,)

    def __init__(self, path: Path, format: str, checkpoints: Mapping[int, FullCheckpoint]):
        self.path = str(path)
        self.format = format
        self.steps = np.array(sorted(checkpoints), dtype=np.int64)
        self.problems: dict[int, str] = {}
        self.attrs: dict[str, Any] = {}
        self._tensors: dict[int, dict[str, Tensor]] = {}
        self._scalars: dict[str, np.ndarray] = {}
        shapes: dict[str, tuple[int, ...]] = {}
        for position, step in enumerate(self.steps.tolist()):
            checkpoint = checkpoints[step]
            try:
                attrs = checkpoint.attrs()
                tensors = without_tied_names(
                    with_clean_names(checkpoint.tensors(), checkpoint.where), attrs
                )
                scalars = checkpoint.scalars()
            except FormatError as problem:
                self.problems[step] = str(problem)
                continue
            self._tensors[step] = tensors
            self.attrs = self.attrs or dict(attrs)
            shapes |= {name: tensor.shape for name, tensor in tensors.items()}
            for name, value in scalars.items():
                series = self._scalars.setdefault(name, np.full(len(self.steps), np.nan))
                series[position] = value
        self._scalars = with_evaluations(self._scalars, path, root_of(path), self.steps)
        self.matrices = matrices_of(shapes)
        if not self.matrices:
            raise FormatError(next(iter(self.problems.values()), f"{path} holds no matrices."))

    def read(self, name: str, step: int, kind: str) -> Dense | None:
        """The weight of a parameter; see `Run.read`."""
        if kind != schema.WEIGHT:
            return None
        if step in self.problems:
            raise FormatError(self.problems[step])
        tensor = self._tensors[step].get(name)
        return None if tensor is None else Dense(tensor.read(), tensor.dtype)

    def origin(self, name: str, step: int, kind: str) -> str | None:
        """See `Run.origin`."""
        if kind != schema.WEIGHT or step in self.problems:
            return None
        tensor = self._tensors[step].get(name)
        return ABSENT if tensor is None else tensor.origin

    @property
    def scalars(self) -> dict[str, np.ndarray]:
        """Along the steps: what the checkpoints logged, and what evaluation.jsonl holds."""
        return self._scalars


def with_clean_names(tensors: Mapping[str, Tensor], where: Path) -> dict[str, Tensor]:
    """Clean name -> tensor: names without the prefixes that wrappers (DDP, compile) add.

    Raises:
        FormatError: two stored names become one, and they are different tensors.
    """
    by_clean_name: dict[str, Tensor] = {}
    stored_names: dict[str, str] = {}
    for name, tensor in tensors.items():
        clean = parameter_names.clean_name(name)
        if clean in by_clean_name and by_clean_name[clean].place != tensor.place:
            raise FormatError(
                f"{where} holds both {stored_names[clean]} and {name}; without the prefixes of "
                f"wrappers both are {clean}. Save one of the two models alone."
            )
        by_clean_name[clean], stored_names[clean] = tensor, name
    return by_clean_name


def without_tied_names(
    tensors: Mapping[str, Tensor], attrs: Mapping[str, Any]
) -> dict[str, Tensor]:
    """The tensors, each under one name only: a tied output embedding is left out.

    Two names are tied where they share a place in the file, or where the model's config says so.
    """
    shapes = {name: tensor.shape for name, tensor in tensors.items()}
    aliases = tied_aliases(shapes, attrs.get("config"))
    tensors = {name: tensor for name, tensor in tensors.items() if name not in aliases}
    places: dict[object, str] = {}
    for name, tensor in tensors.items():
        # The input embedding's name is kept, as in files that leave the output embedding out.
        if tensor.place not in places or parameter_names.module_of(name) == "embed_tokens":
            places[tensor.place] = name
    return {name: tensors[name] for name in tensors if places[tensors[name].place] == name}
