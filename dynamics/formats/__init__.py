"""What a run can be read from. A new format is one file here and one line of `FORMATS`."""

from contextlib import nullcontext, suppress
from functools import partial
from pathlib import Path
from typing import cast

from zarr.abc.store import Store

from dynamics.errors import DynamicsError, FormatError, MissingError, near
from dynamics.formats.beside import with_others
from dynamics.formats.choice import detected_format
from dynamics.formats.dcp import DCPFormat
from dynamics.formats.deepspeed import DeepSpeedFormat
from dynamics.formats.format import Format, OpenOptions
from dynamics.formats.hub.revisions import (
    History,
    cached_model,
    history_of,
    hub_name,
    one_of_many,
    prepare,
    prepare_alike,
    prepare_folders,
)
from dynamics.formats.hub_cache import HubCacheFormat
from dynamics.formats.hugging_face import HuggingFaceFormat
from dynamics.formats.lightning import LightningFormat
from dynamics.formats.nanogpt import NanoGPTFormat
from dynamics.formats.peft.format import PeftFormat
from dynamics.formats.pico import PicoFormat
from dynamics.formats.plain_files import PlainFilesFormat
from dynamics.formats.recording import RecordingFormat, RecordingRun
from dynamics.formats.relora import ReLoRAFormat
from dynamics.formats.several import expanded, open_several
from dynamics.formats.shared.adapters.scaling import is_number
from dynamics.formats.shared.found import CheckpointsFormat
from dynamics.formats.storage.files import (
    is_remote,
    keeping_listings,
    located,
    reporting_unreadable,
)
from dynamics.formats.storage.hub.path import HubPath
from dynamics.formats.storage.hub.transport import HubError
from dynamics.recordings import StoreLike, is_repository
from dynamics.runs import fused
from dynamics.runs.run import Run

# In the order of detection, as some directories fit several formats. A checkpoint with an adapter
# may hold a base model too. A Trainer's checkpoint may hold the float32 masters of DeepSpeed beside
# its own files, and a checkpoint of Lightning a distributed one.
_LOOKED_AT = 3  # of several paths, to find their format
FORMATS: tuple[Format, ...] = (
    RecordingFormat(),
    HubCacheFormat(),
    ReLoRAFormat(),
    PicoFormat(),
    PeftFormat(),
    DeepSpeedFormat(),
    HuggingFaceFormat(),
    NanoGPTFormat(),
    LightningFormat(),
    DCPFormat(),
    PlainFilesFormat(),
)


def open_run(
    path: StoreLike | list[str | Path] | tuple[str | Path, ...],
    *,
    format: str | None = None,
    base: str | Path | None = None,
    adapter: str | None = None,
    lora_alpha: float | None = None,
    expert_blocks: bool | None = None,
    split_fused: bool = True,
    revisions: str | None = None,
    ref_pattern: str | None = None,
) -> Run:
    """Open a training run for analysis. No tensor is read before it is measured.

    Args:
        path: a recording, a directory of checkpoints, or a single checkpoint, which may be one
            file: a path or URL. Several paths, or a glob ("ckpts/*.pt"), are the checkpoints of
            one run, one at each. A zarr Store or an Icechunk repository is read as a recording.
            hf://org/name, or org/name where there is no such path, is a model on the hub: its
            branches and tags whose names carry a step, or its commits whose titles do.
        format: the name of the format (`dynamics list formats`); by default it is detected.
        base: the directory of the base model of PEFT adapters.
        adapter: the name of one adapter, where checkpoints hold several.
        lora_alpha: the alpha of LoRA, where a checkpoint holds factors and nothing beside it says
            how they are scaled. The scaling is alpha over the rank.
        expert_blocks: whether the columns of lora_B that belong to one expert lie together, as
            other tools than PEFT have packed them; files do not say so.
        split_fused: read fused matrices (GPT-2's c_attn) as their parts, see `dynamics.runs.fused`.
        revisions: of a model on the hub, a glob of the branches and tags to take: "stage1-*".
        ref_pattern: of a model on the hub, a regular expression that finds the step in the names
            of its branches and tags, where they are not read otherwise. Its group `step`, or else
            its first group, is the step: "run-a_([0-9]+)k". Names without it are no steps.

    Returns:
        A `Run`: its `steps`, `kinds`, `matrices`, `scalars`, `events`, and `read` for one matrix.

    Raises:
        FormatError: the path does not exist, is empty, fits no format, or holds nothing that can
            be read.
        MissingError: no format is called `format`.
        DynamicsError: an option is given for a format that does not take it, or `lora_alpha` is no
            positive number.

    Example:
        >>> run = dy.open_run("run.zarr")
        >>> run.format
        'recording'
        >>> run.kinds[:3]
        ('weight', 'base', 'adapter')
        >>> name = next(iter(run.matrices))
        >>> run.read(name, run.steps[0], "weight").dtype
        'float32'
    """
    run: Run
    if isinstance(path, Store) or is_repository(path):
        run = RecordingRun(path)
    else:
        given = list(path) if isinstance(path, list | tuple) else [path]
        paths = [located(each) for each in given]
        if not paths:
            raise FormatError("No path is given; give at least one.")
        reporting = reporting_unreadable(paths[0]) if is_remote(paths[0]) else nullcontext()
        with reporting, keeping_listings():
            options = OpenOptions(
                base=None if base is None else located(base),
                adapter=adapter,
                lora_alpha=_checked_alpha(lora_alpha),
                expert_blocks=expert_blocks or None,
            )
            on_hub = _on_hub(paths, revisions, ref_pattern)
            if isinstance(on_hub, History):
                return _opened(_open_history(on_hub, format, options), split_fused)
            paths = on_hub
            if isinstance(paths[0], HubPath):
                _prepare_folders(paths[0], format, options)
            matches = [expanded(each) for each in paths]
            if len(paths) == 1 and matches[0] is None:
                run = _open(paths[0], format, options)
            else:
                of_each = zip(paths, matches, strict=True)
                paths = [each for path, found in of_each for each in found or [path]]
                run = _open_several(list(dict.fromkeys(paths)), format, options)
    return _opened(run, split_fused)


