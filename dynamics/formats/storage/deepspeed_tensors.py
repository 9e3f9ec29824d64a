"""The tensors of a DeepSpeed checkpoint: model states, and ZeRO's partitions of the masters.

With ZeRO, the optimizer updates float32 masters. They are stored flat and spread over the ranks.
They are cut into parameters as deepspeed/utils/zero_to_fp32.py does it, but one parameter at a
time. Without ZeRO (stage 0), or where only the model states were kept, the weights of the module
are read.
"""

import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from dynamics.errors import FormatError
from dynamics.formats.storage.files import children, entries
from dynamics.formats.storage.tensors import StoredTensor, Tensor, UnreadTensor, checked_shape
from dynamics.formats.storage.torch_files import tensors_of, torch_file
from dynamics.formats.storage.unpickling import Inert
from dynamics.formats.storage.zero_partitions import (
    JoinedTensors,
    flat_tensor,
    zero2_parameters,
    zero3_parameters,
)

_MODEL = re.compile(r"(?:zero_pp_rank_(\d+)_)?mp_rank_(\d+)_model_states\.pt")
_OPTIMIZER = re.compile(r"(?:bf16_|fp16_)?zero_pp_rank_(\d+)_mp_rank_(\d+)_optim_states\.pt")
# Experts and pipeline stages have files of their own; each holds a part of a model.
_PARTS = re.compile(r"layer_\d+.*\.pt|expp_rank_\d+_.*\.pt")


def has_model_states(directory: Path) -> bool:
    """Whether DeepSpeed saved a model into the directory itself."""
    return directory.is_dir() and any(_MODEL.fullmatch(each.name) for each in entries(directory))


def model_states(directory: Path, root: Path) -> tuple[Path, Mapping[str, Any]]:
    """(first file of model states in a directory that has one, what it holds).

    Raises:
        FormatError: the file is damaged.
    """
    file = next(each for each in children(directory) if _MODEL.fullmatch(each.name))
    return file, _states_in(file, root)


def deepspeed_tensors(directory: Path, root: Path) -> dict[str, Tensor]:
    """Name -> tensor of the model whose states DeepSpeed saved into a directory.

    Raises:
        FormatError: a rank's file is missing or damaged, partitions and shapes disagree, or the
            model itself is spread over ranks (tensor, pipeline or expert parallelism).
    """
    models, optimizers = _files_by_rank(directory)
    try:
        if not optimizers:
            return _module_weights(directory, models, root)
        return _master_weights(directory, models, optimizers, root)
    # A pickle may hold anything anywhere; where it does not fit, one of these is raised.
    except (KeyError, IndexError, TypeError, AttributeError) as error:
        raise FormatError(
            f"{directory} does not hold states as DeepSpeed saves them ({type(error).__name__}: "
            f"{error}); convert it with its own zero_to_fp32.py."
        ) from error


def _files_by_rank(directory: Path) -> tuple[dict[int | None, Path], dict[int, Path]]:
    """Rank -> file of model states (None: not partitioned), and of optimizer states."""
    models: dict[int | None, Path] = {}
    optimizers: dict[int, Path] = {}
    for file in children(directory):
        model, optimizer = _MODEL.fullmatch(file.name), _OPTIMIZER.fullmatch(file.name)
        match = model or optimizer
        if _PARTS.fullmatch(file.name) or (match and int(match[2]) > 0):
            raise FormatError(
                f"{directory} holds {file.name}, a part of a model that was spread over ranks "
                "(tensor, pipeline or expert parallelism). Such parts are not put together here; "
                "convert them to one model first."
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


def _module_weights(
    directory: Path, models: Mapping[int | None, Path], root: Path
) -> dict[str, Tensor]:
    if None not in models:
        raise FormatError(
            f"{directory} lacks the files *_optim_states.pt. With ZeRO stage 3 the weights are in "
            "these files; copy them there."
        )
    saved = _states_in(models[None], root)
    return dict(tensors_of(saved.get("module"), f"{models[None]}: 'module'"))


def _master_weights(
    directory: Path,
    models: Mapping[int | None, Path],
    optimizers: Mapping[int, Path],
    root: Path,
) -> dict[str, Tensor]:
    states = {
        rank: _states_in(file, root)["optimizer_state_dict"] for rank, file in optimizers.items()
    }
    first = next(iter(states.values()))
    # Only one of DeepSpeed's optimizers stores no stage: the one for bfloat16 weights with float32
    # gradients. It is an optimizer of stage 1.
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
    model = _states_in(models[needed[0]], root)
    groups = [
        {name: checked_shape(shape, f"{directory}: {name}") for name, shape in group.items()}
        for group in model["param_shapes"]
    ]
    key = "fp32_flat_groups" if partitioned else "single_partition_of_fp32_groups"
    flat = [[flat_tensor(each, directory) for each in states[rank][key]] for rank in range(ranks)]
    # Buffers have no master, nor do weights that are not trained (stage 1 has no list of these).
    # Stage 3 leaves an empty tensor in place of each parameter.
    shared = model.get("shared_params") or {}
    tensors: dict[str, Tensor] = {
        name: tensor
        for name, tensor in model["module"].items()
        if isinstance(tensor, StoredTensor | UnreadTensor) and name not in shared
        if not partitioned or name in (model.get("buffer_names") or ())
    }
    if partitioned:
        frozen = model.get("frozen_param_shapes") or {}
        others = [_states_in(models[rank], root) for rank in needed[1:]] if frozen else []
        for name, shape in frozen.items():
            parts = [each["frozen_param_fragments"][name] for each in (model, *others)]
            tensors[name] = JoinedTensors([flat_tensor(part, directory) for part in parts]).cut(
                0, checked_shape(shape, f"{directory}: {name}"), directory
            )
        return tensors | zero3_parameters(
            {k: v for group in groups for k, v in group.items()}, flat, directory
        )
    paddings = first.get("param_alignment_paddings") or [None] * len(groups)
    for group, shapes, padding in zip(range(len(groups)), groups, paddings, strict=True):
        tensors |= zero2_parameters(shapes, [each[group] for each in flat], padding, directory)
    return tensors


def _states_in(file: Path, root: Path) -> Mapping[str, Any]:
    saved = torch_file(file, root)
    if not isinstance(saved, Mapping):
        raise FormatError(f"{file} holds a {type(saved).__name__}, expected DeepSpeed's states.")
    return saved


def _number(value: Any) -> int:
    """An int, or that of an enumeration's member."""
    return int(value.args[0] if isinstance(value, Inert) else value)
