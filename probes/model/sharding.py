"""Tensors of a model whose parts lie on several processes: whole ones, means, and who must help."""

from collections.abc import Iterable, Mapping, Sequence
from datetime import timedelta
from typing import Any

import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.tensor import DTensor

from dynamics.errors import DynamicsError
from probes.model.optimizers import innermost_optimizer, optimizer_layers
from probes.model.parameters import Tracked

# How long a recorder waits for those of the other processes before it says who is missing. Ranks
# leave the construction of a model at about the same time, but one may still be loading data.
PATIENCE = timedelta(seconds=120)

_meetings = 0


def is_sharded(tensor: torch.Tensor) -> bool:
    """Whether reading the whole tensor needs other processes: FSDP2 and tensor parallelism."""
    return isinstance(tensor, DTensor)


def whole(tensor: torch.Tensor, *, keep: bool = True) -> torch.Tensor | None:
    """All values of a tensor, on its device, not copied if they are there; None if not kept.

    A sharded one is gathered: every process must come here, for the same tensors in the same
    order, and at most one whole tensor exists at a time beside what is kept.

    Args:
        tensor: any tensor; a sparse one becomes dense.
        keep: whether this process wants the values.
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

    Args:
        parameters: name -> parameter, the same on each rank.
        values: name -> this rank's value; may lack some. What no rank has is not returned.
        group: the process group; every rank of it must come here.
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
            mean = mean.contiguous()  # collectives take nothing else
            dist.all_reduce(mean, group=group)
            averaged[name] = mean
    return averaged


def data_parallel_group(
    model: nn.Module, averaged: Sequence[Tracked], process_group: Any = None
) -> Any:
    """The process group over which the gradients of `model` are averaged, None for one process.

    Args:
        model: what the user calls; DDP knows its own group.
        averaged: the weights whose gradients DDP does not average for the recorder.
        process_group: the user's word, or None.

    Raises:
        DynamicsError: several processes train, there are such weights, and nobody said over
            which processes gradients are averaged.
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
            f"processes, and {type(model).__name__} does not say which: give the "
            "DistributedDataParallel module or process_group=torch.distributed.group.WORLD to the "
            "recorder of every process, or record=['weight', 'gradient', 'adapter']."
        )
    return None


def meet(ranks: Iterable[int]) -> None:
    """Return when the recorder of each of these processes is here.

    Without it a recorder that one process alone attaches would wait in its first collective for
    ever. The processes meet in the key-value store that `init_process_group` made, which no
    backend's collectives touch.

    Raises:
        DynamicsError: one of them does not come within `PATIENCE`.
    """
    global _meetings
    store = dist.distributed_c10d._get_default_store()
    places = {rank: f"learning-dynamics/recorder/{_meetings}/{rank}" for rank in sorted(ranks)}
    store.set(places[dist.get_rank()], "here")
    try:
        store.wait(list(places.values()), PATIENCE)
    except dist.DistStoreError:
        missing = [str(rank) for rank, place in places.items() if not store.check([place])]
        raise DynamicsError(
            f"Rank {dist.get_rank()} waited {PATIENCE.total_seconds():.0f} s for the recorders of "
            f"ranks {', '.join(missing)}: gathering and averaging need all of them. Attach a "
            "recorder of the same arguments in every process; rank 0 alone writes."
        ) from None
    _meetings += 1


def needed_ranks(tracked: Sequence[Tracked], averaged_over: Any) -> set[int]:
    """The processes without which a record cannot be made; empty where this one can do it alone.

    Args:
        tracked: the recorded weights.
        averaged_over: the process group of gradients that the recorder averages itself, or None.
    """
    ranks = set() if averaged_over is None else set(dist.get_process_group_ranks(averaged_over))
    for each in tracked:
        if isinstance(each.parameter, DTensor):
            ranks.update(each.parameter.device_mesh.mesh.flatten().tolist())
    return ranks


def refuse_unreadable(model: nn.Module, optimizers: Iterable[Any]) -> None:
    """Raise for what keeps weights or gradients where their owner alone can find them.

    Args:
        model: what is trained.
        optimizers: as they were given, wrappers and all.

    Raises:
        DynamicsError: FSDP1, DeepSpeed's ZeRO, or an optimizer without the hooks of torch's.
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
    for optimizer in optimizers:
        for layer in (*optimizer_layers(optimizer), *model.modules()):
            # Not all of the package: its `deepspeed.ops` are optimizers as any other.
            if type(layer).__module__.startswith("deepspeed.runtime"):
                raise DynamicsError(
                    f"DeepSpeed's {type(layer).__name__} keeps gradients in buffers of its own, "
                    "which cannot be recorded: train with DDP or FSDP2, or measure the "
                    "checkpoints of DeepSpeed."
                )
        if not isinstance(innermost_optimizer(optimizer), torch.optim.Optimizer):
            raise DynamicsError(
                f"A recorder takes torch optimizers or wrappers with an `optimizer`; found "
                f"{type(optimizer).__module__}.{type(optimizer).__name__}."
            )
