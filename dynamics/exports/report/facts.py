"""What a result tells of itself: which cells hold numbers, and how ranks depend on the floor."""

from dataclasses import dataclass

import numpy as np
import xarray as xr

from dynamics import schema
from dynamics.schema import Status


def cell_counts(comparison: xr.Dataset) -> dict[str, int]:
    """Outcome -> how many cells have it.

    "does not apply" are the cells of kinds that a run does not have at all, such as the adapter of
    a run without adapters: they miss nothing.
    """
    status = comparison[schema.STATUS].transpose(schema.RUN, schema.KIND, ...).values
    counts = {each.name.lower().replace("_", " "): int((status == each).sum()) for each in Status}
    of_kind = status.reshape(*status.shape[:2], -1)
    absent = (of_kind == Status.NOT_RECORDED) | (of_kind == Status.UNDEFINED)
    whole = absent.all(-1)[..., None]
    for each in (Status.NOT_RECORDED, Status.UNDEFINED):
        counts[each.name.lower().replace("_", " ")] -= int(((of_kind == each) & whole).sum())
    counts["does not apply"] = int(whole.sum()) * of_kind.shape[-1]
    return counts


@dataclass(frozen=True)
class FloorFacts:
    """How much ranks depend on the noise floor.

    Attributes:
        spectra: how many were looked at.
        changed: in how many a floor twice as high gives another rank.
        margin: the smallest singular value counted over the floor, in the median spectrum.
        noise: the largest number of directions that are not counted though not zero.
        beyond: how many ranks are larger than their bound.
    """

    spectra: int
    changed: int
    margin: float
    noise: int
    beyond: int


def floor_facts(comparison: xr.Dataset) -> FloorFacts | None:
    """What the spectra of a result say of its noise floors; None where it has no spectra."""
    if schema.SINGULAR_VALUE not in comparison or schema.NOISE_FLOOR not in comparison:
        return None
    dims = (schema.RUN, schema.KIND, schema.STEP, schema.MATRIX)
    floors = comparison[schema.NOISE_FLOOR].transpose(*dims).values.astype(np.float64)
    singular = comparison[schema.SINGULAR_VALUE].transpose(*dims, schema.INDEX).values
    bounds = (
        comparison["rank_bound"].transpose(*dims).values
        if "rank_bound" in comparison
        else np.full(floors.shape, np.inf)
    )
    spectra = changed = noise = beyond = 0
    margins: list[np.ndarray] = []
    for cell in np.ndindex(floors.shape[:3]):  # some matrices at a time: memory
        s, floor = singular[cell].astype(np.float64), floors[cell]
        there = ~np.isnan(s[:, 0]) & ~np.isnan(floor)
        if not there.any():
            continue
        s, floor, bound = s[there], floor[there], bounds[cell][there]
        rank = (s > floor[:, None]).sum(-1)
        spectra += len(s)
        changed += int(((s > 2 * floor[:, None]).sum(-1) != rank).sum())
        noise = max(noise, int(((s > 0).sum(-1) - rank).max()))
        beyond += int((rank > bound + 0.5).sum())
        known = (rank > 0) & (floor > 0)
        smallest = np.take_along_axis(s, np.maximum(rank - 1, 0)[:, None], -1)[:, 0]
        margins.append(smallest[known] / floor[known])
    if not spectra:
        return None
    margin = np.concatenate(margins)
    median = float(np.median(margin)) if margin.size else np.nan
    return FloorFacts(spectra, changed, median, noise, beyond)
