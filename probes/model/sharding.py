"""Tensors whose parts lie on several processes: gathering, averaging, and who must take part."""

from collections.abc import Iterable, Mapping, Sequence
from datetime import timedelta
from typing import Any

import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.tensor import DTensor

from dynamics.errors import DynamicsError
from probes.model.parameters import Tracked
from probes.optimizers.nesting import (
    innermost_optimizers,
    optimizer_layers,
    optimizer_parameters,
)

# How long a recorder waits for the recorders of other processes before it says which are missing.
# All ranks finish constructing the model at about the same time, but one may still load data.
PATIENCE = timedelta(seconds=120)

_meetings = 0


def is_sharded(tensor: torch.Tensor) -> bool:
    """Whether the tensor is split over processes (FSDP2, tensor parallelism)."""
    return isinstance(tensor, DTensor)


def is_rank_0() -> bool:
    """Whether this is the only process, or rank 0 of torch.distributed."""
    return not (dist.is_available() and dist.is_initialized()) or dist.get_rank() == 0


def gather(tensor: torch.Tensor, *, keep: bool = True) -> torch.Tensor | None:
    """All values of a tensor, on its device; copied only if the tensor is sharded or sparse.

    Every process that holds a part of a sharded tensor must call this, for the same tensors in
    the same order. Besides what is kept, at most one gathered tensor exists at a time.

    Args:
        tensor: any tensor; a sparse one becomes dense.
        keep: whether this process wants the values. Otherwise it gets None.
    """
    tensor = tensor.detach()
    if isinstance(tensor, DTensor):
        tensor = tensor.full_tensor()
    if not keep:
        return None
    return tensor.to_dense() if tensor.is_sparse else tensor


def means_over_ranks(
    parameters: Mapping[str, torch.Tensor], values: Mapping[str, torch.Tensor], group: Any
) -> dict[str, torch.Tensor]:
    """Name -> mean over the ranks, as DDP computes it; a rank without a value counts as zero.

    Every rank of the group must call this.

    Args:
        parameters: name -> parameter, the same on each rank.
        values: name -> value of this rank. Names may be missing; a name that is missing on every
            rank is missing in the result.
        group: the process group.
    """
    if not parameters:
        return {}
    ranks = dist.get_world_size(group)
    device = next(iter(parameters.values())).device
    reached = torch.tensor([name in values for name in parameters], device=device).int()
    dist.all_reduce(reached, group=group)
    averaged = {}
    for (name, parameter), count in zip(parameters.items(), reached.tolist(), strict=True):
        if count > 0:
            mean = values[name] / ranks if name in values else torch.zeros_like(parameter.detach())
            mean = mean.contiguous()  # collectives need it
            dist.all_reduce(mean, group=group)
            averaged[name] = mean
    return averaged


def data_parallel_group(
    model: nn.Module, averaged: Sequence[Tracked], process_group: Any = None
) -> Any:
    """The process group over which the gradients of `model` are averaged; None for one process.

    Args:
        model: the module that the user calls; DDP knows its own group.
        averaged: the weights whose gradients the recorder must average itself.
        process_group: the group that the user gave, or None.

    Raises:
        DynamicsError: several processes train, `averaged` is not empty, and neither DDP nor the
            user says over which processes gradients are averaged.
    """
    if process_group is not None or not (dist.is_available() and dist.is_initialized()):
        return process_group
    for module in model.modules():
        if isinstance(module, nn.parallel.DistributedDataParallel):
            return module.process_group
    ranks = dist.get_world_size()
    if ranks > 1 and averaged:
        raise DynamicsError(
            f"Gradients of frozen weights, or before clipping, must be averaged over {ranks} "
            f"processes, and {type(model).__name__} does not say which: in every process, give the "
            "recorder the DistributedDataParallel module or "
            "process_group=torch.distributed.group.WORLD, or record=['weight', 'gradient', "
            "'adapter']."
        )
    return None


