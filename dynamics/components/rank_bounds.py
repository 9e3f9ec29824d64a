"""The largest rank that a difference of two weights can have, by how the weight was trained."""

from dynamics import schema
from dynamics.runs.run import Factored, Run


def difference_rank_bound(run: Run, name: str, before: int, now: int) -> int | None:
    """The largest rank of W_now - W_before, None where nothing bounds it.

    Adapters bound it (`cycles_rank_bound`), and so does an optimizer that moves a weight within a
    projector's directions alone: GaLore, whose recording has an event at each new projector.
    """
    if schema.ADAPTER not in run.stored_kinds:
        return _projections_rank_bound(run, name, before, now)
    if run.trains(name):  # the base itself, beside its adapter
        return None
    adapter, earlier = (run.read(name, step, schema.ADAPTER) for step in (now, before))
    if not isinstance(adapter, Factored) or not isinstance(earlier, Factored):
        return None
    merged_there = any(event.kind == schema.MERGE and event.step == before for event in run.events)
    is_zero = not (earlier.left.any() and earlier.right.any())
    bound = cycles_rank_bound(
        adapter.rank_bound,
        0 if is_zero else earlier.rank_bound,
        run.merges_between(name, before, now),
        merged_there=merged_there,
    )
    return min(bound, *adapter.shape)


def cycles_rank_bound(rank: int, earlier: int, merges: int, *, merged_there: bool) -> int:
    """The largest rank of a difference of two weights between which only adapters changed.

    Every merge in between adds the s·B·A of one cycle, of rank r, and the present adapter adds one
    more: r·(merges + 1). The earlier adapter is subtracted, which adds its rank, too. It does not
    if it was merged at that very step: then it cancels against the first merge. It cancels only if
    the merge added what it should, so a merge that leaves out s exceeds this bound.

    Args:
        rank: r of the present adapter.
        earlier: the rank of the adapter at the earlier step, 0 where that adapter was zero.
        merges: how many there were from the earlier step to the present one.
        merged_there: whether the first of them happened at the earlier step.
    """
    return rank * merges if merged_there else rank * (merges + 1) + earlier


def projectors(run: Run, name: str) -> dict[int, int]:
    """Step -> rank of each projector within whose directions alone the next steps move a weight.

    It is in use from the step after until the step at which the next one is taken.
    """
    return {  # a run that was resumed may have told one twice
        event.step: event.attrs["rank"]
        for event in run.events
        if event.kind == schema.PROJECTION
        and event.attrs.get("bounded") is True
        and isinstance(event.attrs.get("rank"), int)
        and isinstance(event.attrs.get("matrices"), list)
        and name in event.attrs["matrices"]
    }


def _projections_rank_bound(run: Run, name: str, before: int, now: int) -> int | None:
    ranks = {step: rank for step, rank in projectors(run, name).items() if step < now}
    used = [rank for step, rank in ranks.items() if step >= before]
    if before not in ranks:  # the projector before goes on
        earlier = [step for step in ranks if step < before]
        if not earlier:
            return None
        used.append(ranks[max(earlier)])
    info = run.matrices[name]
    return min(sum(used), info.rows, info.cols)
