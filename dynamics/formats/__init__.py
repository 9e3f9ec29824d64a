"""Formats: what a run can be read from. A format is one file and one line of `FORMATS`."""

from contextlib import nullcontext
from pathlib import Path

from zarr.abc.store import Store

from dynamics.errors import DynamicsError, FormatError, MissingError
from dynamics.formats.checkpoints import CheckpointsRun
from dynamics.formats.files import children, is_remote, located, refused
from dynamics.formats.peft_adapters import PeftAdaptersRun
from dynamics.formats.recording import RecordingRun
from dynamics.run import Run

# In the order of detection: an adapter's checkpoint may hold a base model too.
_Format = type[RecordingRun] | type[PeftAdaptersRun] | type[CheckpointsRun]
FORMATS: tuple[_Format, ...] = (
    RecordingRun,
    PeftAdaptersRun,
    CheckpointsRun,
)


def open_run(
    path: str | Path | Store, *, format: str | None = None, base: str | Path | None = None
) -> Run:
    """Open a training run for analysis.

    Args:
        path: a recording, a directory of checkpoints, or a single checkpoint; a zarr Store is
            read as a recording.
        format: the layout's name, where detection should not decide.
        base: the directory of the base model of PEFT adapters.

    Raises:
        FormatError: the path does not exist, is empty, holds nothing recognised, or nothing
            that can be read.
        MissingError: no layout is called `format`.
    """
    if isinstance(path, Store):
        return RecordingRun(path)
    path = located(path)
    with refused(path) if is_remote(path) else nullcontext():
        return _opened(path, format, base)


def _opened(path: Path, format: str | None, base: str | Path | None) -> Run:
    if not path.exists():
        raise FormatError(f"{path} does not exist.")
    if not path.is_dir():
        raise FormatError(f"{path} is a file; give the directory of the run.")
    found = _named(format) if format else _detected(path)
    if base is not None and found is not PeftAdaptersRun:
        raise DynamicsError(f"{path} is of format {found.format!r}, which takes no base model.")
    if base is not None:
        return PeftAdaptersRun(path, located(base))
    return found(path)


def _named(format: str) -> _Format:
    for known in FORMATS:
        if known.format == format:
            return known
    raise MissingError(
        f"No format {format!r}; known: {', '.join(known.format for known in FORMATS)}."
    )


def _detected(path: Path) -> _Format:
    entries = [child.name + "/" * child.is_dir() for child in children(path)]
    if not entries:
        raise FormatError(f"{path} is empty.")
    for known in FORMATS:
        if known.recognises(path):
            return known
    listed = ", ".join(entries[:8]) + (
        f", ... ({len(entries)} entries)" if len(entries) > 8 else ""
    )
    recognised = "; ".join(known.description for known in FORMATS)
    raise FormatError(f"Nothing recognised in {path}: found {listed}. Recognised: {recognised}.")
