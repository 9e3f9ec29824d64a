"""Verdicts on what the mathematics of a method forces: bounds of ranks, and places of zeros."""

from collections.abc import Sequence

from dynamics.auditing.history import MatrixHistory
from dynamics.auditing.report import Severity, Verdict, not_checked

RANK_BOUND = "rank_bound"
SPARSE_SUPPORT = "sparse_support"


def judge_ranks(histories: Sequence[MatrixHistory]) -> list[Verdict]:
    """Whether matrices stay within the rank that the method allows them.

    These are displacements of adapted weights, updates within a projector's directions (GaLore),
    and W - S where the weight is s·B·A + S (SLTrain). The rank of an adapter itself needs no check:
    it is measured from the factors and cannot exceed r.
    """
    verdicts = []
    for history in histories:
        for fact, what, remedy in (
            (
                history.rank,
                "The displacement has {} cycles · r = {} directions",
                "not only the adapters changed the weight; freeze the base",
            ),
            (
                history.of_projectors,
                "The update has {} the {} directions of its projectors",
                "something else changed the weight too, such as weight decay, or a projector was "
                "not recorded; compare the steps around this record",
            ),
            (
                history.of_product,
                "W - S has {} r = {} directions",
                "the weight is not s·B·A + S; check how the layer computes it",
            ),
        ):
            if fact is None:
                continue
            step, bound, beyond, noise = fact
            exceeded = beyond > noise
            meaning = what.format("more than" if exceeded else "at most", bound)
            verdicts.append(
                Verdict(
                    check=RANK_BOUND,
                    severity=Severity.FAIL if exceeded else Severity.PASS,
                    meaning=f"{meaning}: {remedy}." if exceeded else f"{meaning}.",
                    matrix=history.info.name,
                    step=step,
                    measured=beyond,
                    threshold=noise,
                )
            )
    reason = (
        "needs a bound below full rank: adapted weights with merge events, recorded projectors of "
        "GaLore, or layers of SLTrain"
    )
    return verdicts or [not_checked(RANK_BOUND, reason)]


def judge_sparse_supports(histories: Sequence[MatrixHistory]) -> list[Verdict]:
    """Whether the sparse part of a weight stays at the places that were drawn for it (SLTrain).

    Runs of other methods have no such verdict.
    """
    verdicts = []
    for history in histories:
        entries = history.sparse_entries
        if entries is None or not history.places:
            continue
        grown = [step for step, used in history.places.items() if used > entries]
        used = max(history.places.values())
        verdicts.append(
            Verdict(
                check=SPARSE_SUPPORT,
                severity=Severity.FAIL if grown else Severity.PASS,
                meaning=(
                    f"S has {entries} entries, and the records up to this step use {used} places: "
                    "its support changed; keep sparse_index, also when you resume."
                    if grown
                    else f"S stays at its {entries} places."
                ),
                matrix=history.info.name,
                step=grown[0] if grown else None,
                measured=float(used),
                threshold=float(entries),
            )
        )
    return verdicts
