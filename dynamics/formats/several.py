"""Several paths that are the checkpoints of one run: `dynamics analyze ckpts/*.pt`."""

import glob
from collections.abc import Sequence
from pathlib import Path

from dynamics.errors import FormatError
from dynamics.formats.format import OpenOptions
from dynamics.formats.shared.found import CheckpointsFormat, Found, Unopened, Unreadable
from dynamics.formats.shared.full_checkpoints import SeriesFormat
from dynamics.formats.shared.steps import named_step
from dynamics.formats.storage.files import is_remote, located
from dynamics.formats.storage.hub.path import HubPath
from dynamics.runs.run import Run

_MAGIC = "*?["


def expanded(path: Path) -> list[Path] | None:
    """The paths that a glob stands for, in order; None where `path` is none, or exists.

    Raises:
        FormatError: nothing matches.
    """
    if not is_glob(str(path)) or path.exists():
        return None
    if isinstance(path, HubPath):
        found = path.matches()
    elif is_remote(path):
        matches = path.fs.glob(path.path)  # type: ignore[attr-defined]
        found = [located(path.fs.unstrip_protocol(each)) for each in matches]  # type: ignore[attr-defined]
    else:
        found = [Path(each) for each in glob.glob(str(path), recursive=True)]
    if not found:
        raise FormatError(f"No path matches {path}.")
    return sorted(found, key=str)


def is_glob(path: str) -> bool:
    """Whether a path may stand for several."""
    return bool(set(_MAGIC) & set(path))


def open_several(paths: Sequence[Path], format: CheckpointsFormat, options: OpenOptions) -> Run:
    """The run whose checkpoints lie at several paths, one at each.

    Raises:
        FormatError: one of them holds several checkpoints, or none of them tells a step.
    """
    common = common_directory(paths)
    checkpoints: dict[int, Unopened] = {}
    places: dict[int, Path] = {}
    passed_over: dict[str, str] = {}
    for path in paths:
        whole = str(path if is_remote(path) else path.absolute())
        name = whole.removeprefix(str(common)).strip("/")
        try:
            found = _found(path, format, options)
        except FormatError as problem:
            named = named_step(path.stem)
            if named is None:
                passed_over[name] = str(problem)
                continue
            found = Found({named.step: Unreadable(path, problem)})
        if not found.checkpoints:
            passed_over[name] = f"it is no checkpoint of format {format.name!r}"
            continue
        if len(found.checkpoints) > 1:
            raise FormatError(
                f"{path} is a run of {len(found.checkpoints)} checkpoints; give it alone, or "
                "compare it with others: dynamics compare NAME=RUN NAME=RUN."
            )
        step, checkpoint = next(iter(found.checkpoints.items()))
        above = _step_above(path, common) if found.is_guess else step
        if above is None:
            passed_over[name] = "neither its name nor its files tell a step"
        elif above in checkpoints:
            clash = f"{places[above]} and {path} are both of step {above}; give one of the two."
            checkpoints[above] = Unreadable(path, FormatError(clash))
        else:
            checkpoints[above], places[above] = checkpoint, path
    if not checkpoints:
        reasons = "; ".join(f"{name}: {why}" for name, why in list(passed_over.items())[:4])
        raise FormatError(f"None of {len(paths)} paths is a checkpoint with a step: {reasons}.")
    return format.run_of(common, Found(checkpoints, passed_over), options)


def _found(path: Path, format: CheckpointsFormat, options: OpenOptions) -> Found:
    fits = format.single_files or path.is_dir()
    if fits and isinstance(format, SeriesFormat) and not path.is_dir():
        fits = format.holds(path)  # a file that is given alone may have any name
    return format.found(path, options) if fits and format.recognises(path) else Found({})


def common_directory(paths: Sequence[Path]) -> Path:
    """The directory that all paths lie in; of revisions on the hub, their repository."""
    first = paths[0]
    if isinstance(first, HubPath):
        return first.home
    whole = [each if is_remote(each) else each.absolute() for each in paths]
    parents = [_without_glob(str(each.parent)).rstrip("/").split("/") for each in whole]
    shared = []
    for parts in zip(*parents, strict=False):
        if len(set(parts)) > 1:
            break
        shared.append(parts[0])
    return located("/".join(shared) or "/")


def _without_glob(path: str) -> str:
    parts = path.split("/")
    plain = next((i for i, part in enumerate(parts) if is_glob(part)), len(parts))
    return "/".join(parts[:plain])


def _step_above(path: Path, common: Path) -> int | None:
    """The step in the names of the directories above a path, the nearest first."""
    absolute = path if is_remote(path) else path.absolute()
    for each in absolute.parents:
        if str(each).rstrip("/") == str(common).rstrip("/"):
            return None
        named = named_step(each.name)
        if named is not None and named.level < 2:
            return named.step
    return None
