"""The recorder: what it writes is what training computed, and training does not notice it."""

import contextlib
import shutil

import numpy as np
import pytest
import torch
import xarray as xr
from torch import nn

import dynamics as dy
from dynamics.errors import DynamicsError
from dynamics.recordings import Recording
from probes import Recorder
from tests.probes.training import Net, build, train

MATRICES = ("down_proj.weight", "up_proj.weight")


def _values(run, name, step, kind):
    return run.read(name, step, kind).values


@pytest.mark.slow
@pytest.mark.parametrize("accumulate", [1, 3])
@pytest.mark.parametrize("clip", [None, 0.05])
@pytest.mark.parametrize("options", [{}, {"foreach": True}, {"fused": True}])
def test_the_recorded_gradient_is_what_the_optimizer_step_consumed(
    tmp_path, accumulate, clip, options
):
    model, optimizer = build(**options)
    seen = {}

    def remember(step):
        seen[step] = {name: p.grad.clone().numpy() for name, p in model.named_parameters()}

    with Recorder(model, optimizer, tmp_path / "run.zarr", every=2):
        train(model, optimizer, 6, accumulate=accumulate, clip=clip, after_backward=remember)
    run = dy.open_run(tmp_path / "run.zarr")
    assert run.steps.tolist() == [0, 2, 4, 6]
    for step in (2, 4, 6):
        for name in MATRICES:
            np.testing.assert_array_equal(_values(run, name, step, "gradient"), seen[step][name])
    assert run.read(MATRICES[0], 0, "gradient") is None


def test_the_recorded_weight_is_the_weight_after_that_many_steps(tmp_path):
    model, optimizer = build()
    with Recorder(model, optimizer, tmp_path / "run.zarr", every=3):
        train(model, optimizer, 7)
    run = dy.open_run(tmp_path / "run.zarr")
    for step in (0, 3, 6):
        fresh, fresh_optimizer = build()
        train(fresh, fresh_optimizer, step)
        for name in MATRICES:
            expected = fresh.get_parameter(name).detach().numpy()
            np.testing.assert_array_equal(_values(run, name, step, "weight"), expected)


@pytest.mark.slow
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
def test_training_with_the_recorder_computes_the_same_bits(tmp_path, dtype):
    ends = []
    for recorded in (False, True):
        torch.manual_seed(0)
        model = Net().to(dtype)
        optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)

        def steps(model=model, optimizer=optimizer, dtype=dtype):
            for _ in range(12):
                x = torch.randn(16, 12).to(dtype)  # from the global stream, as dropout is
                optimizer.zero_grad()
                (model(x) - x).pow(2).mean().backward()
                optimizer.step()

        if recorded:
            with Recorder(model, optimizer, tmp_path / "run.zarr", every=1):
                steps()
        else:
            steps()
        ends.append(([p.detach().clone() for p in model.parameters()], torch.get_rng_state()))
    assert all(torch.equal(a, b) for a, b in zip(ends[0][0], ends[1][0], strict=True))
    assert torch.equal(ends[0][1], ends[1][1])


def test_the_model_and_the_optimizer_are_left_as_found(tmp_path):
    model, optimizer = build()

    def traces():
        modules = [
            (sorted(vars(m)), len(m._forward_hooks), len(m._backward_hooks))
            for m in model.modules()
        ]
        parameters = [(p.requires_grad, p._backward_hooks) for p in model.parameters()]
        hooks = len(optimizer._optimizer_step_pre_hooks), len(optimizer._optimizer_step_post_hooks)
        return modules, parameters, hooks, sorted(vars(optimizer))

    before = traces()
    with Recorder(model, optimizer, tmp_path / "run.zarr", every=1):
        assert traces() != before
        train(model, optimizer, 2)
    assert traces() == before


def test_an_exception_in_training_still_closes_the_recording(tmp_path):
    model, optimizer = build()

    def interrupt(step):
        if step == 4:
            raise KeyboardInterrupt

    recorder = Recorder(model, optimizer, tmp_path / "run.zarr", every=1)
    with pytest.raises(KeyboardInterrupt), recorder:
        train(model, optimizer, 9, after_backward=interrupt)
    assert dy.open_run(tmp_path / "run.zarr").steps.tolist() == [0, 1, 2, 3]
    assert not optimizer._optimizer_step_post_hooks


