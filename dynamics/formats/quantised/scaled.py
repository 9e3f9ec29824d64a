"""Weights of one byte per number beside their scales: FP8, MXFP8, int8, and DeepSeek's FP4.

`M.weight` holds the codes. `M.weight_scale` or `M.weight_scale_inv` holds what they are multiplied
with, also where the name says "inv": one number, one per output, or one per block or group. Experts
(E, rows, columns) have `P` and `P_scale` or `P_scale_inv`.
"""

from functools import partial
from math import prod
from typing import Any

import numpy as np

from dynamics.formats.quantised.codes import (
    E2M1,
    Codes,
    blocks,
    nibbles,
    powers_of_two,
    signed_book,
)
from dynamics.formats.quantised.compressed_config import scheme_of
from dynamics.formats.quantised.parts import FLOAT8, Parts
from dynamics.formats.quantised.tensor import (
    Arrays,
    NotDequantised,
    QuantisedTensor,
    damage,
)
from dynamics.formats.storage.tensors import float8_values

_BLOCK = (128, 128)  # DeepSeek's, and the default of transformers
_MULTIPLIED = ("", "fp8", "fbgemm_fp8", "compressed-tensors", "mxfp8", "modelopt")


def block_scaled(parts: Parts) -> QuantisedTensor:
    """`weight_scale_inv`: FP8 by blocks, as DeepSeek and transformers' fp8 write it."""
    weight = parts.get("", *FLOAT8, "int8")
    scale = parts.get("_scale_inv")
    if parts.said.method not in ("", "fp8"):
        raise NotDequantised(f"{parts.said.name} is not known to have a weight_scale_inv")
    shape = weight.shape
    if len(shape) < 2:
        raise NotDequantised(f"it has the shape {shape}")
    given = parts.said.config.get("weight_block_size", _BLOCK)
    packed = weight.dtype == "int8"  # two numbers of E2M1 in each byte
    if packed:
        shape = (*shape[:-1], 2 * shape[-1])
        given = _divided(shape, scale.shape)
    block = _block_size(given, shape)
    grid = "one scale" if prod(scale.shape) == 1 else f"blocks of {block[0]} x {block[1]}"
    return parts.tensor(
        shape,
        f"{'fp4' if packed else weight.dtype}, {grid}",
        partial(_decode, parts.name, "fp4" if packed else weight.dtype, block),
        codes=weight,
        scale=scale,
    )


def scaled(parts: Parts) -> QuantisedTensor:
    """`weight_scale`: FP8 or int8 with one scale, one per output, per group or per block."""
    weight = parts.get("", *FLOAT8, "int8")
    scale, zero = parts.get("_scale"), parts.stored.get("_zero_point")
    method = parts.said.method
    if "_scale_2" in parts.stored or "_global_scale" in parts.stored:
        raise NotDequantised("it has two scales")
    if method not in (*_MULTIPLIED, "int8"):
        raise NotDequantised(f"{parts.said.name} is not known to multiply codes by weight_scale")
    if weight.dtype == "int8" and method != "compressed-tensors":
        raise NotDequantised(f"int8 of {parts.said.name} is not known")
    shape = weight.shape
    block: tuple[int, int] | None = None
    along_last = method == "fbgemm_fp8" and len(shape) == 3
    if method == "compressed-tensors":
        scheme = scheme_of(
            parts.said.config,
            parts.name,
            lambda each: each.bits == 8 and each.is_float == (weight.dtype != "int8"),
        )
        block = scheme.block(shape)
    elif method == "mxfp8":
        block = (1, 32)
    elif prod(scale.shape) != 1 and scale.shape not in (shape[:-1], (*shape[:-1], 1)):
        given = parts.said.config.get("weight_block_size")
        block = None if along_last else _block_size(given, shape)
    return parts.tensor(
        shape,
        f"{weight.dtype} times scale, blocks {block}, outputs last: {along_last}",
        partial(_decode, parts.name, weight.dtype, block, along_last=along_last),
        codes=weight,
        scale=scale,
        zero=zero,
    )


