"""Layers of LoRA: what their factors make of the base weight, variants included."""

import re
from collections.abc import Mapping
from dataclasses import dataclass
from functools import partial
from typing import Any

from dynamics.formats.shared.adapters.computed import ComputedTensor
from dynamics.formats.shared.adapters.methods import NotComputed, lora_variants
from dynamics.formats.shared.adapters.stored import AdapterLayer
from dynamics.formats.shared.lora_factors import Adapter
from dynamics.formats.storage.tensors import ITEM_BYTES, Tensor

# Fields of adapter_config.json with which a model computes something else than W + s·B·A.
_VARIANTS = {
    "kasa_config": "KaSA",
    "arrow_config": "Arrow",
    "monteclora_config": "MonteCLoRA",
    "use_bdlora": "BD-LoRA",
    "alora_invocation_tokens": "aLoRA",
    "use_qalora": "QA-LoRA",
}
_KNOWN = {
    "lora_A", "lora_B", "lora_embedding_A", "lora_embedding_B", "lora_magnitude_vector",
}  # fmt: skip
# With an `init_lora_weights` that begins so, the base weight changes before training.
_CHANGES_BASE = re.compile(r"(?:pissa|olora|corda|loftq|lora_ga)", re.IGNORECASE)


@dataclass(frozen=True)
class LayerResult:
    """What an adapter makes of one parameter.

    Attributes:
        adapter: s·B·A, where it is that.
        base: the base weight, where the method changed it before training.
        weight: the effective weight, where it is not the base weight plus the adapter.
        unknown: why the weight is not known although the adapter is; empty where it is known.
    """

    adapter: Adapter | None = None
    base: Tensor | None = None
    weight: Tensor | None = None
    unknown: str = ""


def variant(config: Mapping[str, Any]) -> str | None:
    """What a variant of LoRA is called that is more than s·B·A and cannot be computed."""
    return next((name for key, name in _VARIANTS.items() if config.get(key)), None)


def factors(layer: AdapterLayer) -> tuple[Tensor, Tensor, bool]:
    """(A, B, whether they are those of an embedding) of a layer.

    Raises:
        NotComputed: they are no pair, or there is more beside them.
    """
    embedding = "lora_embedding_A" in layer.parts or "lora_embedding_B" in layer.parts
    names = [f"lora_{'embedding_' if embedding else ''}{letter}" for letter in "AB"]
    missing = [name for name in names if name not in layer.parts]
    if missing:
        present = next((name for name in names if name not in missing), "lora_A")
        raise NotComputed(
            f"LoRA layers with one factor only ({present}): copy the checkpoint again"
        )
    if "lora_E" in layer.parts:
        raise NotComputed("AdaLoRA adapters, whose files lack the number of ranks in use")
    if unknown := set(layer.parts) - _KNOWN:
        raise NotComputed(f"adapters with {min(unknown)}, a variant of LoRA that is not known")
    a, b = (layer.parts[name] for name in names)
    if len(a.shape) < 2 or len(b.shape) < 2 or len(a.shape) != len(b.shape):
        raise NotComputed(f"LoRA layers whose factors are no matrices (lora_A {a.shape})")
    if a.shape[0] != b.shape[1] or not a.shape[0]:
        raise NotComputed(
            f"LoRA layers whose lora_A {a.shape} and lora_B {b.shape} have no rank in common"
        )
    return a, b, embedding


def lora_layer(
    layer: AdapterLayer,
    base: Tensor | None,
    scale: float | Tensor,
    in_out: bool,
    config: Mapping[str, Any],
) -> LayerResult:
    """What LoRA makes of one layer whose factors fit its base weight.

    Args:
        layer: its parts.
        base: the stored weight, None where it is not there.
        scale: s.
        in_out: whether the weight is stored as (in, out).
        config: adapter_config.json.

    Raises:
        NotComputed: nothing can be measured of it.
    """
    a, b, _ = factors(layer)
    adapter = Adapter(a, b, scale, in_out)
    base, changed = _base(layer, base, scale, in_out, config, a.shape[0])
    if "lora_magnitude_vector" in layer.parts:
        if changed or base is None:
            raise NotComputed(changed or "DoRA adapters without their base weights")
        if not isinstance(scale, float):
            raise NotComputed("DoRA adapters with a trained scaling")
        parts = {"A": a, "B": b, "magnitude": layer.parts["lora_magnitude_vector"]}
        formula = partial(lora_variants.dora, scale=scale, in_out=in_out)
        return LayerResult(base=base, weight=ComputedTensor(layer.name, base, parts, formula))
    if config.get("use_dora"):
        raise NotComputed("DoRA adapters without lora_magnitude_vector")
    return LayerResult(adapter, base, unknown=changed)


def _base(
    layer: AdapterLayer,
    base: Tensor | None,
    scale: float | Tensor,
    in_out: bool,
    config: Mapping[str, Any],
    rank: int,
) -> tuple[Tensor | None, str]:
    """(What the initialisation left of the base weight, why that is not known)."""
    init = config.get("init_lora_weights")
    if not isinstance(init, str) or not _CHANGES_BASE.match(init):
        return base, ""
    changed = f"LoRA layers initialised with {init!r}, which changed their base weights"
    if base is None or base.dtype not in ITEM_BYTES or len(base.shape) != 2:
        return base, changed
    if init.lower() == "pissa":
        formula = partial(lora_variants.without_principal, rank=rank, dtype=base.dtype)
    elif init.lower() == "olora" and not in_out and isinstance(scale, float):
        formula = partial(lora_variants.without_basis, rank=rank, scale=scale, dtype=base.dtype)
    else:
        return base, changed
    return ComputedTensor(layer.name, base, {}, formula), ""