def test_bfloat16_is_stored_exactly_and_says_what_it_was(tmp_path):
    torch.manual_seed(0)
    model = nn.Linear(6, 5, bias=False).to(torch.bfloat16)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    with Recorder(model, optimizer, tmp_path / "run.zarr"):
        pass
    found = dy.open_run(tmp_path / "run.zarr").read("weight", 0, "weight")
    assert found.dtype == "bfloat16"
    np.testing.assert_array_equal(found.values, model.weight.detach().float().numpy())


def test_scalars_tokens_and_events_belong_to_their_steps(tmp_path):
    model, optimizer = build()
    with Recorder(model, optimizer, tmp_path / "run.zarr", every=2) as recorder:
        for step in range(1, 6):
            recorder.log(loss=torch.tensor(float(step), requires_grad=True), tokens=100 * step)
            train(model, optimizer, step, start=step - 1)
            recorder.log(at=step, grad_norm=10.0 * step)
            if step == 3:
                recorder.event("merge", layers=2)
    run = dy.open_run(tmp_path / "run.zarr")
    assert run.steps.tolist() == [0, 2, 4]
    np.testing.assert_array_equal(run.scalars["loss"], [np.nan, 2, 4])
    np.testing.assert_array_equal(run.scalars["tokens"], [np.nan, 200, 400])
    np.testing.assert_array_equal(run.scalars["grad_norm"], [np.nan, 20, 40])
    np.testing.assert_array_equal(run.scalars["learning_rate"], [1e-2] * 3)
    assert [(event.kind, event.step, dict(event.attrs)) for event in run.events] == [
        ("merge", 3, {"layers": 2})
    ]


def test_parameters_are_selected_by_glob_or_predicate(tmp_path):
    model, optimizer = build()
    for number, select in enumerate(
        ["up_*", ["nothing", "up_proj"], lambda name, parameter: parameter.shape == (24, 12)]
    ):
        with Recorder(model, optimizer, tmp_path / f"{number}.zarr", select=select):
            pass
        assert list(dy.open_run(tmp_path / f"{number}.zarr").matrices) == ["up_proj.weight"]
    with pytest.raises(DynamicsError, match=r"matches select='q_proj'; near matches: up_proj"):
        Recorder(model, optimizer, tmp_path / "none.zarr", select="q_proj")


def test_only_what_is_asked_for_is_recorded(tmp_path):
    model, optimizer = build()
    with Recorder(model, optimizer, tmp_path / "run.zarr", every=1, record=["gradient"]):
        train(model, optimizer, 2)
    run = dy.open_run(tmp_path / "run.zarr")
    assert run.kinds == ("gradient",)
    assert list(run.matrices) == list(MATRICES)
    with pytest.raises(DynamicsError, match="found \\['gradients'\\]"):
        Recorder(model, optimizer, tmp_path / "other.zarr", record=["gradients"])


def test_without_probing_frozen_parameters_have_no_gradient(tmp_path):
    model, optimizer = build()
    model.up_proj.weight.requires_grad_(False)
    record = ["weight", "gradient"]
    with Recorder(model, optimizer, tmp_path / "run.zarr", every=1, record=record):
        train(model, optimizer, 1)
    run = dy.open_run(tmp_path / "run.zarr")
    assert run.read("up_proj.weight", 1, "gradient") is None
    assert run.read("down_proj.weight", 1, "gradient") is not None


def test_tied_parameters_are_recorded_once(tmp_path):
    model = nn.Sequential(nn.Embedding(6, 4), nn.Linear(4, 6, bias=False))
    model[1].weight = model[0].weight
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    with Recorder(model, optimizer, tmp_path / "run.zarr"):
        pass
    assert list(dy.open_run(tmp_path / "run.zarr").matrices) == ["0.weight"]


