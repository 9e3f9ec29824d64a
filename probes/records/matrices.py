"""Records that hold the matrices of the model themselves."""

from collections.abc import Iterator, Sequence
from typing import Any

import torch

from dynamics.recordings import ADAPTER, GRADIENT, WEIGHT, factor_path, matrix_path
from probes.gradients.of_step import Gradients
from probes.model.parameters import Tracked
from probes.model.sharding import gather
from probes.records.contents import Contents
from probes.records.cpu_buffers import CpuBuffers
from probes.records.record import Record


class MatrixContents(Contents):
    """Copies of weights, gradients and LoRA factors, in CPU memory; see `Contents`."""

    def __init__(self, tracked: Sequence[Tracked], record: frozenset[str], writes: bool):
        super().__init__(tracked, record, writes)
        self.buffers = CpuBuffers()

    def keep(self, gradient: torch.Tensor, *, owned: bool = False) -> torch.Tensor:
        """A copy of the gradient in CPU memory."""
        return self.buffers.copy(gradient, owned=owned)

    def fill(self, record: Record, gradients: Gradients) -> None:
        """Add the gradients, and copies of the weights and factors as they are now."""
        for name, (gradient, attrs) in gradients.items():
            record.add(matrix_path(GRADIENT, name), gradient, attrs)
        for path, tensor, attrs in self._matrices():
            values = gather(tensor, keep=self._writes)
            if values is not None:
                record.add(path, self.buffers.copy(values), attrs)
        record.copied = self.buffers.pop_events()

    def release(self, record: Record) -> None:
        """Take the record's buffers back."""
        self.buffers.release(record.tensors)

    def _matrices(self) -> Iterator[tuple[str, torch.Tensor, dict[str, Any]]]:
        """(array path, tensor, attributes of the array) of everything except gradients."""
        for each in self._needed():
            if WEIGHT in self._record:
                yield matrix_path(WEIGHT, each.name), each.effective_weight(), {}
            factors = each.factors() if ADAPTER in self._record else None
            if factors is not None:
                attrs = {"scaling": factors.scaling, "transposed": bool(factors.transposed)}
                yield factor_path(each.name, "A"), factors.a, attrs
                yield factor_path(each.name, "B"), factors.b, attrs
