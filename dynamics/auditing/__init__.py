"""audit(): verdicts on merges, resets, dead and frozen layers, and NaN in a run."""

from collections.abc import Callable, Iterable
from pathlib import Path

from dynamics import schema
from dynamics.auditing.against import contents_of, judge_distinct_runs
from dynamics.auditing.beginning import judge_step_zero
from dynamics.auditing.bounds import judge_ranks, judge_sparse_supports
from dynamics.auditing.events import (
    judge_learning_rate,
    judge_live_merges,
    judge_loss,
    judge_optimizer_resets,
)
from dynamics.auditing.history import read_history
from dynamics.auditing.merges import judge_adapter_resets, judge_frozen_bases, judge_merges
from dynamics.auditing.order import (
    Contents,
    contents_read,
    contents_stated,
    judge_distinct,
    judge_order,
)
from dynamics.auditing.report import Report, Severity, Summary, Verdict
from dynamics.auditing.weights import (
    judge_dead_adapters,
    judge_finite,
    judge_frozen_layers,
    judge_readable,
    judge_zero_gradients,
)
from dynamics.errors import MissingError
from dynamics.formats import open_run
from dynamics.runs.matrix_cache import CachedRun
from dynamics.runs.run import Run

__all__ = ["Report", "Severity", "Summary", "Verdict", "audit"]


def audit(
    run: Run | str | Path,
    *,
    hashes_only: bool = False,
    against: Iterable[Run | str | Path] = (),
) -> Report:
    """Check a run for the defects that its files can show; docs/audit.md lists the checks.

    Each matrix is read once. Four of its records are in memory at a time, and up to 512 MiB of
    what was read lately. Where a check compares stored numbers, its threshold comes from the
    rounding of their dtypes.

    Args:
        run: a Run, or the path of one.
        hashes_only: check only what the hub states of the files of a run there, and read nothing:
            `readable` and `distinct_checkpoints`.
        against: other runs. `distinct_runs` names records that hold the numbers of theirs; each of
            their matrices is read once, or its hash is, as that of `run`.

    Returns:
        One verdict per check and matrix (and merge), with the measured number and its threshold.
        A check that the run cannot answer has the severity "not checked" and the reason.

    Raises:
        FormatError: `run` is a path that cannot be opened.
        MissingError: the run has no records, or holds singular values instead of matrices.
        DynamicsError: `hashes_only` of a run that does not lie on the hub.

    Example:
        >>> report = dy.audit("run.zarr")
        >>> report.failed
        False
        >>> [summary.check for summary in report.summaries][2:5]
        ['distinct_checkpoints', 'ordered_history', 'step_zero']
        >>> print(report.of("finite")[0].severity, report.of("finite")[0].meaning)
        pass All numbers are finite.
    """
    # The parts of a fused matrix are read one after the other; the matrix itself only once.
    run = CachedRun(run if isinstance(run, Run) else open_run(run))
    if len(run.steps) == 0:
        raise MissingError(
            f"{run.path} has no records yet, so there is nothing to audit: audit it later."
        )
    run.require_matrices("An audit")
    steps = run.steps.tolist()
    if hashes_only:
        contents = contents_stated(run)
        apart = _against(contents, against, contents_stated)
        stated = judge_distinct(steps, contents)
        return Report(run.path, (*judge_readable(run, []), *stated, *apart))
    events = run.events
    merges = tuple(sorted({event.step for event in events if event.kind == schema.MERGE}))
    histories = [read_history(run, info, merges) for info in run.matrices.values()]
    contents = contents_read(histories)
    order = judge_order(run, histories)
    wrong = {
        each.step for each in order if each.severity is Severity.FAIL and each.step is not None
    }
    return Report(
        run.path,
        (
            *judge_readable(run, histories),
            *judge_finite(run, histories),
            *judge_distinct(steps, contents),
            *_against(contents, against, contents_of),
            *order,
            *judge_step_zero(run, histories, wrong),
            *judge_merges(histories),
            *judge_live_merges(events),
            *judge_adapter_resets(histories),
            *judge_optimizer_resets(events),
            *judge_frozen_bases(histories),
            *judge_ranks(histories),
            *judge_sparse_supports(histories),
            *judge_dead_adapters(histories),
            *judge_zero_gradients(histories),
            *judge_frozen_layers(histories),
            *judge_learning_rate(run),
            *judge_loss(run),
        ),
    )


def _against(
    contents: Contents, others: Iterable[Run | str | Path], contents_of: Callable[[Run], Contents]
) -> list[Verdict]:
    verdicts: list[Verdict] = []
    for each in others:
        other = each if isinstance(each, Run) else open_run(each)
        verdicts += judge_distinct_runs(contents, other.path, contents_of(other))
    return verdicts
