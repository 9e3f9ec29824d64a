"""Means with confidence intervals over repeated measurements."""

from collections.abc import Hashable, Sequence

import numpy as np
import xarray as xr
from scipy.stats import t as student_t

from dynamics.errors import DynamicsError


def mean_interval(
    values: xr.DataArray, over: str | Sequence[Hashable], *, level: float = 0.95
) -> xr.Dataset:
    """Mean of independent measurements, and the interval that holds its expectation.

    mean ± t_{(1 + level)/2, n - 1} · sd / √n. Here sd is the standard deviation of the sample
    (divided by n - 1), and t is the quantile of Student's distribution. The interval is exact for
    normal values and any n >= 2. It describes only what varies along `over`. Runs of several seeds
    are independent of each other; layers of one run are not.

    Args:
        values: any dims; NaN stands for a measurement that was not made; it is left out.
        over: the dimension or dimensions of the measurements.
        level: probability that the interval holds the expectation.

    Returns:
        `mean`, `lower`, `upper` and `count` (n) along the other dims; NaN bounds where n < 2, a NaN
        mean where n = 0.

    Raises:
        DynamicsError: `values` has no such dimension, or `level` is not between 0 and 1.

    Example:
        >>> import xarray as xr
        >>> interval = dy.mean_interval(xr.DataArray([1.0, 2.0, 3.0], dims="seed"), "seed")
        >>> [round(float(interval[name]), 3) for name in ("lower", "mean", "upper")]
        [-0.484, 2.0, 4.484]
    """
    dims = [over] if isinstance(over, str) else list(over)
    missing = [dim for dim in dims if dim not in values.dims]
    if missing or not dims:
        raise DynamicsError(
            f"A mean over {dims} needs these dimensions; the values have {list(values.dims)}."
        )
    if not 0 < level < 1:
        raise DynamicsError(f"level is {level!r}; it must be between 0 and 1.")
    count = values.notnull().sum(dims)
    mean = values.mean(dims)
    # Not ddof=1, which warns where a single value leaves 0 / 0.
    squares = ((values - mean) ** 2).sum(dims)
    enough = count.where(count >= 2)
    deviation = np.sqrt(squares / (enough - 1))
    quantile = xr.apply_ufunc(student_t.ppf, (1 + level) / 2, enough - 1)
    half = quantile * deviation / np.sqrt(enough)
    result = xr.Dataset({"mean": mean, "lower": mean - half, "upper": mean + half, "count": count})
    described = {"level": level, "over": ", ".join(map(str, dims))}
    return result.assign_attrs(values.attrs | described)
