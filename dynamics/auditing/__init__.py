"""audit(): what went wrong in a run: merges, resets, dead and frozen layers, NaN, as verdicts."""

from pathlib import Path

from dynamics import schema
from dynamics.auditing.events import (
    judge_learning_rate,
    judge_live_merges,
    judge_loss,
    judge_optimizer_resets,
)
from dynamics.auditing.merges import judge_adapter_resets, judge_frozen_bases, judge_merges
from dynamics.auditing.observations import observe
from dynamics.auditing.report import Report, Severity, Summary, Verdict
from dynamics.auditing.weights import (
    judge_dead_adapters,
    judge_finite,
    judge_frozen_layers,
    judge_ranks,
    judge_readable,
    judge_zero_gradients,
)
from dynamics.errors import MissingError
from dynamics.formats import open_run
from dynamics.runs.run import Run

__all__ = ["Report", "Severity", "Summary", "Verdict", "audit"]


def audit(run: Run | str | Path) -> Report:
    """Check a run for the defects that its files can show; see docs/audit.md.

    Every matrix is read once, two records at a time. Thresholds come from the rounding of the
    stored dtypes wherever a check compares stored numbers.

    Args:
        run: a Run, or the path of one.

    Returns:
        A verdict per check and matrix (and merge), with the measured number and its threshold.

    Raises:
        FormatError: `run` cannot be opened.
        MissingError: it has no records, or spectra instead of matrices.
    """
    run = run if isinstance(run, Run) else open_run(run)
    if len(run.steps) == 0:
        raise MissingError(f"{run.path} has no records yet; nothing to audit.")
    run.require_matrices("An audit")
    events = run.events
    merges = tuple(sorted({event.step for event in events if event.kind == schema.MERGE}))
    seen = [observe(run, info, merges) for info in run.matrices.values()]
    return Report(
        run.path,
        (
            *judge_readable(run, seen),
            *judge_finite(run, seen),
            *judge_merges(seen),
            *judge_live_merges(events),
            *judge_adapter_resets(seen),
            *judge_optimizer_resets(events),
            *judge_frozen_bases(seen),
            *judge_ranks(seen),
            *judge_dead_adapters(seen),
            *judge_zero_gradients(seen),
            *judge_frozen_layers(seen),
            *judge_learning_rate(run),
            *judge_loss(run),
        ),
    )
