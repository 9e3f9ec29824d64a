"""The stacks of several processes, for test_stacks.py; each process runs this under torchrun.

torchrun --standalone --nproc_per_node 2 -m tests.probes.frameworks.stacks_ranks FOLDER
"""

import sys
from datetime import timedelta
from itertools import product
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from torch.distributed.fsdp import FullyShardedDataParallel, fully_shard
from torch.distributed.tensor import DTensor
from torch.nn.parallel import DistributedDataParallel

from dynamics.errors import DynamicsError
from probes import Recorder
from probes.model import sharding
from tests.probes.adapted import adapted_model, tokens
from tests.probes.stacks import (
    CASES,
    LR,
    STEPS,
    TWO_PROCESSES,
    Case,
    Net,
    lightning,
    loop,
    micro_batches,
    recorded,
    scaler_of,
)

UNCLIPPED = Case(accumulate=2, clip=True, record=("weight", "gradient_before_clipping"))
RANDOM = Case("bfloat16", accumulate=2, clip=True, dropout=0.3)


def end_of(train, case, store, folder):
    """Weights and random numbers after a training."""
    torch.manual_seed(7 + dist.get_rank())
    model = train(case, store, folder, dist.get_rank(), dist.get_world_size())
    weights = [p.full_tensor() if isinstance(p, DTensor) else p for p in model.parameters()]
    return [*(w.detach().clone() for w in weights), torch.get_rng_state()]


def every_case(folder):
    for name, train in TWO_PROCESSES.items():
        for case in CASES:
            end_of(train, case, folder / f"{name}-{case}.zarr", folder)
        end_of(train, UNCLIPPED, folder / f"{name}-unclipped.zarr", folder)
        ends = [
            end_of(train, RANDOM, store, folder) for store in (folder / f"{name}-random.zarr", None)
        ]
        assert all(torch.equal(a, b) for a, b in zip(*ends, strict=True)), name


def no_rank_holds_more_than_one_whole_matrix(folder):
    """Rank 1 keeps nothing, and nothing but matrices of the recording is gathered."""
    model = fully_shard(Net())
    optimizer = torch.optim.SGD(model.parameters(), lr=LR)
    gathered = []
    inner = DTensor.full_tensor

    def counted(self, **options):
        gathered.append(tuple(self.shape))
        return inner(self, **options)

    DTensor.full_tensor = counted
    try:
        with Recorder(model, optimizer, folder / "counted.zarr", every=2, select="up_proj"):
            for step in range(1, STEPS + 1):
                for batch in micro_batches(Case(), step):
                    model(**batch)["loss"].backward()
                optimizer.step()
                optimizer.zero_grad()
    finally:
        DTensor.full_tensor = inner
    assert gathered == [(10, 6)] * 3  # W_0, G_2, W_2


def adapters_of_a_sharded_model(folder):
    """PEFT's adapters on a model that `fully_shard` sharded, and in one process for comparison."""
    record = ["weight", "gradient", "adapter"]
    spectra = {"spectra_only": True, "record": [*record, "update", "displacement"]}
    for sharded, options in product((True, False), ({"record": record}, spectra)):
        model = adapted_model()
        if sharded:
            for layer in model.base_model.model.model.layers:
                fully_shard(layer)
            fully_shard(model)
        optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=1e-2)
        name = f"{'sharded' if sharded else 'whole'}{'-spectra' * (options is spectra)}"
        with Recorder(model, optimizer, folder / f"adapted-{name}.zarr", every=1, **options):
            ids = tokens(1)
            model(input_ids=ids, labels=ids).loss.backward()
            optimizer.step()


def one_rank_alone_is_told_so(folder):
    patience, sharding.PATIENCE = sharding.PATIENCE, timedelta(seconds=1)
    model = fully_shard(Net())
    optimizer = torch.optim.SGD(model.parameters(), lr=LR)
    recorder = Recorder(model, optimizer, folder / "alone.zarr")
    if dist.get_rank() == 0:
        with pytest.raises(DynamicsError, match="Rank 0 waited 1 s for the recorders of ranks 1:"):
            recorder.attach()
    dist.barrier()
    sharding.PATIENCE = patience
    with recorder:  # all of them together can still go on
        pass


def what_cannot_be_recorded_is_refused_by_name(folder):
    model = FullyShardedDataParallel(Net(), device_id=torch.device("cpu"))
    optimizer = torch.optim.SGD(model.parameters(), lr=LR)
    with pytest.raises(DynamicsError, match=r"^FSDP1 .* shard with FSDP2"):
        Recorder(model, optimizer, folder / "fsdp1.zarr")

    model = Net()
    optimizer = torch.optim.SGD(model.parameters(), lr=LR)
    record = ["gradient_before_clipping"]
    with pytest.raises(DynamicsError, match="before clipping, must be averaged over 2 processes"):
        Recorder(model, optimizer, folder / "local.zarr", record=record)

    model.up_proj.weight.requires_grad_(False)
    fully_shard(model)
    with pytest.raises(DynamicsError, match=r"SGD is one of .*: it is .* made before fully_shard"):
        Recorder(model, optimizer, folder / "stale.zarr")
    optimizer = torch.optim.SGD(model.parameters(), lr=LR)
    with pytest.raises(DynamicsError, match=r"sharded \(FSDP2\); 1 are, such as up_proj.weight"):
        Recorder(model, optimizer, folder / "frozen.zarr")

    model = Net()
    optimizer = torch.optim.SGD(model.parameters(), lr=LR)
    with Recorder(model, optimizer, folder / "early.zarr", every=1):
        fully_shard(model)
        with pytest.raises(DynamicsError, match="2 recorded weights, such as up_proj"):
            optimizer.step()


def rank_0_alone_may_record_what_needs_no_other(folder):
    model = DistributedDataParallel(Net())
    optimizer = torch.optim.SGD(model.parameters(), lr=LR)
    case, store = Case(), folder / "alone_in_ddp.zarr"
    with recorded(store if dist.get_rank() == 0 else None, model, optimizer, case):
        loop(model, optimizer, case, scaler_of(case), rank=dist.get_rank(), ranks=2)


def main(folder):
    dist.init_process_group("gloo")
    torch.set_num_threads(1)
    every_case(folder)
    no_rank_holds_more_than_one_whole_matrix(folder)
    adapters_of_a_sharded_model(folder)
    rank_0_alone_may_record_what_needs_no_other(folder)
    one_rank_alone_is_told_so(folder)
    what_cannot_be_recorded_is_refused_by_name(folder)
    lightning(Case(accumulate=2, clip=True), folder / "lightning.zarr", folder, devices=2)
    dist.destroy_process_group()


if __name__ == "__main__":
    main(Path(sys.argv[1]))
