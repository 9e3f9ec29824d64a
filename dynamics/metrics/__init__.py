"""The table of metrics. To add one, write a function in `spectral.py` and a row in `METRICS`."""

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass

from numpy.typing import ArrayLike

from dynamics.errors import MissingError, near
from dynamics.metrics.spectral import (
    above,
    condition_number,
    condition_number_raw,
    effective_rank,
    exceeds_rank_bound,
    frobenius_norm,
    nuclear_norm,
    numerical_rank,
    outliers,
    per_over_random,
    proportional_effective_rank,
    spectral_norm,
    stable_rank,
    top_k_energy,
)
from dynamics.metrics.study import (
    study_count_above_0_1,
    study_effective_rank,
    study_rank,
    study_spectral_gap,
    study_spectrum,
    study_stable_rank,
)
from dynamics.runs.run import Spectrum

__all__ = [
    "METRICS",
    "STUDY_METRICS",
    "Metric",
    "above",
    "condition_number",
    "condition_number_raw",
    "effective_rank",
    "exceeds_rank_bound",
    "frobenius_norm",
    "nuclear_norm",
    "numerical_rank",
    "outliers",
    "per_over_random",
    "proportional_effective_rank",
    "select_metrics",
    "spectral_norm",
    "stable_rank",
    "study_spectrum",
    "top_k_energy",
]


@dataclass(frozen=True)
class Metric:
    """One number of a spectrum, and how a result describes it.

    Attributes:
        function: computes the number from a `Spectrum`. One `Spectrum` can hold several matrices of
            one shape along leading axes; the function then returns one number for each.
        long_name: what plots and files call it.
        reference: the paper that defines it.
        units: "1" for a number without a unit.
        of_study: whether the `Spectrum` is that of `study_spectrum`, and not of `spectrum`.

    Example:
        >>> norm = Metric(lambda x: np.sqrt((x.s**2).sum(-1)), "Frobenius norm", units="weight")
        >>> float(norm.function(dy.spectrum(np.diag([3.0, 4.0]))))
        5.0
    """

    function: Callable[[Spectrum], ArrayLike]
    long_name: str
    reference: str = ""
    units: str = "1"
    of_study: bool = False


_ROY = "Roy & Vetterli 2007, definition 1"
_PER = "Diehl Martinez et al. 2024, arXiv 2410.11451"
_OF_WEIGHT = "units of the matrix"
_STUDY = "arXiv 2605.13652, its code; measured only when asked for"

METRICS: dict[str, Metric] = {
    "effective_rank": Metric(lambda x: effective_rank(x.s), "effective rank", _ROY),
    "effective_rank_above_floor": Metric(
        lambda x: effective_rank(above(x.s, x.floor)),
        "effective rank above the noise floor",
        _ROY,
    ),
    "proportional_effective_rank": Metric(
        lambda x: proportional_effective_rank(x.s), "proportional effective rank (PER)", _PER
    ),
    "per_over_random": Metric(
        lambda x: per_over_random(x.s, x.rows, x.cols),
        "PER / PER of a random matrix of the shape",
        _PER,
    ),
    "rank_bound": Metric(lambda x: x.rank_bound, "rank bound"),
    "rank_bound_use": Metric(
        lambda x: effective_rank(x.s) / x.rank_bound, "effective rank / rank bound"
    ),
    "exceeds_rank_bound": Metric(
        lambda x: exceeds_rank_bound(x.s, x.rank_bound, x.floor, x.error),
        "1 where a rank exceeds its bound",
    ),
    "stable_rank": Metric(
        lambda x: stable_rank(x.s), "stable rank", "Rudelson & Vershynin 2007, section 1"
    ),
    "numerical_rank": Metric(lambda x: numerical_rank(x.s, x.floor), "numerical rank"),
    "numerical_rank_raw": Metric(
        lambda x: numerical_rank(x.s, x.error), "numerical rank, raw: noise counts"
    ),
    "outliers": Metric(
        lambda x: outliers(x.s, x.rows, x.cols, x.floor),
        "singular values beyond the Marchenko-Pastur edge",
        "Gavish & Donoho 2014, section III.E",
    ),
    "condition_number": Metric(
        lambda x: condition_number(x.s, x.floor), "condition number above the noise floor"
    ),
    "condition_number_raw": Metric(
        lambda x: condition_number_raw(x.s, x.error), "condition number, raw"
    ),
    "frobenius_norm": Metric(lambda x: frobenius_norm(x.s), "Frobenius norm", units=_OF_WEIGHT),
    "spectral_norm": Metric(lambda x: spectral_norm(x.s), "spectral norm", units=_OF_WEIGHT),
    "nuclear_norm": Metric(lambda x: nuclear_norm(x.s), "nuclear norm", units=_OF_WEIGHT),
    "top_1_energy": Metric(
        lambda x: top_k_energy(x.s, 1), "share of the energy in the leading direction"
    ),
    "top_4_energy": Metric(
        lambda x: top_k_energy(x.s, 4), "share of the energy in the 4 leading directions"
    ),
    "top_16_energy": Metric(
        lambda x: top_k_energy(x.s, 16), "share of the energy in the 16 leading directions"
    ),
}

# Another study's definitions, beside ours. Each needs a decomposition of its own.
STUDY_METRICS: dict[str, Metric] = {
    "study_rank": Metric(
        lambda x: study_rank(x.s), "singular values above 1e-12", _STUDY, of_study=True
    ),
    "study_effective_rank": Metric(
        lambda x: study_effective_rank(x.s),
        "effective rank of what exceeds 1e-12",
        _STUDY,
        of_study=True,
    ),
    "study_stable_rank": Metric(
        lambda x: study_stable_rank(x.s), "stable rank in bfloat16", _STUDY, of_study=True
    ),
    "study_spectral_gap": Metric(
        lambda x: study_spectral_gap(x.s), "(s₁ - s₂) / s₁ in bfloat16", _STUDY, of_study=True
    ),
    "study_count_above_0_1": Metric(
        lambda x: study_count_above_0_1(x.s), "singular values above 0.1", _STUDY, of_study=True
    ),
}


def select_metrics(
    names: Iterable[str] | None, among: Mapping[str, Metric] | None = None
) -> dict[str, Metric]:
    """The rows of the tables with these names, in the order of the names; `METRICS` for None.

    Args:
        names: of metrics.
        among: the metrics to take them from; those of both tables by default.

    Raises:
        MissingError: a name is not in a table.

    Example:
        >>> list(select_metrics(["stable_rank", "effective_rank"]))
        ['stable_rank', 'effective_rank']
    """
    if names is None:
        return dict(METRICS)
    names = list(names)
    table = {**METRICS, **STUDY_METRICS} if among is None else among
    for name in names:
        if name not in table:
            raise MissingError(f"No metric {name!r}{near(name, table)}; known: {', '.join(table)}.")
    return {name: table[name] for name in names}