def _decode(
    name: str,
    dtype: str,
    block: tuple[int, int] | None,
    arrays: Arrays,
    along_last: bool = False,
) -> Codes:
    codes = nibbles(arrays["codes"]) if dtype == "fp4" else arrays["codes"]
    book = {"fp4": E2M1, "int8": signed_book()}.get(dtype)
    book = float8_values(dtype) if book is None else book
    scale, groups = placed(name, codes.shape, arrays["scale"], block, along_last=along_last)
    zero = arrays.get("zero")
    if zero is not None and zero.any():
        zero, _ = placed(name, codes.shape, zero, block, exponents=False)
        if zero.shape != scale.shape:
            raise damage(name, f"its zero points have the shape {arrays['zero'].shape}")
    else:
        zero = None
    return Codes(codes, book, scale, groups, zero)


def placed(
    name: str,
    shape: tuple[int, ...],
    scale: np.ndarray,
    block: tuple[int, int] | None,
    *,
    along_last: bool = False,
    exponents: bool = True,
) -> tuple[np.ndarray, tuple[np.ndarray, ...]]:
    """(scale float64 with the axes of the tensor, the groups along each axis).

    Args:
        name: of the tensor, for messages.
        shape: of the tensor.
        scale: one number; one per output, (..., rows) or (..., rows, 1); or one per block.
        block: the size of a block.
        along_last: whether outputs are the last axis, as in the experts of Llama 4.
        exponents: whether bytes stand for powers of two (E8M0).

    Raises:
        FormatError: the shapes do not fit.
    """
    if scale.dtype == np.uint8 and exponents:
        scale = powers_of_two(scale)
    scale = scale.astype(np.float64)
    *leading, rows, cols = shape
    if scale.size == 1:
        return scale.reshape((1,) * len(shape)), blocks(shape, shape)
    if along_last and scale.size == prod(leading) * cols:
        return scale.reshape(*leading, 1, cols), blocks(shape, (*(1 for _ in leading), rows, 1))
    if scale.shape in (tuple(shape[:-1]), (*leading, rows, 1)) and block is None:
        return scale.reshape(*leading, rows, 1), blocks(shape, (*(1 for _ in leading), 1, cols))
    if block is not None:
        grid = (*leading, -(-rows // block[0]), -(-cols // block[1]))
        if scale.size == prod(grid) and scale.shape[-1:] == grid[-1:]:
            return scale.reshape(grid), blocks(shape, (*(1 for _ in leading), *block))
        if scale.size == prod(leading) and leading:  # one scale per expert
            return scale.reshape(*leading, 1, 1), blocks(shape, (*(1 for _ in leading), rows, cols))
    blocked = "" if block is None else f" and blocks of {block[0]} x {block[1]}"
    raise damage(name, f"a scale of shape {scale.shape} beside codes of shape {shape}{blocked}")


def _block_size(given: Any, shape: tuple[int, ...]) -> tuple[int, int]:
    if given is None:
        return shape[-2], shape[-1]
    if (
        not isinstance(given, list | tuple)
        or len(given) != 2
        or not all(isinstance(n, int) and not isinstance(n, bool) and 0 < n < 2**31 for n in given)
    ):
        raise NotDequantised(f"its config names blocks of {str(given)[:40]}")
    return given[0], given[1]


def _divided(shape: tuple[int, ...], grid: tuple[int, ...]) -> tuple[int, int]:
    """The size of equal blocks that a grid of scales divides a matrix into."""
    rows, cols = grid[-2:] if len(grid) > 1 else (1, 1)
    if not rows or not cols or shape[-2] % rows or shape[-1] % cols:
        raise NotDequantised(f"its scale has the shape {grid} beside codes of shape {shape}")
    return max(shape[-2] // rows, 1), max(shape[-1] // cols, 1)
