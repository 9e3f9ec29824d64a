"""Four-bit floats (E2M1): MXFP4 of gpt-oss, NVFP4 of ModelOpt."""

from functools import partial

import numpy as np

from dynamics.formats.quantised.codes import E2M1, Codes, blocks, nibbles, powers_of_two
from dynamics.formats.quantised.parts import Parts
from dynamics.formats.quantised.tensor import (
    Arrays,
    NotDequantised,
    QuantisedTensor,
    check_shape,
)

_MX, _NV = 32, 16  # numbers that share a scale


def gpt_oss(parts: Parts) -> QuantisedTensor:
    """`P_blocks` and `P_scales` of experts, stored (E, out, in); the model has (E, in, out)."""
    codes, scale = parts.get("_blocks", "uint8"), parts.get("_scales", "uint8")
    *leading, groups, half = codes.shape
    if len(leading) != 2 or half != _MX // 2:
        raise NotDequantised(f"its blocks have the shape {codes.shape}")
    experts, outputs = leading
    return parts.tensor(
        (experts, groups * _MX, outputs),
        "mxfp4, transposed",
        partial(_gpt_oss, parts.name),
        codes=codes,
        scale=scale,
    )


def _gpt_oss(name: str, arrays: Arrays) -> Codes:
    experts, outputs, groups, half = arrays["codes"].shape
    check_shape(name, "scales", arrays["scale"], (experts, outputs, groups))
    codes = nibbles(arrays["codes"].reshape(experts, outputs, groups * half))
    return Codes(
        codes, E2M1, powers_of_two(arrays["scale"]), blocks(codes.shape, (1, 1, _MX))
    ).transposed()


def modelopt(parts: Parts) -> QuantisedTensor:
    """NVFP4 of ModelOpt: book · weight_scale · weight_scale_2."""
    if parts.said.method != "modelopt":
        raise NotDequantised(f"{parts.said.name} is not known to have a weight_scale_2")
    weight, scale = parts.get("", "uint8"), parts.get("_scale", "float8_e4m3fn")
    if len(weight.shape) != 2:
        raise NotDequantised(f"it has the shape {weight.shape}")
    rows, half = weight.shape
    return parts.tensor(
        (rows, 2 * half),
        "nvfp4, times weight_scale_2",
        partial(nvfp4, parts.name, True),
        codes=weight,
        scale=scale,
        second=parts.get("_scale_2"),
    )


def nvfp4(name: str, multiplied: bool, arrays: Arrays) -> Codes:
    """Codes with a scale (E4M3) per 16 numbers, times the second scale or divided by it."""
    codes = nibbles(arrays["codes"])
    rows, cols = codes.shape
    check_shape(name, "weight_scale", arrays["scale"], (rows, -(-cols // _NV)))
    check_shape(name, "second scale", arrays["second"].reshape(-1), (1,))
    second = float(arrays["second"].reshape(-1)[0])
    scale = arrays["scale"].astype(np.float64)
    with np.errstate(divide="ignore", invalid="ignore"):
        scale = scale * second if multiplied else scale / np.float64(second)
    return Codes(codes, E2M1, scale, blocks((rows, cols), (1, _NV)))


def mxfp4(name: str, arrays: Arrays) -> Codes:
    """Codes (out, in) with a power of two per 32 numbers."""
    codes = nibbles(arrays["codes"])
    rows, cols = codes.shape
    check_shape(name, "weight_scale", arrays["scale"], (rows, -(-cols // _MX)))
    scale = arrays["scale"]
    scale = powers_of_two(scale) if scale.dtype == np.uint8 else scale.astype(np.float64)
    return Codes(codes, E2M1, scale, blocks((rows, cols), (1, _MX)))
