"""Verdicts on weights and gradients: dead adapters, frozen layers, NaN, damaged records."""

from collections.abc import Sequence

import numpy as np

from dynamics.auditing.history import MatrixHistory
from dynamics.auditing.report import Severity, Verdict, not_checked
from dynamics.runs.run import Run

DEAD_ADAPTER = "dead_adapter"
ZERO_GRADIENT = "zero_gradient"
FROZEN_LAYER = "frozen_layer"
FINITE = "finite"
READABLE = "readable"


def judge_dead_adapters(histories: Sequence[MatrixHistory]) -> list[Verdict]:
    """Adapters with A = B = 0. They stay zero: dL/dA = s·Bᵀ·G and dL/dB = s·G·Aᵀ are zero too."""
    return [
        Verdict(
            check=DEAD_ADAPTER,
            severity=Severity.FAIL if history.dead else Severity.PASS,
            meaning=(
                f"A and B are both zero in {len(history.dead)} records ({_span(history.dead)}): "
                "no gradient reaches either, so the layer does not learn; draw one of them anew."
                if history.dead
                else "A and B are never both zero."
            ),
            matrix=history.info.name,
            step=history.dead[0] if history.dead else None,
            measured=float(len(history.dead)),
            threshold=0.0,
        )
        for history in histories
        if history.adapted
    ] or [not_checked(DEAD_ADAPTER, "the run holds no adapters")]


def judge_zero_gradients(histories: Sequence[MatrixHistory]) -> list[Verdict]:
    """Parameters whose recorded gradient is exactly zero in every record."""
    verdicts = []
    for history in histories:
        if not history.gradients:
            continue
        always = len(history.zero_gradients) == history.gradients
        by_design = history.trains is False and not history.adapted
        meaning = "The gradient is not always zero."
        if always and by_design:
            meaning = "The gradient is zero in every record, and the weight does not train."
        elif always:
            meaning = (
                "The gradient is zero in every record: the loss does not depend on the "
                "parameter, or a layer after it is dead; check where its output goes."
            )
        verdicts.append(
            Verdict(
                check=ZERO_GRADIENT,
                severity=Severity.FAIL if always and not by_design else Severity.PASS,
                meaning=meaning,
                matrix=history.info.name,
                step=history.zero_gradients[0] if always else None,
                measured=len(history.zero_gradients) / history.gradients,
            )
        )
    return verdicts or [not_checked(ZERO_GRADIENT, "the run holds no gradients")]


def judge_frozen_layers(histories: Sequence[MatrixHistory]) -> list[Verdict]:
    """Layers whose weight does not change while the same module of other layers does.

    Weights with an adapter are compared with each other, and weights without with each other: the
    latter do not train where LoRA is on some layers only. A module that changes in no layer was
    frozen on purpose, unless it trains by its settings. Whole layers from the first one up were
    most likely frozen on purpose, too (fine-tuning does so), and so were whole layers without
    adapters; they give only a warning.
    """
    inside = [history for history in histories if history.info.layer is not None and history.moved]
    if not inside:
        return [not_checked(FROZEN_LAYER, "no weight of a layer is in two records")]
    # Of the intervals in which the module changed in any layer: the share without a change here.
    frozen: dict[str, float] = {}
    for history in inside:
        active = [
            pair
            for pair in history.moved
            if any(each.moved.get(pair, False) for each in inside if _should_move(history, each))
        ]
        at_rest = sum(not history.moved[pair] for pair in active)
        frozen[history.info.name] = at_rest / len(active) if active else 0.0
    from_below = _frozen_from_below(inside)
    whole = _whole_layers_at_rest(inside)
    return [
        _frozen_layer(
            each,
            frozen[each.info.name],
            from_below=each.info.layer in from_below,
            whole=each.info.layer in whole,
        )
        for each in inside
    ]


def _should_move(history: MatrixHistory, other: MatrixHistory) -> bool:
    """Whether a weight should change wherever the other one does."""
    if history.trains and not history.adapted and not any(history.moved.values()):
        return True  # it trains by its settings, whatever other layers do
    same = history.info.module == other.info.module and history.info.stack == other.info.stack
    return same and history.adapted == other.adapted


