"""What the command line prints: results to stdout, progress and problems to stderr."""

import json
import sys
import warnings
from contextlib import contextmanager
from functools import partial
from typing import TYPE_CHECKING, Any

import typer

from dynamics import schema

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Mapping

    import xarray as xr
    from rich.console import Console
    from rich.table import Table

    from dynamics.analysis.analyze import Progress
    from dynamics.formats.hub.cost import Cost

_NO_WIDTH = 10**6
_MUCH, _VERY_MUCH = 50 * 10**6, 2 * 10**9  # bytes


@contextmanager
def progress_bar(name: str) -> "Iterator[Progress]":
    """A progress bar for `analyze`, whose warnings are printed at the end instead.

    An IntervalWarning is printed like an own warning of the command.
    """
    from rich.progress import (
        BarColumn,
        MofNCompleteColumn,
        Progress,
        Task,
        TextColumn,
        TimeRemainingColumn,
    )
    from rich.text import Text

    class Rate(TextColumn):
        def render(self, task: Task) -> Text:
            return Text("" if task.speed is None else f"{task.speed:.1f} spectra/s")

    from dynamics.errors import IntervalWarning, UnmeasuredWarning

    columns = (
        TextColumn("{task.description}", markup=False),  # names of runs hold anything
        BarColumn(),
        MofNCompleteColumn(),
        Rate(""),
        TimeRemainingColumn(),
    )
    console = error_console()
    silent = not console.is_terminal  # a log file gets warnings and errors only
    bar = Progress(*columns, console=console, transient=True, disable=silent)
    task = bar.add_task(f"measuring {name}")

    def update(done: int, total: int, _: str) -> None:
        bar.start()  # not before: a question may come first
        bar.update(task, completed=done, total=total)

    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", UnmeasuredWarning)
            warnings.simplefilter("always", IntervalWarning)
            warnings.showwarning = partial(_printed, warnings.showwarning, IntervalWarning)
            yield update
    finally:
        bar.stop()


def agree_to(cost: "Cost", yes: bool) -> None:
    """Say what will be fetched where that is much, and at a terminal ask where it is very much.

    Raises:
        typer.Exit: the answer is no.
    """
    if cost.bytes < _MUCH:
        return
    error_console().print(cost.line, highlight=False, markup=False, soft_wrap=True)
    asks = cost.bytes > _VERY_MUCH and not yes and sys.stdin.isatty() and sys.stderr.isatty()
    if asks and not typer.confirm("Fetch it?", err=True):
        raise typer.Exit(1)


def _printed(
    others: "Callable[..., object]",
    own: type[Warning],
    message: Warning | str,
    category: type[Warning],
    *where: Any,
) -> None:
    if issubclass(category, own):
        print_warning(str(message))
    else:
        others(message, category, *where)


def report_problems(problems: list[str]) -> None:
    """Print what could not be measured; exit code 1 if there is any."""
    for problem in problems:
        print_warning(problem)
    if problems:
        raise typer.Exit(1)


def print_table(table: "Table") -> None:
    """Print a table: in a terminal as wide as that is; whole in a pipe or file, which has no width.

    Its title and caption are lines of their own, as long as they need be.
    """
    from rich.text import Text

    title, caption = table.title, table.caption
    table.title = table.caption = None
    whole = not sys.stdout.isatty()
    screen = console(_NO_WIDTH if whole else None)
    if whole:
        for column in table.columns:
            column.header = Text(" ".join(str(column.header).split()))
    for part in (title, table, caption):
        if part is None:
            continue
        with screen.capture() as captured:
            screen.print(Text(part) if isinstance(part, str) else part, highlight=False)
        for line in captured.get().splitlines():
            print(line.rstrip() if whole else line)


def print_line(line: str) -> None:
    """Print a line as it is, never wrapped, so that paths in it can be copied."""
    console().print(line, soft_wrap=True, highlight=False, markup=False)


def problems_of(attrs: "Mapping[str, Any]") -> list[str]:
    """What could not be measured of a saved result; of a comparison, run by run."""
    found = json.loads(attrs.get("problems", "[]"))
    if isinstance(found, dict):
        return [f"{run}: {each}" for run, problems in found.items() for each in problems]
    return list(found)


def print_accounts(dataset: "xr.Dataset") -> None:
    """Print what of the model of a result is measured; run by run of a comparison."""
    account = json.loads(dataset.attrs.get("account", "null"))
    if schema.RUN not in dataset.dims:
        print_account(account)
        return
    for run, of_run in (account or {}).items():
        print_account(of_run, f"{run}: ")


def print_account(account: Any, of: str = "") -> None:
    """Print what of a model is measured, and a warning where much of it is not."""
    from dynamics.runs.account import Account

    found = Account.from_json(account)
    if found is None:
        return
    print_line(f"{of}Measured {found.line(names=3)}")
    if warning := found.warning():
        print_warning(f"{of}{warning}")


def print_warning(text: str) -> None:
    """Print a warning to stderr."""
    error_console().print(
        f"warning: {text}", style="yellow", highlight=False, markup=False, soft_wrap=True
    )


def console(width: int | None = None) -> "Console":
    """Results go here; by default as wide as the terminal is."""
    from rich.console import Console

    return Console(width=width)


def error_console() -> "Console":
    """Progress and problems go here."""
    from rich.console import Console

    return Console(stderr=True)
