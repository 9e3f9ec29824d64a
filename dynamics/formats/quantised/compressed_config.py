"""The config of compressed-tensors: which scheme quantised which weight."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, TypeGuard

from dynamics.formats.quantised.tensor import NotDequantised


@dataclass(frozen=True)
class Scheme:
    """How compressed-tensors quantised a weight.

    Attributes:
        format: how it is stored, "pack-quantized".
        bits: of a code.
        strategy: what has a scale of its own: tensor, channel, group, tensor_group, block.
        group_size: columns of a group.
        symmetric: whether there are no zero points.
        block_structure: rows and columns of a block.
        is_float: whether the codes are floats.
    """

    format: str
    bits: int
    strategy: str
    is_float: bool = False
    group_size: int | None = None
    symmetric: bool = True
    block_structure: tuple[int, int] | None = None

    def block(self, shape: tuple[int, ...]) -> tuple[int, int] | None:
        """Rows and columns that share a scale; None: one scale, or one per row."""
        if self.strategy in ("group", "tensor_group") and self.group_size:
            return 1, self.group_size
        if self.strategy == "block":
            return self.block_structure or (128, 128)
        if self.strategy in ("tensor", "channel"):
            return None
        raise NotDequantised(f"the strategy {self.strategy!r} of compressed-tensors is not known")


def scheme_of(
    config: Mapping[str, Any], name: str, fits: Callable[[Scheme], bool] = lambda _: True
) -> Scheme:
    """The scheme of a weight: that of the group whose targets name it, else the one that fits it.

    Targets that are regular expressions are not evaluated: they come from a file.

    Args:
        config: the quantisation config.
        name: of the weight.
        fits: whether what is stored of the weight can be of a scheme.

    Raises:
        NotDequantised: no scheme fits, or several that differ.
    """
    groups = config.get("config_groups")
    if not isinstance(groups, Mapping):
        raise NotDequantised("its config has no config_groups")
    module = name.removesuffix(".weight")
    named: set[Scheme] = set()
    others: set[Scheme] = set()
    for group in groups.values():
        if not isinstance(group, Mapping) or not isinstance(group.get("weights"), Mapping):
            continue
        scheme = _scheme(group, group["weights"], str(config.get("format") or ""))
        targets = group.get("targets")
        is_named = isinstance(targets, list) and module in targets
        (named if is_named else others).add(scheme)
    found = {scheme for scheme in named or others if fits(scheme)}
    if len(found) != 1:
        raise NotDequantised(f"{len(found)} schemes of its config fit it")
    return found.pop()


def _scheme(group: Mapping[str, Any], weights: Mapping[str, Any], format: str) -> Scheme:
    bits, size = weights.get("num_bits"), weights.get("group_size")
    block = weights.get("block_structure")
    if isinstance(block, str):
        block = [int(n) for n in block.split("x") if n.isdigit()]
    if block is not None and not (
        isinstance(block, list) and len(block) == 2 and all(_is_size(n) for n in block)
    ):
        raise NotDequantised(f"its config names blocks of {str(block)[:40]}")
    strategy = weights.get("strategy")
    if strategy is None:
        strategy = "group" if _is_size(size) else "tensor"
    return Scheme(
        format=str(group.get("format") or format),
        bits=bits if _is_size(bits) else 0,
        is_float=weights.get("type") == "float",
        strategy=str(strategy),
        group_size=size if _is_size(size) else None,
        symmetric=weights.get("symmetric") is not False,
        block_structure=None if block is None else (block[0], block[1]),
    )


def _is_size(value: Any) -> TypeGuard[int]:
    return isinstance(value, int) and not isinstance(value, bool) and 0 < value < 2**31
