"""LoRA on the experts of a mixture, whose weights are one parameter (`target_parameters` of PEFT).

lora_A is (E·r, in) and lora_B (out, E·r). PEFT takes expert e's rows of A together, A[e·r:(e+1)·r],
and every E-th column of B, B[:, e::E]. Other tools have taken its columns of B together; files do
not say so. Each expert's product is read alone. Where gate and up projections are one parameter,
both have the same A and their own rows of B.
"""

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from dynamics.formats.shared.lora_factors import Adapter
from dynamics.formats.storage.tensors import Tensor
from dynamics.runs.stacks import Part, parts_of, stores_in_out


@dataclass(frozen=True)
class ExpertAdapter(Adapter):
    """The part of factors for all experts that belongs to one matrix of one expert.

    Attributes:
        part: the matrix, as a part of the parameter.
        experts: how many there are.
        by_blocks: whether an expert's columns of B lie together.
    """

    part: Part = field(default_factory=lambda: Part("", 0, 0))
    experts: int = 1
    by_blocks: bool = False

    @property
    def shape(self) -> tuple[int, ...]:
        """(rows, cols) of the matrix."""
        return self.part.rows, self.part.cols

    @property
    def rank(self) -> int:
        """R of one expert."""
        return self.a.shape[0] // self.experts

    def factors(self) -> tuple[np.ndarray, np.ndarray]:
        """(B, A) of the expert, (out, r) and (r, in)."""
        expert, *index = self.part.index
        assert isinstance(expert, int)
        rank = self.rank
        a = self.a.read()[expert * rank : (expert + 1) * rank]
        own = slice(expert * rank, (expert + 1) * rank)
        b = self.b.read()[:, own if self.by_blocks else slice(expert, None, self.experts)]
        rows, cols = (*index, slice(None), slice(None))[:2]
        of_a, of_b = (rows, cols) if self.transposed else (cols, rows)
        return b[of_b], a[:, of_a]

    @property
    def settings(self) -> str:
        """See `Adapter.settings`."""
        return f"{super().settings}, {self.part.index} of {self.experts}, {self.by_blocks}"


def parameter_shape(
    a: tuple[int, ...], b: tuple[int, ...], experts: int, config: Mapping[str, Any], is_old: bool
) -> tuple[int, int, int]:
    """The shape of the parameter that factors on all experts belong to.

    Args:
        a: shape of lora_A, (E·r, in).
        b: shape of lora_B, (out, E·r).
        experts: E.
        config: of the model.
        is_old: whether PEFT took (E, out, in) for (E, in, out), as it did before 0.19.1.
    """
    if stores_in_out(config) or is_old:
        return experts, a[1], b[0]
    return experts, b[0], a[1]


def expert_adapters(
    name: str,
    a: Tensor,
    b: Tensor,
    scale: float | Tensor,
    shape: tuple[int, ...],
    config: Mapping[str, Any],
    *,
    is_old: bool = False,
    by_blocks: bool = False,
) -> dict[str, ExpertAdapter] | str:
    """Name of a matrix -> its adapter, for factors on all experts of a layer; or why there is none.

    Args:
        name: clean name of the parameter.
        a: lora_A.
        b: lora_B.
        scale: s.
        shape: of the parameter, (E, m, n).
        config: of the model.
        is_old: whether PEFT took (E, out, in) for (E, in, out), as it did before 0.19.1.
        by_blocks: whether an expert's columns of B lie together.
    """
    experts, *sizes = shape
    out_in = [b.shape[0], a.shape[1]]
    if a.shape[0] != b.shape[1] or a.shape[0] % experts:
        return f"LoRA factors on experts that have no rank in common ({a.shape}, {b.shape})"
    if sizes not in (out_in, out_in[::-1]):
        return "LoRA factors on experts that do not fit the base weight"
    transposed = sizes != out_in
    if sizes[0] == sizes[1]:
        transposed = stores_in_out(config) or is_old
    parts = parts_of(name, shape, config)
    if isinstance(parts, str):
        return f"LoRA on {parts}"
    if not all(part.index for part in parts):
        return "LoRA on a parameter that holds no experts"
    return {
        part.name: ExpertAdapter(
            a, b, scale, transposed, part=part, experts=experts, by_blocks=by_blocks
        )
        for part in parts
    }