def wait_for_ranks(ranks: Iterable[int]) -> None:
    """Wait until the recorder of each of these processes is attached.

    Without this, a recorder that only one process attaches would wait in its first collective
    forever. The processes meet in the key-value store that `init_process_group` made, because no
    collective of a backend uses it.

    Raises:
        DynamicsError: a process does not arrive within `PATIENCE`.
    """
    global _meetings
    store = dist.distributed_c10d._get_default_store()
    places = {rank: f"learning-dynamics/recorder/{_meetings}/{rank}" for rank in sorted(ranks)}
    store.set(places[dist.get_rank()], "here")
    try:
        store.wait(list(places.values()), PATIENCE)
    except RuntimeError:  # DistStoreError is one; a FileStore raises no other
        missing = [str(rank) for rank, place in places.items() if not store.check([place])]
        if not missing:
            raise
        raise DynamicsError(
            f"Rank {dist.get_rank()} waited {PATIENCE.total_seconds():.0f} s for the recorders of "
            f"ranks {', '.join(missing)}: gathering and averaging need all of them. Attach a "
            "recorder with the same arguments in every process; only rank 0 writes."
        ) from None
    _meetings += 1


def needed_ranks(tracked: Sequence[Tracked], averaged_over: Any) -> set[int]:
    """The ranks that must take part in making a record; empty if this process can do it alone.

    Args:
        tracked: the recorded weights.
        averaged_over: the process group over which the recorder averages gradients, or None.
    """
    ranks = set() if averaged_over is None else set(dist.get_process_group_ranks(averaged_over))
    for each in tracked:
        if isinstance(each.parameter, DTensor):
            ranks.update(each.parameter.device_mesh.mesh.flatten().tolist())
    return ranks


def refuse_unreadable(model: nn.Module, optimizers: Iterable[Any]) -> None:
    """Refuse libraries that keep weights or gradients where a recorder cannot read them.

    Args:
        model: the model that is trained.
        optimizers: as the user gave them, with their wrappers.

    Raises:
        DynamicsError: FSDP1, DeepSpeed ZeRO, a model on the meta device, an optimizer without the
            hooks of torch, or one of another model.
    """
    from torch.distributed.fsdp import FullyShardedDataParallel

    if any(isinstance(module, FullyShardedDataParallel) for module in model.modules()) or any(
        "_fsdp_wrapped_module" in name or "_flat_param" in name
        for name, _ in model.named_parameters()
    ):
        raise DynamicsError(
            "FSDP1 (FullyShardedDataParallel) keeps flattened pieces instead of matrices and "
            "cannot be recorded: shard with FSDP2, torch.distributed.fsdp.fully_shard (accelerate "
            "and transformers: fsdp_version=2; Lightning: ModelParallelStrategy)."
        )
    matrices = {name: each.is_meta for name, each in model.named_parameters() if each.ndim > 1}
    if matrices and all(matrices.values()):
        raise DynamicsError(
            f"The weights of {type(model).__name__}, such as {next(iter(matrices))}, are on the "
            "meta device and have no values: load the model, or move it with to_empty(), first."
        )
    for optimizer in optimizers:
        for layer in (*optimizer_layers(optimizer), *model.modules()):
            # Optimizers of `deepspeed.ops` are fine: they are ordinary torch optimizers.
            if type(layer).__module__.startswith("deepspeed.runtime"):
                raise DynamicsError(
                    f"DeepSpeed's {type(layer).__name__} keeps gradients in buffers of its own, "
                    "which cannot be recorded: train with DDP or FSDP2, or analyze the "
                    "checkpoints that DeepSpeed saves."
                )
        inside = innermost_optimizers(optimizer)
        if not all(isinstance(each, torch.optim.Optimizer) for each in inside):
            raise DynamicsError(
                "A recorder takes torch optimizers, or wrappers that hold some; "
                f"found {type(optimizer).__module__}.{type(optimizer).__name__}."
            )
        own = {id(parameter) for parameter in model.parameters()}
        if not any(id(each) in own for layer in inside for each in optimizer_parameters(layer)):
            raise DynamicsError(
                f"No parameter of the optimizer {type(optimizer).__name__} is one of the model "
                f"{type(model).__name__}: it is of another model, or it was made before "
                "fully_shard() or accelerator.prepare() replaced the parameters. Give the recorder "
                "the optimizer that trains this model."
            )
