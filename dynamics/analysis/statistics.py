"""Means with confidence intervals over repeated measurements, and differences of runs."""

from collections.abc import Hashable, Sequence
from typing import TypeVar

import numpy as np
import xarray as xr
from scipy.stats import t as student_t

from dynamics import schema
from dynamics.analysis.settings import difference_of_runs, settings_groups
from dynamics.errors import DynamicsError, MissingError, near

STATISTIC = "statistic"
# What describes single runs, and is neither averaged nor subtracted.
_DESCRIBED = (
    schema.STATUS,
    schema.SINGULAR_VALUE_ERROR,
    schema.NOISE_FLOOR,
    schema.STORAGE_NOISE_FLOOR,
    schema.REFERENCE_STEP,
)
Values = TypeVar("Values", xr.Dataset, xr.DataArray)


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


def over(
    values: xr.Dataset | xr.DataArray, coordinate: str | Sequence[str], *, level: float = 0.95
) -> xr.Dataset:
    """Mean, interval and count over one setting of the runs of a comparison, such as their seed.

    Runs are pooled if they differ in nothing else: all other coordinates along `run` are equal.

    Args:
        values: what `compare` returns, or one of its variables.
        coordinate: the setting to average over, a coordinate along `run`; or several that change
            together.
        level: see `mean_interval`.

    Returns:
        One entry along `run` for each setting of the others, which stay coordinates. It is named
        by what the names of its runs share ("relora" for "relora-seed=0" and "relora-seed=1"), or
        by its settings. For a variable: `mean`, `lower`, `upper` and `count` as in `mean_interval`.
        For a Dataset: its variables with a dimension `statistic` of these four, without
        `status`, `singular_value_error` and `noise_floor`; `reference_step` is -1 where it differs.

    Raises:
        DynamicsError: no two runs differ in `coordinate` alone; two runs have the same settings;
            a run has no value of `coordinate`; or there is no dimension `run`.
        MissingError: there is no such coordinate.

    Example:
        >>> import xarray as xr
        >>> coords = {"run": ["a", "b", "c", "d"], "seed": ("run", [0, 1, 0, 1])}
        >>> coords["lr"] = ("run", [0.1, 0.1, 0.2, 0.2])
        >>> loss = xr.DataArray([3.0, 3.2, 3.5, 3.7], coords, dims="run")
        >>> found = dy.over(loss, "seed")
        >>> found.run.values.tolist(), found.lr.values.tolist()
        (['lr=0.1', 'lr=0.2'], [0.1, 0.2])
        >>> found["mean"].values.round(2).tolist(), found["count"].values.tolist()
        ([3.1, 3.6], [2, 2])
    """
    names = (coordinate,) if isinstance(coordinate, str) else tuple(coordinate)
    groups = settings_groups(values, names)
    if (
        max(map(len, groups.values())) == 1
        and len({v for each in groups.values() for v in each}) > 1
    ):
        raise DynamicsError(
            f"No two runs differ in {' and '.join(names)} alone: "
            f"{difference_of_runs(values, names)}; average over what changes together "
            "(several names), or drop the coordinates that are no settings (drop_vars)."
        )
    pooled = [
        _pooled(values, list(each.values()), label, names, level) for label, each in groups.items()
    ]
    found = xr.concat(pooled, schema.RUN, coords="minimal", compat="override", join="exact",
                      combine_attrs="override")  # fmt: skip
    return found.assign_attrs(values.attrs | {"level": level, "over": ", ".join(names)})


def _pooled(
    values: xr.Dataset | xr.DataArray,
    members: list[int],
    label: str,
    names: Sequence[str],
    level: float,
) -> xr.Dataset:
    """The statistics of a group of runs as one entry along `run`, with their common settings."""
    of_group = values.isel({schema.RUN: members})
    settings = {
        name: coord.isel({schema.RUN: [0]}).variable
        for name, coord in of_group.coords.items()
        if schema.RUN in coord.dims and name not in (schema.RUN, *names)
    }
    of_group = of_group.drop_vars([*settings, *names])
    if isinstance(of_group, xr.DataArray):
        found = mean_interval(of_group, schema.RUN, level=level)
    else:
        found = xr.Dataset(attrs=of_group.attrs)
        for name, each in of_group.drop_vars(_DESCRIBED, errors="ignore").items():
            if schema.RUN in each.dims and each.dtype.kind in "fiu":
                interval = mean_interval(each, schema.RUN, level=level)
                found[name] = interval.drop_attrs().to_dataarray(STATISTIC).assign_attrs(each.attrs)
        if schema.REFERENCE_STEP in of_group:
            starts = of_group[schema.REFERENCE_STEP]
            first = starts.isel({schema.RUN: 0}, drop=True)
            agreed = first.where((starts == first).all(schema.RUN), schema.NO_STEP)
            found[schema.REFERENCE_STEP] = agreed.assign_attrs(starts.attrs)
    return found.expand_dims({schema.RUN: [label]}).assign_coords(settings)


