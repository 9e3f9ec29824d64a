"""Whether a layer stores its weight as (in, out), which its adapter does not show.

PEFT transposes the product of LoRA for GPT-2's `Conv1D`. adapter_config.json has one
`fan_in_fan_out` for all layers: that of the layer that PEFT wrapped last. So each layer is decided
by itself: by the shape of its base weight, else by what its model family builds it from.
"""

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any

from dynamics.formats.shared.adapters.stored import AdapterLayer
from dynamics.formats.storage.tensors import Tensor

# Families of transformers with `Conv1D`, and the names of these modules.
_CONV1D_FAMILIES = (
    "gpt2", "openai-gpt", "imagegpt", "decision_transformer", "clvp", "clvp_decoder", "ctrl",
)  # fmt: skip
_CONV1D_NAMES = ("c_attn", "c_proj", "c_fc", "q_attn")


@dataclass(frozen=True)
class Orientations:
    """The orientations of the layers of one adapter.

    Attributes:
        flag: `fan_in_fan_out` of adapter_config.json.
        family: `model_type` of the model's config, "" where it is not known.
        seen: name of a module -> the orientations that the shapes of such layers show.
    """

    flag: bool
    family: str
    seen: Mapping[str, set[bool]] = field(default_factory=dict)

    @classmethod
    def of(
        cls,
        layers: Iterable[tuple[str, tuple[int, int], tuple[int, ...] | None]],
        config: Mapping[str, Any],
        model_config: Mapping[str, Any],
    ) -> "Orientations":
        """What the layers show together.

        Args:
            layers: (path, (out, in) of the adapter, shape of the base weight or None).
            config: adapter_config.json.
            model_config: config.json of the model.
        """
        seen: dict[str, set[bool]] = {}
        for path, out_in, shape in layers:
            shown = _by_shape(out_in, shape)
            seen.setdefault(_leaf(path), set())
            if shown is not None:
                seen[_leaf(path)].add(shown)
        family = model_config.get("model_type")
        return cls(bool(config.get("fan_in_fan_out")), str(family or ""), seen)

    def is_in_out(
        self, path: str, out_in: tuple[int, int], shape: tuple[int, ...] | None
    ) -> bool | None:
        """Whether the layer at `path` stores (in, out); None where nothing can tell."""
        shown = _by_shape(out_in, shape)
        if shown is not None:
            return shown
        if self.family in _CONV1D_FAMILIES:
            return _leaf(path) in _CONV1D_NAMES
        alike = self.seen.get(_leaf(path), set())
        if len(alike) == 1:
            return next(iter(alike))
        others = set().union(*self.seen.values())
        if self.family:  # PEFT sets the flag back for all that is no Conv1D
            return None if True in others else False
        # Layers of both kinds are possible where their names are.
        mixed = len({_leaf(each) in _CONV1D_NAMES for each in self.seen}) > 1
        return None if mixed or others - {self.flag} else self.flag


def _by_shape(out_in: tuple[int, int], shape: tuple[int, ...] | None) -> bool | None:
    if shape is None or len(shape) != 2 or out_in[0] == out_in[1]:
        return None
    if shape == out_in:
        return False
    return True if shape == out_in[::-1] else None


def _leaf(path: str) -> str:
    return path.rpartition(".")[2]


def orientations_of(
    layers: Iterable[AdapterLayer],
    weights: Mapping[str, Tensor] | None,
    config: Mapping[str, Any],
    model_config: Mapping[str, Any],
) -> Orientations:
    """What all layers of an adapter show together.

    Args:
        layers: the layers.
        weights: clean name -> base weight; None where there is no base.
        config: adapter_config.json.
        model_config: config.json of the model.
    """
    known = []
    for layer in layers:
        _, base = layer.base_in(weights, model_config)
        out_in = out_in_of(layer, base)
        if out_in is not None:
            known.append((layer.path, out_in, None if base is None else base.shape))
    return Orientations.of(known, config, model_config)


def out_in_of(layer: AdapterLayer, base: Tensor | None) -> tuple[int, int] | None:
    """(out, in) of a linear layer as the parts of its adapter show it; None where they do not."""
    parts = layer.parts
    if {"lora_A", "lora_B"} <= set(parts):
        a, b = parts["lora_A"].shape, parts["lora_B"].shape
        return (b[0], a[1]) if len(a) == len(b) == 2 else None
    if base is None or len(base.shape) != 2:
        return None
    sizes: dict[str, Callable[[], int]] = {
        "vera_lambda_b": lambda: parts["vera_lambda_b"].shape[0],
        "boft_s": lambda: parts["boft_s"].shape[0],
    }
    rows, cols = base.shape
    for part, size in sizes.items():
        if part in parts and parts[part].shape:
            out = size()
            return (out, cols if rows == out else rows)
    scale = parts["ia3_l"].shape if "ia3_l" in parts else ()
    if len(scale) == 2:
        if scale[1] == 1:
            return scale[0], cols if rows == scale[0] else rows
        return rows if cols == scale[1] else cols, scale[1]
    return rows, cols
