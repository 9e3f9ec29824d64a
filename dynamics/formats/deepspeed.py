"""DeepSpeed checkpoints: global_stepN/ with model states and ZeRO's partitions of the masters.

With ZeRO, the numbers that the optimizer updates are float32 masters, flat and spread over ranks;
they are cut into parameters as deepspeed/utils/zero_to_fp32.py does, but read one parameter at a
time. Without ZeRO (stage 0), or where only the model states were kept, the module's weights count.
"""

import re
from collections.abc import Mapping
from functools import partial
from pathlib import Path
from typing import Any

from dynamics.errors import FormatError
from dynamics.formats.checkpoints import model_attrs
from dynamics.formats.shared.full_checkpoints import Checkpoint, WeightsRun
from dynamics.formats.shared.steps import by_step, step_inside
from dynamics.formats.shared.trainer_state import STATE, last_logged, read_state
from dynamics.formats.storage.files import children, contained
from dynamics.formats.storage.tensors import ITEM_BYTES, StoredTensor, Tensor, checked_shape
from dynamics.formats.storage.torch_files import tensors_of, torch_file
from dynamics.formats.storage.unpickling import Inert
from dynamics.formats.storage.zero_partitions import (
    Stretches,
    flat_tensor,
    zero2_parameters,
    zero3_parameters,
)

_STEP = re.compile(r"global_step(\d{1,15})")
_TRAINERS = re.compile(r"checkpoint-(\d{1,15})")
_MODEL = re.compile(r"(?:zero_pp_rank_(\d+)_)?mp_rank_(\d+)_model_states\.pt")
_OPTIMIZER = re.compile(r"(?:bf16_|fp16_)?zero_pp_rank_(\d+)_mp_rank_(\d+)_optim_states\.pt")
# Experts and pipeline stages have files of their own; each is a part of a model.
_PARTS = re.compile(r"layer_\d+.*\.pt|expp_rank_\d+_.*\.pt")


class DeepSpeedRun(WeightsRun):
    """A directory of global_stepN/, one of them, or a Trainer's checkpoint-N/ that have them."""

    format = "deepspeed"
    description = "global_stepN/ with mp_rank_00_model_states.pt or ZeRO partitions (DeepSpeed)"

    @staticmethod
    def recognises(path: Path) -> bool:
        """Whether there is a directory with model states at or below `path`."""
        return bool(_directories(path))

    @staticmethod
    def checkpoints(path: Path, root: Path) -> dict[int, Checkpoint]:
        """See `WeightsRun.checkpoints`."""
        found = []
        for step, directory in _directories(path):
            found.append((_step_inside(directory, root) if step is None else step, directory))
        return {
            step: _checkpoint(step, directory, root, beside=directory != path)
            for step, directory in by_step(found, path).items()
        }


def _checkpoint(step: int, directory: Path, root: Path, beside: bool) -> Checkpoint:
    tensors = partial(deepspeed_tensors, directory, root)
    if not beside:  # what lies beside the opened directory is no part of the run
        return Checkpoint(directory, tensors)
    trainers = directory.parent
    logged = partial(_logged, trainers / STATE, root, step)
    return Checkpoint(directory, tensors, partial(model_attrs, trainers, root), logged)


def has_model_states(directory: Path) -> bool:
    """Whether DeepSpeed saved a model into the directory itself."""
    return directory.is_dir() and any(_MODEL.fullmatch(each.name) for each in children(directory))


def _directories(path: Path) -> list[tuple[int | None, Path]]:
    """(step, directory with model states) at or below `path`; None: the files tell the step."""
    if not path.is_dir():
        return []
    if has_model_states(path):
        numbered = _STEP.fullmatch(path.name)
        return [(int(numbered[1]) if numbered else None, path)]
    if numbered := _TRAINERS.fullmatch(path.name):
        inside = _latest(path)
        return [] if inside is None else [(int(numbered[1]), inside)]
    found: list[tuple[int | None, Path]] = []
    for child in children(path):
        if (numbered := _STEP.fullmatch(child.name)) and has_model_states(child):
            found.append((int(numbered[1]), child))
        elif (numbered := _TRAINERS.fullmatch(child.name)) and child.is_dir():
            inside = _latest(child)
            found += [] if inside is None else [(int(numbered[1]), inside)]
    latest = None if found else _latest(path)  # a tag of the user's own
    return [(None, latest)] if latest is not None else found


def _latest(path: Path) -> Path | None:
    """The directory with model states that `latest` names, or the only one of them."""
    named = path / "latest"
    if named.is_file():
        tag = named.read_bytes()[:256].decode("utf-8", "replace").strip()
        if tag and not set(tag) & set("/\\\0") and tag not in (".", ".."):
            return path / tag if has_model_states(path / tag) else None
    inside = [each for each in children(path) if _STEP.fullmatch(each.name)]
    inside = [each for each in inside if has_model_states(each)]
    return inside[0] if len(inside) == 1 else None


def _step_inside(directory: Path, root: Path) -> int:
    file = next(each for each in children(directory) if _MODEL.fullmatch(each.name))
    step = step_inside(_saved(file, root).get("global_steps"))
    if step is None:
        raise FormatError(f"{file} tells no global_steps; name its directory global_stepN.")
    return step


def _logged(state: Path, root: Path, step: int) -> Mapping[str, float]:
    return last_logged(read_state(contained(state, root)), step)


