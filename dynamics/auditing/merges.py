"""Verdicts on merges: W_eff kept, update not lost to rounding, adapter drawn anew, base frozen.

A frozen base changes only at merges. So, between the record at a merge step N and any later record
before the next merge, base(later) - base(N) must equal s·B_N·A_N (Lialin et al. 2023, arXiv
2307.05695, algorithm 1).
"""

from collections.abc import Sequence

from scipy.stats import binom

from dynamics.auditing.history import MatrixHistory
from dynamics.auditing.record_pairs import Merge, Restart
from dynamics.auditing.report import Severity, Verdict, not_checked

MERGE_FIDELITY = "merge_fidelity"
ROUNDING_LOSS = "rounding_loss"
ADAPTER_RESET = "adapter_reset"
FROZEN_BASE = "frozen_base"

# How much of an update a merge may lose is a convention, not a noise level: here the noise itself
# is measured. float32 never loses a hundredth; bfloat16 does for small updates. A tenth of the norm
# is more than the error of most later measurements of the update.
LOSS_TO_WARN = 0.01
LOSS_TO_FAIL = 0.1
# Probability that an audit of a healthy run calls any adapter kept, over all tests of the audit.
FALSE_ALARM = 1e-4
# Cosine of old and new factor above which the new one continues the old one.
KEPT = 0.5


def named_scale(scale: float, scaling: float, tolerance: float) -> str:
    """The likely mistake behind a merge, and its remedy, from the scale that was merged.

    Args:
        scale: the c for which c·s·B·A fits Δbase best; 1 for a correct merge.
        scaling: the adapter's s.
        tolerance: how far rounding can move c.
    """
    candidates = (
        (
            1 / scaling,
            f"the merge forgot the scale s = {scaling:g} (it added B·A, so only 1/s = "
            f"{1 / scaling:.3g} of the update was kept and the function jumped); merge s·B·A",
        ),
        (
            0.0,
            "the base did not change, so the cycle's update was thrown away; merge, then reset",
        ),
        (scaling, f"the scale s = {scaling:g} was applied twice; merge s·B·A once"),
        (2.0, "the update was merged twice; merge it once"),
        (-1.0, "the update was subtracted; add it"),
    )
    fitting = [
        meaning for value, meaning in candidates if value != 1 and abs(scale - value) <= tolerance
    ]
    if fitting:
        return " - or ".join(fitting)
    if abs(scale - 1) <= tolerance:
        return "something else was added to the base at the merge; add s·B·A and nothing else"
    return f"the base got {scale:.3g} times the update; merge s·B·A, s = {scaling:g}"


def judge_merges(histories: Sequence[MatrixHistory]) -> list[Verdict]:
    """Merge fidelity and rounding loss of every merge that the records show."""
    adapted = [history for history in histories if history.adapted]
    if not adapted:
        reason = "the run holds no adapters"
        return [not_checked(check, reason) for check in (MERGE_FIDELITY, ROUNDING_LOSS)]
    merged_at = {merge.step for history in adapted for merge in history.merges}
    verdicts: list[Verdict] = []
    for history in adapted:
        name = history.info.name
        # All layers are merged together: one layer with a clear merge dates the others' merges.
        clear = [merge for merge in history.unclear if merge.step in merged_at]
        for merge in (*history.merges, *clear):
            verdicts += (_fidelity(name, merge), _rounding_loss(name, merge))
        unchecked = {
            merge.step: (
                "the base changed by something that is not a multiple of this record's adapter; "
                "it was merged at a step without a record, or several times"
            )
            for merge in history.unclear
            if merge not in clear
        }
        for step, reason in (history.unchecked | unchecked).items():
            verdicts += [
                not_checked(check, f"Not known: {reason}.", name, step)
                for check in (MERGE_FIDELITY, ROUNDING_LOSS)
            ]
    if not verdicts:
        reason = "no merge is recorded, and no base weight changed between records"
        return [not_checked(check, reason) for check in (MERGE_FIDELITY, ROUNDING_LOSS)]
    return verdicts


def _fidelity(name: str, merge: Merge) -> Verdict:
    jump, threshold = merge.residual / merge.update, merge.bound / merge.update
    loose = merge.tf32_bound / merge.update
    change = f"the base changed by {merge.scale:.6g} times s·B·A"
    if jump <= threshold and threshold < 1:
        severity, meaning = Severity.PASS, f"W_eff stayed the same: {change}."
    elif jump <= loose < 1:
        severity = Severity.WARN
        meaning = (
            f"W_eff changed by more than rounding to {merge.dtype} explains, but by no more than "
            f"TF32 products explain ({change}); merge with float32 products."
        )
    elif jump <= loose:
        severity = Severity.NOT_CHECKED
        meaning = f"Not known: the update is smaller than the rounding error of {merge.dtype}."
    else:
        severity = Severity.FAIL
        cause = named_scale(merge.scale, merge.scaling, loose)
        meaning = f"W_eff changed at the merge ({change}): {cause}."
    return Verdict(
        check=MERGE_FIDELITY,
        severity=severity,
        meaning=meaning,
        matrix=name,
        step=merge.step,
        measured=jump,
        threshold=threshold,
    )


