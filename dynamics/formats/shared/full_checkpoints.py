"""Runs of full checkpoints: every step has the weights of the whole model, by name.

What such formats share: names are cleaned, a tied weight is measured once, a checkpoint that
cannot be read is a problem of its step. A format says which checkpoints there are (`checkpoints`).
"""

from abc import abstractmethod
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from dynamics import schema
from dynamics.errors import FormatError
from dynamics.formats.shared.evaluations import with_evaluations
from dynamics.formats.storage.files import root_of
from dynamics.formats.storage.tensors import Tensor
from dynamics.runs import parameter_names
from dynamics.runs.attention_config import tied_aliases
from dynamics.runs.run import Dense, Run, matrices_of


@dataclass(frozen=True)
class Checkpoint:
    """One checkpoint, not opened yet.

    Attributes:
        where: its path, for messages.
        tensors: gives stored name -> tensor; raises FormatError where it is damaged.
        attrs: gives what the checkpoint tells of its model: {"config": ...}; likewise.
        scalars: gives what was logged: name -> value; likewise.
    """

    where: Path
    tensors: Callable[[], Mapping[str, Tensor]]
    attrs: Callable[[], Mapping[str, Any]] = dict
    scalars: Callable[[], Mapping[str, float]] = dict


class WeightsRun(Run):
    """A run of full checkpoints; a format derives from it and names them.

    Raises:
        FormatError: no checkpoint can be read, or none holds matrices.
    """

    description: str
    single_files = False  # whether a run of this format may be one file
    stored_kinds = (schema.WEIGHT,)

    @staticmethod
    @abstractmethod
    def recognises(path: Path) -> bool:
        """Whether a run of this format lies at `path`."""

    @staticmethod
    @abstractmethod
    def checkpoints(path: Path, root: Path) -> dict[int, Checkpoint]:
        """Step -> checkpoint, none of them opened.

        Args:
            path: the run's.
            root: the directory that no file may lead out of.

        Raises:
            FormatError: two checkpoints claim the same step.
        """

    def __init__(self, path: Path):
        self.path = str(path)
        found = dict(sorted(self.checkpoints(path, root_of(path)).items()))
        self.steps = np.array(list(found), dtype=np.int64)
        self.problems: dict[int, str] = {}
        self.attrs: dict[str, Any] = {}
        self._tensors: dict[int, dict[str, Tensor]] = {}
        self._scalars: dict[str, np.ndarray] = {}
        shapes: dict[str, tuple[int, ...]] = {}
        for position, (step, checkpoint) in enumerate(found.items()):
            try:
                attrs = checkpoint.attrs()
                tensors = untied(cleaned(checkpoint.tensors(), checkpoint.where), attrs)
                scalars = checkpoint.scalars()
            except FormatError as problem:
                self.problems[step] = str(problem)
                continue
            self._tensors[step] = tensors
            self.attrs = self.attrs or dict(attrs)
            shapes |= {name: tensor.shape for name, tensor in tensors.items()}
            for name, value in scalars.items():
                series = self._scalars.setdefault(name, np.full(len(found), np.nan))
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
        return "absent" if tensor is None else tensor.origin

    @property
    def scalars(self) -> dict[str, np.ndarray]:
        """What the checkpoints' logs and evaluation.jsonl say, along the steps."""
        return self._scalars


def cleaned(tensors: Mapping[str, Tensor], where: Path) -> dict[str, Tensor]:
    """Clean name -> tensor.

    Raises:
        FormatError: two stored names are the same parameter without their wrappers' prefixes.
    """
    found: dict[str, Tensor] = {}
    stored: dict[str, str] = {}
    for name, tensor in tensors.items():
        clean = parameter_names.clean_name(name)
        if clean in found and found[clean].place != tensor.place:
            raise FormatError(
                f"{where} holds both {stored[clean]} and {name}, which are {clean} without their "
                "wrappers' prefixes; save one of the two models alone."
            )
        found[clean], stored[clean] = tensor, name
    return found


def untied(tensors: Mapping[str, Tensor], attrs: Mapping[str, Any]) -> dict[str, Tensor]:
    """The tensors without second names of the same numbers: a tied output embedding.

    It is one where the file says so, by a place that two names share, or the model's config.
    """
    shapes = {name: tensor.shape for name, tensor in tensors.items()}
    aliases = tied_aliases(shapes, attrs.get("config"))
    tensors = {name: tensor for name, tensor in tensors.items() if name not in aliases}
    places: dict[object, str] = {}
    for name, tensor in tensors.items():
        # Of two names the input embedding's stays, as in files that leave the other one out.
        if tensor.place not in places or parameter_names.module_of(name) == "embed_tokens":
            places[tensor.place] = name
    return {name: tensors[name] for name in tensors if places[tensors[name].place] == name}
