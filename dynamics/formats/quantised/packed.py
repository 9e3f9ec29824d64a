"""Integers packed into words of 32 bits: GPTQ, AWQ, and compressed-tensors' `weight_packed`."""

from functools import partial
from math import prod
from typing import Any

import numpy as np

from dynamics.formats.quantised import fp4
from dynamics.formats.quantised.codes import Codes, blocks, integer_book, unpacked
from dynamics.formats.quantised.compressed_config import Scheme, scheme_of
from dynamics.formats.quantised.parts import Parts
from dynamics.formats.quantised.tensor import (
    Arrays,
    NotDequantised,
    QuantisedTensor,
    check_shape,
    damage,
)

_GPTQ_BITS = (2, 3, 4, 8)
# Where a word of AWQ has the code of each column.
_AWQ_ORDER = (0, 4, 1, 5, 2, 6, 3, 7)


def gptq_or_awq(parts: Parts) -> QuantisedTensor:
    """`qweight`, `qzeros`, `scales`: by what the config says."""
    method, config = parts.said.method, parts.said.config
    bits = config.get("bits", config.get("w_bit"))
    qweight, scales = parts.get(".qweight", "int32"), parts.get(".scales")
    qzeros = parts.get(".qzeros", "int32")
    if len(qweight.shape) != 2 or len(scales.shape) != 2:
        raise NotDequantised(f"its codes have the shape {qweight.shape}")
    groups, outputs = scales.shape
    if method == "awq":
        version = str(config.get("version", config.get("format", "gemm"))).lower()
        if version != "gemm" or bits != 4:
            raise NotDequantised(f"AWQ {version} of {bits} bits is not known")
        shape = (outputs, qweight.shape[0])
        decode: Any = partial(_awq, parts.name, shape)
        scheme, g_idx = "awq gemm", None
    elif method == "gptq":
        if bits not in _GPTQ_BITS:
            raise NotDequantised(f"GPTQ of {str(bits)[:20]} bits is not known")
        format = str(config.get("checkpoint_format") or "gptq")
        if format not in ("gptq", "gptq_v2"):
            raise NotDequantised(f"the GPTQ format {format[:20]!r} is not known")
        shape = (outputs, qweight.shape[0] * 32 // bits)
        decode = partial(_gptq, parts.name, shape, bits, format == "gptq")
        scheme, g_idx = f"{format}, {bits} bits", parts.stored.get(".g_idx")
        if g_idx is None and shape[1] % max(groups, 1):
            raise NotDequantised("its g_idx is missing")
    else:
        raise NotDequantised("only its config can tell how")
    return parts.tensor(
        shape, scheme, decode, codes=qweight, zero=qzeros, scale=scales, g_idx=g_idx
    )


def _gptq(name: str, shape: tuple[int, int], bits: int, plus_one: bool, arrays: Arrays) -> Codes:
    outputs, inputs = shape
    groups = len(arrays["scale"])
    check_shape(name, "qweight", arrays["codes"], (inputs * bits // 32, outputs))
    check_shape(name, "scales", arrays["scale"], (groups, outputs))
    words = -(-outputs * bits // 32)
    check_shape(name, "qzeros", arrays["zero"], (groups, words))
    if "g_idx" in arrays:
        check_shape(name, "g_idx", arrays["g_idx"], (inputs,))
        group = arrays["g_idx"].astype(np.int64)
        if group.min(initial=0) < 0 or group.max(initial=0) >= groups:
            raise damage(name, f"its g_idx names group {group.max()} of {groups}")
    else:
        group = np.arange(inputs) // max(inputs // max(groups, 1), 1)
    codes = unpacked(arrays["codes"].T, bits, inputs)
    zero = unpacked(arrays["zero"], bits, outputs).astype(np.float64)
    if plus_one:  # v1 stores one less, in as many bits
        zero = (zero + 1) % 2**bits
    return Codes(
        codes,
        integer_book(bits),
        arrays["scale"].astype(np.float64).T,
        (np.arange(outputs), group),
        zero.T,
    )


def _awq(name: str, shape: tuple[int, int], arrays: Arrays) -> Codes:
    outputs, inputs = shape
    groups = len(arrays["scale"])
    check_shape(name, "qweight", arrays["codes"], (inputs, outputs // 8))
    check_shape(name, "qzeros", arrays["zero"], (groups, outputs // 8))
    if not groups or inputs % groups or outputs % 8:
        raise damage(name, f"{groups} groups of {inputs} inputs")
    codes, zero = (_reordered(unpacked(arrays[each], 4, outputs)) for each in ("codes", "zero"))
    return Codes(
        codes.T,
        integer_book(4),
        arrays["scale"].astype(np.float64).T,
        blocks(shape, (1, inputs // groups)),
        zero.astype(np.float64).T,
    )


def _reordered(codes: np.ndarray) -> np.ndarray:
    words = codes.reshape(*codes.shape[:-1], -1, 8)
    return words[..., _AWQ_ORDER].reshape(codes.shape)


def compressed(parts: Parts) -> QuantisedTensor:
    """`weight_packed` of compressed-tensors: integers of 1 to 8 bits, MXFP4, NVFP4."""
    if parts.said.method != "compressed-tensors":
        raise NotDequantised("only its config can tell how")
    packed, scale = parts.get(".weight_packed", "int32", "uint8"), parts.get(".weight_scale")
    if len(packed.shape) != 2:
        raise NotDequantised(f"its codes have the shape {packed.shape}")
    is_float = packed.dtype == "uint8"
    second = parts.stored.get(".weight_global_scale")
    rows = packed.shape[0]
    if is_float:
        scheme = scheme_of(
            parts.said.config,
            parts.name,
            lambda each: (
                each.is_float and each.bits == 4 and (each.group_size == 16) == (second is not None)
            ),
        )
        if scheme.group_size not in (16, 32) or ".weight_zero_point" in parts.stored:
            raise NotDequantised(f"FP4 in groups of {scheme.group_size} is not known")
        shape = (rows, 2 * packed.shape[1])
        if second is None:
            decode: Any = partial(fp4.mxfp4, parts.name)
        else:
            decode = partial(fp4.nvfp4, parts.name, False)
        return parts.tensor(
            shape, f"fp4, {scheme}", decode, codes=packed, scale=scale, second=second
        )
    stored = parts.get(".weight_shape", "int64", "int32")
    if stored.shape != (2,):
        raise damage(parts.name, f"its weight_shape has the shape {stored.shape}")
    height, width = (int(n) for n in stored.read())
    words = packed.shape[1]
    scheme = scheme_of(
        parts.said.config,
        parts.name,
        lambda each: (
            not each.is_float
            and 1 <= each.bits <= 8
            and words == -(-width * each.bits // 32)
            and each.format == "pack-quantized"
        ),
    )
    if height != rows:
        raise damage(parts.name, f"its weight_shape names {height} rows, its codes have {rows}")
    zero = parts.stored.get(".weight_zero_point")
    if not scheme.symmetric and zero is None:
        raise NotDequantised("its weight_zero_point is missing")
    return parts.tensor(
        (rows, width),
        str(scheme),
        partial(_compressed, parts.name, scheme, (rows, width)),
        codes=packed,
        scale=scale,
        zero=None if scheme.symmetric else zero,
        g_idx=parts.stored.get(".weight_g_idx"),
    )


def _compressed(name: str, scheme: Scheme, shape: tuple[int, int], arrays: Arrays) -> Codes:
    rows, cols = shape
    codes = unpacked(arrays["codes"], scheme.bits, cols)
    scale = arrays["scale"].astype(np.float64)
    if prod(scale.shape) == 1:
        scale, group = scale.reshape(1, 1), np.zeros(cols, dtype=np.int64)
    else:
        size = scheme.group_size if scheme.strategy == "group" and scheme.group_size else cols
        check_shape(name, "weight_scale", scale, (rows, -(-cols // size)))
        group = np.arange(cols) // size
    g_idx = arrays.get("g_idx")
    if g_idx is not None and (g_idx >= 0).all():  # -1 where no order was chosen
        check_shape(name, "weight_g_idx", g_idx, (cols,))
        group = g_idx.astype(np.int64)
        if group.max(initial=0) >= scale.shape[1]:
            raise damage(name, f"its weight_g_idx names group {group.max()} of {scale.shape[1]}")
    half = 2 ** (scheme.bits - 1)
    zero = np.zeros((1, 1))
    if "zero" in arrays:
        words = -(-rows * scheme.bits // 32)
        check_shape(name, "weight_zero_point", arrays["zero"], (words, scale.shape[1]))
        zero = unpacked(arrays["zero"].T, scheme.bits, rows).T.astype(np.float64) - half
    rows_of = np.arange(rows) if len(scale) > 1 else np.zeros(rows, dtype=np.int64)
    return Codes(
        codes,
        integer_book(scheme.bits) - np.float32(half),
        scale,
        (rows_of, group),
        np.broadcast_to(zero, scale.shape) if zero.any() else None,
    )
