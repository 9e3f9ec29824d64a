"""Results as trackers take them: runs, each with its settings and numbers along steps."""

import math
from dataclasses import dataclass
from typing import Any

import xarray as xr

from dynamics import schema
from dynamics.metrics.modules import MODULE, by_module, tracker_key


@dataclass(frozen=True)
class RunSeries:
    """One run of a result.

    Attributes:
        name: of the run.
        settings: in which the runs differ, and where the result is from.
        steps: step -> key -> mean over the layers of a module, see `tracker_key`. What was not
            measured has no key, and a step without any is not there.
    """

    name: str
    settings: dict[str, Any]
    steps: dict[int, dict[str, float]]


def run_series(dataset: xr.Dataset, name: str) -> list[RunSeries]:
    """The runs of a result.

    Args:
        dataset: what `analyze`, `compare` or `difference` returned.
        name: of a run that has none, because the result is of one run.
    """
    means = by_module(dataset)
    if schema.RUN not in means.dims:
        return [_series(means, name)]
    return [_series(means.sel({schema.RUN: run}), str(run)) for run in means[schema.RUN].values]


def _series(means: xr.Dataset, name: str) -> RunSeries:
    modules = means[MODULE].values.tolist()
    steps: dict[int, dict[str, float]] = {step: {} for step in means[schema.STEP].values.tolist()}
    for metric, values in means.data_vars.items():
        ordered = values.transpose(schema.KIND, schema.STEP, MODULE)
        for kind, of_kind in zip(means[schema.KIND].values.tolist(), ordered.values, strict=True):
            keys = [tracker_key(kind, str(metric), module) for module in modules]
            for step, numbers in zip(steps, of_kind.tolist(), strict=True):
                steps[step] |= {
                    key: number
                    for key, number in zip(keys, numbers, strict=True)
                    if not math.isnan(number)
                }
    settings = {
        str(key): coord.item()
        for key, coord in means.coords.items()
        if not coord.dims and key != schema.RUN
    }
    if "source" in means.attrs:
        settings.setdefault("source", means.attrs["source"])
    return RunSeries(name, settings, {step: each for step, each in steps.items() if each})
