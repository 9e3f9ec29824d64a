"""Whatever surrounds a step: records have the bits of the merged weight, training its own bits.

The contexts lie around the whole step, or around each of its parts: forward and backward,
`optimizer.step()`, what is logged.
"""

import copy
from contextlib import ExitStack, contextmanager

import pytest
import torch
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

import dynamics as dy
from dynamics.runs.parameter_names import clean_name
from probes import Recorder
from probes.contexts import outside_of_contexts
from tests.probes.adapted import adam, adapted_model, tokens


def bfloat16():
    return torch.autocast("cpu", dtype=torch.bfloat16)


@contextmanager
def default_dtype():
    torch.set_default_dtype(torch.float64)
    try:
        yield
    finally:
        torch.set_default_dtype(torch.float32)


@contextmanager
def default_device():
    torch.set_default_device("meta")
    try:
        yield
    finally:
        torch.set_default_device(None)


def counting():
    return FlopCounterMode(display=False)


# Around forward, backward and step alike.
AROUND_ALL = {
    "autocast": bfloat16,
    "autocast without cache": lambda: torch.autocast("cpu", torch.bfloat16, cache_enabled=False),
    "float16": lambda: torch.autocast("cpu", dtype=torch.float16),
    "default dtype": default_dtype,
    "flops": counting,
    "grad": torch.enable_grad,
    "detect_anomaly": torch.autograd.detect_anomaly,
}
# Around the step, and what is logged.
AROUND_STEP = AROUND_ALL | {
    "inference": torch.inference_mode,
    "no_grad": torch.no_grad,
    "device": lambda: torch.device("meta"),
    "default device": default_device,
}


def merged(model):
    whole = copy.deepcopy(model).merge_and_unload()
    return {
        clean_name(name): each.detach().clone()
        for name, each in whole.named_parameters()
        if each.ndim == 2
    }


def trained(store, where, context, *, every=1, dtype=torch.float32, checkpointing=False):
    """Trains three steps; returns (the model, the losses)."""
    model = adapted_model(0.2, dtype)
    if checkpointing:
        model.enable_input_require_grads()
        model.gradient_checkpointing_enable({"use_reentrant": False})
    optimizer, last = adam(model), []
    around = {where: context}
    torch.manual_seed(3)
    with ExitStack() as stack:
        stack.enter_context(around.get("loop", ExitStack)())
        recorder = None
        if store is not None:
            recorder = stack.enter_context(Recorder(model, optimizer, store, every=every))
        for step in range(1, 4):
            with around.get("step", ExitStack)():
                for micro in range(2):
                    with around.get("forward", ExitStack)():
                        ids = tokens(step, micro)
                        loss = model(input_ids=ids, labels=ids).loss
                        loss.backward()
                with around.get("update", ExitStack)():
                    if recorder is not None:
                        recorder.log(loss=loss.detach())
                    optimizer.step()
                    optimizer.zero_grad()
            last.append(float(loss))
    return model, last


@pytest.mark.slow
@pytest.mark.parametrize(
    ("where", "name"),
    [(where, name) for where in ("step", "forward") for name in AROUND_ALL]
    + [("loop", "autocast"), ("loop", "default dtype")]
    + [("update", name) for name in AROUND_STEP],
)
def test_training_and_records_have_their_bits_in_any_context(tmp_path, where, name):
    context = AROUND_STEP[name]
    for checkpointing in (False, True) if where == "step" else (False,):
        plain, losses = trained(None, where, context, checkpointing=checkpointing)
        for every in (1, 3):
            store = tmp_path / f"{every}-{checkpointing}.zarr"
            model, seen = trained(store, where, context, every=every, checkpointing=checkpointing)
            assert seen == losses
            for one, other in zip(model.parameters(), plain.parameters(), strict=True):
                assert torch.equal(one, other)
            run = dy.open_run(store)
            for weight, expected in merged(model).items():
                found = run.read(weight, 3, "weight")
                assert found.dtype == str(expected.dtype).removeprefix("torch.")
                assert (found.values == expected.numpy()).all()
                assert run.read(weight, 3, "gradient") is not None
            assert run.scalars["loss"][-1] == losses[-1]


