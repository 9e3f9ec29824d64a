"""What each process of a data-parallel training does, for test_data_parallel.py; run by torchrun.

torchrun --standalone --nproc_per_node 2 -m tests.probes.gradients.data_parallel_ranks FOLDER
"""

import sys
from contextlib import nullcontext
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.nn.parallel import DistributedDataParallel

from dynamics.errors import DynamicsError
from probes import Recorder
from probes.model.twin import whole
from probes.relora.layers.sltrain import SLTrainLinear
from tests.probes.adapted import (
    adam,
    adapted_model,
    frozen_matrices,
    tokens,
    train,
    unfrozen_gradients,
)
from tests.probes.frameworks.trainer import trained_by_trainer

STEPS, ACCUMULATE = 3, 2
VARIANTS = {
    "plain": {},
    "find_unused": {"find_unused_parameters": True},
    "bucket_view": {"gradient_as_bucket_view": True},
}


class Sometimes(nn.Module):
    """A trained layer, a frozen one that rank 0 alone uses, and a frozen one that nobody uses."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.trained = nn.Linear(4, 4, bias=False)
        self.sometimes, self.never = (nn.Linear(4, 4, bias=False) for _ in range(2))
        for layer in (self.sometimes, self.never):
            layer.requires_grad_(False)

    def forward(self, x):
        y = self.trained(x)
        return self.sometimes(y) if dist.get_rank() == 0 else y


def probed_and_unfrozen(folder, options):
    """A probed training, the same without a recorder, and a twin whose base is in DDP's buckets."""
    training = {"accumulate": ACCUMULATE, "rank": dist.get_rank(), "clip": 0.05}
    ends = []
    for recorded in (True, False):
        model = adapted_model(0.3)
        flags = [p.requires_grad for p in model.parameters()]
        parallel, optimizer = DistributedDataParallel(model, **options), adam(model)
        if recorded:
            with Recorder(parallel, optimizer, folder / "run.zarr", every=1):
                norms = train(parallel, optimizer, STEPS, **training)
        else:
            norms = train(parallel, optimizer, STEPS, **training)
        assert flags == [p.requires_grad for p in model.parameters()]
        ends.append(([p.detach().clone() for p in model.parameters()], norms))
    (probed, probed_norms), (plain, plain_norms) = ends
    assert probed_norms == plain_norms
    assert all(torch.equal(a, b) for a, b in zip(probed, plain, strict=True))

    model = adapted_model(0.3)
    frozen, optimizer = frozen_matrices(model), adam(model)
    for parameter in frozen.values():
        parameter.requires_grad_(True)
    parallel = DistributedDataParallel(model, **options)
    expected = unfrozen_gradients(parallel, optimizer, frozen, STEPS, **training)
    if dist.get_rank() == 0:
        torch.save(expected, folder / "expected.pt")


def some_ranks_only(folder):
    model = Sometimes()
    parallel = DistributedDataParallel(model)
    optimizer = torch.optim.SGD(model.trained.parameters(), lr=0.1)
    with Recorder(parallel, optimizer, folder / "sometimes.zarr", every=1):
        parallel(torch.ones(2, 4)).sum().backward()
        optimizer.step()


def sparse_low_rank_model():
    """Two layers of SLTrain, all of whose parts are random, as after some training."""
    torch.manual_seed(0)
    model = nn.Sequential(
        SLTrainLinear(9, 12, 2, scaling=2.0, sparsity=0.2),
        nn.Tanh(),
        SLTrainLinear(12, 7, 2, scaling=2.0, sparsity=0.2),
    )
    for layer in (model[0], model[2]):
        nn.init.normal_(layer.lora_B)
    return model


def inputs(step, rank):
    """(4, 9), which differ from process to process."""
    return torch.randn(4, 9, generator=torch.Generator().manual_seed(10 * step + rank))


def fully_sharded(model):
    mesh = init_device_mesh("cpu", (2,))
    for each in (model[0], model[2], model):
        fully_shard(each, mesh=mesh)
    return model


WRAPPED = {"ddp": DistributedDataParallel, "fsdp2": fully_sharded}


def sparse_low_rank(folder, name):
    """With a recorder and without, which must train the same bits."""
    ends = []
    for recorded in (True, False):
        parallel = WRAPPED[name](sparse_low_rank_model())
        optimizer = torch.optim.SGD(parallel.parameters(), lr=1e-3)
        recorder = Recorder(
            parallel,
            optimizer,
            folder / f"sltrain-{name}.zarr",
            every=1,
            process_group=dist.group.WORLD,
        )
        with recorder if recorded else nullcontext():
            for step in range(STEPS):
                optimizer.zero_grad()
                with parallel.no_sync() if name == "ddp" else nullcontext():
                    parallel(inputs(step, dist.get_rank())).square().sum().backward()
                parallel(-inputs(step, dist.get_rank())).exp().sum().backward()
                optimizer.step()
        ends.append([whole(each.detach()) for each in parallel.parameters()])
    assert all(torch.equal(a, b) for a, b in zip(*ends, strict=True))


def the_module_inside_needs_a_group(folder):
    model = adapted_model()
    DistributedDataParallel(model)
    optimizer = adam(model)
    with pytest.raises(DynamicsError, match="must be averaged over 2 processes, and Peft"):
        Recorder(model, optimizer, folder / "refused.zarr")
    record = ["weight", "gradient", "adapter"]
    with Recorder(model, optimizer, folder / "unprobed.zarr", record=record):
        pass
    store = folder / "grouped.zarr"
    ids = tokens(1, rank=dist.get_rank())
    with Recorder(model, optimizer, store, every=1, process_group=dist.group.WORLD):
        model(input_ids=ids, labels=ids).loss.backward()
        optimizer.step()


def main(folder):
    dist.init_process_group("gloo")
    torch.set_num_threads(1)
    for name, options in VARIANTS.items():
        (folder / name).mkdir(exist_ok=True)
        probed_and_unfrozen(folder / name, options)
    some_ranks_only(folder)
    for name in WRAPPED:
        sparse_low_rank(folder, name)
    the_module_inside_needs_a_group(folder)
    trained_by_trainer(folder, "trainer", batch=2, every=1)
    dist.destroy_process_group()


if __name__ == "__main__":
    main(Path(sys.argv[1]))
