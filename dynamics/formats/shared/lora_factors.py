"""LoRA adapters in files: factors paired by parameter, their scaling, and whether they fit.

What PEFT, ReLoRA and relora-pico have in common, whoever wrote the files.
"""

import math
import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from dynamics.errors import FormatError
from dynamics.formats.storage.tensors import Tensor
from dynamics.runs.run import Factored


@dataclass(frozen=True)
class Adapter:
    """The LoRA factors of one parameter, not read yet.

    Attributes:
        a: (r, in).
        b: (out, r).
        scale: s; or, where it was trained, the tensor of one number whose tanh is s (ReLoRA).
        transposed: whether the parameter is stored as (in, out): embeddings, GPT-2's Conv1D.
    """

    a: Tensor
    b: Tensor
    scale: float | Tensor
    transposed: bool = False

    @property
    def shape(self) -> tuple[int, ...]:
        """That of s·B·A in the orientation of the parameter, from the files' headers."""
        out_in = self.b.shape[0], self.a.shape[1]
        return out_in[::-1] if self.transposed else out_in

    def read(self) -> Factored:
        """s·B·A in the orientation of the parameter."""
        scale = self.scale
        if not isinstance(scale, float | int):
            scale = math.tanh(float(scale.read().reshape(-1)[0]))
        a, b = self.a.read(), self.b.read()
        if self.transposed:
            return Factored(a.T, b.T, scale, self.a.dtype, transposed=True)
        return Factored(b, a, scale, self.a.dtype)

    @property
    def origin(self) -> str | None:
        """See `Run.origin`."""
        scale = self.scale
        parts = [self.a.origin, self.b.origin]
        parts.append(repr(scale) if isinstance(scale, float | int) else scale.origin)
        return joined([*parts, str(self.transposed)])


def paired(
    tensors: Mapping[str, Tensor], pattern: re.Pattern[str], where: Path
) -> tuple[dict[str, dict[str, Tensor]], dict[str, Tensor]]:
    """(Clean name of a parameter -> its parts by letter: "A", "B", "s"; the other tensors).

    Factors that are no matrices, those of convolutions, are left out, as their weights are.

    Args:
        tensors: clean name -> tensor.
        pattern: matches the names of the parts, with the groups `path` and `part`, which is A or
            B; without one it is s, a trained scaling.
        where: for messages.

    Raises:
        FormatError: a factor lacks its partner, or they have different ranks.
    """
    parts: dict[str, dict[str, Tensor]] = {}
    others: dict[str, Tensor] = {}
    matched = {name: pattern.fullmatch(name) for name in tensors}
    adapted = {each["path"] for each in matched.values() if each and each["part"]}
    for name, tensor in tensors.items():
        found = matched[name]
        if found and found["path"] in adapted:
            parts.setdefault(found["path"] + ".weight", {})[found["part"] or "s"] = tensor
        else:
            others[name] = tensor
    for name, each in parts.items():
        if not {"A", "B"} <= set(each):
            raise FormatError(
                f"{where} holds lora_{min(each)} of {name} only; copy the checkpoint anew."
            )
    matrices = {
        name: each
        for name, each in parts.items()
        if len(each["A"].shape) == len(each["B"].shape) == 2
    }
    for name, each in matrices.items():
        if each["A"].shape[0] != each["B"].shape[1] or not each["A"].shape[0]:
            raise FormatError(
                f"{where} holds lora_A of {name} in shape {each['A'].shape} and lora_B in shape "
                f"{each['B'].shape}, which have no rank in common; they are no pair."
            )
    return matrices, others


def adapters_of(
    parts: Mapping[str, Mapping[str, Any]], config: Mapping[str, Any], where: Path
) -> dict[str, Adapter]:
    """Clean name -> adapter with s = lora_alpha/r, or the trained one that lies beside it.

    Raises:
        FormatError: the config has no lora_alpha, or another rank than the factors.
    """
    found: dict[str, Adapter] = {}
    for name, each in parts.items():
        alpha, rank = config.get("lora_alpha"), each["A"].shape[0]
        trained = each.get("s")
        if trained is None and (isinstance(alpha, bool) or not isinstance(alpha, int | float)):
            raise FormatError(f"{where} has lora_alpha {alpha!r}, expected a number.")
        if config.get("r", rank) != rank:
            raise FormatError(
                f"{where} has rank r = {config['r']!r}, but {name} has factors of rank {rank}; "
                "it is not their config."
            )
        scale = trained if trained is not None else float(alpha or 0) / rank
        found[name] = Adapter(each["A"], each["B"], scale)
    return found


def check_fits(
    adapters: Mapping[str, Adapter], base: Mapping[str, Tensor], where: Path, adapter_at: Path
) -> None:
    """Refuse adapters that have another shape than their parameters in the base model.

    Raises:
        FormatError: naming the first that does not fit.
    """
    for name, adapter in adapters.items():
        found = base[name].shape if name in base else adapter.shape
        if found != adapter.shape:
            turned = found == adapter.shape[::-1]
            reason = (
                "fan_in_fan_out does not suit all of its layers"
                if turned
                else "it is not the base of this adapter"
            )
            raise FormatError(
                f"{where} has {name} in shape {found}, the adapter in {adapter_at} fits "
                f"{adapter.shape}; {reason}."
            )


def joined(parts: list[str | None]) -> str | None:
    """One origin of several; None where one of them is."""
    return None if None in parts else "\n".join(str(each) for each in parts)