def difference(
    comparison: xr.Dataset, *, baseline: str, pair: str | Sequence[str] | None = None
) -> xr.Dataset:
    """Every other run minus the baseline run, value by value.

    NaN where either was not measured. The variables `status`, `singular_value_error` and
    `noise_floor` describe single runs and are left out. `reference_step` is -1 where those of the
    two runs differ.

    Args:
        comparison: what `compare` returns.
        baseline: the run that is subtracted. With `pair`, one of the runs of the baseline setting,
            or the name that `over` gives to that setting.
        pair: a setting such as "seed": each run of another setting minus the run of the baseline
            setting with the same seed. `dy.over(result, "seed")` is then the mean of the paired
            differences, with its interval.

    Raises:
        DynamicsError: `comparison` has no dimension `run`; or runs of a setting and runs of the
            baseline setting are no pairs, one to one.
        MissingError: no run is called `baseline`, or there is no setting `pair`.

    Example:
        >>> runs = {"full": "full/run.zarr", "relora": "relora/run.zarr"}
        >>> both = dy.compare(runs, kinds=["weight"])
        >>> dy.difference(both, baseline="full").run.values.tolist()
        ['relora']
        >>> import xarray as xr
        >>> runs = ["full-seed=0", "full-seed=1", "lora-seed=0", "lora-seed=1"]
        >>> coords = {"run": runs, "seed": ("run", [0, 1, 0, 1]), "rank": ("run", [0, 0, 8, 8])}
        >>> losses = xr.Dataset({"loss": ("run", [3.0, 4.0, 3.5, 4.75])}, coords)
        >>> less = dy.difference(losses, baseline="full", pair="seed")
        >>> less.loss.values.tolist(), dy.over(less, "seed").loss.sel(statistic="mean").item()
        ([0.5, 0.75], 0.625)
    """
    if schema.RUN not in comparison.dims:
        raise DynamicsError("difference() takes what compare() returns: it has a dimension 'run'.")
    labels = comparison[schema.RUN].values.tolist()
    if pair is None:
        _check_run(baseline, labels)
        first = labels.index(baseline)
        others = [position for position in range(len(labels)) if position != first]
        partners = [first] * len(others)
    else:
        others, partners = _pairs(comparison, baseline, pair)
    values = comparison.drop_vars(_DESCRIBED, errors="ignore")
    ours, theirs = values.isel({schema.RUN: others}), _under(values, partners, others)
    with xr.set_options(keep_attrs=True):
        result = ours - theirs
    if schema.REFERENCE_STEP in comparison:
        starts = comparison[schema.REFERENCE_STEP]
        of_ours = starts.isel({schema.RUN: others})
        same = of_ours == _under(starts, partners, others)
        result[schema.REFERENCE_STEP] = of_ours.where(same, schema.NO_STEP)
    paired = {} if pair is None else {"pair": pair if isinstance(pair, str) else ", ".join(pair)}
    return result.assign_attrs(comparison.attrs, baseline=baseline, **paired)


def _under(values: Values, partners: Sequence[int], others: Sequence[int]) -> Values:
    """The values of the partners under the names of the others, without their settings."""
    theirs = values.isel({schema.RUN: partners})
    theirs = theirs.drop_vars([n for n, c in theirs.coords.items() if schema.RUN in c.dims])
    return theirs.assign_coords({schema.RUN: values[schema.RUN].values[others]})


def _check_run(baseline: str, known: Sequence[str]) -> None:
    if baseline not in known:
        raise MissingError(
            f"No run {baseline!r}{near(baseline, known)} in this comparison; it has "
            f"{', '.join(known)}."
        )


def _pairs(
    comparison: xr.Dataset, baseline: str, pair: str | Sequence[str]
) -> tuple[list[int], list[int]]:
    """Positions of the runs of other settings, and of their partners of the baseline setting."""
    labels = comparison[schema.RUN].values.tolist()
    names = [pair] if isinstance(pair, str) else list(pair)
    groups = settings_groups(comparison, pair)
    _check_run(baseline, [*labels, *(label for label in groups if label not in labels)])
    base = next(
        label
        for label, group in groups.items()
        if label == baseline or baseline in [labels[position] for position in group.values()]
    )
    partners: dict[int, int] = {}
    for label, group in groups.items():
        if label == base:
            continue
        alone = [(value, label) for value in group if value not in groups[base]]
        alone += [(value, base) for value in groups[base] if value not in group]
        if alone:
            value, of = alone[0]
            given = ", ".join(f"{n}={v}" for n, v in zip(names, value, strict=True))
            raise DynamicsError(
                f"{label!r} and {base!r} are no pairs, one to one: only {of!r} has a run with "
                f"{given}; leave it out (.sel(run=...)), or compare without pair."
            )
        partners |= {position: groups[base][value] for value, position in group.items()}
    if not partners:
        raise DynamicsError(
            f"All runs have the setting of {baseline!r}, but for {' and '.join(names)}; there is "
            "nothing to compare it with."
        )
    others = sorted(partners)
    return others, [partners[position] for position in others]
