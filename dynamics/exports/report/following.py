"""follow_report(): a report that is made anew whenever a run in progress has something new."""

from collections.abc import Callable
from pathlib import Path
from typing import Unpack

from dynamics import schema
from dynamics.analysis.execution import Execution
from dynamics.analysis.following import follow
from dynamics.analysis.selection import SelectionOptions
from dynamics.exports.files import check_file
from dynamics.exports.report.audits import checks_of_run
from dynamics.exports.report.report import write_report
from dynamics.exports.report.runs import comparison_of
from dynamics.exports.report.server import LivePage, serving
from dynamics.exports.report.sources import with_audits
from dynamics.runs.run import Run


def follow_report(
    run: Callable[[], Run],
    output: Path,
    execution: Execution,
    *,
    name: str,
    stopped: Callable[[], bool],
    say: Callable[[str], None],
    port: int = 8000,
    interval: float = 10.0,
    title: str | None = None,
    audit: bool = True,
    overwrite: bool = False,
    command: str | None = None,
    **choice: Unpack[SelectionOptions],
) -> None:
    """Serve the report of a run, made anew whenever the run has changed, until `stopped` says so.

    The last report stays in the file.

    Args:
        run: opens the run.
        output: the file.
        execution: how the run is measured.
        name: what the run is called.
        stopped: whether to end.
        say: prints a line.
        port: of the server on this machine; 0 for any that is free.
        interval: seconds between two looks.
        title: see `report`.
        audit: whether the run is audited each time; that reads all of its matrices.
        overwrite: whether the file may replace one that was there before.
        command: see `report`.
        choice: what is measured, see `analyze`.

    Raises:
        OutputExistsError: the file exists and may not be replaced.
        DynamicsError: the port is taken.
    """
    path = check_file(output, overwrite=overwrite)
    page = LivePage()
    with serving(page, port) as address:
        say(f"Serving {address} until Ctrl-C")
        results = follow(
            run,
            stopped=stopped,
            interval=interval,
            waiting=lambda reason: None if reason is None else say(f"waiting: {reason}"),
            execution=execution,
            **choice,
        )
        for result in results:
            comparison = comparison_of(result, name)
            if audit:
                comparison = with_audits(comparison, {name: checks_of_run(run())})
            write_report(comparison, path, title=title, command=command, follow=page.next_version)
            page.show(path)
            say(f"step {int(result[schema.STEP][-1])}: {path}")
