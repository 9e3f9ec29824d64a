"""What records hold: the matrices of the model, or their singular values only."""

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch

from dynamics import schema
from dynamics.errors import DynamicsError
from dynamics.recordings import (
    ADAPTER,
    GRADIENT,
    WEIGHT,
    Recording,
    factor_path,
    matrix_path,
    spectra_arrays,
)
from dynamics.runs.differences import cycles_rank_bound
from dynamics.runs.run import Event, Spectrum
from probes.gradients.of_step import GRADIENT_BEFORE_CLIPPING, PROBED_GRADIENT, Gradients
from probes.model.parameters import Factors, Tracked
from probes.model.sharding import is_sharded, whole
from probes.records.background_writer import Record
from probes.records.cpu_buffers import Snapshots
from probes.records.live_spectra import measured, measured_adapter

DEFAULT_RECORD = (WEIGHT, GRADIENT, ADAPTER, PROBED_GRADIENT)
DIFFERENCES = (schema.UPDATE, schema.DISPLACEMENT)


class Matrices:
    """Records hold copies of the matrices themselves.

    Args:
        tracked: the recorded weights.
        record: words of `Recorder`.
        writes: whether this process writes; the others help to gather.
    """

    def __init__(self, tracked: Sequence[Tracked], record: frozenset[str], writes: bool):
        self._tracked, self._record, self._writes = tracked, record, writes
        self.snapshots = Snapshots()

    def keep(self, gradient: torch.Tensor, *, owned: bool = False) -> torch.Tensor:
        """What a record has of a gradient; `owned`: nobody else will change it."""
        return self.snapshots.copy(gradient, owned=owned)

    def fill(self, record: Record, gradients: Gradients) -> None:
        """Add all that a record has to have; other processes help."""
        for name, (gradient, attrs) in gradients.items():
            record.add(matrix_path(GRADIENT, name), gradient, attrs)
        for path, tensor, attrs in self._matrices():
            values = whole(tensor, keep=self._writes)
            if values is not None:
                record.add(path, self.snapshots.copy(values), attrs)
        record.copied = self.snapshots.mark()

    def written(self, record: Record) -> None:
        """Take its memory back."""
        self.snapshots.release(record.tensors)

    def note(self, event: Event) -> None:
        """Nothing here depends on events."""

    def resume(self, recording: Recording) -> None:
        """Nothing here depends on earlier records."""

    def _matrices(self) -> Iterator[tuple[str, torch.Tensor, dict[str, Any]]]:
        for each in readable(self._tracked, self._writes):
            if WEIGHT in self._record:
                yield matrix_path(WEIGHT, each.name), each.effective_weight(), {}
            factors = each.factors() if ADAPTER in self._record else None
            if factors is not None:
                attrs = {"scaling": factors.scaling, "transposed": bool(factors.transposed)}
                yield factor_path(each.name, "A"), factors.a, attrs
                yield factor_path(each.name, "B"), factors.b, attrs


@dataclass
class _Reference:
    """An earlier weight, in CPU memory, that differences are taken to."""

    step: int
    weight: torch.Tensor
    adapter_rank: int | None  # 0 for a zero adapter, None for none


