"""Verdicts on weights and gradients: dead adapters, frozen layers, ranks above bounds, NaN."""

from collections.abc import Sequence

import numpy as np

from dynamics.auditing.observations import Observations
from dynamics.auditing.report import Severity, Verdict
from dynamics.runs.run import Run

DEAD_ADAPTER = "dead_adapter"
ZERO_GRADIENT = "zero_gradient"
FROZEN_LAYER = "frozen_layer"
RANK_BOUND = "rank_bound"
FINITE = "finite"
READABLE = "readable"


def judge_dead_adapters(all_seen: Sequence[Observations]) -> list[Verdict]:
    """Adapters with A = B = 0: dL/dA = s·Bᵀ·G and dL/dB = s·G·Aᵀ are zero, so they stay zero."""
    return [
        Verdict(
            check=DEAD_ADAPTER,
            severity=Severity.FAIL if seen.dead else Severity.PASS,
            meaning=(
                f"A and B are both zero in {len(seen.dead)} records ({_span(seen.dead)}): no "
                "gradient can reach either, and the layer does not learn; draw one of them anew."
                if seen.dead
                else "A and B are never both zero."
            ),
            matrix=seen.info.name,
            step=seen.dead[0] if seen.dead else None,
            measured=float(len(seen.dead)),
            threshold=0.0,
        )
        for seen in all_seen
        if seen.adapted
    ] or [_not_checked(DEAD_ADAPTER, "the run holds no adapters")]


def judge_zero_gradients(all_seen: Sequence[Observations]) -> list[Verdict]:
    """Parameters whose recorded gradient is exactly zero in every record."""
    verdicts = []
    for seen in all_seen:
        if not seen.gradients:
            continue
        always = len(seen.zero_gradients) == seen.gradients
        verdicts.append(
            Verdict(
                check=ZERO_GRADIENT,
                severity=Severity.FAIL if always else Severity.PASS,
                meaning=(
                    "The gradient is zero in every record: the parameter does not take part in "
                    "the loss, or what follows it is dead; look at what its output feeds."
                    if always
                    else "Gradients flow."
                ),
                matrix=seen.info.name,
                step=seen.zero_gradients[0] if always else None,
                measured=len(seen.zero_gradients) / seen.gradients,
            )
        )
    return verdicts or [_not_checked(ZERO_GRADIENT, "the run holds no gradients")]


def judge_frozen_layers(all_seen: Sequence[Observations]) -> list[Verdict]:
    """Layers whose weight does not move while the same module of other layers does.

    A module that rests in all layers was meant to; so were, most likely, whole layers from the
    first one up (fine-tuning freezes these), which gives a warning only.
    """
    inside = [seen for seen in all_seen if seen.info.layer is not None and seen.moved]
    if not inside:
        return [_not_checked(FROZEN_LAYER, "no weight of a layer is in two records")]
    frozen: dict[str, float] = {}  # share of the intervals in which only the sisters moved
    for seen in inside:
        sisters = [each for each in inside if each.info.module == seen.info.module]
        telling = [pair for pair in seen.moved if any(s.moved.get(pair, False) for s in sisters)]
        rested = sum(not seen.moved[pair] for pair in telling)
        frozen[seen.info.name] = rested / len(telling) if telling else 0.0
    meant = _frozen_from_below(inside, frozen)
    return [_frozen_layer(seen, frozen[seen.info.name], meant) for seen in inside]


def _frozen_from_below(inside: Sequence[Observations], frozen: dict[str, float]) -> set[int]:
    """The layers 0, 1, ... up to the first in which some matrix moved."""
    meant: set[int] = set()
    for layer in sorted({seen.info.layer for seen in inside if seen.info.layer is not None}):
        if any(frozen[seen.info.name] < 1 for seen in inside if seen.info.layer == layer):
            break
        meant.add(layer)
    return meant


