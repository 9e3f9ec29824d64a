"""Which gradient belongs to a step: closures, gradient scalers, several optimizers."""

import dataclasses
import os
import shutil
import subprocess
import sys
from importlib.util import find_spec
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import nn

import dynamics as dy
from dynamics.errors import DynamicsError
from dynamics.recordings import Recording
from probes import Recorder
from tests.probes.stacks import LR, Case, Net, micro_batches

NAMES = ("up_proj.weight", "down_proj.weight")


def backward(model, step, scale=1.0):
    for batch in micro_batches(Case(), step):
        (scale * model(**batch)["loss"]).backward()


def gradients(model):
    return {name: parameter.grad.clone().numpy() for name, parameter in model.named_parameters()}


def recorded_gradients(store, step):
    run = dy.open_run(store)
    found = {name: run.read(name, step, "gradient") for name in run.matrices}
    return {name: each.values for name, each in found.items() if each is not None}


def assert_same(found, expected):
    assert found.keys() == expected.keys()
    for name, values in expected.items():
        np.testing.assert_array_equal(found[name], values)


@pytest.mark.parametrize("by_keyword", [False, True])
@pytest.mark.parametrize("record", [("gradient",), ("gradient_before_clipping",)])
def test_of_a_closure_the_first_call_counts(tmp_path, by_keyword, record):
    """LBFGS asks several times; the first time is at the weights before the step."""
    ends = []
    for recorded in (True, False):
        model = Net()
        optimizer = torch.optim.LBFGS(model.parameters(), lr=0.1, max_iter=4)
        calls = []

        def closure(model=model, optimizer=optimizer, calls=calls):
            optimizer.zero_grad()
            (batch,) = micro_batches(Case(), 1)
            loss = model(**batch)["loss"]
            loss.backward()
            calls.append(gradients(model))
            return loss

        def steps(optimizer=optimizer, closure=closure):
            for _ in range(2):
                optimizer.step(**{"closure": closure}) if by_keyword else optimizer.step(closure)

        if recorded:
            with Recorder(model, optimizer, tmp_path / "run.zarr", every=1, record=record):
                steps()
            per_step = len(calls) // 2
            assert per_step > 1
            for step in (1, 2):
                first = calls[(step - 1) * per_step]
                assert_same(recorded_gradients(tmp_path / "run.zarr", step), first)
        else:
            steps()
        ends.append([p.detach().clone() for p in model.parameters()])
    assert all(torch.equal(a, b) for a, b in zip(*ends, strict=True))


def test_the_gradients_of_frozen_weights_are_probed_within_a_closure(tmp_path):
    model = Net()
    model.up_proj.weight.requires_grad_(False)
    optimizer = torch.optim.SGD(model.down_proj.parameters(), lr=LR)

    def closure():
        optimizer.zero_grad()
        backward(model, 1)

    with Recorder(model, optimizer, tmp_path / "run.zarr", every=1):
        optimizer.step(closure)
    twin = Net()
    backward(twin, 1)
    assert_same(recorded_gradients(tmp_path / "run.zarr", 1), gradients(twin))


@pytest.mark.parametrize("fused", [False, True])
@pytest.mark.parametrize("record", [("weight", "gradient"), ("weight", "gradient_before_clipping")])
def test_a_step_that_the_scaler_skips_is_none(tmp_path, fused, record):
    """A fused optimizer is asked to step nevertheless, and leaves it out by itself."""
    model = Net()
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2, fused=fused)
    scaler = torch.amp.GradScaler("cpu", init_scale=1024.0)
    seen = []
    with Recorder(
        model, optimizer, tmp_path / "run.zarr", every=1, record=record, grad_scaler=scaler
    ) as recorder:
        for factor in (1.0, float("inf"), 1.0):
            optimizer.zero_grad()
            before = [p.detach().clone() for p in model.parameters()]
            scale = scaler.get_scale()
            backward(model, 1, scaler.scale(torch.tensor(factor)))
            seen.append({name: each / scale for name, each in gradients(model).items()})
            scaler.step(optimizer)
            scaler.update()
            moved = any(
                not torch.equal(a, b) for a, b in zip(before, model.parameters(), strict=True)
            )
            assert moved == (factor == 1.0)
        assert recorder.step == 2
    assert scaler.get_scale() == 512.0
    assert dy.open_run(tmp_path / "run.zarr").steps.tolist() == [0, 1, 2]
    assert_same(recorded_gradients(tmp_path / "run.zarr", 1), seen[0])
    assert_same(recorded_gradients(tmp_path / "run.zarr", 2), seen[2])


