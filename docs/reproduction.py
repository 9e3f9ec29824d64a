"""What rounding alone gives of the published update curves: the numbers of reproduction.md.

    python docs/reproduction.py [CURVES.csv]

CURVES.csv has columns metric, kind, component, scale, model, step, value; without it the
published values are left out of the tables.
"""

import csv
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch

from dynamics.metrics import METRICS, STUDY_METRICS, study_spectrum
from dynamics.runs.differences import Difference
from dynamics.runs.run import Dense, Spectrum
from dynamics.spectra.spectrum import spectrum

RANK = 16
LAYERS = 12  # the published values are means over these
LAST_STEP = 20_000
# (component, scale) -> (out, in): d 96 and 384, 12 heads, 4 key-value heads, hidden 4·d.
SHAPES = {
    ("attention.v_proj", "tiny"): (32, 96),
    ("attention.o_proj", "tiny"): (96, 96),
    ("swiglu.w_2", "tiny"): (96, 384),
    ("attention.v_proj", "small"): (128, 384),
    ("attention.o_proj", "small"): (384, 384),
    ("swiglu.w_2", "small"): (384, 1536),
}


@dataclass(frozen=True)
class Simulated:
    """A random rank-16 product B·A, before and after storing it in bfloat16.

    Each value is the mean over 12 layers, as published, and of that the median over the runs.
    """

    per_exact: float
    per_stored: float
    per_above_floor: float
    condition_number_stored: float
    condition_number_above_floor: float
    numerical_rank: float


def simulate(shape: tuple[int, int], runs: int = 5) -> Simulated:
    """Store Gaussian products B (m, 16) · A (16, n) in bfloat16 and measure what comes back."""
    exact, stored = [], []
    for seed in range(runs * LAYERS):
        rng = np.random.default_rng(seed)
        product = rng.standard_normal((shape[0], RANK)) @ rng.standard_normal((RANK, shape[1]))
        rounded = torch.from_numpy(product).to(torch.bfloat16).double().numpy()
        exact.append(spectrum(Dense(product, "float64")))
        stored.append(spectrum(Dense(rounded, "bfloat16")))
    k = min(shape)
    return Simulated(
        per_exact=_value(exact, "proportional_effective_rank"),
        per_stored=_value(stored, "proportional_effective_rank"),
        per_above_floor=_value(stored, "effective_rank_above_floor") / k,
        condition_number_stored=_value(stored, "condition_number_raw"),
        condition_number_above_floor=_value(stored, "condition_number"),
        numerical_rank=_value(stored, "numerical_rank"),
    )


def published(path: Path) -> dict[tuple[str, str, str], float]:
    """(metric, component, scale) -> the published value of ReLoRA's updates at the last step."""
    with path.open(newline="") as file:
        rows = [row for row in csv.DictReader(file) if row["kind"] == "updates"]
    return {
        (row["metric"], row["component"], row["scale"]): float(row["value"])
        for row in rows
        if row["model"] == "relora" and float(row["step"]) == LAST_STEP
    }


def initial(path: Path) -> list[tuple[str, str, str, str, float]]:
    """(metric, component, scale, model, value) of the published weights at step 0."""
    with path.open(newline="") as file:
        rows = [row for row in csv.DictReader(file) if row["kind"] == "weights"]
    return [
        (row["metric"], row["component"], row["scale"], row["model"], float(row["value"]))
        for row in rows
        if float(row["step"]) == 0
    ]


def initialisation(shape: tuple[int, int], runs: int = 2) -> tuple[float, float]:
    """PER and condition number of a Gaussian matrix, as an initialised weight is."""
    found = [
        spectrum(Dense(np.random.default_rng(seed).standard_normal(shape), "float64"))
        for seed in range(runs * LAYERS)
    ]
    return _value(found, "proportional_effective_rank"), _value(found, "condition_number")


def study(share: float, size: int = 512, rank: int = RANK) -> dict[str, dict[str, float]]:
    """What arXiv 2605.13652 counts of an update of low rank, and our numerical rank.

    Args:
        share: the update's Frobenius norm over that of the Gaussian weight it changes.
        size: rows and columns.
        rank: of the update.

    Returns:
        "float32" (its definitions without the rounding of its loader) and "bfloat16" (with it) ->
        metric -> value.
    """
    rng = np.random.default_rng(0)
    before = 0.02 * rng.standard_normal((size, size))
    update = rng.standard_normal((size, rank)) @ rng.standard_normal((rank, size))
    update *= share * np.linalg.norm(before) / np.linalg.norm(update)
    terms = [torch.tensor(each).float() for each in (before + update, before)]
    exact = Difference(*(Dense(each.numpy(), "float32") for each in terms))
    rounded = Difference(*(Dense(each.bfloat16().float().numpy(), "bfloat16") for each in terms))
    s = torch.linalg.svdvals(terms[0] - terms[1]).double().numpy()
    theirs = {
        "float32": Spectrum(s, size, size, size, 0.0, 0.0),
        "bfloat16": study_spectrum(exact),
    }
    ours = {"float32": spectrum(exact), "bfloat16": spectrum(rounded)}
    return {
        dtype: {name: float(each.function(of)) for name, each in STUDY_METRICS.items()}
        | {"numerical_rank": float(METRICS["numerical_rank"].function(ours[dtype]))}
        for dtype, of in theirs.items()
    }


def _value(found: list[Spectrum], metric: str) -> float:
    function: Callable = METRICS[metric].function
    values = np.array([function(each) for each in found], dtype=np.float64)
    return float(np.median(values.reshape(-1, LAYERS).mean(axis=1)))


def main(curves: Path | None) -> None:
    """Print the tables."""
    values = published(curves) if curves is not None else {}
    print("component, scale, shape | bound 16/k | PER: published, stored, above floor, exact |")
    print("condition number: published, stored, above floor | numerical rank")
    for (component, scale), shape in SHAPES.items():
        found = simulate(shape)
        per, condition = (
            values.get((metric, component, scale), float("nan"))
            for metric in ("per", "condition_number")
        )
        print(
            f"{component:17}{scale:6}{shape[0]:4} × {shape[1]:<5}| {RANK / min(shape):.4f} | "
            f"{per:.4f} {found.per_stored:.4f} {found.per_above_floor:.4f} {found.per_exact:.4f} | "
            f"{condition:9.3g} {found.condition_number_stored:9.3g} "
            f"{found.condition_number_above_floor:5.2f} | {found.numerical_rank:.0f}"
        )
    print("\nGaussian initialisation: PER, condition number")
    for scale, shape in (("tiny", (96, 384)), ("small", (384, 1536))):
        print(f"swiglu.w_2 {scale:6}", *(f"{value:.4f}" for value in initialisation(shape)))
    for row in initial(curves) if curves is not None else ():
        print("published", *row)
    print("\nWhat arXiv 2605.13652 counts of an update of rank 16, 512 × 512: float32, bfloat16")
    for share in (1, 0.1, 0.01, 0.001):
        found_of = study(share)
        columns = (
            f"{name} " + ", ".join(f"{each[name]:.1f}" for each in found_of.values())
            for name in found_of["float32"]
        )
        print(f"{share:6} |", " | ".join(columns))


if __name__ == "__main__":
    main(Path(sys.argv[1]) if len(sys.argv) > 1 else None)