def _rounding_loss(name: str, merge: Merge) -> Verdict:
    if merge.lost > LOSS_TO_FAIL:
        severity = Severity.FAIL
    else:
        severity = Severity.WARN if merge.lost > LOSS_TO_WARN else Severity.PASS
    meaning = (
        f"Storing base + s·B·A in {merge.dtype} has an error of {merge.lost:.2g} of the update's "
        f"norm (expected for this dtype: {merge.lost_expected:.2g}) and keeps "
        f"{1 - merge.lost_along:.4g} of the update along its own direction"
    )
    meaning += "." if severity is Severity.PASS else "; keep the base weights in float32."
    return Verdict(
        check=ROUNDING_LOSS,
        severity=severity,
        meaning=meaning,
        matrix=name,
        step=merge.step,
        measured=merge.lost,
        threshold=LOSS_TO_FAIL if severity is Severity.FAIL else LOSS_TO_WARN,
    )


def judge_adapter_resets(histories: Sequence[MatrixHistory]) -> list[Verdict]:
    """Whether the adapter after a merge was drawn anew, or continues the one before.

    A drawn component (a row of A with its column of B) and its negative are equally likely, and
    they train to each other's negative. Whatever the training does, a new component therefore
    points in the old one's direction with probability 1/2, independently of all others. So the
    number of agreeing components is binomial with p = 1/2, over the components of one merge and
    over those of one matrix. A kept adapter agrees in all components.
    """
    restarts = [(history, each) for history in histories for each in history.restarts]
    if not restarts:
        return [not_checked(ADAPTER_RESET, "no adapter is recorded on both sides of a merge")]
    pools: dict[int | str, list[Restart]] = {}
    for history, restart in restarts:
        pools.setdefault(restart.step, []).append(restart)
        pools.setdefault(history.info.name, []).append(restart)
    level = FALSE_ALARM / (2 * len(pools))  # each pool may be tested by both factors
    return [
        _adapter_reset(history, restart, (pools[restart.step], pools[history.info.name]), level)
        for history, restart in restarts
    ]


def _adapter_reset(
    history: MatrixHistory, restart: Restart, pools: Sequence[Sequence[Restart]], level: float
) -> Verdict:
    # Only the drawn factor is evidence. The other one grows from zero along whatever momentum the
    # optimizer kept, so it may follow the old direction after a correct reset. A record in which
    # one factor is zero shows which one is drawn; without such a record both must agree.
    tested = (0, 1) if history.drawn is None else (history.drawn,)
    cosine, factor = min((restart.cosines[each], each) for each in tested)
    counts = [
        (sum(each.agreeing[factor] for each in pool), sum(each.components[factor] for each in pool))
        for pool in pools
    ]
    severity, meaning = Severity.PASS, "The adapter after the merge was drawn anew."
    if cosine > KEPT and any(binom.sf(n - 1, total, 0.5) < level for n, total in counts):
        severity = Severity.FAIL
        meaning = (
            "The reset did not take effect: the adapter continues the one before the merge "
            f"({counts[0][0]} of {counts[0][1]} components point in the old direction, and the "
            f"adapter still holds {restart.kept:.2g} of the product that was merged); draw A and B "
            "anew."
        )
    elif cosine > KEPT and all(0.5**total >= level for _, total in counts):
        severity = Severity.NOT_CHECKED
        meaning = "Not known: too few components to distinguish a kept adapter from chance."
    return Verdict(
        check=ADAPTER_RESET,
        severity=severity,
        meaning=meaning,
        matrix=history.info.name,
        step=restart.step,
        measured=cosine,
        threshold=KEPT,
    )


def judge_frozen_bases(histories: Sequence[MatrixHistory]) -> list[Verdict]:
    """Whether base weights stayed the same between merges; needs a recording with merge events."""
    verdicts = []
    for history in histories:
        if not history.drifts:
            continue
        step, drift, bound = max(history.drifts, key=lambda each: each[1] - each[2])
        moved = drift > bound
        verdicts.append(
            Verdict(
                check=FROZEN_BASE,
                severity=Severity.FAIL if moved else Severity.PASS,
                meaning=(
                    "The base weight changed between merges: it is trained together with its "
                    "adapter, or a merge was not recorded as an event; freeze the base, or record "
                    "the merge."
                    if moved
                    else "The base weight changed only at merges."
                ),
                matrix=history.info.name,
                step=step,
                measured=drift,
                threshold=bound,
            )
        )
    reason = "no two records of adapters lie between the same recorded merges"
    return verdicts or [not_checked(FROZEN_BASE, reason)]
