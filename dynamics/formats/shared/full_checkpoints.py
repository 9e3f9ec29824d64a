"""Formats whose checkpoints are complete: every step has the weights of the whole model, by name.

Such a format only says how one checkpoint looks (`SeriesFormat`), or, where a run is more than a
series of them, which checkpoints there are (`FullCheckpointsFormat`). The rest is here: names lose
the prefixes of wrappers, and a tied weight is measured once.
"""

import re
from abc import abstractmethod
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any, ClassVar

from dynamics.errors import FormatError
from dynamics.formats.format import OpenOptions
from dynamics.formats.quantised.dequantise import dequantised
from dynamics.formats.shared.adapters.inside import (
    Inside,
    adapters_inside,
    may_hold_adapters,
    with_clean_names_left_out,
)
from dynamics.formats.shared.checkpoints import Checkpoint, CheckpointsRun
from dynamics.formats.shared.found import (
    CheckpointsFormat,
    Found,
    Unopened,
    Unreadable,
    found_in_series,
)
from dynamics.formats.shared.look import Look, Series
from dynamics.formats.shared.model_config import ConfigBeside
from dynamics.formats.shared.series import find_series
from dynamics.formats.shared.sparse_low_rank import with_sparse_weights
from dynamics.formats.shared.steps import step_in_name
from dynamics.formats.storage.files import is_directory, reporting_unreadable, root_of
from dynamics.formats.storage.tensors import Tensor
from dynamics.runs import parameter_names
from dynamics.runs.attention_config import tied_aliases
from dynamics.runs.stacks import name_in_files

_LAST = re.compile(r"last(?:-v\d+)?")


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

    def with_config(self, beside: ConfigBeside) -> "FullCheckpoint":
        """This checkpoint with a config that lies beside it, where it has none of its own."""
        return replace(self, attrs=partial(beside.attrs, self.attrs, self.where))

    def open(self, root: Path | None = None, options: OpenOptions | None = None) -> Checkpoint:
        """The checkpoint: dequantised, with clean names, each tied weight under one name only.

        Args:
            root: the directory that no file may lead out of; its own directory by default.
            options: what the user said of adapters in it.
        """
        with reporting_unreadable(self.where):
            attrs = self.attrs()
            stored, not_read = dequantised(
                with_sparse_weights(self.tensors(), self.where), attrs.get("config")
            )
            scalars = self.scalars()
            if may_hold_adapters(stored):
                inside = adapters_inside(
                    stored,
                    not_read,
                    self.where,
                    root or root_of(self.where if self.where.is_dir() else self.where.parent),
                    attrs,
                    options or OpenOptions(),
                    partial(_as_weights, where=self.where, attrs=attrs),
                )
                if inside is not None:
                    return _checkpoint_of(inside, attrs, scalars)
            weights = _as_weights(stored, self.where, attrs)
            left_out = with_clean_names_left_out(not_read)
            return Checkpoint(weights, left_out=left_out, attrs=attrs, scalars=scalars)


class FullCheckpointsFormat(CheckpointsFormat):
    """A format whose checkpoints are complete; it says which there are."""

    options = ("adapter", "lora_alpha", "expert_blocks")

    @abstractmethod
    def checkpoints(self, path: Path, root: Path) -> Found | dict[int, FullCheckpoint]:
        """The checkpoints of a run, or step -> checkpoint, none of them opened.

        Args:
            path: where the run lies.
            root: the directory that no file may lead out of.

        Raises:
            FormatError: it is not clear which the checkpoints are.
        """

    def found(self, path: Path, options: OpenOptions) -> Found:
        """See `CheckpointsFormat.found`."""
        root = root_of(path)
        given = self.checkpoints(path, root)
        found = given if isinstance(given, Found) else Found(given)
        beside = ConfigBeside(path, root if path.is_dir() else root_of(path.parent))
        checkpoints = {
            step: each.with_config(beside) if isinstance(each, FullCheckpoint) else each
            for step, each in found.checkpoints.items()
        }
        return replace(
            found, checkpoints=checkpoints, passed_over={**found.passed_over, **beside.damaged}
        )

    def run_of(self, path: Path, found: Found, options: OpenOptions) -> CheckpointsRun:
        """See `CheckpointsFormat.run_of`. Without adapters, there is no use for options."""
        run = super().run_of(path, found, options)
        if not run.has_adapters:
            for option in self.options:
                if getattr(options, option) is not None:
                    raise self.takes_no(option, path)
        return run