def _frozen_layer(seen: Observations, share: float, meant: set[int]) -> Verdict:
    severity, meaning = Severity.PASS, "The weight moves whenever its module does in other layers."
    if share == 1 and seen.info.layer in meant:
        severity = Severity.WARN
        meaning = (
            "The weight never changes, nor does any other up to this layer; if these layers were "
            "meant to train, give their parameters to the optimizer."
        )
    elif share == 1:
        severity = Severity.FAIL
        meaning = (
            "The weight never changes while the same module of other layers does; check "
            "requires_grad of the layer and that the optimizer holds its parameters."
        )
    elif share > 0:
        severity = Severity.WARN
        meaning = (
            f"The weight rested in {share:.0%} of the intervals in which the same module of other "
            "layers moved; check what feeds it."
        )
    return Verdict(
        check=FROZEN_LAYER,
        severity=severity,
        meaning=meaning,
        matrix=seen.info.name,
        measured=share,
        threshold=0.0,
    )


def judge_ranks(all_seen: Sequence[Observations]) -> list[Verdict]:
    """Whether the displacement of adapted weights has no more rank than its cycles allow.

    An adapter's own rank needs no check: it is measured from its factors, and cannot exceed r.
    """
    verdicts = []
    for seen in all_seen:
        if seen.rank is None:
            continue
        step, bound, beyond, noise = seen.rank
        exceeded = beyond > noise
        verdicts.append(
            Verdict(
                check=RANK_BOUND,
                severity=Severity.FAIL if exceeded else Severity.PASS,
                meaning=(
                    f"The displacement has more than cycles · r = {bound} directions: something "
                    "besides the adapters changed the weight; freeze the base."
                    if exceeded
                    else f"The displacement has at most cycles · r = {bound} directions."
                ),
                matrix=seen.info.name,
                step=step,
                measured=beyond,
                threshold=noise,
            )
        )
    reason = "needs adapted weights, merge events and cycles · r below full rank"
    return verdicts or [_not_checked(RANK_BOUND, reason)]


def judge_finite(run: Run, all_seen: Sequence[Observations]) -> list[Verdict]:
    """NaN or Inf in weights, factors and gradients, and Inf among the logged values."""
    verdicts = []
    for seen in all_seen:
        bad = seen.non_finite
        verdicts.append(
            Verdict(
                check=FINITE,
                severity=Severity.FAIL if bad else Severity.PASS,
                meaning=(
                    f"NaN or Inf in {len(bad)} matrices, first in {bad[0][1]} at step {bad[0][0]}; "
                    "go back to a record before it and lower the learning rate."
                    if bad
                    else "All numbers are finite."
                ),
                matrix=seen.info.name,
                step=bad[0][0] if bad else None,
                measured=float(len(bad)),
                threshold=0.0,
            )
        )
    for name, series in run.scalars.items():
        infinite = np.flatnonzero(np.isinf(series))  # NaN is "not logged"
        if infinite.size:
            verdicts.append(
                Verdict(
                    check=FINITE,
                    severity=Severity.FAIL,
                    meaning=f"The logged {name} is infinite in {infinite.size} records.",
                    step=int(run.steps[infinite[0]]),
                    measured=float(infinite.size),
                    threshold=0.0,
                )
            )
    return verdicts


def judge_readable(run: Run, all_seen: Sequence[Observations]) -> list[Verdict]:
    """Checkpoints and chunks that cannot be read."""
    found = {str(problem): step for step, problem in run.problems.items()}
    for seen in all_seen:
        for problem, step in seen.unreadable.items():
            found.setdefault(problem, step)
    if not found:
        meaning = f"All {len(run.steps)} records were read."
        return [Verdict(check=READABLE, severity=Severity.PASS, meaning=meaning)]
    return [
        Verdict(check=READABLE, severity=Severity.FAIL, meaning=problem, step=step)
        for problem, step in found.items()
    ]


def _span(steps: list[int]) -> str:
    return f"step {steps[0]}" if len(steps) == 1 else f"steps {steps[0]} to {steps[-1]}"


def _not_checked(check: str, reason: str) -> Verdict:
    return Verdict(check=check, severity=Severity.NOT_CHECKED, meaning=reason)
