"""How a command line runs: errors, stops and missing packages are one line, with an exit code."""

import shlex
import sys
from contextvars import ContextVar
from typing import Any

import typer
from typer.core import TyperGroup

from dynamics.cli.output import error_console
from dynamics.errors import DynamicsError, require_extra

_goes_on: ContextVar[str] = ContextVar("goes_on", default="Stopped.")


def goes_on(line: str) -> None:
    """Say how one goes on, should Ctrl-C stop this command."""
    _goes_on.set(line)


def command_line() -> str:
    """The command as it was written, to be kept with what it makes."""
    return shlex.join(["dynamics", *sys.argv[1:]])


class Commands(TyperGroup):
    """Commands that Ctrl-C ends with a line and exit code 130, as shells expect it."""

    def invoke(self, ctx: Any) -> Any:
        """Run the command that is called."""
        try:
            return super().invoke(ctx)
        except KeyboardInterrupt:
            _print_error(_goes_on.get(), "yellow")
            raise SystemExit(130) from None


def run_app(command: typer.Typer) -> None:
    """Run a command line; a user's error is one line on stderr and exit code 2."""
    try:
        command()
    except DynamicsError as error:
        _print_error(f"error: {error}", "red")
    except ModuleNotFoundError as error:
        extra = _extra_of(error.name or "")
        if extra is None:
            raise
        _print_error(f"error: {require_extra(extra, error)}", "red")
    except KeyboardInterrupt:  # before a command began
        sys.exit(130)
    else:
        return
    sys.exit(2)


def _extra_of(module: str) -> str | None:
    """The extra that brings a package, None for packages that are not optional."""
    from dynamics.cli.doctor import extras

    name = module.partition(".")[0]
    return next((extra for extra, packages in extras().items() if name in packages), None)


def _print_error(text: str, style: str) -> None:
    error_console().print(text, style=style, highlight=False, markup=False, soft_wrap=True)