class SeriesFormat(FullCheckpointsFormat):
    """A format that says how one checkpoint looks; a run is a series of them (`shared.series`).

    Attributes:
        suffixes: how the names of files end that are a checkpoint by themselves.
    """

    suffixes: ClassVar[tuple[str, ...]] = ()

    @abstractmethod
    def holds(self, path: Path) -> bool:
        """Whether there is a checkpoint at a path: a directory, or a file with such a suffix."""

    @abstractmethod
    def checkpoint(self, path: Path, root: Path, step: int) -> FullCheckpoint:
        """The checkpoint at a path, not opened.

        Args:
            path: where one is, or should be.
            root: the directory that no file may lead out of.
            step: the step that it belongs to.
        """

    def own_step(self, path: Path) -> int | None:
        """The step that the files of a checkpoint tell; None where they tell none.

        Raises:
            FormatError: they are damaged.
        """
        return None

    def look(self) -> Look:
        """How one checkpoint looks."""
        return Look(self.holds, self.suffixes, self.own_step)

    def recognises(self, path: Path) -> bool:
        """Whether there is a checkpoint at a path, or a series of them below it."""
        return self.series(path) is not None

    def series(self, path: Path) -> Series | None:
        """See `CheckpointsFormat.series`."""
        return find_series(path, self.look())

    def holds_one(self, path: Path) -> bool:
        """See `CheckpointsFormat.holds_one`."""
        if not is_directory(path):
            return path.name.endswith(self.suffixes or ("/",)) and self.holds(path)
        return self.holds(path)

    def holds_beside(self, path: Path) -> bool:
        """See `CheckpointsFormat.holds_beside`."""
        look = self.look()
        return (look.beside or look.holds)(path)

    def checkpoints(self, path: Path, root: Path) -> Found:
        """See `FullCheckpointsFormat.checkpoints`."""
        series = self.series(path) or Series({0: path})  # reading it says what is missing
        return found_in_series(series, lambda step, at: self.checkpoint(at, root, step))


class OtherKindError(FormatError):
    """A file is no checkpoint of a format."""


def found_in_files(
    files: Iterable[Path], opened: Callable[[Path], tuple[int, FullCheckpoint]], where: Path
) -> Found:
    """The checkpoints of files that tell their steps themselves.

    Of two with one step, the one that is not called last (Lightning writes the newest one twice),
    or the one that can be read.

    Args:
        files: in order.
        opened: returns the step in a file, and its checkpoint. FormatError: it is damaged;
            OtherKindError: it is no checkpoint.
        where: for messages.

    Raises:
        FormatError: none has a step.
    """
    claims: dict[int, list[tuple[Path, Unopened, bool]]] = {}
    passed_over: dict[str, str] = {}
    for file in files:
        try:
            step, checkpoint = opened(file)
        except FormatError as problem:
            named = None if isinstance(problem, OtherKindError) else step_in_name(file.stem)
            if named is None:
                passed_over[file.name] = str(problem)
                continue
            claims.setdefault(named, []).append((file, Unreadable(file, problem), False))
        else:
            claims.setdefault(step, []).append((file, checkpoint, True))
    if not claims:
        raise FormatError(next(iter(passed_over.values()), f"{where} holds no checkpoint."))
    checkpoints: dict[int, Unopened] = {}
    for step, claim in sorted(claims.items()):
        sound = [each for each in claim if each[2]] or claim
        chosen = [each for each in sound if not _LAST.fullmatch(each[0].stem)] or sound[:1]
        checkpoints[step] = chosen[0][1]
        if len(chosen) > 1:
            one, other = sorted(each[0].name for each in chosen)[:2]
            clash = f"{where} holds {one} and {other}, both of step {step}; remove one of the two."
            checkpoints[step] = Unreadable(chosen[0][0], FormatError(clash))
        for file, *_ in claim:
            if file not in [each[0] for each in chosen]:
                passed_over[file.name] = f"{chosen[0][0].name} is of step {step} too"
    return Found(checkpoints, passed_over)


def _as_weights(
    tensors: Mapping[str, Tensor], where: Path, attrs: Mapping[str, Any]
) -> dict[str, Tensor]:
    return without_tied_names(_with_names_of_files(with_clean_names(tensors, where), attrs), attrs)


def _with_names_of_files(tensors: dict[str, Tensor], attrs: Mapping[str, Any]) -> dict[str, Tensor]:
    """The tensors by the names that save_pretrained would give them, where these are others.

    Stacks of experts keep theirs: an adapter on them refers to it, and their parts get new names.
    """
    config = attrs.get("config")
    config = config if isinstance(config, Mapping) else {}
    named = {
        name_in_files(name, config) if len(each.shape) < 3 else name: each
        for name, each in tensors.items()
    }
    return named if len(named) == len(tensors) else tensors


def _checkpoint_of(
    inside: Inside,
    attrs: Mapping[str, Any],
    scalars: Mapping[str, float],
) -> Checkpoint:
    adapted = inside.adapted
    return Checkpoint(
        adapted.weights,
        adapted.adapters,
        adapted.effective,
        adapted.unknown,
        left_out=(*inside.left_out, *adapted.left_out),
        no_base=inside.no_base,
        no_scale=inside.no_scale,
        attrs={**attrs, "adapter_config": dict(inside.config)} if inside.config else attrs,
        scalars=scalars,
    )


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
