"""What each rank of `test_mesh` does: tensor parallelism within FSDP2, on a mesh of 2 x 2.

python -m torch.distributed.run --nproc_per_node 4 -m tests.probes.model.mesh_ranks FOLDER
"""

import sys
from pathlib import Path

import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor.parallel import (
    ColwiseParallel,
    RowwiseParallel,
    parallelize_module,
)

from probes import Recorder

STEPS = 3


def sharded_model():
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(8, 16, bias=False), nn.ReLU(), nn.Linear(16, 8, bias=False))
    mesh = init_device_mesh("cpu", (2, 2), mesh_dim_names=("data", "tensor"))
    parallelize_module(model, mesh["tensor"], {"0": ColwiseParallel(), "2": RowwiseParallel()})
    fully_shard(model, mesh=mesh["data"])
    return model


def train(store=None):
    """(whole weights, whole gradients of the last step), by name."""
    model = sharded_model()
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.05)
    recorder = Recorder(model, optimizer, store, every=1).attach() if store else None
    for step in range(STEPS):
        batch = 10 * step + dist.get_rank() // 2  # the ranks of one tensor group see the same
        x = torch.randn(4, 8, generator=torch.Generator().manual_seed(batch))
        model(x).square().mean().backward()
        gradients = {name: each.grad.full_tensor() for name, each in model.named_parameters()}
        optimizer.step()
        optimizer.zero_grad()
    if recorder is not None:
        recorder.close()
    return {name: each.full_tensor().detach() for name, each in model.named_parameters()}, gradients


if __name__ == "__main__":
    folder = Path(sys.argv[1])
    dist.init_process_group("gloo")
    plain, _ = train()
    weights, gradients = train(folder / "run.zarr")
    same = all(torch.equal(plain[name], weights[name]) for name in plain)
    torch.save((same, weights, gradients), folder / f"rank{dist.get_rank()}.pt")
    dist.destroy_process_group()
