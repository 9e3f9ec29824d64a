"""LoRA adapters in files: pairs of factors, their scaling, and whether they fit the base model."""

import math
import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from dynamics.errors import FormatError
from dynamics.formats.storage.tensors import Tensor
from dynamics.runs.account import LeftOut
from dynamics.runs.run import Factored


@dataclass(frozen=True)
class Adapter:
    """The LoRA factors of one parameter, not read yet. Those of convolutions are flat matrices.

    Attributes:
        a: (r, in), or (r, in, k, ...).
        b: (out, r), or (out, r, 1, ...).
        scale: s; where s was trained (ReLoRA), a tensor with one number whose tanh is s.
        transposed: whether the parameter is stored as (in, out): embeddings, GPT-2's Conv1D.
    """

    a: Tensor
    b: Tensor
    scale: float | Tensor
    transposed: bool = False

    @property
    def shape(self) -> tuple[int, ...]:
        """Shape of s·B·A in the orientation of the parameter, from the files' headers."""
        out_in = self.b.shape[0], math.prod(self.a.shape[1:])
        return out_in[::-1] if self.transposed else out_in

    def factors(self) -> tuple[np.ndarray, np.ndarray]:
        """(B, A), read and flat: (out, r) and (r, in)."""
        a, b = self.a.read(), self.b.read()
        return b.reshape(b.shape[0], -1), a.reshape(a.shape[0], -1)

    def read(self) -> Factored:
        """s·B·A in the orientation of the parameter."""
        scale = self.scale
        if not isinstance(scale, float | int):
            scale = math.tanh(float(scale.read().reshape(-1)[0]))
        b, a = self.factors()
        if self.transposed:
            return Factored(a.T, b.T, scale, self.a.dtype, transposed=True)
        return Factored(b, a, scale, self.a.dtype)

    @property
    def settings(self) -> str:
        """All that `read` depends on beside the tensors, as text."""
        return str(self.transposed)

    @property
    def origin(self) -> str | None:
        """See `Run.origin`."""
        scale = self.scale
        parts = [self.a.origin, self.b.origin]
        parts.append(repr(scale) if isinstance(scale, float | int) else scale.origin)
        return joined_origin([*parts, self.settings])


def pair_factors(
    tensors: Mapping[str, Tensor], pattern: re.Pattern[str], where: Path
) -> tuple[dict[str, dict[str, Tensor]], dict[str, Tensor], list[LeftOut]]:
    """(Clean name of a parameter -> its parts by letter: "A", "B", "s"; the other tensors; layers).

    The layers are those whose factors are no matrices (convolutions). These trainers make none, so
    their products are not known, and the stored weights of these layers are not their weights.

    Args:
        tensors: clean name -> tensor.
        pattern: matches the name of a part. Group `path` is the parameter's module; group `part`
            is A or B, or None for s, a trained scaling.
        where: for messages.

    Raises:
        FormatError: a factor lacks its partner, or the two have different ranks.
    """
    parts: dict[str, dict[str, Tensor]] = {}
    others: dict[str, Tensor] = {}
    matches = {name: pattern.fullmatch(name) for name in tensors}
    with_factors = {each["path"] for each in matches.values() if each and each["part"]}
    for name, tensor in tensors.items():
        match = matches[name]
        if match and match["path"] in with_factors:
            parts.setdefault(match["path"] + ".weight", {})[match["part"] or "s"] = tensor
        else:
            others[name] = tensor
    for name, each in parts.items():
        if not {"A", "B"} <= set(each):
            raise FormatError(
                f"{where} holds lora_{min(each)} of {name} only; copy the checkpoint again."
            )
    matrices = {
        name: each
        for name, each in parts.items()
        if len(each["A"].shape) == len(each["B"].shape) == 2
    }
    left_out = [
        LeftOut(
            name, others.pop(name, each["B"]).shape, "LoRA layers whose factors are no matrices"
        )
        for name, each in parts.items()
        if name not in matrices
    ]
    for name, each in matrices.items():
        if each["A"].shape[0] != each["B"].shape[1] or not each["A"].shape[0]:
            raise FormatError(
                f"{where} holds lora_A of {name} in shape {each['A'].shape} and lora_B in shape "
                f"{each['B'].shape}, which have no rank in common: they are not a pair. Copy the "
                "checkpoint again."
            )
    return matrices, others, left_out


def adapters_of(
    parts: Mapping[str, Mapping[str, Any]], config: Mapping[str, Any], where: Path
) -> dict[str, Adapter]:
    """Clean name -> adapter with s = lora_alpha/r, or with the trained s that lies beside it.

    Raises:
        FormatError: the config has no lora_alpha, or its rank is not that of the factors.
    """
    adapters: dict[str, Adapter] = {}
    for name, each in parts.items():
        alpha, rank = config.get("lora_alpha"), each["A"].shape[0]
        trained = each.get("s")
        if trained is None and (isinstance(alpha, bool) or not isinstance(alpha, int | float)):
            raise FormatError(f"{where} has lora_alpha {alpha!r}, expected a number.")
        if config.get("r", rank) != rank:
            raise FormatError(
                f"{where} has rank r = {config['r']!r}, but {name} has factors of rank {rank}; "
                "it is not the config of these factors."
            )
        scale = trained if trained is not None else float(alpha or 0) / rank
        adapters[name] = Adapter(each["A"], each["B"], scale)
    return adapters


def check_fits(
    adapters: Mapping[str, Adapter], base: Mapping[str, Tensor], where: Path, adapter_at: Path
) -> None:
    """Check that every adapter has the shape of its parameter in the base model.

    Raises:
        FormatError: one has not; the message names the first of them.
    """
    for name, adapter in adapters.items():
        shape = base[name].shape if name in base else adapter.shape
        if shape != adapter.shape:
            turned = shape == adapter.shape[::-1]
            reason = (
                "fan_in_fan_out is wrong for some of its layers"
                if turned
                else "it is not the base of this adapter"
            )
            raise FormatError(
                f"{where} has {name} in shape {shape}, but the adapter in {adapter_at} fits "
                f"{adapter.shape}; {reason}."
            )


def joined_origin(parts: list[str | None]) -> str | None:
    """One origin made of several; None where one of them is None."""
    return None if None in parts else "\n".join(str(each) for each in parts)