def _opened(run: Run, split_fused: bool) -> Run:
    return fused.split_fused(run) if split_fused else run


def _on_hub(
    paths: list[Path], revisions: str | None, ref_pattern: str | None
) -> History | list[Path]:
    """The history that a path is, or the paths as they are to be opened."""
    path = paths[0]
    named = hub_name(path) if len(paths) == 1 else None
    if named is not None:
        on_hub = located(named)
        assert isinstance(on_hub, HubPath)
        try:
            cached_model(on_hub) or on_hub.repository.refs
        except HubError as problem:
            raise FormatError(f"{path} does not exist here, and {problem}") from problem
        path = cast(Path, on_hub)
    if len(paths) > 1 or not isinstance(path, HubPath):
        given = {"revisions": revisions, "ref_pattern": ref_pattern}
        for name in (name for name, value in given.items() if value is not None):
            raise DynamicsError(
                f"{name}= (--{name.replace('_', '-')}) has no effect on {path}, which is not one "
                "model on the hub (hf://org/name); leave it out."
            )
        return paths
    cached = cached_model(path)
    if cached is not None and revisions is None and ref_pattern is None:
        return [cached]
    found = history_of(path, revisions, ref_pattern)
    return found if isinstance(found, History) else [cast(Path, found)]


def _open_history(history: History, format_name: str | None, options: OpenOptions) -> Run:
    """A run whose checkpoints are revisions. Their small parts are fetched at once."""
    prepare(history)
    paths = [cast(Path, each) for each in history.paths.values()]
    with suppress(FormatError):  # is told where all are opened
        _open_several(paths[-1:], format_name, options)
        prepare_alike(history)
    run = _open_several(paths, format_name, options)
    run.places = history.places
    run.passed_over = {**history.passed_over, **run.passed_over}
    return run


def _prepare_folders(path: HubPath, format_name: str | None, options: OpenOptions) -> None:
    """Fetch the small parts of checkpoints in folders at once, where there are several."""
    with suppress(FormatError):  # is told where all are opened
        folder = one_of_many(path)
        if folder is not None:
            _open(cast(Path, folder), format_name, options)
            prepare_folders(folder)


def _open(path: Path, format_name: str | None, options: OpenOptions) -> Run:
    if not path.exists():
        unreached = ", or its server does not answer" * is_remote(path)
        raise FormatError(f"{path} does not exist{unreached}.")
    format = _format_called(format_name) if format_name else detected_format(path, FORMATS)
    format.check_takes(path, options)
    if not isinstance(format, CheckpointsFormat) or not path.is_dir():
        return format.open(path, options)
    found = format.found(path, options)
    found = with_others(path, found, format, FORMATS, adopt=format_name is None)
    return format.run_of(path, found, options)


def _checked_alpha(alpha: float | None) -> float | None:
    if alpha is None or (is_number(alpha) and alpha > 0):
        return alpha
    raise DynamicsError(f"lora_alpha is {alpha!r}; give a positive number (--lora-alpha).")


def _open_several(paths: list[Path], format_name: str | None, options: OpenOptions) -> Run:
    for path in paths:
        if not path.exists() and not path.is_symlink():
            raise FormatError(f"{path} does not exist.")
    if format_name is not None:
        formats = [_format_called(format_name)]
    else:
        formats = [each for each in FORMATS if any(map(partial(_fits, each), paths[:_LOOKED_AT]))]
    if not formats:
        return _open(paths[0], None, options)  # tells what was found there
    format = formats[0]
    if not isinstance(format, CheckpointsFormat):
        raise FormatError(
            f"{paths[0]} is of format {format.name!r}, of which one path is a whole run; give one "
            "path, or compare several: dynamics compare NAME=RUN NAME=RUN."
        )
    for path in paths:
        if _fits(format, path):
            format.check_takes(path, options)
    return open_several(paths, format, options)


def _fits(format: Format, path: Path) -> bool:
    return (format.single_files or path.is_dir()) and format.recognises(path)


def _format_called(name: str) -> Format:
    for format in FORMATS:
        if format.name == name:
            return format
    names = [each.name for each in FORMATS]
    raise MissingError(
        f"There is no format {name!r}{near(name, names)}; give one of {', '.join(names)}."
    )
