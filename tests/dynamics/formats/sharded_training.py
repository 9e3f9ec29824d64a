"""Small trainings whose libraries write the files that these tests read, some by torchrun.

torchrun --standalone --nproc_per_node 2 -m tests.dynamics.formats.sharded_training fsdp2 FOLDER
"""

import os
import subprocess
import sys
from pathlib import Path

import torch
import torch.distributed as dist
from torch import nn

VOCABULARY, WIDTH = 11, 7  # odd, so that nothing is divided evenly
STEPS = 2


class Small(nn.Module):
    """Two layers between embeddings; `frozen` is not trained, a buffer has two dimensions."""

    def __init__(self, tied=False):
        super().__init__()
        self.embed_tokens = nn.Embedding(VOCABULARY, WIDTH)
        self.layers = nn.ModuleList([nn.Linear(WIDTH, WIDTH) for _ in range(2)])
        self.frozen = nn.Linear(WIDTH, 5, bias=False)
        self.lm_head = nn.Linear(WIDTH, VOCABULARY, bias=False)
        self.register_buffer("table", torch.rand(3, WIDTH))
        self.register_buffer("calls", torch.zeros(2, 2, dtype=torch.int64))
        self.frozen.requires_grad_(False)
        if tied:
            self.lm_head.weight = self.embed_tokens.weight

    def forward(self, tokens):
        hidden = self.embed_tokens(tokens)
        for layer in self.layers:
            hidden = torch.relu(layer(hidden))
        used = (
            self.frozen(hidden).float().mean()
            + (hidden @ self.table.T.to(hidden.dtype)).float().mean()
        )
        return self.lm_head(hidden).float().square().mean() + used


def batch():
    return torch.randint(0, VOCABULARY, (2, 3))


def matrices(state_dict):
    """Name -> tensor of what has two dimensions and is no integer."""
    return {
        name: tensor.detach()
        for name, tensor in state_dict.items()
        if tensor.ndim == 2 and tensor.is_floating_point()
    }


def torchrun(what, folder, processes=2):
    """Run `what` of this module in so many processes; a failure shows what they printed."""
    command = ["torch.distributed.run", "--standalone", "--nproc_per_node", str(processes)]
    done = subprocess.run(
        [sys.executable, "-m", *command, "-m", __name__, what, str(folder)],
        cwd=Path(__file__).parents[3],
        env={**os.environ, "OMP_NUM_THREADS": "1", "DS_ACCELERATOR": "cpu"},
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert done.returncode == 0, (done.stdout + done.stderr)[-4000:]
    return folder


def fsdp2(folder):
    """torchtitan's names: checkpoint/step-N with {"model", "optimizer", "train_state"}."""
    import torch.distributed.checkpoint as dcp
    from torch.distributed.checkpoint.state_dict import get_state_dict
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import fully_shard

    dist.init_process_group("gloo")
    torch.manual_seed(0)
    model = Small()
    mesh = init_device_mesh("cpu", (dist.get_world_size(),))
    for layer in model.layers:
        fully_shard(layer, mesh=mesh)
    fully_shard(model, mesh=mesh)
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.1)
    expected = {}
    for step in range(1, STEPS + 1):
        model(batch()).backward()
        optimizer.step()
        optimizer.zero_grad()
        weights, moments = get_state_dict(model, optimizer)
        saved = {"model": weights, "optimizer": moments, "train_state": {"step": step}}
        dcp.save(saved, checkpoint_id=folder / f"checkpoint/step-{step}")
        expected[step] = {
            name: each.full_tensor() if hasattr(each, "full_tensor") else each
            for name, each in weights.items()
        }
        expected[step] = {name: each.clone() for name, each in expected[step].items()}
    if dist.get_rank() == 0:
        torch.save(expected, folder / "expected.pt")


# stage, and what else is configured
DEEPSPEED = {
    "fp32_0": (0, {}),
    "bf16_0": (0, {"bf16": {"enabled": True}}),
    "fp32_1": (1, {}),
    "bf16_1": (1, {"bf16": {"enabled": True}}),
    "accumulated_1": (
        1,
        {"bf16": {"enabled": True}, "data_types": {"grad_accum_dtype": "fp32"}},
    ),
    "bf16_2": (2, {"bf16": {"enabled": True}}),
    "fp32_3": (3, {}),
    "bf16_3": (3, {"bf16": {"enabled": True}}),
    "groups_3": (3, {"bf16": {"enabled": True}}),
}


def deepspeed(folder):
    """Each of DEEPSPEED in a folder of its own, with what DeepSpeed's own script makes of it."""
    import deepspeed
    from deepspeed.utils import safe_get_full_fp32_param
    from deepspeed.utils.zero_to_fp32 import get_fp32_state_dict_from_zero_checkpoint

    # It would compile collectives for shared memory, for a minute or two; gloo serves as well.
    deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False
    for name, (stage, more) in DEEPSPEED.items():
        torch.manual_seed(0)
        model = Small(tied=name != "fp32_3")
        trained = [each for each in model.parameters() if each.requires_grad]
        groups = [
            {"params": [each for each in trained if each.ndim == 2]},
            {"params": [each for each in trained if each.ndim == 1], "weight_decay": 0.0},
        ]
        zero = {"stage": stage} | ({"sub_group_size": 60} if name == "groups_3" else {})
        engine, *_ = deepspeed.initialize(
            model=model,
            optimizer=torch.optim.AdamW(groups, lr=0.1),
            config={
                "train_micro_batch_size_per_gpu": 2,
                "zero_optimization": zero,
                "zero_allow_untested_optimizer": True,
                "zero_force_ds_cpu_optimizer": False,
                **more,
            },
        )
        for step in range(1, STEPS + 1):
            engine.backward(engine(batch()))
            engine.step()
            engine.save_checkpoint(folder / name)
            if stage == 0:
                expected = {k: v.clone() for k, v in engine.module.state_dict().items()}
            elif name == "accumulated_1":  # whose files the script does not know
                trained = (each for each in model.named_parameters() if each[1].requires_grad)
                expected = {k: safe_get_full_fp32_param(v).clone() for k, v in trained}
            elif dist.get_rank() == 0:
                expected = get_fp32_state_dict_from_zero_checkpoint(folder / name)
            if dist.get_rank() == 0:
                torch.save(expected, folder / name / f"expected_{step}.pt")
            dist.barrier()
        if name == "bf16_2":  # as Lightning's DeepSpeedStrategy does
            state = {
                "epoch": 1,
                "hyper_parameters": {"n_head": 1},
                "pytorch-lightning_version": "2",
            }
            engine.save_checkpoint(
                folder / "lightning/epoch=1-step=2.ckpt",
                client_state={"global_step": 2, **state},
                tag="checkpoint",
            )
        engine.destroy()


def lightning(folder):
    """A Trainer with ModelParallelStrategy, which shards its checkpoints."""
    from tests.dynamics.formats.lightning_training import fit_sharded

    fit_sharded(folder)


if __name__ == "__main__":
    torch.set_num_threads(1)
    globals()[sys.argv[1]](Path(sys.argv[2]))
    dist.barrier()  # a process that leaves before the other one takes it down
    sys.stdout.flush(), sys.stderr.flush()
    os._exit(0)  # gloo's threads now and then abort a process that tidies up