def test_a_training_may_count_skipped_steps_too(tmp_path):
    model = Net()
    optimizer = torch.optim.SGD(model.parameters(), lr=LR)
    with Recorder(model, optimizer, tmp_path / "run.zarr", every=1) as recorder:
        backward(model, 1)
        optimizer.step()
        recorder.skip_step()
        recorder.log(at=2, loss=7.0)
        optimizer.step()
    run = dy.open_run(tmp_path / "run.zarr")
    assert run.steps.tolist() == [0, 1, 2, 3]
    assert [(event.kind, event.step) for event in run.events] == [("skipped_step", 2)]
    np.testing.assert_array_equal(run.scalars["loss"], [np.nan, np.nan, 7.0, np.nan])
    assert recorded_gradients(tmp_path / "run.zarr", 2) == {}
    for name in NAMES:
        one, two = (run.read(name, step, "weight").values for step in (1, 2))
        np.testing.assert_array_equal(one, two)


@pytest.mark.parametrize("record", [("gradient",), ("gradient_before_clipping",)])
def test_several_optimizers_make_one_step(tmp_path, record):
    model = Net()
    optimizers = [
        torch.optim.AdamW(model.up_proj.parameters(), lr=0.1),
        torch.optim.SGD(model.down_proj.parameters(), lr=LR),
    ]
    seen = {}
    with Recorder(model, optimizers, tmp_path / "run.zarr", every=2, record=record) as recorder:
        for step in range(1, 5):
            backward(model, step % 3 + 1)
            seen[step] = gradients(model)
            for optimizer in optimizers:
                optimizer.step()
                optimizer.zero_grad()  # frees the gradients of one before the other steps
        assert recorder.step == 4
    for step in (2, 4):
        assert_same(recorded_gradients(tmp_path / "run.zarr", step), seen[step])
    run = dy.open_run(tmp_path / "run.zarr")
    np.testing.assert_array_equal(run.scalars["learning_rate"], [0.1] * 3)


def test_optimizers_given_in_another_order_are_noticed(tmp_path):
    model = Net()
    first = torch.optim.SGD(model.up_proj.parameters(), lr=LR)
    second = torch.optim.SGD(model.down_proj.parameters(), lr=LR)
    with Recorder(model, [second, first], tmp_path / "run.zarr", every=1):
        backward(model, 1)
        with pytest.warns(UserWarning, match="1 of 2 optimizers had not stepped when the last one"):
            first.step()
        second.step()


class Freeing(torch.optim.SGD):
    """Drops each gradient once it is used, as memory-saving optimizers do.

    Its step calls that of SGD, whose class runs the optimizer's hooks once more.
    """

    def step(self, closure=None):
        loss = super().step(closure)
        for group in self.param_groups:
            for parameter in group["params"]:
                parameter.grad = None
        return loss


@pytest.mark.slow
@pytest.mark.parametrize("set_to_none", [False, True])
@pytest.mark.parametrize("optimizer", [Freeing, torch.optim.SGD])
def test_gradients_may_be_freed_or_zeroed_and_groups_may_differ(tmp_path, optimizer, set_to_none):
    model = Net()
    groups = [
        {"params": model.up_proj.parameters(), "lr": 0.1},
        {"params": model.down_proj.parameters(), "lr": 0.2, "weight_decay": 0.1},
    ]
    optimizer = optimizer(groups, lr=1.0)
    for number in (1, 2):
        seen = {}
        record = ("gradient",) if number == 1 else ("gradient_before_clipping",)
        with Recorder(model, optimizer, tmp_path / f"{number}.zarr", every=1, record=record):
            for step in (1, 2, 3):
                optimizer.zero_grad(set_to_none=set_to_none)
                backward(model, step)
                seen[step] = gradients(model)
                optimizer.step()
        for step in (1, 2, 3):
            assert_same(recorded_gradients(tmp_path / f"{number}.zarr", step), seen[step])


