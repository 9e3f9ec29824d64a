"""Gradients of frozen weights are those of an unfrozen twin, and training does not notice."""

import copy
import functools

import pytest
import torch
import xarray as xr
from torch import nn

import dynamics as dy
from dynamics.runs.parameter_names import clean_name
from probes import Recorder
from tests.probes.adapted import (
    adam,
    adapted_model,
    frozen_matrices,
    relative_error,
    tokens,
    train,
    unfrozen_gradients,
)


def _recorded(store, model, optimizer, steps, *, every=1, options=None, **training):
    with Recorder(model, optimizer, store, every=every, **(options or {})):
        train(model, optimizer, steps, **training)
    return dy.open_run(store)


@pytest.mark.slow
@pytest.mark.parametrize("accumulate", [1, 3])
@pytest.mark.parametrize(("dropout", "dtype"), [(0.0, torch.float32), (0.3, torch.bfloat16)])
@pytest.mark.parametrize("reentrant", [None, True, False])
def test_a_probed_gradient_is_that_of_the_twin_whose_base_requires_it(
    tmp_path, accumulate, dropout, dtype, reentrant
):
    def build():
        model = adapted_model(dropout, dtype)
        if reentrant is not None:
            model.enable_input_require_grads()
            model.gradient_checkpointing_enable({"use_reentrant": reentrant})
        return model

    options = {"accumulate": accumulate, "clip": 0.05}
    twin = build()
    frozen, optimizer = frozen_matrices(twin), adam(twin)
    for parameter in frozen.values():
        parameter.requires_grad_(True)
    expected = unfrozen_gradients(twin, optimizer, frozen, 4, **options)

    model = build()
    run = _recorded(tmp_path / "run.zarr", model, adam(model), 4, every=2, **options)
    for name in frozen:
        assert run.read(name, 0, "gradient") is None
        for step in (2, 4):
            found = run.read(name, step, "gradient")
            assert found.dtype == str(dtype).removeprefix("torch.")
            assert (found.values == expected[step, name].float().numpy()).all()


@pytest.mark.slow
def test_a_probed_gradient_is_that_of_the_effective_weight_in_a_plain_model(tmp_path):
    model = adapted_model(dtype=torch.float64)
    plain = copy.deepcopy(model).merge_and_unload().requires_grad_(True)
    assert not any("lora" in name for name, _ in plain.named_parameters())
    names = frozen_matrices(model)
    ids = tokens(1)
    plain(input_ids=ids, labels=ids).loss.backward()
    run = _recorded(tmp_path / "run.zarr", model, adam(model), 1)
    for name, parameter in plain.named_parameters():
        if clean_name(name) in names:
            found = run.read(clean_name(name), 1, "gradient").values
            assert relative_error(found, parameter.grad) < 1e-12


@pytest.mark.slow
def test_frozen_weights_are_probed_while_trained_ones_are_taken_before_clipping(tmp_path):
    words = ("gradient_before_clipping", "probed_gradient")
    runs = []
    for record in (words[:1], words[1:], words):
        model = adapted_model()
        model.get_output_embeddings().weight.requires_grad_(True)
        store = tmp_path / "-".join(record)
        options = {"record": record}
        runs.append(_recorded(store, model, adam(model), 2, clip=0.05, options=options))
    for name in runs[2].matrices:
        trained, probed, both = (run.read(name, 2, "gradient") for run in runs)
        assert (trained is None) != (probed is None)
        assert (both.values == (probed if trained is None else trained).values).all()


@pytest.mark.parametrize("of_all", [pytest.param(False, marks=pytest.mark.slow), True])
@pytest.mark.parametrize(
    "dtype", [torch.float32, pytest.param(torch.bfloat16, marks=pytest.mark.slow)]
)
def test_training_with_probing_computes_the_same_bits(tmp_path, of_all, dtype):
    ends = []
    for every in (None, 1, 3):
        model = adapted_model(0.3, dtype)
        # An optimizer may hold frozen weights too; without a gradient it passes over them.
        optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2) if of_all else adam(model)
        options = {"accumulate": 2, "clip": 0.05}
        if every is None:
            norms = train(model, optimizer, 7, **options)
        else:
            with Recorder(model, optimizer, tmp_path / f"{every}.zarr", every=every):
                norms = train(model, optimizer, 7, **options)
        ends.append((list(model.parameters()), norms, torch.get_rng_state()))
    for parameters, norms, random_state in ends[1:]:
        assert all(torch.equal(a, b) for a, b in zip(parameters, ends[0][0], strict=True))
        assert norms == ends[0][1]
        assert torch.equal(random_state, ends[0][2])


def _state(model):
    return [
        (name, p.requires_grad, p.grad is None, bool(p._post_accumulate_grad_hooks))
        for name, p in model.named_parameters()
        if "lora_" not in name
    ]


