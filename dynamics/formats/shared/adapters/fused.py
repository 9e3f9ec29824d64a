"""LoRA on a fused projection: query, key and value have factors of their own in one pair.

litgpt and loralib store A as (k·r, in) and B as (out, r), for the k parts that have an adapter. The
product is block-diagonal: part i has the rows of A from i·r and its own rows of B.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np

from dynamics.formats.shared.lora_factors import Adapter
from dynamics.formats.storage.tensors import Tensor

_PARTS = ("query", "key", "value")


@dataclass(frozen=True)
class FusedAdapter(Adapter):
    """The factors of several parts of one matrix.

    Attributes:
        rows: of the matrix.
        parts: first row and count of rows of each part that has an adapter.
    """

    rows: int = 0
    parts: tuple[tuple[int, int], ...] = ()

    @property
    def shape(self) -> tuple[int, ...]:
        """(out, in) of the fused matrix."""
        return self.rows, self.a.shape[1]

    def factors(self) -> tuple[np.ndarray, np.ndarray]:
        """(B, A) with one column of B for each row of A."""
        a, stored = self.a.read(), self.b.read()
        rank = stored.shape[1]
        b = np.zeros((self.rows, a.shape[0]), dtype=stored.dtype)
        taken = 0
        for index, (first, count) in enumerate(self.parts):
            own = stored[taken : taken + count]
            b[first : first + count, index * rank : (index + 1) * rank] = own
            taken += count
        return b, a

    @property
    def settings(self) -> str:
        """See `Adapter.settings`."""
        return f"{super().settings}, {self.parts} of {self.rows}"


def fused_parts(
    a: Tensor, b: Tensor, rows: int, config: Mapping[str, Any], hyper: Mapping[str, Any]
) -> tuple[tuple[int, int], ...] | None:
    """First row and count of the parts that have an adapter; None where nothing tells them.

    Args:
        a: (k·r, in).
        b: (out of these parts, r).
        rows: of the fused matrix.
        config: of the model: n_head, n_query_groups, head_size of litgpt.
        hyper: litgpt's hyperparameters, with lora_query, lora_key and lora_value.
    """
    count = a.shape[0] // b.shape[1]
    heads, groups, size = (config.get(key) for key in ("n_head", "n_query_groups", "head_size"))
    if isinstance(heads, int) and isinstance(groups, int) and heads > 0 and groups > 0:
        unit, rest = divmod(rows, heads + 2 * groups)
        if rest or (isinstance(size, int) and size != unit):
            return None
        widths = (heads * unit, groups * unit, groups * unit)
    elif rows % 3 == 0 and b.shape[0] == count * rows // 3:
        widths = (rows // 3,) * 3
    else:
        return None
    flags = [hyper.get(f"lora_{part}") for part in _PARTS]
    if count == 3:
        flags = [True] * 3
    elif not all(isinstance(flag, bool) for flag in flags):
        return None
    parts, first = [], 0
    for flag, width in zip(flags, widths, strict=True):
        if flag:
            parts.append((first, width))
        first += width
    fits = len(parts) == count and sum(width for _, width in parts) == b.shape[0]
    return tuple(parts) if fits else None
