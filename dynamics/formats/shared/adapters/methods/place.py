"""Where a method is applied: the layer, its base weight, and what the config says of both."""

from collections.abc import Mapping
from dataclasses import dataclass
from functools import partial
from typing import Any

import numpy as np

from dynamics.formats.shared.adapters.scaling import is_number, of_module, scaling
from dynamics.formats.shared.adapters.stored import AdapterLayer
from dynamics.formats.storage.tensors import Tensor


class NotComputed(Exception):
    """Why the weight of a layer cannot be computed: a few words that name the method."""


@dataclass(frozen=True)
class Place:
    """One layer with an adapter.

    Attributes:
        layer: the parts of the adapter.
        shape: of the base weight.
        in_out: whether the base weight is stored as (in, out).
        config: adapter_config.json.
        shared: parts that all layers use.
    """

    layer: AdapterLayer
    shape: tuple[int, ...]
    in_out: bool
    config: Mapping[str, Any]
    shared: Mapping[str, Tensor]

    def parts(self, *names: str) -> dict[str, Tensor]:
        """The stored parts of these names; NotComputed where one is missing."""
        missing = [name for name in names if name not in self.layer.parts]
        if missing:
            raise NotComputed(f"{self.method} adapters without {missing[0]}")
        return {name: self.layer.parts[name] for name in names}

    @property
    def method(self) -> str:
        """What PEFT calls the method: "LOHA"."""
        return str(self.config.get("peft_type") or self.layer.method.upper())

    def number(self, field: str, patterns: str | None = None) -> float:
        """A number of the config, or the one that its patterns give for this layer."""
        value = self.config.get(field)
        if patterns is not None:
            value = of_module(self.config, field, patterns, self.layer.path)
        if not is_number(value):
            raise NotComputed(f"{self.method} adapters whose config has {field} {str(value)[:40]}")
        return float(value)  # type: ignore[arg-type]

    def flag(self, field: str) -> bool:
        """A truth value of the config."""
        value = self.config.get(field)
        if not isinstance(value, bool):
            raise NotComputed(f"{self.method} adapters whose config has {field} {str(value)[:40]}")
        return value

    def scale(self) -> float:
        """Alpha / r, each by its patterns."""
        rank = self.number("r", "rank_pattern")
        if rank < 1:
            raise NotComputed(f"{self.method} adapters of rank {rank}")
        return scaling(
            {**self.config, "use_rslora": False}, self.layer.path, int(rank), field="alpha"
        )


@dataclass(frozen=True)
class Recipe:
    """How a weight is made.

    Attributes:
        parts: name -> tensor that the formula takes.
        formula: see `computed.ComputedTensor`.
    """

    parts: Mapping[str, Tensor]
    formula: "partial[np.ndarray]"
