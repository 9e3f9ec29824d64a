"""Records that hold singular values only, measured while training waits."""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch

from dynamics import schema
from dynamics.components.rank_bounds import cycles_rank_bound
from dynamics.recordings import (
    ADAPTER,
    GRADIENT,
    WEIGHT,
    Recording,
    factor_path,
    matrix_path,
    spectra_arrays,
)
from dynamics.runs.run import Event, Spectrum
from probes.gradients.of_step import Gradients
from probes.model.parameters import Tracked
from probes.model.sharding import gather
from probes.model.weights import Factors
from probes.records.contents import DIFFERENCES, Contents, factor_arrays, gathered_factors
from probes.records.live_spectra import adapter_spectrum, live_spectrum
from probes.records.record import Record

_ADAPTER_RANK = "adapter_rank"


@dataclass
class _Reference:
    """An earlier weight, in CPU memory, that a difference subtracts."""

    step: int
    weight: torch.Tensor
    adapter_rank: int | None  # 0 for an adapter of zeros, None without an adapter
    factors: Factors | None  # of an adapter that is not zero


class SpectrumContents(Contents):
    """Singular values, measured at the record step on the device that trains; see `Contents`.

    `update` and `displacement` each keep a copy of the weights, and of adapters that are not zero,
    in CPU memory. If displacements are recorded, the first record also holds what they refer to: a
    resumed recording reads it from there.
    """

    def __init__(self, tracked: Sequence[Tracked], record: frozenset[str], writes: bool):
        super().__init__(tracked, record, writes)
        self._descriptions = [facts for each in tracked for facts in _descriptions(each)]
        self._references: dict[str, dict[str, _Reference]] = {kind: {} for kind in DIFFERENCES}
        self._merges: list[int] = []

    def keep(self, gradient: torch.Tensor, *, owned: bool = False) -> Spectrum:
        """The spectrum of the gradient."""
        return live_spectrum(gradient)

    def fill(self, record: Record, gradients: Gradients) -> None:
        """Add the spectra of the gradients, and measure the weights as they are now."""
        by_kind: dict[str, dict[str, Spectrum]] = {GRADIENT: {}}
        for name, (spectrum, _) in gradients.items():
            by_kind[GRADIENT][name] = spectrum
        for each in self._needed():
            for kind, name, spectrum in self._measure(each, record):
                by_kind.setdefault(kind, {})[name] = spectrum
        for kind, spectra in by_kind.items():
            for name, spectrum in spectra.items():
                if spectrum.noise_floor != spectrum.noise_floor:
                    record.defects[f"{kind}/{name}"] = f"{kind} of {name} holds NaN or Inf"
            if spectra:
                arrays, attrs = spectra_arrays(kind, self._descriptions, spectra)
                for path, values in arrays.items():
                    record.add(path, torch.from_numpy(values), attrs)

    def note(self, event: Event) -> None:
        """Count merges: each of them rounds the weights once more."""
        if event.kind == schema.MERGE:
            self._merges.append(event.step)

    def resume(self, recording: Recording) -> None:
        """Read the merges, and the weights that displacements refer to."""
        for event in recording.events:
            self.note(event)
        if schema.DISPLACEMENT in self._record and len(recording.steps):
            first = self._references[schema.DISPLACEMENT]
            for name in (part.name for each in self._tracked for part in each.parts):
                path = matrix_path(WEIGHT, name)
                values = recording.read(path, 0)
                if values is None:
                    continue
                dtype = getattr(torch, recording.attr(path, "source_dtype", str))
                rank = recording.attr(path, _ADAPTER_RANK, int, type(None))
                weight = torch.from_numpy(values).to(dtype)
                factors = _recorded_factors(recording, name) if rank else None
                first[name] = _Reference(int(recording.steps[0]), weight, rank, factors)

    def _measure(self, each: Tracked, record: Record) -> Iterator[tuple[str, str, Spectrum]]:
        """(kind, name of the matrix, spectrum) of everything that is read from one weight."""
        factors = {part.name: own for part, own in gathered_factors(each, keep=self._writes)}
        if ADAPTER in self._record:
            for name, of_part in factors.items():
                yield ADAPTER, name, adapter_spectrum(of_part)
        if not each.weight.readable or not {WEIGHT, *DIFFERENCES} & self._record:
            return
        weight = gather(each.weight.read(), keep=self._writes)
        if weight is None:
            return
        for part, matrix in each.matrices(weight):
            own = factors.get(part.name)
            for kind, spectrum in self._of_weight(
                part.name, matrix, own, each.weight.trains, record
            ):
                yield kind, part.name, spectrum

    def _of_weight(
        self,
        name: str,
        weight: torch.Tensor,
        factors: Factors | None,
        trains: bool,
        record: Record,
    ) -> Iterator[tuple[str, Spectrum]]:
        if WEIGHT in self._record:
            yield WEIGHT, live_spectrum(weight)
        for kind in DIFFERENCES:
            if kind in self._record:
                if (before := self._references[kind].get(name)) is not None:
                    steps = record.step - before.step if trains else 0
                    found = self._difference_spectrum(weight, factors, before, record.step, steps)
                    yield kind, found
                self._remember(kind, name, weight, factors, record)

    def _difference_spectrum(
        self,
        weight: torch.Tensor,
        factors: Factors | None,
        before: _Reference,
        step: int,
        trained_steps: int,
    ) -> Spectrum:
        merges, bound = 0, None
        if factors is not None:
            merges = sum(before.step <= merge < step for merge in self._merges)
            if before.adapter_rank is not None and not trained_steps:
                bound = cycles_rank_bound(
                    factors.a.shape[0],
                    before.adapter_rank,
                    merges,
                    merged_there=before.step in self._merges,
                )
        earlier = before.weight.to(weight.device)
        return live_spectrum(
            weight,
            before=earlier,
            merges=merges,
            rank_bound=bound,
            adapters=(factors, before.factors),
            trained_steps=trained_steps,
        )

    def _remember(
        self,
        kind: str,
        name: str,
        weight: torch.Tensor,
        factors: Factors | None,
        record: Record,
    ) -> None:
        """Keep the weight as the reference of later differences."""
        references = self._references[kind]
        if kind == schema.DISPLACEMENT and name in references:
            return
        rank = None if factors is None else _rank(factors)
        kept = _copied(factors) if factors is not None and rank else None
        if name in references:
            copy = references[name].weight.copy_(weight)
        else:
            copy = torch.empty_like(weight, device="cpu", pin_memory=weight.is_cuda).copy_(weight)
        references[name] = _Reference(record.step, copy, rank, kept)
        if kind == schema.DISPLACEMENT:
            record.add(matrix_path(WEIGHT, name), copy, {_ADAPTER_RANK: rank})
            for path, factor, attrs in [] if kept is None else factor_arrays(name, kept):
                record.add(path, factor, attrs)


def _descriptions(each: Tracked) -> Iterator[Mapping[str, Any]]:
    dtype = str(each.weight.dtype).removeprefix("torch.")
    for part in each.parts:
        facts = {"name": part.name, "rows": part.rows, "cols": part.cols, "source_dtype": dtype}
        yield {**facts, **part.attrs}


def _copied(factors: Factors) -> Factors:
    a, b = (each.detach().to("cpu", copy=True) for each in (factors.a, factors.b))
    return factors._replace(a=a, b=b)


def _recorded_factors(recording: Recording, name: str) -> Factors | None:
    """Those of the first record; None in a recording of version 0.1, which does not hold them."""
    if name not in recording.parameters(ADAPTER):
        return None
    path = factor_path(name, "A")
    a, b = (recording.read(factor_path(name, factor), 0) for factor in "AB")
    if a is None or b is None:
        return None
    scaling = float(recording.attr(path, "scaling", int, float))
    transposed = recording.attr(path, "transposed", bool)
    return Factors(torch.from_numpy(a), torch.from_numpy(b), scaling, transposed)


def _rank(factors: Factors) -> int:
    is_zero = not (bool(factors.a.any()) and bool(factors.b.any()))
    return 0 if is_zero else int(factors.a.shape[0])
