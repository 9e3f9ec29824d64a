"""What the values of the command line's options and arguments mean."""

import re
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING

from dynamics.errors import DynamicsError

if TYPE_CHECKING:
    from collections.abc import Mapping

    from dynamics.analysis.execution import Execution
    from dynamics.analysis.selection import SelectionOptions
    from dynamics.runs.run import Run


def choice_of(
    metrics: str | None,
    components: str | None,
    kinds: str | None,
    steps: str | None,
    select: list[str] | None,
    lag: int | None,
) -> "SelectionOptions":
    """What to measure."""
    return {
        "metrics": _split("--metrics", metrics),
        "components": _split("--components", components),
        "kinds": _split("--kinds", kinds),
        "steps": steps,
        "select": select or None,
        "lag": lag,
    }


def opener_of(
    format: str | None,
    base: str | None,
    adapter: str | None,
    lora_alpha: float | None,
    expert_blocks: bool,
    revisions: str | None,
    ref_pattern: str | None,
    keep_fused: bool = False,
) -> "partial[Run]":
    """How a run is opened: `open_run` with what the command line says of runs."""
    from dynamics.formats import open_run

    return partial(
        open_run,
        format=format,
        base=base,
        adapter=adapter,
        lora_alpha=lora_alpha,
        expert_blocks=expert_blocks,
        revisions=revisions,
        ref_pattern=ref_pattern,
        split_fused=not keep_fused,
    )


def execution_of(
    output: Path, no_cache: bool, strict: bool, workers: int, scheduler: str | None, device: str
) -> "Execution":
    """How to measure it, with a cache beside the output."""
    from dynamics.analysis.execution import Execution

    beside = output.with_name(f"{output.name.removesuffix('.zarr')}.cache")
    return Execution(
        cache=None if no_cache else beside,
        strict=strict,
        workers=workers,
        scheduler=scheduler,
        device=device,
    )


def refuse_unused(options: "Mapping[str, object]", why: str) -> None:
    """Refuse options that were given and have no effect.

    Args:
        options: argument of the library -> value; None and switches that are off were not given.
        why: of what they have no effect on.
    """
    for name, value in options.items():
        if value is not None and not isinstance(value, bool):
            raise DynamicsError(
                f"--{name.replace('_', '-')} has no effect on {why}; leave it out, or give runs."
            )


def interrupted(cache: object) -> str:
    """What Ctrl-C leaves, and how to go on."""
    if cache is None:
        return "Stopped; nothing is kept (--no-cache). The same command begins anew."
    return f"Stopped; what was measured is in {cache}. The same command goes on from there."


def named_paths(runs: list[str]) -> dict[str, str]:
    """Name -> path or URL of each NAME=RUN."""
    paths: dict[str, str] = {}
    for each in runs:
        name, path = _named(each)
        if not name or not path:
            raise DynamicsError(f"Expected NAME=RUN, found {each!r}.")
        if name in paths:
            raise DynamicsError(f"The name {name!r} is given twice; give each run its own.")
        paths[name] = path
    return paths


def _named(text: str) -> tuple[str, str]:
    """NAME and RUN of NAME=RUN. Both may have "=" in them: RUN is the longest that is there."""
    signs = [position for position, letter in enumerate(text) if letter == "="]
    splits = [(text[:sign], text[sign + 1 :]) for sign in signs] or [("", "")]
    found = (each for each in splits if re.match(r"\w+://", each[1]) or Path(each[1]).exists())
    return next(found, splits[0])


def run_of(paths: list[str]) -> str | tuple[str, ...]:
    """The run that is given: one path, or the paths of its checkpoints."""
    return paths[0] if len(paths) == 1 else tuple(paths)


def run_name(paths: list[str]) -> str:
    """What a run is called, without `.zarr`: the stem of its results' names.

    It is the name of its path or URL; for several paths and for a glob, that of the directory that
    they lie in.
    """
    from dynamics.formats.several import common_directory, is_glob
    from dynamics.formats.storage.files import located

    run = paths[0]
    if len(paths) > 1 or is_glob(run):
        run = str(common_directory([located(each) for each in paths]))
    path = run.rstrip("/").rpartition("/")[2] if "://" in run else Path(run).resolve().name
    return path.removesuffix(".zarr") or "run"


def stem_of(result: Path) -> str:
    """How the names of what is made of a saved result begin."""
    return result.resolve().name.removesuffix(".zarr").removesuffix(".analysis")


def step_numbers(text: str | None) -> list[int] | None:
    """The steps of "0,80,560", None for None."""
    parts = _split("--steps", text)
    if parts is None:
        return None
    if not all(part.isdecimal() for part in parts):
        raise DynamicsError(f"--steps takes step numbers with commas, found {text!r}.")
    return [int(part) for part in parts]


def width_of(text: str | None) -> str | float | None:
    """A width by name, or its inches."""
    try:
        return None if text is None else float(text)
    except ValueError:
        return text


def _split(option: str, text: str | None) -> list[str] | None:
    """The parts of a comma-separated list, None for None."""
    parts = None if text is None else [each.strip() for each in text.split(",") if each.strip()]
    if parts == []:
        raise DynamicsError(f"{option} is empty; name one or more, or leave it out.")
    return parts
