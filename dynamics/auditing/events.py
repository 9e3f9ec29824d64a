"""Verdicts on what was measured live at merges and resets, and on the logged values around them.

`probes.checks` measures at the moment of a merge; its numbers are attributes of the run's `merge`
and `optimizer_reset` events, spelled here.
"""

from collections.abc import Iterable, Mapping
from itertools import pairwise
from typing import Any

import numpy as np

from dynamics import schema
from dynamics.auditing.merges import named_scale
from dynamics.auditing.report import Severity, Verdict
from dynamics.runs.run import Event, Run

LIVE_MERGE = "live_merge"
OPTIMIZER_RESET = "optimizer_reset"
MOMENTS = "moments"
LEARNING_RATE = "learning_rate"
LOSS = "loss_at_merges"

# Attributes of a merge event, of its worst layer.
CHANGE, TOLERANCE, SCALE, SCALING, WORST_LAYER = (
    "relative_change",
    "tolerance",
    "scale",
    "worst_scaling",
    "worst_layer",
)
# Attributes of an optimizer_reset event.
ZERO_FIRST, ZERO_SECOND = "zero_exp_avg", "zero_exp_avg_sq"
UNBALANCED, WORST_PARAMETER = "momentum_without_variance", "worst_parameter"
RESET_SHARE, RATE = "reset_share", "learning_rate"

# A restart begins at a fraction of the old rate (0 in ReLoRA's jagged cosine); a decay that goes
# on as if nothing had happened changes it by far less than half in one step.
_RATE_THAT_RESTARTED = 0.5


def judge_live_merges(events: Iterable[Event]) -> list[Verdict]:
    """Whether W_eff stayed at each merge, as measured when it happened."""
    merges = _of_kind(events, schema.MERGE)
    verdicts = [merge_verdict(event.step, event.attrs) for event in merges if CHANGE in event.attrs]
    reason = _no_facts(merges, "merge")
    return verdicts or [_not_checked(LIVE_MERGE, reason)]


def merge_verdict(step: int, facts: Mapping[str, Any]) -> Verdict:
    """The verdict on the facts of one merge (see `probes.checks.merge_facts`)."""
    failed = facts[CHANGE] > facts[TOLERANCE]
    if not failed:
        meaning = "W_eff was the same before and after the merge."
    elif abs(facts[SCALE] - 1) <= facts[TOLERANCE]:
        meaning = (
            "The merge was right and W_eff changed nevertheless, so the adapter still adds to it: "
            "the update counts twice; reset the adapter."
        )
    else:
        cause = named_scale(facts[SCALE], facts[SCALING], facts[TOLERANCE])
        meaning = f"W_eff changed at the merge (scale {facts[SCALE]:.4g}): {cause}."
    return Verdict(
        check=LIVE_MERGE,
        severity=Severity.FAIL if failed else Severity.PASS,
        meaning=meaning,
        matrix=facts[WORST_LAYER],
        step=step,
        measured=facts[CHANGE],
        threshold=facts[TOLERANCE],
    )


def judge_optimizer_resets(events: Iterable[Event]) -> list[Verdict]:
    """Whether each reset took, and left no momentum over an emptied variance."""
    resets = _of_kind(events, schema.OPTIMIZER_RESET)
    verdicts = []
    for event in resets:
        if ZERO_FIRST in event.attrs:
            verdicts += optimizer_verdicts(event.step, event.attrs)
    reason = _no_facts(resets, "optimizer_reset")
    return verdicts or [_not_checked(check, reason) for check in (OPTIMIZER_RESET, MOMENTS)]


