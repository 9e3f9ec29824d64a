"""A run is a series of checkpoints: weights, and where there are any, LoRA adapters and gradients.

Every format that stores checkpoints builds a `Checkpoint` per step, and `CheckpointsRun` does the
rest. With adapters, the effective weight is W = W_base + s·B·A, and the run has the kinds weight,
base and adapter. A merge shows as a base that changed. A format says where the tensors lie and
what s is. A checkpoint that cannot be read is a problem of its step.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np

from dynamics import schema
from dynamics.errors import FormatError
from dynamics.formats.quantised.tensor import QuantisedTensor
from dynamics.formats.shared.evaluations import EVALUATIONS, with_evaluations
from dynamics.formats.shared.lora_factors import Adapter, joined_origin
from dynamics.formats.shared.matrices import as_matrices
from dynamics.formats.shared.sparse_low_rank import SparseTensor
from dynamics.formats.storage.files import root_of
from dynamics.formats.storage.hub.path import HubPath
from dynamics.formats.storage.tensors import Tensor
from dynamics.runs.account import Account, LeftOut
from dynamics.runs.origins import ABSENT
from dynamics.runs.run import Dense, Matrix, Run, matrices_of


@dataclass(frozen=True)
class Checkpoint:
    """One checkpoint: where its weights, adapters and gradients lie.

    Attributes:
        weights: clean name -> stored weight, without the product of its adapter; None where the
            base model was not found. A parameter that has an adapter but is not in `weights`
            consists of the adapter alone.
        adapters: clean name -> adapter.
        effective: clean name -> weight that an adapter makes, where that is not the stored weight
            plus s·B·A: DoRA, rotations, rows of trained tokens, ...
        unknown: clean name of a matrix or tensor -> why its weight is not known here, or nothing of
            it; its adapter may be in `adapters`.
        is_merged: whether the adapters were merged into `weights` already.
        gradients: clean name -> tensor.
        left_out: tensors that are stored and not measured, besides those in `weights` that are no
            matrices: quantised ones that cannot be dequantised, integers, complex numbers.
        no_base: why the base model was not found and what to do, for messages.
        bad_base: likewise, for a base model that was found and is damaged or does not fit.
        no_scale: why the scaling of its adapters is not known and what to do, for messages.
        attrs: what the checkpoint says of its model: {"config": ...}.
        scalars: name -> value that was logged.
    """

    weights: Mapping[str, Tensor] | None
    adapters: Mapping[str, Adapter] = field(default_factory=dict)
    effective: Mapping[str, Tensor] = field(default_factory=dict)
    unknown: Mapping[str, str] = field(default_factory=dict)
    is_merged: bool = False
    gradients: Mapping[str, Tensor] = field(default_factory=dict)
    left_out: tuple[LeftOut, ...] = ()
    no_base: str = ""
    bad_base: str = ""
    no_scale: str = ""
    attrs: Mapping[str, Any] = field(default_factory=dict)
    scalars: Mapping[str, float] = field(default_factory=dict)

    @property
    def shapes(self) -> dict[str, tuple[int, ...]]:
        """Clean name -> shape of everything that can be measured."""
        parts = (self.gradients, self.adapters, self.weights or {})
        return {name: each.shape for part in parts for name, each in part.items()}

    @property
    def kinds(self) -> set[str]:
        """The kinds that are stored here."""
        kinds = {schema.ADAPTER} if self.adapters else set()
        if self.weights is not None:
            adapted = self.adapters or self.effective
            kinds |= {schema.WEIGHT, *((schema.BASE,) if adapted else ())}
        return kinds | ({schema.GRADIENT} if self.gradients else set())

    @property
    def absent_kinds(self) -> dict[str, str]:
        """Kind -> why it is not here, see `Run.absent_kinds`."""
        absent = {}
        if self.weights is None and not self.bad_base:
            absent = dict.fromkeys((schema.WEIGHT, schema.BASE), self.no_base)
        if self.no_scale and not self.adapters:
            absent |= dict.fromkeys((schema.BASE, schema.ADAPTER), self.no_scale)
        return absent

    def as_matrices(self) -> tuple["Checkpoint", Account | None]:
        """This checkpoint with its tensors of three and more dimensions as matrices; its account.

        Where the base model was not found, there is an account only if an adapter is left out.
        """
        config = self.attrs.get("config")
        config = config if isinstance(config, Mapping) else {}
        gradients = as_matrices(self.gradients, config).matrices
        if self.weights is None:
            measured = {name: each.shape for name, each in self.adapters.items()}
            account = Account(measured, left_out=self.left_out) if self.left_out else None
            return replace(self, gradients=gradients), account
        found = as_matrices(self.weights, config)
        effective = as_matrices(self.effective, config).matrices
        account = Account(found.measured, left_out=(*found.left_out, *self.left_out))
        matrices = replace(self, weights=found.matrices, effective=effective, gradients=gradients)
        return matrices, account

    def read(self, name: str, kind: str) -> Matrix | None:
        """See `Run.read`."""
        if kind == schema.GRADIENT:
            return _dense(self.gradients.get(name))
        adapter = self.adapters.get(name)
        if kind == schema.ADAPTER:
            return adapter.read() if adapter else None
        if self.weights is None or kind not in (schema.WEIGHT, schema.BASE) or name in self.unknown:
            return None
        if name in self.effective and kind == schema.WEIGHT:
            return _with_errors_of(self.weights.get(name), _dense(self.effective[name]))
        if adapter is None or (self.is_merged and kind == schema.WEIGHT):
            return _dense(self.weights.get(name))
        if kind == schema.BASE:
            return None if self.is_merged else _dense(self.weights.get(name))
        base, product = _dense(self.weights.get(name)), adapter.read()
        if base is None:
            return Dense(product.product(), product.dtype)
        values = base.values.astype(np.float64) + product.product()
        return Dense(values, base.dtype, base.errors)

    def origin(self, name: str, kind: str) -> str | None:
        """See `Run.origin`."""
        if not self.adapters and not self.effective and kind == schema.WEIGHT:
            return _origin((self.weights or {}).get(name))
        if name in self.effective and kind == schema.WEIGHT:
            return _origin(self.effective[name])
        adapter, base = self.adapters.get(name), (self.weights or {}).get(name)
        parts: list[str | None] = [f"{kind}, merged: {self.is_merged}"]
        if kind == schema.GRADIENT:
            parts.append(_origin(self.gradients.get(name)))
        if kind in (schema.WEIGHT, schema.ADAPTER):
            parts.append(_origin(adapter))
        if kind in (schema.WEIGHT, schema.BASE):
            parts.append(_origin(base))
        return joined_origin(parts)


class CheckpointsRun(Run):
    """A run of checkpoints.

    Args:
        path: where it lies.
        format: the name of its format.
        checkpoints: step -> function that opens its checkpoint, or raises FormatError where it is
            damaged.

    Raises:
        FormatError: no checkpoint can be read, or none holds matrices.
    """

    def __init__(
        self, path: Path, format: str, checkpoints: Mapping[int, Callable[[], Checkpoint]]
    ):
        self.path = str(path)
        self.source = path.repository if isinstance(path, HubPath) else None
        self.format = format
        self.steps = np.array(sorted(checkpoints), dtype=np.int64)
        self.problems: dict[int, str] = {}
        self.attrs: dict[str, Any] = {}
        self.absent_kinds: dict[str, str] = {}
        self.account: Account | None = None  # of the first checkpoint
        self._checkpoints: dict[int, Checkpoint] = {}
        self._base_changes: dict[tuple[str, int, int], bool] = {}
        self._scalars: dict[str, np.ndarray] = {}
        shapes: dict[str, tuple[int, ...]] = {}
        kinds: set[str] = set()
        for position, step in enumerate(self.steps.tolist()):
            try:
                checkpoint, account = checkpoints[step]().as_matrices()
            except FormatError as problem:
                self.problems[step] = str(problem)
                continue
            self._checkpoints[step] = checkpoint
            self.account = self.account or account
            self.attrs = self.attrs or dict(checkpoint.attrs)
            kinds |= checkpoint.kinds
            shapes |= checkpoint.shapes
            for name, value in checkpoint.scalars.items():
                series = self._scalars.setdefault(name, np.full(len(self.steps), np.nan))
                series[position] = value
            self.absent_kinds |= checkpoint.absent_kinds
        bad_bases = [each.bad_base for each in self._checkpoints.values()]
        if bad_bases and all(bad_bases):
            self.absent_kinds |= dict.fromkeys((schema.WEIGHT, schema.BASE), bad_bases[0])
        try:
            self._scalars = with_evaluations(self._scalars, path, root_of(path), self.steps)
        except FormatError as problem:
            self.passed_over = {EVALUATIONS: str(problem)}
        self.stored_kinds = tuple(
            kind for kind in schema.KINDS if kind in kinds and kind not in self.absent_kinds
        )
        self._with_adapter = {name for each in self._checkpoints.values() for name in each.adapters}
        # Without a base, parameters without adapter cannot be measured at every step.
        if schema.WEIGHT in self.absent_kinds:
            shapes = {name: shape for name, shape in shapes.items() if name in self._with_adapter}
        self.matrices = matrices_of(shapes)
        if not self.matrices:
            raise FormatError(next(iter(self.problems.values()), self._why_no_matrices()))

    def read(self, name: str, step: int, kind: str) -> Matrix | None:
        """The effective weight, base weight, adapter or gradient of a parameter; see `Run.read`."""
        if kind not in self.stored_kinds:
            return None  # a run without adapters has no base either
        if step in self.problems:
            raise FormatError(self.problems[step])
        self._check_known(name, step, kind)
        return self._checkpoints[step].read(name, kind)

    def _check_known(self, name: str, step: int, kind: str) -> None:
        """Raise the reason where a matrix is not known at one step, and is at others."""
        checkpoint = self._checkpoints[step]
        if kind in (schema.WEIGHT, schema.BASE) and checkpoint.bad_base:
            raise FormatError(checkpoint.bad_base)
        reason = checkpoint.unknown.get(name)
        if reason is None or (kind == schema.ADAPTER and name in checkpoint.adapters):
            return
        if kind in (schema.WEIGHT, schema.BASE, schema.ADAPTER) and any(
            name not in each.unknown for each in self._checkpoints.values()
        ):
            raise FormatError(f"{self.path} has no {kind} of {name} at step {step}: {reason}.")

    def _why_no_matrices(self) -> str:
        reasons = [f"It has {self.account.line(names=3)}."] if self.account else []
        reasons += dict.fromkeys(self.absent_kinds.values())
        return " ".join([f"{self.path} holds no matrices.", *reasons])

    def origin(self, name: str, step: int, kind: str) -> str | None:
        """See `Run.origin`."""
        return None if step in self.problems else self._checkpoints[step].origin(name, kind)

    @property
    def has_adapters(self) -> bool:
        """Whether any checkpoint holds a part of an adapter, be it measured or not."""
        return any(
            each.adapters or each.effective or each.unknown for each in self._checkpoints.values()
        )

    @property
    def scalars(self) -> dict[str, np.ndarray]:
        """Along the steps: what the checkpoints logged, and what evaluation.jsonl holds."""
        return self._scalars

    def trains(self, name: str) -> bool | None:
        """True for `modules_to_save` of PEFT, which train as a whole, and for SLTrain's weights.

        See `Run.trains`.
        """
        if self.sparse_entries(name) is not None:
            return True
        config = self.attrs.get("adapter_config")
        saved = config.get("modules_to_save") if isinstance(config, Mapping) else None
        if isinstance(saved, list) and any(f".{each}." in f".{name}" for each in saved):
            return True
        return None

    def sparse_entries(self, name: str) -> int | None:
        """How many places the first checkpoint stores; see `Run.sparse_entries`."""
        bases = ((each.weights or {}).get(name) for each in self._checkpoints.values())
        return next((each.entries for each in bases if isinstance(each, SparseTensor)), None)

    def merges_between(self, name: str, before: int, now: int) -> int:
        """How often the frozen base of a weight with an adapter changed between checkpoints.

        Each change is one merge or more; several merges between two neighbouring checkpoints count
        as one. Checkpoints that cannot be read are skipped.
        """
        if name not in self._with_adapter or self.sparse_entries(name) is not None:
            return 0
        readable = [
            int(s) for s in self.steps if before <= s <= now and int(s) in self._checkpoints
        ]
        return sum(self._base_changed(name, *pair) for pair in pairwise(readable))

    def _base_changed(self, name: str, before: int, now: int) -> bool:
        key = (name, before, now)
        if key not in self._base_changes:
            one, other = self._checkpoints[before], self._checkpoints[now]
            bases = [(each.weights or {}).get(name) for each in (one, other)]
            self._base_changes[key] = name in other.adapters and _differ(*bases)
        return self._base_changes[key]


def _with_errors_of(base: Tensor | None, effective: Dense | None) -> Dense | None:
    """What is computed from a quantised base has its errors, as far as it is near to the base."""
    if effective is None or not isinstance(base, QuantisedTensor) or base.shape != effective.shape:
        return effective
    return replace(effective, errors=base.dense().errors)


def _dense(tensor: Tensor | None) -> Dense | None:
    if isinstance(tensor, QuantisedTensor):
        return tensor.dense()
    return None if tensor is None else Dense(tensor.read(), tensor.dtype)


def _differ(one: Tensor | None, other: Tensor | None) -> bool:
    if one is None or other is None:
        return False
    if one.origin is not None and one.origin == other.origin:
        return False
    return not np.array_equal(one.read(), other.read())


def _origin(part: Tensor | Adapter | None) -> str | None:
    return ABSENT if part is None else part.origin
