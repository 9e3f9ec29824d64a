"""`Live`: what is measured while the model trains, how often, and where it goes."""

from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass, replace
from typing import Any

from dynamics import schema
from dynamics.errors import DynamicsError
from dynamics.metrics import METRICS, select_metrics
from dynamics.metrics.modules import labels_of
from dynamics.runs.run import MatrixInfo
from probes.schedule import Schedule
from probes.schedule import every as every_n

DEFAULT_KINDS = (schema.WEIGHT, schema.GRADIENT, schema.UPDATE)
_KINDS = (*DEFAULT_KINDS, schema.ADAPTER, schema.DISPLACEMENT)
# What one curve is of -> the last part of its key, of each matrix.
_GROUPS: dict[str, Callable[[Sequence[MatrixInfo]], list[str]]] = {
    "module": labels_of,
    "layer": lambda matrices: [_layer(each.layer) for each in matrices],
    "matrix": lambda matrices: [each.name for each in matrices],
}


@dataclass(frozen=True)
class Live:
    """Metrics that reach a tracker while the model trains: `Recorder(..., live=Live(...))`.

    They are measured in the thread that writes, from the numbers that are recorded, and have the
    same bits as `analyze` of the recording. A key is `rank/KIND/METRIC/MODULE`, and its value is
    the mean over the layers of the module. A value arrives one or a few steps late, and has the
    step of its record.

    Measuring takes at most the share `budget` of the time that training takes. If that is too
    little for every matrix, each record measures some of them, in turn. A value is then the mean
    over those that were measured for it, and a `LiveSubsetWarning` says so once. Before the first
    step no time is known, so the first record takes 0.1 s at most.

    Args:
        metrics: names of `dynamics.METRICS`.
        kinds: some of "weight", "gradient", "update", "adapter" and, with `spectra_only`,
            "displacement". None takes the first three, as far as they are recorded. "update" keeps
            the weights of the previous record in memory.
        by: what one curve is of: "module", "layer" or "matrix".
        every: n, for the records at every n-th step; or a function of the step. None takes every
            record.
        to: who gets the values: `wandb.log`, `writer.add_scalar` of a TensorBoard writer,
            `trackio.log`, `mlflow.log_metrics`, `accelerator.log`, or any function that takes
            (dict of floats, step). None, in a callback, is what the framework reports to. It is
            called by the training thread, between two steps, in the process that records.
        budget: share of the training time that may be spent; None measures everything.
        extremes: also the smallest and the largest value of the layers: `.../MODULE/min`, `/max`.
        bounds: also the mean rank bound and noise floor: `rank/KIND/rank_bound/MODULE`,
            `rank/KIND/noise_floor/MODULE`.

    Raises:
        MissingError: an unknown metric.
        DynamicsError: an argument that cannot be meant.

    Example:
        >>> from probes import Live, Recorder
        >>> model = torch.nn.Sequential(torch.nn.Linear(6, 4))
        >>> optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
        >>> shown = {}
        >>> def show(values, step):
        ...     shown[step] = values
        >>> live = Live(kinds=["weight"], to=show, budget=None)
        >>> with Recorder(model, optimizer, "live.zarr", every=2, live=live):
        ...     for step in range(1, 5):
        ...         model(torch.ones(3, 6)).square().mean().backward()
        ...         optimizer.step()
        >>> list(shown), list(shown[0])
        ([0, 2, 4], ['rank/weight/effective_rank/0'])
    """

    metrics: Sequence[str] = ("effective_rank",)
    kinds: Sequence[str] | None = None
    by: str = "module"
    every: int | Schedule | None = None
    to: Any = None
    budget: float | None = 0.02
    extremes: bool = False
    bounds: bool = False

    def __post_init__(self) -> None:
        for name in ("metrics", "kinds"):
            if isinstance(getattr(self, name), str):
                raise DynamicsError(f"Live takes {name} as a list; found {getattr(self, name)!r}.")
        select_metrics(self.metrics, among=METRICS)
        if not self.metrics:
            raise DynamicsError("Live takes one metric or more; found metrics=().")
        unknown = [kind for kind in self.kinds or () if kind not in _KINDS]
        if unknown or (self.kinds is not None and not self.kinds):
            raise DynamicsError(f"Live takes kinds of {', '.join(_KINDS)}; found {self.kinds!r}.")
        if self.by not in _GROUPS:
            raise DynamicsError(f"Live takes by of {', '.join(_GROUPS)}; found by={self.by!r}.")
        if self.budget is not None and not _is_share(self.budget):
            raise DynamicsError(
                "Live takes budget as a share of the training time such as 0.02, or None; found "
                f"{self.budget!r}."
            )
        if self.to is not None and not (callable(self.to) or hasattr(self.to, "alarm")):
            raise DynamicsError(
                f"Live takes a function as `to`, such as wandb.log; found {self.to!r}."
            )
        if self.every is not None and not callable(self.every):
            every_n(self.every)

    def is_due(self, step: int) -> bool:
        """Whether the record of a step is measured."""
        if self.every is None:
            return True
        return bool((self.every if callable(self.every) else every_n(self.every))(step))

    def groups(self, matrices: Sequence[MatrixInfo]) -> dict[str, str]:
        """Name of a matrix -> the last part of its key."""
        names = [each.name for each in matrices]
        return dict(zip(names, _GROUPS[self.by](matrices), strict=True))

    def among(self, recorded: Collection[str]) -> "Live":
        """These settings with the kinds that are recorded.

        Raises:
            DynamicsError: a kind that was asked for is not recorded.
        """
        missing = [kind for kind in self.kinds or () if kind not in recorded]
        kinds = tuple(kind for kind in self.kinds or DEFAULT_KINDS if kind in recorded)
        if missing or not kinds:
            raise DynamicsError(
                f"Live cannot measure {', '.join(missing or DEFAULT_KINDS)}: the recorder records "
                f"{', '.join(sorted(recorded)) or 'nothing of it'}; add it to record=[...]."
            )
        return replace(self, kinds=kinds)


def _layer(number: int | None) -> str:
    return "no_layer" if number is None else f"layer_{number}"


def _is_share(budget: object) -> bool:
    return isinstance(budget, int | float) and not isinstance(budget, bool) and budget > 0


def live_settings(live: object, to: Any = None) -> Live | None:
    """What `live=` of a recorder or a callback means.

    Args:
        live: None, False, True or a `Live`.
        to: who gets the values where `live` does not say.

    Raises:
        DynamicsError: it is something else, or nobody gets the values.
    """
    if live is None or live is False:
        return None
    settings = Live() if live is True else live
    if not isinstance(settings, Live):
        raise DynamicsError(f"live takes True or probes.Live(...); found {live!r}.")
    if settings.to is None:
        if to is None:
            raise DynamicsError(
                "live needs somebody who gets the values: live=Live(to=wandb.log), "
                "Live(to=writer.add_scalar), or any function of (values, step)."
            )
        settings = replace(settings, to=to)
    return settings
