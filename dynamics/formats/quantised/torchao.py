"""torchao's tensors in safetensors: `M._weight_qdata`, and a JSON per tensor in the header."""

import json
from functools import partial
from typing import Any

import numpy as np

from dynamics.formats.quantised.codes import Codes, signed_book
from dynamics.formats.quantised.parts import FLOAT8, Parts
from dynamics.formats.quantised.scaled import placed
from dynamics.formats.quantised.tensor import Arrays, NotDequantised, QuantisedTensor, damage
from dynamics.formats.storage.safetensors_files import safetensors_metadata
from dynamics.formats.storage.tensors import StoredTensor, float8_values

_DTYPES = {
    "Int8Tensor": ("int8",),
    "Float8Tensor": FLOAT8,
    "IntxUnpackedToInt8Tensor": ("int8",),
}


def torchao(parts: Parts) -> QuantisedTensor:
    """(code - zero) · scale, one scale and zero point for each block of `block_size`."""
    codes = parts.get("_qdata")
    kind, block = _described(parts, codes)
    if kind not in _DTYPES:
        raise NotDequantised(f"{kind} of torchao is not known")
    codes, scale = parts.get("_qdata", *_DTYPES[kind]), parts.get("_scale")
    unknown = set(parts.stored) - {"_qdata", "_scale", "_zero_point", "_act_quant_scale"}
    if unknown:
        raise NotDequantised(f"its {min(unknown).strip('_')} is not known")
    if len(codes.shape) != 2:
        raise NotDequantised(f"it has the shape {codes.shape}")
    rows, cols = codes.shape
    size = tuple(
        length if given == -1 else given for given, length in zip(block, (rows, cols), strict=True)
    )
    return parts.tensor(
        codes.shape,
        f"torchao {kind}, {codes.dtype}, blocks {size}",
        partial(_decode, parts.name, codes.dtype, (size[0], size[1])),
        codes=codes,
        scale=scale,
        zero=parts.stored.get("_zero_point"),
    )


def _described(parts: Parts, codes: Any) -> tuple[str, tuple[int, int]]:
    if not isinstance(codes, StoredTensor):
        raise NotDequantised("only its header can tell how")
    try:
        described = json.loads(safetensors_metadata(codes.path).get(parts.name, ""))
        kind, block = described["_type"], described["_data"]["block_size"]
    except (ValueError, RecursionError, KeyError, TypeError) as error:
        raise NotDequantised("the header of its file does not tell how") from error
    sound = (
        isinstance(block, list)
        and len(block) == 2
        and all(
            isinstance(n, int) and not isinstance(n, bool) and (n == -1 or 0 < n < 2**31)
            for n in block
        )
    )
    if not sound:
        raise damage(parts.name, f"its header names blocks of {str(block)[:40]}")
    return str(kind)[:40], (block[0], block[1])


def _decode(name: str, dtype: str, block: tuple[int, int], arrays: Arrays) -> Codes:
    codes = arrays["codes"]
    book = signed_book() if dtype == "int8" else float8_values(dtype)
    scale, groups = placed(name, codes.shape, arrays["scale"], block, exponents=False)
    zero = arrays.get("zero")
    if zero is not None and zero.any():
        zero, _ = placed(name, codes.shape, zero.astype(np.float64), block, exponents=False)
        if zero.shape != scale.shape:
            raise damage(name, f"its zero points have the shape {arrays['zero'].shape}")
        return Codes(codes, book, scale, groups, zero)
    return Codes(codes, book, scale, groups)
