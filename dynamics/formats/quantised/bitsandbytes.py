"""bitsandbytes: int8 with one scale per row, NF4 and FP4 with one scale per 64 numbers in a row.

The blocks of the 4-bit formats run through the flattened weight. Their scales ("absmax") may be
quantised themselves, by blocks of 256 (`bnb_4bit_use_double_quant`).
"""

from functools import partial
from math import gcd, prod
from typing import Any

import numpy as np

from dynamics.errors import FormatError
from dynamics.formats.quantised.codes import Codes, blocks, nibbles, signed_book
from dynamics.formats.quantised.parts import Parts
from dynamics.formats.quantised.tensor import (
    Arrays,
    NotDequantised,
    QuantisedTensor,
    check_shape,
    damage,
    read_json,
)
from dynamics.formats.storage.tensors import checked_shape

_FLOATS = ("float16", "bfloat16", "float32")
_MOST_BLOCKS = 2**31


def int8(parts: Parts) -> QuantisedTensor:
    """`load_in_8bit`: code · SCB / 127, SCB the largest number of each row."""
    weight, scale = parts.get(".weight", "int8"), parts.get(".SCB")
    if len(weight.shape) != 2:
        raise NotDequantised(f"it has the shape {weight.shape}")
    decode = partial(_int8, parts.name)
    return parts.tensor(weight.shape, "bitsandbytes int8", decode, codes=weight, scale=scale)


def _int8(name: str, arrays: Arrays) -> Codes:
    codes = arrays["codes"]
    rows, cols = codes.shape
    check_shape(name, "SCB", arrays["scale"], (rows,))
    scale = arrays["scale"].astype(np.float64).reshape(rows, 1) / 127
    return Codes(codes, signed_book(), scale, blocks((rows, cols), (1, cols)))


def four_bits(parts: Parts) -> QuantisedTensor:
    """`load_in_4bit`: quant_map[code] · absmax, the high half of each byte first."""
    weight, absmax, book = parts.get("", "uint8"), parts.get(".absmax"), parts.get(".quant_map")
    state = read_json(parts.get(f".quant_state.bitsandbytes__{parts.detail}"), parts.name)
    shape, block, nested_block, offset, dtype = _state(parts.name, state)
    numbers = prod(shape)
    if len(shape) != 2 or -(-numbers // 2) != prod(weight.shape) or not numbers:
        raise damage(parts.name, f"a shape {shape} of {prod(weight.shape)} bytes of codes")
    nested = absmax.dtype == "uint8"
    if nested and offset is None:
        raise damage(parts.name, "its state has no nested_offset")
    tensor = parts.tensor(
        shape,
        f"{parts.detail}, blocks of {block}, scales in blocks of {nested_block} above {offset}",
        partial(_four_bits, parts.name, shape, block, nested_block, offset),
        codes=weight,
        absmax=absmax,
        book=book,
        nested_absmax=parts.get(".nested_absmax") if nested else None,
        nested_book=parts.get(".nested_quant_map") if nested else None,
    )
    return QuantisedTensor(
        tensor.name, shape, dtype or tensor.dtype, tensor.stored, tensor.scheme, tensor.decode
    )


def _state(name: str, state: Any) -> tuple[tuple[int, ...], int, int, float | None, str | None]:
    """(Shape, block size, block size of nested scales, their offset, dtype)."""
    if not isinstance(state, dict):
        raise damage(name, "its state is no JSON object")
    try:
        shape = checked_shape(state.get("shape"), name)
    except FormatError as error:
        raise damage(name, f"its state names the shape {str(state.get('shape'))[:60]}") from error
    sizes = [state.get("blocksize"), state.get("nested_blocksize", 256)]
    for size in sizes:
        if not isinstance(size, int) or isinstance(size, bool) or not 0 < size < _MOST_BLOCKS:
            raise damage(name, f"its state names blocks of {str(size)[:40]}")
    offset = state.get("nested_offset")
    if offset is not None and not isinstance(offset, float | int):
        raise damage(name, f"its state names the offset {str(offset)[:40]}")
    dtype = str(state.get("dtype"))
    return (
        shape,
        sizes[0],
        sizes[1],
        None if offset is None else float(offset),
        dtype if dtype in _FLOATS else None,
    )


def _four_bits(
    name: str,
    shape: tuple[int, int],
    block: int,
    nested_block: int,
    offset: float | None,
    arrays: Arrays,
) -> Codes:
    rows, cols = shape
    codes = nibbles(arrays["codes"].reshape(-1), high_first=True)[: rows * cols]
    check_shape(name, "quant_map", arrays["book"], (16,))
    count = -(-rows * cols // block)
    absmax = arrays["absmax"]
    check_shape(name, "absmax", absmax, (count,))
    if offset is not None and "nested_absmax" in arrays:
        check_shape(name, "nested_quant_map", arrays["nested_book"], (256,))
        check_shape(name, "nested_absmax", arrays["nested_absmax"], (-(-count // nested_block),))
        # In float32, as the library does.
        scale = arrays["nested_book"][absmax].astype(np.float32)
        scale *= np.repeat(arrays["nested_absmax"], nested_block)[:count].astype(np.float32)
        absmax = scale + np.float32(offset)
    # Blocks run on from row to row. Cut to the length that divides a row, each lies in one row.
    length = gcd(cols, block)
    each = np.repeat(absmax.astype(np.float64), block // length)[: rows * cols // length]
    return Codes(
        codes.reshape(rows, cols),
        arrays["book"].astype(np.float32),
        each.reshape(rows, cols // length),
        blocks((rows, cols), (1, length)),
    )
