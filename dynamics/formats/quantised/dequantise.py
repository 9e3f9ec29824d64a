"""From the stored tensors of a checkpoint to those that can be measured.

Codes and scales become the weight that they stand for, under the name that it has where it is not
quantised. What says that it is quantised, and is of no known kind, is left out by name. Integers
are left out, too.
"""

import re
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

from dynamics.formats.quantised import bitsandbytes, fp4, packed, scaled, torchao
from dynamics.formats.quantised.config import Said, said_by
from dynamics.formats.quantised.parts import FLOAT8, Parts
from dynamics.formats.quantised.tensor import NotDequantised, QuantisedTensor
from dynamics.formats.storage.tensors import CODE_BYTES, ITEM_BYTES, Tensor, UnreadTensor
from dynamics.runs.account import INTEGERS, LeftOut


@dataclass(frozen=True)
class _Kind:
    """A kind of quantised weight, and the key that it is recognised by.

    Attributes:
        anchor: how the key ends; what comes before it is the stem.
        name: what follows the stem in the name of the weight.
        parts: what follows the stem in the keys of its parts; the first holds the codes.
        build: makes the tensor.
    """

    anchor: re.Pattern[str]
    name: str
    parts: tuple[str, ...]
    build: Callable[[Parts], QuantisedTensor]


def _kind(anchor: str, name: str, parts: str, build: Callable[[Parts], QuantisedTensor]) -> _Kind:
    keys = tuple("" if part == "=" else part for part in parts.split())
    return _Kind(re.compile(f"(?P<stem>.+){anchor}", re.DOTALL), name, keys, build)


# The first that fits decides. "=" stands for the stem itself.
_KINDS = (
    _kind(
        r"\.quant_state\.bitsandbytes__(?P<detail>nf4|fp4)",
        "",
        "= .absmax .quant_map .nested_absmax .nested_quant_map "
        ".quant_state.bitsandbytes__nf4 .quant_state.bitsandbytes__fp4",
        bitsandbytes.four_bits,
    ),
    _kind(r"\.SCB", ".weight", ".weight .SCB .weight_format", bitsandbytes.int8),
    _kind("_blocks", "", "_blocks _scales", fp4.gpt_oss),
    _kind(r"\.qweight", ".weight", ".qweight .qzeros .scales .g_idx", packed.gptq_or_awq),
    _kind(
        r"\.weight_packed",
        ".weight",
        ".weight_packed .weight_scale .weight_zero_point .weight_shape .weight_global_scale "
        ".weight_g_idx",
        packed.compressed,
    ),
    _kind("_scale_inv", "", "= _scale_inv", scaled.block_scaled),
    _kind("_scale_2", "", "= _scale _scale_2", fp4.modelopt),
    _kind("_scale", "", "= _scale _scale_2 _global_scale _zero_point", scaled.scaled),
)
_TORCHAO = re.compile(r"(?P<module>.+)\._(?P<leaf>[^.]+)_qdata", re.DOTALL)
# Leaves of keys that hold scales and the like, and never a weight.
_SCALES = re.compile(
    r"weight_scale(?:_inv|_2)?|weight_zero_point|weight_global_scale|scale_weight"
    r"|SCB|absmax|nested_absmax|quant_map|nested_quant_map|qzeros"
)
# Leaves of keys that hold codes: of those above, and of HQQ, AQLM, QuIP, EXL2, EXL3, quanto, 2:4.
_CODE_LEAVES = re.compile(
    r"weight|weight_packed|qweight|W_q|codes|Qidxs|q_weight|trellis|_data|bitmask|_\w+_qdata"
)