def deepspeed_tensors(directory: Path, root: Path) -> dict[str, Tensor]:
    """Name -> tensor of the model whose states DeepSpeed saved into a directory.

    Raises:
        FormatError: a rank's file is missing or damaged, partitions and shapes disagree, or the
            model itself is spread over ranks (tensor, pipeline or expert parallelism).
    """
    models, optimizers = _files(directory)
    try:
        if not optimizers:
            return _module(directory, models, root)
        return _masters(directory, models, optimizers, root)
    # A pickle may hold anything anywhere; what does not fit shows as one of these.
    except (KeyError, IndexError, TypeError, AttributeError) as error:
        raise FormatError(
            f"{directory} holds no states as DeepSpeed saves them ({type(error).__name__}: "
            f"{error}); convert it with its zero_to_fp32.py."
        ) from error


def _files(directory: Path) -> tuple[dict[int | None, Path], dict[int, Path]]:
    """Rank -> file of model states (None: not partitioned), and of optimizer states."""
    models: dict[int | None, Path] = {}
    optimizers: dict[int, Path] = {}
    for file in children(directory):
        model, optimizer = _MODEL.fullmatch(file.name), _OPTIMIZER.fullmatch(file.name)
        found = model or optimizer
        if _PARTS.fullmatch(file.name) or (found and int(found[2]) > 0):
            raise FormatError(
                f"{directory} holds {file.name}, a part of a model that was spread over ranks "
                "(tensor, pipeline or expert parallelism), which is not put together here; "
                "convert it to one model first."
            )
        if model:
            models[None if model[1] is None else int(model[1])] = file
        elif optimizer:
            rank = int(optimizer[1])
            if rank in optimizers:
                raise FormatError(
                    f"{directory} holds {optimizers[rank].name} and {file.name}, both of rank "
                    f"{rank}; remove the one of an earlier save."
                )
            optimizers[rank] = file
    return models, optimizers


def _module(directory: Path, models: Mapping[int | None, Path], root: Path) -> dict[str, Tensor]:
    if None not in models:
        raise FormatError(
            f"{directory} lacks the files *_optim_states.pt; with ZeRO stage 3 the weights are in "
            "them: copy them there."
        )
    saved = _saved(models[None], root)
    return dict(tensors_of(saved.get("module"), f"{models[None]}: 'module'"))


def _masters(
    directory: Path,
    models: Mapping[int | None, Path],
    optimizers: Mapping[int, Path],
    root: Path,
) -> dict[str, Tensor]:
    states = {rank: _saved(file, root)["optimizer_state_dict"] for rank, file in optimizers.items()}
    first = next(iter(states.values()))
    # Of its optimizers, only the one for bfloat16 whose gradients are float32 tells no stage: it is
    # that of stage 1.
    stage, ranks = _number(first.get("zero_stage", 1)), first["partition_count"]
    ranks = max(ranks) if isinstance(ranks, list) else ranks
    if sorted(states) != list(range(ranks)):
        raise FormatError(
            f"{directory} holds the optimizer states of ranks {sorted(states)[:8]}, but {ranks} "
            "ranks saved them; copy the others there, or remove those of another save."
        )
    partitioned = stage >= 3
    needed = list(range(ranks)) if partitioned else [None]
    missing = [rank for rank in needed if rank not in models]
    if missing:
        name = f"zero_pp_rank_{missing[0]}_" * partitioned + "mp_rank_00_model_states.pt"
        raise FormatError(f"{directory} lacks {name}; copy it there or remove the checkpoint.")
    model = _saved(models[needed[0]], root)
    groups = [
        {name: checked_shape(shape, f"{directory}: {name}") for name, shape in group.items()}
        for group in model["param_shapes"]
    ]
    key = "fp32_flat_groups" if partitioned else "single_partition_of_fp32_groups"
    flat = [[flat_tensor(each, directory) for each in states[rank][key]] for rank in range(ranks)]
    # What has no master: buffers, and what is not trained, of which stage 1 keeps no other list.
    # Stage 3 leaves empty tensors in place of its parameters.
    shared = model.get("shared_params") or {}
    found: dict[str, Tensor] = {
        name: tensor
        for name, tensor in model["module"].items()
        if isinstance(tensor, StoredTensor) and tensor.dtype in ITEM_BYTES and name not in shared
        if not partitioned or name in (model.get("buffer_names") or ())
    }
    if partitioned:
        frozen = model.get("frozen_param_shapes") or {}
        others = [_saved(models[rank], root) for rank in needed[1:]] if frozen else []
        for name, shape in frozen.items():
            parts = [each["frozen_param_fragments"][name] for each in (model, *others)]
            found[name] = Stretches([flat_tensor(part, directory) for part in parts]).cut(
                0, checked_shape(shape, f"{directory}: {name}"), directory
            )
        return found | zero3_parameters(
            {k: v for group in groups for k, v in group.items()}, flat, directory
        )
    paddings = first.get("param_alignment_paddings") or [None] * len(groups)
    for group, shapes, padding in zip(range(len(groups)), groups, paddings, strict=True):
        found |= zero2_parameters(shapes, [each[group] for each in flat], padding, directory)
    return found


def _saved(file: Path, root: Path) -> Mapping[str, Any]:
    saved = torch_file(file, root)
    if not isinstance(saved, Mapping):
        raise FormatError(f"{file} holds a {type(saved).__name__}, expected DeepSpeed's states.")
    return saved


def _number(value: Any) -> int:
    """An int, or that of an enumeration's member."""
    return int(value.args[0] if isinstance(value, Inert) else value)