def _frozen_from_below(inside: Sequence[MatrixHistory]) -> set[int]:
    """The layers 0, 1, ... before the first one in which some matrix changed."""
    at_rest: set[int] = set()
    for layer in sorted({each.info.layer for each in inside if each.info.layer is not None}):
        if any(any(each.moved.values()) for each in inside if each.info.layer == layer):
            break
        at_rest.add(layer)
    return at_rest


def _whole_layers_at_rest(inside: Sequence[MatrixHistory]) -> set[int]:
    """The layers in which nothing has an adapter, and nothing changed."""
    layers = {each.info.layer for each in inside if each.info.layer is not None}
    active = {each.info.layer for each in inside if each.adapted or any(each.moved.values())}
    return layers - active


def _frozen_layer(
    history: MatrixHistory, share: float, *, from_below: bool, whole: bool
) -> Verdict:
    severity = Severity.PASS
    meaning = "The weight changes whenever the same module of other layers does."
    if not any(history.moved.values()) and not history.adapted and share == 0:
        meaning = "The weight has no adapter and never changes, nor does the module elsewhere."
    by_design = history.trains is False and not history.adapted
    if share == 1 and by_design:
        severity = Severity.WARN
        meaning = (
            "The weight never changes although the same module of other layers does, and no "
            "optimizer held it; if it should train, give it to the optimizer."
        )
    elif share == 1 and (from_below or (whole and history.trains is None)):
        severity = Severity.WARN
        what = "up to this layer" if from_below else "of this layer"
        meaning = (
            f"The weight never changes, and no other weight {what} does; if these layers "
            "should train, give their parameters to the optimizer."
        )
    elif share == 1:
        severity = Severity.FAIL
        meaning = (
            "The weight never changes although the same module of other layers does; check that "
            "its requires_grad is True and that the optimizer holds its parameters."
        )
        if history.trains and not history.adapted:
            meaning = (
                "The weight never changes although it trains by its settings and others change; "
                "check that the optimizer holds it, its learning rate and its gradient."
            )
    elif share > 0:
        severity = Severity.WARN
        meaning = (
            f"The weight did not change in {share:.0%} of the intervals in which the same module "
            "of other layers did; check its input."
        )
    return Verdict(
        check=FROZEN_LAYER,
        severity=severity,
        meaning=meaning,
        matrix=history.info.name,
        measured=share,
        threshold=0.0,
    )


def judge_finite(run: Run, histories: Sequence[MatrixHistory]) -> list[Verdict]:
    """NaN or Inf in weights, factors and gradients; Inf in the logged values."""
    verdicts = []
    for history in histories:
        bad = history.non_finite
        verdicts.append(
            Verdict(
                check=FINITE,
                severity=Severity.FAIL if bad else Severity.PASS,
                meaning=(
                    f"NaN or Inf in {len(bad)} matrices, first in {bad[0][1]} at step {bad[0][0]}; "
                    "resume from an earlier record with a lower learning rate."
                    if bad
                    else "All numbers are finite."
                ),
                matrix=history.info.name,
                step=bad[0][0] if bad else None,
                measured=float(len(bad)),
                threshold=0.0,
            )
        )
    for name, series in run.scalars.items():
        infinite = np.flatnonzero(np.isinf(series))  # NaN means "not logged"
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


def judge_readable(run: Run, histories: Sequence[MatrixHistory]) -> list[Verdict]:
    """Checkpoints and chunks that cannot be read."""
    problems = {str(problem): step for step, problem in run.problems.items()}
    for history in histories:
        for problem, step in history.unreadable.items():
            problems.setdefault(problem, step)
    if not problems:
        meaning = f"All {len(run.steps)} records were read."
        return [Verdict(check=READABLE, severity=Severity.PASS, meaning=meaning)]
    return [
        Verdict(check=READABLE, severity=Severity.FAIL, meaning=problem, step=step)
        for problem, step in problems.items()
    ]


def _span(steps: list[int]) -> str:
    return f"step {steps[0]}" if len(steps) == 1 else f"steps {steps[0]} to {steps[-1]}"