@pytest.mark.slow  # the compiler takes seconds
def test_a_compiled_model_under_autocast_trains_the_same_bits(tmp_path):
    ends = []
    for every in (None, 1, 2):
        torch._dynamo.reset()
        model = adapted_model()
        optimizer, fast = adam(model), torch.compile(model, backend="aot_eager")
        with ExitStack() as stack:
            if every is not None:
                store = tmp_path / f"{every}.zarr"
                stack.enter_context(Recorder(model, optimizer, store, every=every))
            for step in range(1, 5):
                with bfloat16():
                    fast(input_ids=tokens(step), labels=tokens(step)).loss.backward()
                    optimizer.step()
                    optimizer.zero_grad()
        ends.append(list(model.parameters()))
    for found in ends[1:]:
        assert all(map(torch.equal, found, ends[0]))
    run = dy.open_run(tmp_path / "2.zarr")
    assert all(run.read(name, 4, "gradient") is not None for name in run.matrices)


@pytest.mark.slow
@pytest.mark.parametrize("name", AROUND_STEP)
def test_a_probed_gradient_is_the_same_whatever_is_around_the_update(tmp_path, name):
    trained(tmp_path / "plain.zarr", "update", ExitStack)
    trained(tmp_path / "other.zarr", "update", AROUND_STEP[name])
    plain, other = (dy.open_run(tmp_path / f"{each}.zarr") for each in ("plain", "other"))
    for weight in plain.matrices:
        one, two = (run.read(weight, 1, "gradient").values for run in (plain, other))
        assert (one == two).all()


@pytest.mark.slow
@pytest.mark.parametrize("name", AROUND_STEP)
def test_spectra_are_the_same_in_any_context(tmp_path, name):
    results = []
    for number, context in enumerate((ExitStack, AROUND_STEP[name])):
        model = adapted_model()
        optimizer = adam(model)
        store = tmp_path / f"{number}.zarr"
        record = ("weight", "gradient", "adapter", "probed_gradient", "update", "displacement")
        with Recorder(model, optimizer, store, every=1, spectra_only=True, record=record):
            for step in (1, 2):
                model(input_ids=tokens(step), labels=tokens(step)).loss.backward()
                with context():
                    optimizer.step()
                    optimizer.zero_grad()
        results.append(dy.analyze(store))
    assert results[0].drop_attrs().identical(results[1].drop_attrs())


def test_casts_that_autocast_keeps_stay_as_they_were():
    """A cast that is kept is wrong once the weight has changed; it is the training's own."""
    weight, x = nn.Parameter(torch.ones(2, 2)), torch.ones(2, 2)
    with bfloat16():
        before = x @ weight
        with torch.no_grad():
            weight.zero_()
        with outside_of_contexts():
            assert not (x @ weight).any()
        assert torch.equal(x @ weight, before)
        assert (x @ weight).dtype == torch.bfloat16
    with torch.inference_mode(), outside_of_contexts():
        made = torch.ones(2)
    assert not made.is_inference()


def test_contexts_and_random_states_are_given_back():
    state = torch.get_rng_state()
    with bfloat16(), torch.inference_mode(), torch.device("meta"), counting() as counter:
        with outside_of_contexts():
            assert torch.zeros(1).device.type == "cpu"
            torch.ones(2, 2) @ torch.ones(2, 2)
        with pytest.raises(ValueError, match="ours"), outside_of_contexts():
            raise ValueError("ours")
        assert torch.is_inference_mode_enabled()
        assert torch.is_autocast_enabled("cpu")
        assert torch.zeros(1).is_meta
        assert counter.get_total_flops() == 0
    assert torch.equal(torch.get_rng_state(), state)
