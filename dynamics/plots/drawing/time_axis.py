"""The time axis: optimizer steps, tokens or epochs; the cells, cycles and merges along it."""

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import TYPE_CHECKING, Any

import numpy as np
import xarray as xr

from dynamics import schema
from dynamics.errors import DynamicsError, MissingError, near
from dynamics.plots.drawing.captions import counted, describe, listed
from dynamics.plots.drawing.style import panel_width, thickness

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.ticker import Locator

_LABELS = {schema.STEP: "optimizer step", "tokens": "tokens", "epoch": "epoch"}
_PLURALS = {schema.STEP: "optimizer steps", "tokens": "tokens", "epoch": "epochs"}
# Kinds that begin anew with each cycle: a line across a merge would join different matrices.
_OF_CYCLES = (schema.ADAPTER, schema.CYCLE_UPDATE)
_MERGE_NAME = "_name of merges"  # the label of the axis that has it
_LINES = 24  # merges, up to which each is a line
_NAMED = 4  # runs, up to which a caption has their names
Run = str | None  # None: the one run of a result


@dataclass(frozen=True)
class TimeAxis:
    """Where the steps of each run lie.

    Attributes:
        name: "step", "tokens" or "epoch".
        known: run -> the steps of its records and their positions, NaN where unknown.
        merges: run -> the steps of its merges.
        projectors: run -> the steps after which a new projector bounds its updates.
    """

    name: str
    known: Mapping[Run, tuple[np.ndarray, np.ndarray]]
    merges: Mapping[Run, list[int]]
    projectors: Mapping[Run, list[int]]

    @property
    def plural(self) -> str:
        """What the axis counts, for captions."""
        return _PLURALS[self.name]

    def at(self, steps: Sequence[int] | np.ndarray, run: Run = None) -> np.ndarray:
        """The positions of steps, interpolated between records; NaN where they are unknown."""
        steps = np.asarray(steps, dtype=np.float64)
        if self.name == schema.STEP:
            return steps
        known, positions = self.known[run]
        return np.interp(steps, known, positions, left=np.nan, right=np.nan)

    def cycles(self, steps: np.ndarray, run: Run, kind: str) -> list[slice]:
        """The records between merges, for kinds that begin anew with each; else all in one."""
        merges = self.merges.get(run, []) if kind in _OF_CYCLES else []
        # A merge at step m comes after the record of m.
        cuts = np.unique(np.searchsorted(steps, merges, side="right"))
        ends = [0, *(int(cut) for cut in cuts if 0 < cut < len(steps)), len(steps)]
        return [slice(a, b) for a, b in pairwise(ends)]

    def label(self, ax: "Axes") -> None:
        """Name the x axis; many tokens get a k, M or G."""
        from matplotlib.ticker import EngFormatter

        ax.set_xlabel(_LABELS[self.name])
        room = int(2.2 * panel_width(ax))  # labels that have room side by side, about
        whole = self.name != "epoch"
        ax.xaxis.set_major_locator(_ticks(max(2, min(room, 7)), whole))
        if self.name == "tokens":
            ax.xaxis.set_major_formatter(EngFormatter(sep=""))

    def pooled(self, groups: Mapping[str, Sequence[str]]) -> "TimeAxis":
        """The axis for groups of runs that have the same positions.

        Raises:
            DynamicsError: runs of a group are at different positions at the same step.
        """
        known: dict[Run, tuple[np.ndarray, np.ndarray]] = {}
        merges: dict[Run, list[int]] = {}
        projectors: dict[Run, list[int]] = {}
        for group, runs in groups.items():
            for run in runs if self.name != schema.STEP else ():
                first, other = self.known[runs[0]], self.known[run]
                if not all(np.array_equal(a, b) for a, b in zip(first, other, strict=True)):
                    raise DynamicsError(
                        f"{runs[0]!r} and {run!r} are not at the same {self.plural} at the same "
                        "step, so there is no mean along them; draw along steps."
                    )
            known[group] = self.known[runs[0]]
            merges[group] = sorted({step for run in runs for step in self.merges[run]})
            projectors[group] = sorted({step for run in runs for step in self.projectors[run]})
        return TimeAxis(self.name, known, merges, projectors)


def _ticks(most: int, whole: bool) -> "Locator":
    """At multiples of 1, 2, 2.5 or 5 times a power of ten."""
    from matplotlib.ticker import MaxNLocator

    return MaxNLocator(most, steps=[1, 2, 5, 10] if whole else [1, 2, 2.5, 5, 10], integer=whole)


def time_axis(dataset: xr.Dataset, x: str) -> TimeAxis:
    """The axis that is called x.

    Args:
        dataset: a result, of one run or several.
        x: "step", "tokens" or "epoch". The last two are logged values: the result must have them.

    Raises:
        MissingError: the result does not have it, or x is none of these.
    """
    has = [name for name in _LABELS if name == schema.STEP or _is_logged(dataset, name)]
    if x not in has:
        raise MissingError(
            f"No {x!r}{near(x, has)} to draw along in this result; it has {', '.join(has)}."
        )
    events = _events(dataset)
    steps = dataset[schema.STEP].values
    known: dict[Run, tuple[np.ndarray, np.ndarray]] = {}
    for run in events:
        if x == schema.STEP:
            known[run] = steps, steps.astype(np.float64)
            continue
        values = dataset[x] if run is None else dataset[x].sel({schema.RUN: run})
        positions = values.values.astype(np.float64)
        positions = np.where((steps == 0) & np.isnan(positions), 0.0, positions)
        there = np.isfinite(positions)
        known[run] = steps[there], positions[there]
        if not there.any():
            known[run] = steps[:1], np.array([np.nan])
    merges = {run: _steps_of(each, schema.MERGE) for run, each in events.items()}
    bounding = {
        run: [event for event in each if event["attrs"].get("bounded") is True]
        for run, each in events.items()
    }
    projectors = {run: _steps_of(each, schema.PROJECTION) for run, each in bounding.items()}
    return TimeAxis(x, known, merges, projectors)


