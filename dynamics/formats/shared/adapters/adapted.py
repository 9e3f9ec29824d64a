"""What is known of an adapter beside its tensors, and what it makes of a model."""

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from dynamics.formats.shared.adapters.methods import NotComputed
from dynamics.formats.shared.adapters.scaling import scaling
from dynamics.formats.shared.lora_factors import Adapter
from dynamics.formats.storage.tensors import Tensor
from dynamics.runs.account import LeftOut

# PEFT before this version took (E, out, in) for (E, in, out).
_SWAPPED_BEFORE = (0, 19, 1)


@dataclass(frozen=True)
class Settings:
    """What is known of an adapter beside its tensors.

    Attributes:
        config: adapter_config.json, or what stands for it.
        model_config: config.json of the model.
        shared: parts that all layers use.
        by_blocks: whether an expert's columns of lora_B lie together.
        no_scale: why the scaling of LoRA is not known, where the config has no alpha.
        scales: path -> alpha of a layer that is stored with it, or its trained scaling.
        hyperparameters: litgpt's, which say what of a fused projection has an adapter.
    """

    config: Mapping[str, Any]
    model_config: Mapping[str, Any] = field(default_factory=dict)
    shared: Mapping[str, Tensor] = field(default_factory=dict)
    by_blocks: bool = False
    no_scale: str = ""
    scales: Mapping[str, float | Tensor] = field(default_factory=dict)
    hyperparameters: Mapping[str, Any] = field(default_factory=dict)

    def scale(self, path: str, rank: int) -> float | Tensor:
        """The scaling of a module, or of a parameter with all experts; a tensor where it trained.

        Raises:
            FormatError: the config has no usable alpha.
            NotComputed: there is no config.
        """
        own = self.scales.get(path)
        if own is not None:
            return own / rank if isinstance(own, float) else own
        if self.no_scale:
            raise NotComputed(self.no_scale)
        return scaling(self.config, path, rank)

    @property
    def swaps_experts(self) -> bool:
        """Whether the version of PEFT took (E, out, in) for (E, in, out)."""
        numbers = str(self.config.get("peft_version") or "0").split("+")[0].split(".")[:3]
        digits = ["".join(filter(str.isdigit, each)) or "0" for each in numbers]
        return tuple(int(each[:9]) for each in digits) < _SWAPPED_BEFORE


@dataclass
class Adapted:
    """What adapters make of a model.

    Attributes:
        weights: clean name -> base weight, without the layers that are left out; None without base.
        adapters: clean name -> s·B·A.
        effective: clean name -> weight that is not base + s·B·A.
        unknown: clean name -> why its weight is not known.
        left_out: the layers that are left out.
        misfits: the layers whose adapter has another shape than the base weight.
    """

    weights: dict[str, Tensor] | None
    adapters: dict[str, Adapter] = field(default_factory=dict)
    effective: dict[str, Tensor] = field(default_factory=dict)
    unknown: dict[str, str] = field(default_factory=dict)
    left_out: list[LeftOut] = field(default_factory=list)
    misfits: list[str] = field(default_factory=list)

    def leave_out(self, name: str, shape: tuple[int, ...], reason: str) -> None:
        """Leave a parameter out, or only its weight where the adapter is known."""
        stored = (self.weights or {}).get(name)
        self.left_out.append(LeftOut(name, stored.shape if stored else shape, reason))
        self.unknown[name] = reason
        if self.weights is not None:
            self.weights.pop(name, None)
