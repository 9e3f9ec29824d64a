"""What a group of one process shows of gathering and averaging.

Several processes are in tests/probes/frameworks/test_stacks.py and
tests/probes/gradients/test_data_parallel.py.
"""

from datetime import timedelta

import pytest
import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import Shard, distribute_tensor

from dynamics.errors import DynamicsError
from probes.model import sharding
from probes.model.parameters import track


@pytest.fixture
def process_group():
    store = dist.TCPStore("127.0.0.1", 0, 1, is_master=True)  # what torchrun makes
    dist.init_process_group("gloo", store=store, rank=0, world_size=1)
    yield dist.group.WORLD
    dist.destroy_process_group()


@pytest.fixture
def weight():
    return torch.arange(12.0).view(4, 3)


def test_a_sharded_tensor_is_gathered_and_a_plain_one_is_not_copied(process_group, weight):
    mesh = init_device_mesh("cpu", (1,))
    sharded = distribute_tensor(weight, mesh, [Shard(0)])
    assert sharding.is_sharded(sharded)
    assert not sharding.is_sharded(weight)
    assert torch.equal(sharding.gather(sharded), weight)
    assert sharding.gather(sharded, keep=False) is None
    assert sharding.gather(weight).data_ptr() == weight.data_ptr()
    assert torch.equal(sharding.gather(weight.to_sparse()), weight)


def test_a_weight_that_no_rank_reached_has_no_mean(process_group, weight):
    parameters = {"a": weight, "b": weight}
    means = sharding.means_over_ranks(parameters, {"a": 2 * weight}, process_group)
    assert means.keys() == {"a"}
    assert torch.equal(means["a"], 2 * weight)
    assert sharding.means_over_ranks({}, {}, process_group) == {}


def test_ddp_says_over_which_processes_gradients_are_averaged(process_group):
    model = nn.Linear(3, 2)
    wrapped = nn.parallel.DistributedDataParallel(model)
    tracked = track(model, None)[0]
    assert sharding.data_parallel_group(wrapped, tracked) is wrapped.process_group
    assert sharding.data_parallel_group(model, tracked) is None  # a single process
    assert sharding.data_parallel_group(model, tracked, process_group) is process_group
    assert sharding.needed_ranks(tracked, process_group) == {0}
    assert sharding.needed_ranks(tracked, None) == set()


def test_a_recorder_that_waits_in_vain_names_the_missing_ranks(process_group, monkeypatch):
    monkeypatch.setattr(sharding, "PATIENCE", timedelta(milliseconds=50))
    sharding.wait_for_ranks([0])
    with pytest.raises(DynamicsError, match="recorders of ranks 1, 2: gathering"):
        sharding.wait_for_ranks([0, 1, 2])


def test_a_store_in_a_file_names_the_missing_ranks_too(tmp_path, monkeypatch):
    monkeypatch.setattr(sharding, "PATIENCE", timedelta(milliseconds=50))
    dist.init_process_group("gloo", init_method=f"file://{tmp_path}/store", rank=0, world_size=1)
    try:
        with pytest.raises(DynamicsError, match="recorders of ranks 1: gathering"):
            sharding.wait_for_ranks([0, 1])
    finally:
        dist.destroy_process_group()