def dequantised(
    tensors: Mapping[str, Tensor], config: Mapping[str, Any] | None = None
) -> tuple[dict[str, Tensor], tuple[LeftOut, ...]]:
    """The floating-point tensors of a model, and what is left out of it.

    Nothing but headers and small descriptions is read. Codes and scales that contradict each other
    are errors when the weight is read.

    Args:
        tensors: stored name -> tensor.
        config: the model's config.json as JSON-like values, with its `quantization_config`.

    Returns:
        (Name -> tensor with quantised weights as `QuantisedTensor`, what is left out: integers, and
        quantised weights that cannot be dequantised).

    Raises:
        FormatError: the description of a quantised weight is damaged.
    """
    said = said_by(config)
    found: dict[str, Tensor] = {}
    left_out: list[LeftOut] = []
    used: set[str] = set()
    unknown: set[str] = set()  # paths of modules, or names of weights, that stay quantised
    for parts, build, keys in _quantised(tensors, said):
        if used & keys:
            continue
        used |= keys
        try:
            found[parts.name] = build(parts)
        except NotDequantised as reason:
            why = f"quantised by {said.name}, not dequantised: {reason}"
            codes = next(iter(parts.stored.values()))
            left_out.append(LeftOut(parts.name, codes.shape, why))
            unknown.add(parts.name.removesuffix(".weight"))
    for name, tensor in tensors.items():
        if name not in used and _holds_codes(name, tensor, said):
            used.add(name)
            path = name.rpartition(".")[0] or name
            if path not in unknown:
                unknown.add(path)
                weight = path if path == name or path.endswith(".weight") else f"{path}.weight"
                known = tensor.dtype in CODE_BYTES or tensor.dtype in ITEM_BYTES
                how = f"by {said.name}" if known or said.method else f"as {tensor.dtype}"
                why = f"quantised {how}, not dequantised"
                left_out.append(LeftOut(weight, tensor.shape, why))
    for name in tensors.keys() - used:
        # Scales and codebooks are parts of a weight that is named above.
        if any(path in unknown for path in _above(name)) and not name.endswith("bias"):
            used.add(name)
    rest = {name: tensor for name, tensor in tensors.items() if name not in used}
    for name in [each for each in rest if _SCALES.fullmatch(each.rpartition(".")[2])]:
        scales = rest.pop(name)
        unread = isinstance(scales, UnreadTensor)
        why = _no_float(scales) if unread else "scales of quantised weights"
        left_out.append(LeftOut(name, scales.shape, why))
    plain, others = floats_of(rest)
    return found | plain, (*left_out, *others)


def floats_of(tensors: Mapping[str, Tensor]) -> tuple[dict[str, Tensor], tuple[LeftOut, ...]]:
    """(The floating-point tensors, what the others are), of tensors that are not quantised.

    Args:
        tensors: name -> tensor.
    """
    found = {
        name: tensor
        for name, tensor in tensors.items()
        if tensor.dtype in ITEM_BYTES and not isinstance(tensor, UnreadTensor)
    }
    others = {name: tensor for name, tensor in tensors.items() if name not in found}
    return found, tuple(LeftOut(n, each.shape, _no_float(each)) for n, each in others.items())


def _no_float(tensor: Tensor) -> str:
    if isinstance(tensor, UnreadTensor):
        return tensor.reason
    return INTEGERS if tensor.dtype in CODE_BYTES else f"numbers of the dtype {tensor.dtype}"


def _quantised(
    tensors: Mapping[str, Tensor], said: Said
) -> Iterator[tuple[Parts, Callable[[Parts], QuantisedTensor], set[str]]]:
    """(Parts, what builds the weight of them, their keys) of each weight that is recognised."""
    of_torchao: dict[str, dict[str, str]] = {}
    for key in tensors:
        module, _, leaf = key.rpartition("._")
        if module:
            of_torchao.setdefault(module, {})[leaf] = key
    for key in tensors:
        if match := _TORCHAO.fullmatch(key):
            module, leaf = match["module"], match["leaf"]
            keys = {
                each.removeprefix(leaf): stored
                for each, stored in of_torchao[module].items()
                if each.startswith(leaf + "_")
            }
            stored = {suffix: tensors[each] for suffix, each in keys.items()}
            yield Parts(f"{module}.{leaf}", stored, said), torchao.torchao, set(keys.values())
            continue
        for kind in _KINDS:
            match = kind.anchor.fullmatch(key)
            if match is None:
                continue
            stem = match["stem"]
            codes = tensors.get(stem + kind.parts[0])
            if codes is None or not _may_be_codes(codes):
                continue
            keys = {part: stem + part for part in kind.parts if stem + part in tensors}
            stored = {part: tensors[each] for part, each in keys.items()}
            detail = match.groupdict().get("detail") or ""
            yield Parts(stem + kind.name, stored, said, detail), kind.build, set(keys.values())
            break


def _may_be_codes(tensor: Tensor) -> bool:
    if isinstance(tensor, UnreadTensor):
        return False
    return tensor.dtype not in ITEM_BYTES or tensor.dtype in FLOAT8


def _holds_codes(name: str, tensor: Tensor, said: Said) -> bool:
    """Whether a tensor that belongs to no known kind holds the codes of a weight."""
    if sum(size > 1 for size in tensor.shape) < 2 or not _may_be_codes(tensor):
        return False
    leaf = name.rpartition(".")[2]
    if tensor.dtype in FLOAT8:  # without a scale, they are numbers like others
        return bool(said.method)
    if _CODE_LEAVES.fullmatch(leaf):
        return True
    no_code = leaf.endswith(("bias", "mask", "position_ids"))
    return bool(said.method) and tensor.dtype not in ("int64", "bool") and not no_code


def _above(name: str) -> Iterator[str]:
    """The paths above a name, the nearest first."""
    while "." in name:
        name = name.rpartition(".")[0]
        yield name