@pytest.mark.slow
@pytest.mark.parametrize("moment", ["after_forward", "after_backward", None])
def test_the_model_is_left_as_found_whenever_training_ends(tmp_path, moment):
    model = adapted_model()
    found = _state(model)

    def interrupt(step):
        if step == 3:
            raise KeyboardInterrupt

    optimizer = adam(model)
    with Recorder(model, optimizer, tmp_path / "run.zarr", every=1):
        assert _state(model) == found
        if moment is None:
            train(model, optimizer, 3)
        else:
            with pytest.raises(KeyboardInterrupt):
                train(model, optimizer, 3, **{moment: interrupt})
        assert _state(model) == found
    assert _state(model) == found
    # A backward pass that is still under way when the recorder goes leaves nothing behind.
    train(model, optimizer, 1)
    assert _state(model) == found


def _asked_within_forward(model):
    """Names of base weights that required a gradient when their layer computed; fills as it runs.

    The hooks are the user's own.
    """
    asked = set()

    def look(name, module, args):
        if module.weight.requires_grad:
            asked.add(clean_name(f"{name}.weight"))

    for name, module in model.named_modules():
        if "lora_" not in name and isinstance(getattr(module, "weight", None), nn.Parameter):
            module.register_forward_pre_hook(functools.partial(look, name))
    return asked


@pytest.mark.slow
def test_only_recorded_steps_ask_for_the_gradients_and_only_within_the_model(tmp_path):
    model = adapted_model()
    frozen, found, asked = frozen_matrices(model), _state(model), _asked_within_forward(model)
    seen = []

    def look(step):
        assert _state(model) == found
        seen.append((step, set(asked)))
        asked.clear()

    with Recorder(model, adam(model), tmp_path / "run.zarr", every=2):
        train(model, adam(model), 1, after_forward=look)  # of no optimizer that is watched
    assert seen.pop() == (1, set())
    optimizer = adam(model)
    with Recorder(model, optimizer, tmp_path / "other.zarr", every=2):
        train(model, optimizer, 5, after_forward=look)
    assert seen == [(step, set(frozen) if step % 2 == 0 else set()) for step in range(1, 6)]


def test_a_selection_limits_what_is_probed(tmp_path):
    model = adapted_model()
    asked = _asked_within_forward(model)
    optimizer = adam(model)
    with Recorder(model, optimizer, tmp_path / "run.zarr", every=1, select="*.q_proj"):
        train(model, optimizer, 1)
    assert asked == {f"model.layers.{layer}.self_attn.q_proj.weight" for layer in (0, 1)}


@pytest.mark.slow
def test_probing_can_be_left_out_or_be_all_that_is_recorded(tmp_path):
    model = adapted_model()
    found = _state(model)
    record = ["weight", "gradient", "adapter"]
    optimizer = adam(model)
    with Recorder(model, optimizer, tmp_path / "off.zarr", every=1, record=record):
        assert _state(model) == found
        train(model, optimizer, 1)
    assert "gradient" not in dy.open_run(tmp_path / "off.zarr").kinds
    run = _recorded(
        tmp_path / "only.zarr", model, adam(model), 1, options={"record": ["probed_gradient"]}
    )
    assert run.kinds == ("gradient",)
    assert set(run.matrices) == set(frozen_matrices(model))


def test_the_recording_says_which_gradients_are_probed(tmp_path):
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(4, 5), nn.Linear(5, 3))
    model[0].requires_grad_(False)
    optimizer = torch.optim.SGD(model[1].parameters(), lr=0.1)
    with Recorder(model, optimizer, tmp_path / "run.zarr", every=1):
        model(torch.ones(2, 4)).sum().backward()
        optimizer.step()
    tree = xr.open_datatree(tmp_path / "run.zarr", engine="zarr")
    assert tree["gradient"]["0.weight"].attrs["probed"] is True
    assert "before clipping" in tree["gradient"]["0.weight"].attrs["definition"]
    assert "probed" not in tree["gradient"]["1.weight"].attrs


@pytest.mark.slow
def test_a_step_that_the_loop_skips_leaves_nothing_in_the_next_gradient(tmp_path):
    def window(model, optimizer, step, *, late):
        for micro in range(2):
            ids = tokens(step, micro)
            loss = model(input_ids=ids, labels=ids).loss
            if late and micro == 0:
                optimizer.zero_grad()
            loss.backward()

    gradients = []
    for skip in (False, True):
        for late in (False, True):
            model = adapted_model()
            optimizer = adam(model)
            store = tmp_path / f"{skip}{late}.zarr"
            with Recorder(model, optimizer, store, every=1):
                if skip:
                    window(model, optimizer, 7, late=late)  # a bad batch: no optimizer step
                    if not late:
                        optimizer.zero_grad()
                window(model, optimizer, 1, late=late)
                optimizer.step()
            run = dy.open_run(store)
            gradients.append([run.read(name, 1, "gradient").values for name in run.matrices])
    for others in gradients[1:]:
        assert all((a == b).all() for a, b in zip(gradients[0], others, strict=True))


