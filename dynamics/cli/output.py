"""What the command line prints: results to stdout, progress and problems to stderr."""

import json
import warnings
from contextlib import contextmanager
from functools import partial
from typing import TYPE_CHECKING, Any

import typer

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

    from rich.console import Console

    from dynamics.analysis.analyze import Progress


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
        TextColumn("{task.description}"),
        BarColumn(),
        MofNCompleteColumn(),
        Rate(""),
        TimeRemainingColumn(),
    )
    console = error_console()
    silent = not console.is_terminal  # a log file gets warnings and errors only
    with Progress(*columns, console=console, transient=True, disable=silent) as bar:
        task = bar.add_task(f"measuring {name}")
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", UnmeasuredWarning)
            warnings.simplefilter("always", IntervalWarning)
            warnings.showwarning = partial(_printed, warnings.showwarning, IntervalWarning)
            yield lambda done, total, _: bar.update(task, completed=done, total=total)


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


def print_line(line: str) -> None:
    """Print a line as it is, never wrapped, so that paths in it can be copied."""
    console().print(line, soft_wrap=True, highlight=False, markup=False)


def print_account(account: str, of: str = "") -> None:
    """Print what of a model is measured, and a warning where much of it is not."""
    from dynamics.runs.account import Account

    found = Account.from_json(json.loads(account))
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


def console() -> "Console":
    """Results go here."""
    from rich.console import Console

    return Console()


def error_console() -> "Console":
    """Progress and problems go here."""
    from rich.console import Console

    return Console(stderr=True)
