"""Formats: what a run can be read from. A format is one file and one line of `FORMATS`."""

from contextlib import nullcontext
from pathlib import Path

from zarr.abc.store import Store

from dynamics.errors import DynamicsError, FormatError, MissingError
from dynamics.formats.checkpoints import CheckpointsRun
from dynamics.formats.dcp import DistributedRun
from dynamics.formats.deepspeed import DeepSpeedRun
from dynamics.formats.hub_cache import HubCacheRun
from dynamics.formats.lightning import LightningRun
from dynamics.formats.nanogpt import NanoGPTRun
from dynamics.formats.peft.run import PeftAdaptersRun
from dynamics.formats.pico import PicoRun
from dynamics.formats.plain_files import PlainFilesRun
from dynamics.formats.recording import RecordingRun
from dynamics.formats.relora import ReLoRARun
from dynamics.formats.shared.full_checkpoints import WeightsRun
from dynamics.formats.storage.files import children, is_remote, located, refused
from dynamics.recordings import StoreLike, is_repository
from dynamics.runs import fused
from dynamics.runs.run import Run

# In the order of detection: an adapter's checkpoint may hold a base model too, a Trainer's the
# float32 masters of DeepSpeed beside its own files, and Lightning's distributed ones.
_Format = (
    type[RecordingRun] | type[PeftAdaptersRun] | type[ReLoRARun] | type[PicoRun] | type[WeightsRun]
)
FORMATS: tuple[_Format, ...] = (
    RecordingRun,
    HubCacheRun,
    ReLoRARun,
    PicoRun,
    PeftAdaptersRun,
    DeepSpeedRun,
    CheckpointsRun,
    NanoGPTRun,
    LightningRun,
    DistributedRun,
    PlainFilesRun,
)


def open_run(
    path: StoreLike,
    *,
    format: str | None = None,
    base: str | Path | None = None,
    adapter: str | None = None,
    split_fused: bool = True,
) -> Run:
    """Open a training run for analysis.

    Args:
        path: a recording, a directory of checkpoints, or a single checkpoint, which may be one
            file: a path or URL. A zarr Store or an Icechunk repository is read as a recording.
        format: the layout's name, where detection should not decide.
        base: the directory of the base model of PEFT adapters.
        adapter: the name of one of several PEFT adapters in each checkpoint.
        split_fused: read fused matrices (GPT-2's c_attn) as their parts, see `dynamics.runs.fused`.

    Raises:
        FormatError: the path does not exist, is empty, holds nothing recognised, or nothing
            that can be read.
        MissingError: no layout is called `format`.
    """
    run: Run
    if isinstance(path, Store) or is_repository(path):
        run = RecordingRun(path)
    else:
        path = located(path)
        with refused(path) if is_remote(path) else nullcontext():
            run = _opened(path, format, base, adapter)
    return fused.split_fused(run) if split_fused else run


def _opened(path: Path, format: str | None, base: str | Path | None, adapter: str | None) -> Run:
    if not path.exists():
        unreached = ", or its server does not answer" * is_remote(path)
        raise FormatError(f"{path} does not exist{unreached}.")
    found = _named(format) if format else _detected(path)
    if not path.is_dir() and not _takes_files(found):
        raise FormatError(
            f"{path} is a file, and a run of format {found.format!r} is a directory; give that."
        )
    if found is PeftAdaptersRun:
        return PeftAdaptersRun(path, None if base is None else located(base), adapter)
    for given, what in ((base, "base model"), (adapter, "name of an adapter")):
        if given is not None:
            raise DynamicsError(f"{path} is of format {found.format!r}, which takes no {what}.")
    return found(path)


def _named(format: str) -> _Format:
    for known in FORMATS:
        if known.format == format:
            return known
    raise MissingError(
        f"No format {format!r}; known: {', '.join(known.format for known in FORMATS)}."
    )


def _takes_files(known: _Format) -> bool:
    return getattr(known, "single_files", False)


def _detected(path: Path) -> _Format:
    if not path.is_dir():
        return _detected_file(path)
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


def _detected_file(path: Path) -> _Format:
    of_files = [known for known in FORMATS if _takes_files(known)]
    for known in of_files:
        if known.recognises(path):
            return known
    recognised = "; ".join(known.description for known in of_files)
    raise FormatError(
        f"{path} is a file and no checkpoint; give the directory of the run, or one file of: "
        f"{recognised}."
    )