@pytest.mark.slow
@pytest.mark.parametrize("options", [{}, {"fused": True}])
def test_the_loss_scale_is_taken_out(tmp_path, options):
    recorded = []
    for scale in (None, 1024.0):  # a power of two: nothing rounds
        model = adapted_model()
        optimizer = adam(model, **options)
        store = tmp_path / f"{scale}.zarr"
        scaler = torch.amp.GradScaler("cpu", init_scale=scale or 1.0, enabled=scale is not None)
        with Recorder(model, optimizer, store, every=1, grad_scaler=scaler):
            for step in (1, 2):
                ids = tokens(step)
                scaler.scale(model(input_ids=ids, labels=ids).loss).backward()
                scaler.step(optimizer)
                scaler.update()
                optimizer.zero_grad()
        recorded.append(dy.open_run(store))
    plain, scaled = recorded
    for name in plain.matrices:
        one, other = (run.read(name, 1, "gradient").values for run in (plain, scaled))
        assert relative_error(other, one) < 1e-6


def test_gradients_of_trained_weights_are_unscaled_where_the_optimizer_unscales_itself(tmp_path):
    recorded = []
    for scale in (1.0, 1024.0):
        torch.manual_seed(0)
        model = nn.Linear(6, 5)
        optimizer = torch.optim.AdamW(model.parameters(), lr=0.1, fused=True)
        scaler = torch.amp.GradScaler("cpu", init_scale=scale)
        with Recorder(model, optimizer, tmp_path / f"{scale}.zarr", every=1):
            scaler.scale(model(torch.ones(2, 6)).sum()).backward()
            scaler.step(optimizer)
        run = dy.open_run(tmp_path / f"{scale}.zarr")
        recorded.append(run.read("weight", 1, "gradient").values)
    assert (recorded[0] == recorded[1]).all()


def test_weights_that_cannot_have_a_gradient_or_carry_one_are_left_alone(tmp_path):
    torch.manual_seed(0)
    model = nn.Module()
    model.trained, model.stale = nn.Linear(4, 3), nn.Linear(4, 3, bias=False)
    model.quantised = nn.Parameter(torch.zeros(3, 4, dtype=torch.int8), requires_grad=False)
    model.stale.requires_grad_(False)
    model.stale.weight.grad = kept = torch.ones(3, 4)
    optimizer = torch.optim.SGD(model.trained.parameters(), lr=0.1)
    with Recorder(model, optimizer, tmp_path / "run.zarr", every=1):
        x = torch.ones(2, 4)
        (model.trained(x) + model.stale(x)).sum().backward()
        assert model.stale.weight.grad is kept
        assert (kept == 1).all()
        optimizer.step()
    assert dy.open_run(tmp_path / "run.zarr").read("quantised", 1, "gradient") is None


def test_a_weight_that_nothing_reached_has_no_gradient(tmp_path):
    torch.manual_seed(0)
    model = nn.ModuleList([nn.Linear(4, 4, bias=False) for _ in range(3)])
    model[1].requires_grad_(False)
    model[2].requires_grad_(False)
    optimizer = torch.optim.SGD(model[0].parameters(), lr=0.1)
    with Recorder(model, optimizer, tmp_path / "run.zarr", every=1):
        model[1](model[0](torch.ones(2, 4))).sum().backward()
        optimizer.step()
    run = dy.open_run(tmp_path / "run.zarr")
    assert run.read("1.weight", 1, "gradient") is not None
    assert run.read("2.weight", 1, "gradient") is None


def test_a_frozen_embedding_with_sparse_gradients_is_recorded_dense(tmp_path):
    torch.manual_seed(0)
    model = nn.Sequential(nn.Embedding(8, 4, sparse=True), nn.Linear(4, 2))
    model[0].requires_grad_(False)
    optimizer = torch.optim.SGD(model[1].parameters(), lr=0.1)
    with Recorder(model, optimizer, tmp_path / "run.zarr", every=1):
        for _ in range(2):
            model(torch.tensor([1, 1, 3])).sum().backward()
        optimizer.step()
    gradient = dy.open_run(tmp_path / "run.zarr").read("0.weight", 1, "gradient").values
    assert gradient.any(axis=1).tolist() == [False, True, False, True, False, False, False, False]


@pytest.mark.slow  # the compiler takes seconds
def test_a_compiled_model_is_probed_too(tmp_path):
    recorded = []
    for compiled in (False, True):
        model = adapted_model()
        optimizer = adam(model)
        called = torch.compile(model, backend="aot_eager") if compiled else model
        with Recorder(model, optimizer, tmp_path / f"{compiled}.zarr", every=2):
            train(called, optimizer, 2)
        recorded.append(dy.open_run(tmp_path / f"{compiled}.zarr"))
    for name in frozen_matrices(model):
        plain, compiled = (run.read(name, 2, "gradient").values for run in recorded)
        assert relative_error(compiled, plain) < 1e-5