@pytest.mark.slow
def test_a_resumed_recording_goes_on_where_training_does(tmp_path):
    store, whole = tmp_path / "run.zarr", tmp_path / "whole.zarr"
    model, optimizer = build()
    with Recorder(model, optimizer, whole, every=2):
        train(model, optimizer, 12)

    model, optimizer = build()
    with Recorder(model, optimizer, store, every=2) as recorder:
        train(model, optimizer, 9)  # interrupted after step 9; the last checkpoint is at 6
        recorder.event("merge")
    model, optimizer = build()
    train(model, optimizer, 6)
    with Recorder(model, optimizer, store, every=2, resume_at=6):
        train(model, optimizer, 12, start=6)

    resumed, expected = dy.open_run(store), dy.open_run(whole)
    assert resumed.steps.tolist() == expected.steps.tolist() == [0, 2, 4, 6, 8, 10, 12]
    events = [(event.kind, event.step, dict(event.attrs)) for event in resumed.events]
    dropped = {"dropped_records": 1, "last_step": 8}
    assert events == [("resume", 6, dropped)]  # the merge was undone with step 9


def test_after_a_flush_a_reader_sees_all_that_was_recorded(tmp_path):
    model, optimizer = build()
    with Recorder(model, optimizer, tmp_path / "run.zarr", every=1) as recorder:
        for done in range(1, 4):
            train(model, optimizer, 1)
            recorder.flush()
            assert dy.open_run(tmp_path / "run.zarr").steps.tolist() == list(range(done + 1))


def test_an_existing_recording_is_not_overwritten(tmp_path):
    model, optimizer = build()
    with Recorder(model, optimizer, tmp_path / "run.zarr", every=1):
        train(model, optimizer, 2)
    with pytest.raises(DynamicsError, match="already holds a recording of 3 records; resume"):
        Recorder(model, optimizer, tmp_path / "run.zarr").attach()
    assert len(dy.open_run(tmp_path / "run.zarr").steps) == 3
    assert not optimizer._optimizer_step_post_hooks


def test_a_failing_writer_is_reported_in_training_and_on_closing(tmp_path):
    store = tmp_path / "run.zarr"
    model, optimizer = build()
    recorder = Recorder(model, optimizer, store, every=1).attach()
    train(model, optimizer, 1)
    while len(dy.open_run(store).steps) < 1:  # step 0 is written behind us; step 1 waits
        pass
    while not store.is_file():  # the writer may still be at work in there
        shutil.rmtree(store, ignore_errors=True)
        with contextlib.suppress(IsADirectoryError):
            store.write_text("no directory any more")
    with pytest.raises(RuntimeError, match="The recorder could not write"):
        train(model, optimizer, 50, start=1)
    with pytest.raises(RuntimeError, match="The recorder could not write"):
        recorder.close()
    assert not optimizer._optimizer_step_post_hooks


def test_a_recording_opens_in_plain_xarray(tmp_path):
    model, optimizer = build()
    with Recorder(model, optimizer, tmp_path / "run.zarr", every=1) as recorder:
        train(model, optimizer, 3, log=recorder.log)
    tree = xr.open_datatree(tmp_path / "run.zarr", engine="zarr")
    weight = tree["weight"]["up_proj.weight"]
    assert weight.dims == ("step", "out_24", "in_12")
    assert tree["weight"]["step"].values.tolist() == [0, 1, 2, 3]
    np.testing.assert_array_equal(weight.sel(step=3), model.up_proj.weight.detach())
    assert tree["scalars"]["loss"].notnull().sum() == 3
    assert "optimizer.step()" in tree.attrs["gradient"]
    assert weight.attrs["source_dtype"] == "float32"


def test_any_zarr_store_takes_a_recording():
    from zarr.storage import MemoryStore

    model, optimizer = build()
    store = MemoryStore()
    with Recorder(model, optimizer, store, every=1):
        train(model, optimizer, 2)
    assert Recording(store).steps.tolist() == [0, 1, 2]
    assert dy.open_run(store).steps.tolist() == [0, 1, 2]
