"""Live values of two processes, for test_ranks.py; each process runs this under torchrun."""

import sys
from pathlib import Path

import torch
import torch.distributed as dist
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor
from torch.nn.parallel import DistributedDataParallel

from probes import Live, Recorder
from tests.probes.live.test_frameworks import fitted, trained
from tests.probes.live.training import build, loop


class Shown(dict):
    """step -> values of one process."""

    def __call__(self, values, step):
        assert step not in self
        self[step] = values


def recorded(folder, name, wrap):
    """The end of a training of which each rank writes what it was shown to a file of its own."""
    model, _ = build()
    model = wrap(model)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
    shown = Shown()
    live = None if name is None else Live(to=shown, budget=None)
    if name is None:
        loop(model, optimizer, 4)
    else:
        with Recorder(model, optimizer, folder / f"{name}.zarr", every=1, live=live):
            loop(model, optimizer, 4)
        torch.save(dict(shown), folder / f"{name}-{dist.get_rank()}.pt")
    weights = [p.full_tensor() if isinstance(p, DTensor) else p for p in model.parameters()]
    return [each.detach().clone() for each in weights]


def main(folder):
    dist.init_process_group("gloo")
    torch.set_num_threads(1)
    for name, wrap in (("ddp", DistributedDataParallel), ("fsdp", fully_shard)):
        with_live, without = recorded(folder, name, wrap), recorded(folder, None, wrap)
        assert all(torch.equal(a, b) for a, b in zip(with_live, without, strict=True)), name
    try:
        import tensorboard  # noqa: F401
    except ImportError:
        dist.destroy_process_group()
        return
    from lightning.pytorch.loggers import TensorBoardLogger

    trained(folder, "trainer", "tensorboard")
    (folder / "lightning").mkdir(exist_ok=True)
    logger = TensorBoardLogger(folder / "lightning/log")
    fitted(folder / "lightning", [logger], devices=2, strategy="ddp")
    dist.destroy_process_group()


if __name__ == "__main__":
    main(Path(sys.argv[1]))
