"""Records that hold the matrices of the model themselves."""

from collections.abc import Iterator, Sequence
from typing import Any

import torch

from dynamics.recordings import (
    ADAPTER,
    BASE,
    GRADIENT,
    SPARSE_ENTRIES,
    WEIGHT,
    matrix_path,
)
from dynamics.runs.stacks import Part
from probes.gradients.of_step import Gradients
from probes.model.parameters import Tracked
from probes.model.sharding import gather
from probes.records.contents import Contents, factor_arrays, gathered_factors
from probes.records.cpu_buffers import CpuBuffers
from probes.records.record import Record


class MatrixContents(Contents):
    """Copies of weights, gradients and LoRA factors, in CPU memory; see `Contents`."""

    def __init__(self, tracked: Sequence[Tracked], record: frozenset[str], writes: bool):
        super().__init__(tracked, record, writes)
        self.buffers = CpuBuffers()
        self._bases: dict[str, tuple[int, int]] = {}  # name -> address and version, as recorded

    def keep(self, gradient: torch.Tensor, *, owned: bool = False) -> torch.Tensor:
        """A copy of the gradient in CPU memory."""
        return self.buffers.copy(gradient, owned=owned)

    def fill(self, record: Record, gradients: Gradients) -> None:
        """Add the gradients, and copies of the weights and factors as they are now."""
        for name, (gradient, attrs) in gradients.items():
            record.add(matrix_path(GRADIENT, name), gradient, attrs)
        for each in self._needed():
            for path, matrix, attrs in self._matrices(each):
                record.add(path, self.buffers.copy(matrix), attrs)
        record.copied = self.buffers.pop_events()

    def release(self, record: Record) -> None:
        """Take the record's buffers back."""
        self.buffers.release(record.tensors)

    def _changed_base(self, each: Tracked) -> Iterator[tuple[Part, torch.Tensor]]:
        """The matrices of a base weight of its own, in the first record and after a change."""
        base = each.weight.own_base()
        if base is None:
            return
        state = base.data_ptr(), base._version
        values = gather(base, keep=self._writes)
        changed = each.weight.base_trains or self._bases.get(each.name) != state
        if values is not None and changed:
            self._bases[each.name] = state
            yield from each.matrices(values)

    def _matrices(self, each: Tracked) -> Iterator[tuple[str, torch.Tensor, dict[str, Any]]]:
        """(array path, matrix, attributes of the array) of what is read from one weight."""
        if WEIGHT in self._record and each.weight.readable:
            weight = gather(each.weight.read(), keep=self._writes)
            if weight is not None:
                for part, matrix in each.matrices(weight):
                    yield matrix_path(WEIGHT, part.name), matrix, dict(part.attrs)
            for part, base in self._changed_base(each):
                attrs = dict(part.attrs)
                if each.weight.base_trains:
                    attrs[SPARSE_ENTRIES] = each.weight.parts[0].numel()
                yield matrix_path(BASE, part.name), base, attrs
        if ADAPTER in self._record:
            for part, factors in gathered_factors(each, keep=self._writes):
                yield from factor_arrays(part.name, factors)
