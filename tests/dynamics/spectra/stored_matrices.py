"""Matrices as files hold them, in every dtype with a rounding model."""

import numpy as np
import torch

ROUNDED = ["float32", "float16", "bfloat16", "float8_e4m3fn", "float8_e5m2"]
DTYPES = ["float64", *ROUNDED]


def rounded(values: np.ndarray, dtype: str) -> np.ndarray:
    return torch.from_numpy(values).to(getattr(torch, dtype)).double().numpy()


def stored_as(values: np.ndarray, dtype: str):
    """The matrix as it would be read back: int8 with one scale per row."""
    if dtype != "int8":
        return rounded(values, dtype), dtype
    scale = np.abs(values).max(axis=1, keepdims=True) / 127
    return np.round(values / scale) * scale, dtype, scale


def weight_with_zeros_and_powers(dtype):
    """A (300, 200) tensor stored in `dtype` whose rounding has every special case."""
    generator = torch.Generator().manual_seed(1)
    values = torch.randn(300, 200, generator=generator, dtype=torch.float64)
    values[0] *= 2.0**-20
    values[:, 50:60] = 0  # columns of padding
    values[200:, 0] = 0.5  # a power of two, below which numbers lie closer
    return values.to(getattr(torch, dtype))