def optimizer_verdicts(step: int, facts: Mapping[str, Any]) -> list[Verdict]:
    """The verdicts on the facts of one reset (see `probes.checks.optimizer_state_facts`)."""
    asked = float(facts.get(RESET_SHARE, 1.0))
    emptied = min(facts[ZERO_FIRST], facts[ZERO_SECOND])
    took = emptied >= asked * (1 - 1e-12)  # the share went through a division
    unbalanced = facts[UNBALANCED]
    return [
        Verdict(
            check=OPTIMIZER_RESET,
            severity=Severity.PASS if took else Severity.FAIL,
            meaning=(
                f"{emptied:.4g} of the adapters' moments are empty, {asked:.4g} were to be."
                if took
                else f"The reset did not take: {emptied:.4g} of the adapters' moments are empty, "
                f"{asked:.4g} were to be; clear the state of these very parameters."
            ),
            step=step,
            measured=1 - emptied,
            threshold=1 - asked,
        ),
        Verdict(
            check=MOMENTS,
            severity=Severity.FAIL if unbalanced > 0 else Severity.PASS,
            meaning=(
                f"{unbalanced:.2g} of the entries keep a momentum over a zeroed variance, so "
                "Adam's next step there exceeds its learning rate by far; prune both moments with "
                "one mask."
                if unbalanced > 0
                else "First and second moments were emptied together."
            ),
            matrix=facts.get(WORST_PARAMETER) if unbalanced > 0 else None,
            step=step,
            measured=unbalanced,
            threshold=0.0,
        ),
    ]


def judge_learning_rate(run: Run) -> list[Verdict]:
    """Whether the learning rate restarted where the optimizer's state was emptied."""
    rates = _series(run, RATE)
    verdicts = []
    for event in _of_kind(run.events, schema.OPTIMIZER_RESET):
        before, after = rates.get(event.step), event.attrs.get(RATE, rates.get(event.step + 1))
        if before is None or after is None or before <= 0:
            continue
        restarted = after <= _RATE_THAT_RESTARTED * before
        verdicts.append(
            Verdict(
                check=LEARNING_RATE,
                severity=Severity.PASS if restarted else Severity.WARN,
                meaning=(
                    f"The learning rate restarted at {after:.3g} after {before:.3g}."
                    if restarted
                    else f"The optimizer's state was emptied and the learning rate went on, "
                    f"{before:.3g} to {after:.3g}; the first steps of an empty Adam are badly "
                    "estimated, so warm up again."
                ),
                step=event.step,
                measured=after / before,
                threshold=_RATE_THAT_RESTARTED,
            )
        )
    reason = "needs an optimizer_reset event and the rates of the steps before and after it"
    return verdicts or [_not_checked(LEARNING_RATE, reason)]


def judge_loss(run: Run) -> list[Verdict]:
    """How the logged loss changed across merges; for information, it never fails."""
    losses = _series(run, "loss")
    steps = list(losses)
    merges = {event.step for event in _of_kind(run.events, schema.MERGE)}
    across, elsewhere = [], [0.0]
    for one, other in pairwise(steps):
        crossed = [step for step in merges if one <= step < other]
        rise = losses[other] - losses[one]
        if crossed:
            across.append((rise, crossed[0]))
        else:
            elsewhere.append(rise)
    if not across:
        return [_not_checked(LOSS, "needs merge events and a logged loss on both sides of one")]
    rise, step = max(across)
    return [
        Verdict(
            check=LOSS,
            severity=Severity.PASS,
            meaning=(
                f"Across merges the logged loss changed by at most {rise:+.3g}, elsewhere by at "
                f"most {max(elsewhere):+.3g} from record to record (for information)."
            ),
            step=step,
            measured=rise,
        )
    ]


def _series(run: Run, name: str) -> dict[int, float]:
    """Step -> logged value, where there is one."""
    series = run.scalars.get(name, np.full(len(run.steps), np.nan))
    pairs = zip(run.steps.tolist(), series.tolist(), strict=True)
    return {step: value for step, value in pairs if np.isfinite(value)}


def _of_kind(events: Iterable[Event], kind: str) -> list[Event]:
    return [event for event in events if event.kind == kind]


def _no_facts(events: list[Event], kind: str) -> str:
    if not events:
        return f"the run has no {kind} events"
    return f"the {kind} events hold no live measurement; probes.checks makes them"


def _not_checked(check: str, reason: str) -> Verdict:
    return Verdict(check=check, severity=Severity.NOT_CHECKED, meaning=reason)