def test_a_tied_matrix_is_recorded_once_with_the_sum_of_its_gradients(tmp_path):
    torch.manual_seed(0)
    model = nn.Sequential(nn.Embedding(6, 4), nn.Linear(4, 6, bias=False))
    model[1].weight = model[0].weight
    optimizer = torch.optim.SGD(model.parameters(), lr=LR)
    with Recorder(model, optimizer, tmp_path / "run.zarr", every=1):
        model(torch.tensor([1, 2])).square().sum().backward()
        expected = model[0].weight.grad.clone()
        optimizer.step()
    assert_same(recorded_gradients(tmp_path / "run.zarr", 1), {"0.weight": expected.numpy()})


@pytest.mark.slow  # the compiler takes seconds
@pytest.mark.parametrize("backend", ["aot_eager", "inductor"])
def test_names_of_compiled_models_are_clean(tmp_path, backend):
    model = Net()
    fast = torch.compile(model, backend=backend)
    optimizer = torch.optim.SGD(fast.parameters(), lr=LR)
    with Recorder(fast, optimizer, tmp_path / "run.zarr", every=1):
        backward(fast, 1)
        expected = gradients(model)
        optimizer.step()
    assert_same(recorded_gradients(tmp_path / "run.zarr", 1), expected)


@dataclasses.dataclass
class Config:
    """As nanoGPT's."""

    n_embd: int = 6
    n_head: int = 2
    dtype: torch.dtype = torch.float32


@pytest.mark.slow
@pytest.mark.parametrize("wrap", [lambda model: model, nn.DataParallel, torch.compile])
def test_a_dataclass_config_is_stored_also_of_a_wrapped_model(tmp_path, wrap):
    model = Net()
    model.config = Config()
    optimizer = torch.optim.SGD(model.parameters(), lr=LR)
    with Recorder(wrap(model), optimizer, tmp_path / "run.zarr"):
        pass
    config = Recording(tmp_path / "run.zarr").attrs["config"]
    assert config == {"n_embd": 6, "n_head": 2, "dtype": "torch.float32"}


def test_what_is_no_torch_optimizer_or_asks_twice_for_a_gradient_is_refused(tmp_path):
    model = Net()
    with pytest.raises(DynamicsError, match=r"found builtins\.object"):
        Recorder(model, object(), tmp_path / "run.zarr")
    optimizer = torch.optim.SGD(model.parameters(), lr=LR)
    both = ("gradient", "gradient_before_clipping")
    with pytest.raises(DynamicsError, match="would be the same arrays: record one of them"):
        Recorder(model, optimizer, tmp_path / "run.zarr", record=both)


DEEPSPEED = """
import sys, deepspeed, pytest, torch
from dynamics.errors import DynamicsError
from probes import Recorder
from tests.probes.stacks import Net
# It would compile collectives for shared memory, for a minute or two; gloo serves as well.
deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False
model = Net()
optimizer = torch.optim.AdamW(model.parameters())
config = {"train_batch_size": 1, "zero_optimization": {"stage": 1}}
config |= {"zero_allow_untested_optimizer": True, "zero_force_ds_cpu_optimizer": False}
engine, *_ = deepspeed.initialize(model=model, optimizer=optimizer, config=config)
with pytest.raises(DynamicsError, match="DeepSpeed's DeepSpeedZeroOptimizer keeps gradients"):
    Recorder(model, engine.optimizer, sys.argv[1])
with pytest.raises(DynamicsError, match="DeepSpeed's DeepSpeedEngine keeps gradients"):
    Recorder(engine, optimizer, sys.argv[1])
"""


@pytest.mark.slow
@pytest.mark.skipif(
    find_spec("deepspeed") is None or shutil.which("g++") is None,
    reason="needs deepspeed and g++, with which it builds its CPU kernels",
)
def test_deepspeed_is_refused_by_name(tmp_path):
    script = tmp_path / "train.py"
    script.write_text(DEEPSPEED)
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", str(script)]
    root = str(Path(__file__).parents[3])
    done = subprocess.run(
        [*command, str(tmp_path / "run.zarr")],
        env={**os.environ, "DS_ACCELERATOR": "cpu", "OMP_NUM_THREADS": "1", "PYTHONPATH": root},
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert done.returncode == 0, done.stderr[-3000:]
