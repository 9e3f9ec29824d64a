"""Verdicts on the live measurements at merges and resets, and on the logged values around them.

`probes.checks` measures at the moment of a merge or reset. Its numbers are attributes of the run's
`merge` and `optimizer_reset` events; this file holds the names of these attributes.
"""

from collections.abc import Iterable, Mapping
from itertools import pairwise
from typing import Any

import numpy as np

from dynamics import schema
from dynamics.auditing.merges import named_scale
from dynamics.auditing.report import Severity, Verdict, not_checked
from dynamics.runs.run import Event, Run

LIVE_MERGE = "live_merge"
OPTIMIZER_RESET = "optimizer_reset"
MOMENTS = "moments"
LEARNING_RATE = "learning_rate"
LOSS = "loss_at_merges"

# Attributes of a merge event; they describe the layer where W_eff changed most.
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

# A restart begins at a small fraction of the old rate (0 in ReLoRA's jagged cosine). A decay that
# does not restart changes the rate by far less than half in one step.
_RATE_THAT_RESTARTED = 0.5


def judge_live_merges(events: Iterable[Event]) -> list[Verdict]:
    """Whether each merge kept W_eff, as measured at the moment of the merge."""
    merges = _of_kind(events, schema.MERGE)
    verdicts = [merge_verdict(event.step, event.attrs) for event in merges if CHANGE in event.attrs]
    reason = _no_facts(merges, "merge")
    return verdicts or [not_checked(LIVE_MERGE, reason)]


def merge_verdict(step: int, facts: Mapping[str, Any]) -> Verdict:
    """The verdict on one merge, from the facts of `probes.checks.merge_facts`."""
    failed = facts[CHANGE] > facts[TOLERANCE]
    if not failed:
        meaning = "W_eff was the same before and after the merge."
    elif abs(facts[SCALE] - 1) <= facts[TOLERANCE]:
        meaning = (
            "The merge was correct, but W_eff changed: the adapter still adds its product, so the "
            "update counts twice; reset the adapter after the merge."
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
    """Whether each reset emptied the moments, and emptied both moments of an entry together."""
    resets = _of_kind(events, schema.OPTIMIZER_RESET)
    verdicts = [
        verdict
        for event in resets
        if ZERO_FIRST in event.attrs
        for verdict in optimizer_verdicts(event.step, event.attrs)
    ]
    reason = _no_facts(resets, "optimizer_reset")
    return verdicts or [not_checked(check, reason) for check in (OPTIMIZER_RESET, MOMENTS)]


def optimizer_verdicts(step: int, facts: Mapping[str, Any]) -> list[Verdict]:
    """The verdicts on one reset, from the facts of `probes.checks.optimizer_state_facts`."""
    requested = float(facts.get(RESET_SHARE, 1.0))
    emptied = min(facts[ZERO_FIRST], facts[ZERO_SECOND])
    complete = emptied >= requested * (1 - 1e-12)  # the share went through a division
    unbalanced = facts[UNBALANCED]
    shares = (
        f"{emptied:.4g} of the entries of the adapters' moments are zero, {requested:.4g} were "
        "requested"
    )
    return [
        Verdict(
            check=OPTIMIZER_RESET,
            severity=Severity.PASS if complete else Severity.FAIL,
            meaning=(
                f"{shares}."
                if complete
                else f"The reset did not take effect: {shares}; clear the optimizer's state of "
                "exactly these parameters."
            ),
            step=step,
            measured=1 - emptied,
            threshold=1 - requested,
        ),
        Verdict(
            check=MOMENTS,
            severity=Severity.FAIL if unbalanced > 0 else Severity.PASS,
            meaning=(
                f"{unbalanced:.2g} of the entries keep the first moment although the second was "
                "set to zero, so Adam's next step there is far larger than its learning rate; "
                "prune both moments with one mask."
                if unbalanced > 0
                else "The first and second moments were emptied together."
            ),
            matrix=facts.get(WORST_PARAMETER) if unbalanced > 0 else None,
            step=step,
            measured=unbalanced,
            threshold=0.0,
        ),
    ]


def judge_learning_rate(run: Run) -> list[Verdict]:
    """Whether the learning rate restarted wherever the optimizer's state was emptied."""
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
                    f"The learning rate restarted: {before:.3g}, then {after:.3g}."
                    if restarted
                    else "The optimizer's state was emptied, but the learning rate did not restart "
                    f"({before:.3g}, then {after:.3g}); the first steps of an empty Adam are badly "
                    "estimated, so warm up again."
                ),
                step=event.step,
                measured=after / before,
                threshold=_RATE_THAT_RESTARTED,
            )
        )
    reason = "needs an optimizer_reset event and the rates of the steps before and after it"
    return verdicts or [not_checked(LEARNING_RATE, reason)]


def judge_loss(run: Run) -> list[Verdict]:
    """How the logged loss changed across merges; for information only, it never fails."""
    losses = _series(run, "loss")
    merges = {event.step for event in _of_kind(run.events, schema.MERGE)}
    across, elsewhere = [], [0.0]
    for earlier, later in pairwise(losses):
        crossed = [step for step in merges if earlier <= step < later]
        rise = losses[later] - losses[earlier]
        if crossed:
            across.append((rise, crossed[0]))
        else:
            elsewhere.append(rise)
    if not across:
        return [
            not_checked(LOSS, "needs merge events, and a logged loss before and after one of them")
        ]
    rise, step = max(across)
    return [
        Verdict(
            check=LOSS,
            severity=Severity.PASS,
            meaning=(
                f"From record to record, the logged loss changed by at most {rise:+.3g} across "
                f"merges and by at most {max(elsewhere):+.3g} elsewhere (for information only)."
            ),
            step=step,
            measured=rise,
        )
    ]


def _series(run: Run, name: str) -> dict[int, float]:
    """Step -> logged value, for the steps that have one."""
    series = run.scalars.get(name, np.full(len(run.steps), np.nan))
    pairs = zip(run.steps.tolist(), series.tolist(), strict=True)
    return {step: value for step, value in pairs if np.isfinite(value)}


def _of_kind(events: Iterable[Event], kind: str) -> list[Event]:
    return [event for event in events if event.kind == kind]


def _no_facts(events: list[Event], kind: str) -> str:
    if not events:
        return f"the run has no {kind} events"
    return f"the {kind} events hold no live measurements; record them with probes.checks"