class Spectra:
    """Records hold singular values, measured on the device that trains, at the record step.

    `update` and `displacement` each keep a copy of the weights in CPU memory. The first record
    has the weights themselves where displacements refer to them, so that a resumed recording can
    go on.

    Args:
        tracked: the recorded weights.
        record: words of `Recorder`.
        writes: whether this process writes; the others help to gather.
    """

    def __init__(self, tracked: Sequence[Tracked], record: frozenset[str], writes: bool):
        self._tracked, self._record, self._writes = tracked, record, writes
        self._matrices = [_facts(each) for each in tracked]
        self._references: dict[str, dict[str, _Reference]] = {kind: {} for kind in DIFFERENCES}
        self._merges: list[int] = []

    def keep(self, gradient: torch.Tensor, *, owned: bool = False) -> Spectrum:
        """What a record has of a gradient."""
        return measured(gradient)

    def fill(self, record: Record, gradients: Gradients) -> None:
        """Measure all that a record has to have; other processes help."""
        found: dict[str, dict[str, Spectrum]] = {GRADIENT: {}}
        for name, (gradient, _) in gradients.items():
            found[GRADIENT][name] = gradient
        for each in readable(self._tracked, self._writes):
            for kind, spectrum in self._measured(each, record):
                found.setdefault(kind, {})[each.name] = spectrum
        for kind, spectra in found.items():
            for name, spectrum in spectra.items():
                if spectrum.noise_floor != spectrum.noise_floor:
                    record.defects[f"{kind}/{name}"] = f"{kind} of {name} holds NaN or Inf"
            if spectra:
                arrays, attrs = spectra_arrays(kind, self._matrices, spectra)
                for path, values in arrays.items():
                    record.add(path, torch.from_numpy(values), attrs)

    def written(self, record: Record) -> None:
        """Nothing is used again."""

    def note(self, event: Event) -> None:
        """Count merges: each rounds the weights once more."""
        if event.kind == schema.MERGE:
            self._merges.append(event.step)

    def resume(self, recording: Recording) -> None:
        """Continue from what an earlier process has recorded."""
        for event in recording.events:
            self.note(event)
        if schema.DISPLACEMENT in self._record and len(recording.steps):
            first = self._references[schema.DISPLACEMENT]
            for each in self._tracked:
                path = matrix_path(WEIGHT, each.name)
                values = recording.read(path, 0)
                if values is None:
                    continue
                dtype = getattr(torch, recording.attr(path, "source_dtype", str))
                rank = recording.attr(path, _ADAPTER_RANK, int, type(None))
                weight = torch.from_numpy(values).to(dtype)
                first[each.name] = _Reference(int(recording.steps[0]), weight, rank)

    def _measured(self, each: Tracked, record: Record) -> Iterator[tuple[str, Spectrum]]:
        """(kind, spectrum) of all that is read of one weight."""
        factors = _whole_factors(each.factors(), self._writes)
        if not {WEIGHT, *DIFFERENCES} & self._record:
            weight = None
        else:
            weight = whole(each.effective_weight(), keep=self._writes)
        if not self._writes:
            return
        if factors is not None and ADAPTER in self._record:
            yield ADAPTER, measured_adapter(factors)
        if weight is None:
            return
        if WEIGHT in self._record:
            yield WEIGHT, measured(weight)
        for kind in DIFFERENCES:
            if kind in self._record:
                if (before := self._references[kind].get(each.name)) is not None:
                    yield kind, self._difference(weight, factors, before, record.step)
                self._remember(kind, each.name, weight, factors, record)

    def _difference(
        self, weight: torch.Tensor, factors: Factors | None, before: _Reference, step: int
    ) -> Spectrum:
        merges, bound = 0, None
        if factors is not None:
            merges = sum(before.step <= merge < step for merge in self._merges)
            if before.adapter_rank is not None:
                bound = cycles_rank_bound(
                    factors.a.shape[0],
                    before.adapter_rank,
                    merges,
                    merged_there=before.step in self._merges,
                )
        earlier = before.weight.to(weight.device)
        adapter = None if bound is None else factors
        return measured(weight, before=earlier, merges=merges, rank_bound=bound, adapter=adapter)

    def _remember(
        self,
        kind: str,
        name: str,
        weight: torch.Tensor,
        factors: Factors | None,
        record: Record,
    ) -> None:
        references = self._references[kind]
        if kind == schema.DISPLACEMENT and name in references:
            return
        rank = None if factors is None else _rank(factors)
        if name in references:
            references[name].weight.copy_(weight)
            references[name].step, references[name].adapter_rank = record.step, rank
            return
        copy = torch.empty_like(weight, device="cpu", pin_memory=weight.is_cuda).copy_(weight)
        references[name] = _Reference(record.step, copy, rank)
        if kind == schema.DISPLACEMENT:
            record.add(matrix_path(WEIGHT, name), copy, {_ADAPTER_RANK: rank})


_ADAPTER_RANK = "adapter_rank"


def readable(tracked: Iterable[Tracked], writes: bool) -> Iterator[Tracked]:
    """Those weights that this process must read for a record, its own or another's."""
    return (each for each in tracked if writes or is_sharded(each.parameter))


def check_record(record: Sequence[str], spectra_only: bool) -> None:
    """Refuse words of `Recorder` that do not go together.

    Raises:
        DynamicsError: an unknown word, none, two that would be the same arrays, or differences
            where matrices are recorded.
    """
    takes = (*DEFAULT_RECORD, GRADIENT_BEFORE_CLIPPING, *(DIFFERENCES if spectra_only else ()))
    if not record or set(record) - set(takes):
        derived = set(record) & set(DIFFERENCES)
        why = f" {' and '.join(sorted(derived))} follow from the weights." if derived else ""
        raise DynamicsError(f"record takes some of {', '.join(takes)}; found {list(record)}.{why}")
    if {GRADIENT, GRADIENT_BEFORE_CLIPPING} <= set(record):
        raise DynamicsError(
            f"{GRADIENT} and {GRADIENT_BEFORE_CLIPPING} would be the same arrays: record one "
            "of them, or attach two recorders with a store each."
        )


def _facts(each: Tracked) -> Mapping[str, Any]:
    rows, cols = each.parameter.shape
    dtype = str(each.parameter.dtype).removeprefix("torch.")
    return {"name": each.name, "rows": rows, "cols": cols, "source_dtype": dtype}


def _whole_factors(factors: Factors | None, keep: bool) -> Factors | None:
    if factors is None:
        return None
    a, b = (whole(each, keep=keep) for each in (factors.a, factors.b))
    return None if a is None or b is None else factors._replace(a=a, b=b)


def _rank(factors: Factors) -> int:
    is_zero = not (bool(factors.a.any()) and bool(factors.b.any()))
    return 0 if is_zero else int(factors.a.shape[0])