def _is_logged(dataset: xr.Dataset, name: str) -> bool:
    return (
        name in dataset
        and schema.STEP in dataset[name].dims
        and set(dataset[name].dims) <= {schema.RUN, schema.STEP}
        and bool(np.isfinite(dataset[name]).any())
    )


def _events(dataset: xr.Dataset) -> dict[Run, list[dict[str, Any]]]:
    """Run -> its events, as in the attributes of a result; one run is called None."""
    events = json.loads(dataset.attrs.get("events", "[]"))
    if schema.RUN in dataset.dims:
        runs: list[Run] = dataset[schema.RUN].values.tolist()
        # Events without a run are those of one that was given a name (expand_dims).
        by_run = events if isinstance(events, dict) else dict.fromkeys(runs, events)
    else:
        runs = [None]
        if isinstance(events, dict):  # of a comparison, from which .sel took one run
            label = str(dataset.coords[schema.RUN].item()) if schema.RUN in dataset.coords else ""
            events = events.get(label, [])
        by_run = {None: events}
    return {run: by_run.get(run, []) for run in runs}


def _steps_of(events: Sequence[Mapping[str, Any]], kind: str) -> list[int]:
    return sorted({event["step"] for event in events if event["kind"] == kind})


def mark_merges(ax: "Axes", axis: TimeAxis) -> None:
    """Mark every merge; the first is named, and the caption tells whose they are."""
    by_run = {run: axis.at(steps, run) for run, steps in axis.merges.items() if steps}
    at = sorted({float(x) for each in by_run.values() for x in each if np.isfinite(x)})
    runs = [str(run) for run in by_run if run is not None]
    some = listed(runs) if len(runs) <= _NAMED else f"{len(runs)} of {len(axis.merges)} runs"
    draw_merges(ax, at, f" of {some}" if 0 < len(runs) < len(axis.merges) else "")


def draw_merges(
    ax: "Axes", at: Sequence[float], whose: str = "", *, on_cells: bool = False
) -> None:
    """Dotted lines at merges, or ticks at the upper edge where lines would cover the data.

    Args:
        ax: where.
        at: their positions, in order.
        whose: text like " of relora".
        on_cells: whether they have to be seen on colours, pale and dark.
    """
    if not len(at):
        return
    how_many = "the merge" if len(at) == 1 else f"the {counted([len(at)], 'merge')}"
    few = len(at) <= _LINES
    for x in at if few else []:
        if on_cells:
            ax.axvline(x, color="0.2", linewidth=thickness(0.8))
        ax.axvline(
            x,
            color="white" if on_cells else "0.6",
            linewidth=thickness(0.8),
            linestyle=(0, (1.5, 1.5)) if on_cells else ":",
            zorder=None if on_cells else 0.5,
        )
    if not few:
        ax.vlines(
            at, 1, 1.025, transform=ax.get_xaxis_transform(), color="0.4",
            linewidth=thickness(0.6), clip_on=False, label="_merges",
        )  # fmt: skip
    _name_merges(ax, at[0] if few else (at[0] + at[-1]) / 2, "merge" if few else "merges")
    mark = "Ticks above" if not few else "Dotted white" if on_cells else "Dotted"
    describe(ax, f"{mark}: {how_many}{whose}")


def _name_merges(ax: "Axes", x: float, text: str) -> None:
    """Write "merge" above the axes, over the first one, or over the middle of many.

    It is a tick of an axis above: titles make room for it, also those that a user sets later.
    """
    import matplotlib

    if has_merge_name(ax):
        return
    above = ax.secondary_xaxis("top", label=_MERGE_NAME)
    above.set_xticks([x], [text])
    above.minorticks_off()
    above.spines["top"].set_visible(False)
    size = matplotlib.rcParams["legend.fontsize"]
    above.tick_params(length=0, pad=1 if text == "merge" else 4, labelsize=size, labelcolor="0.4")


def has_merge_name(ax: "Axes") -> bool:
    """Whether the name of merges stands above the axes."""
    return any(each.get_label() == _MERGE_NAME for each in ax.child_axes)


def hide_merge_name(ax: "Axes", *, keep_room: bool = False) -> None:
    """Take the name of merges away.

    Args:
        ax: where it stands.
        keep_room: whether titles stand as high as if it were there, beside those that have it.
    """
    if keep_room:
        _name_merges(ax, float(np.mean(ax.get_xlim())), "merge")
    for each in list(ax.child_axes):
        if each.get_label() == _MERGE_NAME:
            if keep_room:
                each.tick_params(labelcolor="none")
            else:
                each.remove()


def edges(positions: np.ndarray) -> np.ndarray:
    """The ends of the cells of records: each reaches from the record before it to its own.

    The first one, which has none before it, is as broad as the second.

    >>> edges(np.array([0.0, 20.0, 60.0]))
    array([-20.,   0.,  20.,  60.])
    """
    first = positions[1] - positions[0] if len(positions) > 1 else 1.0
    return np.concatenate([[positions[0] - first], positions])
