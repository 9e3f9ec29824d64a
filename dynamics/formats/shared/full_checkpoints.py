"""Formats whose checkpoints are complete: every step has the weights of the whole model, by name.

Such a format only says which checkpoints there are (`FullCheckpointsFormat.checkpoints`). The rest
is here: names lose the prefixes of wrappers, and a tied weight is measured once.
"""

from abc import abstractmethod
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, NoReturn

from dynamics.errors import FormatError
from dynamics.formats.format import Format, OpenOptions
from dynamics.formats.quantised.dequantise import dequantised
from dynamics.formats.shared.checkpoints import Checkpoint, CheckpointsRun
from dynamics.formats.storage.files import root_of
from dynamics.formats.storage.tensors import Tensor
from dynamics.runs import parameter_names
from dynamics.runs.attention_config import tied_aliases
from dynamics.runs.run import Run


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

    def open(self) -> Checkpoint:
        """The checkpoint: dequantised, with clean names, each tied weight under one name only."""
        attrs = self.attrs()
        stored, left_out = dequantised(self.tensors(), attrs.get("config"))
        tensors = with_clean_names(stored, self.where)
        return Checkpoint(
            without_tied_names(tensors, attrs),
            left_out=tuple(
                replace(each, name=parameter_names.clean_name(each.name)) for each in left_out
            ),
            attrs=attrs,
            scalars=self.scalars(),
        )

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
        checkpoints = self.checkpoints(path, root_of(path))
        return CheckpointsRun(path, self.name, {s: each.open for s, each in checkpoints.items()})


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
