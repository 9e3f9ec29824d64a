"""Checkpoints of SLTrain and CoLA: what becomes of their parts, and of damaged ones."""

import json
import math

import numpy as np
import pytest

import dynamics as dy
from dynamics.errors import FormatError, MissingError

torch = pytest.importorskip("torch")
save_file = pytest.importorskip("safetensors.torch").save_file

ROWS, COLUMNS, RANK, ENTRIES = 12, 8, 2, 9
LAYERS = [f"model.layers.{layer}.mlp.up_proj" for layer in range(2)]
CONFIG = {"r": RANK, "lora_alpha": 6, "sp_ratio": 0.1, "trainable_scaling": False}


def parts(seed, dtype=torch.float32):
    made = torch.Generator().manual_seed(seed)
    places = torch.randperm(ROWS * COLUMNS, generator=torch.Generator().manual_seed(7))
    return {
        "lora_A": torch.randn(RANK, COLUMNS, generator=made).to(dtype),
        "lora_B": torch.randn(ROWS, RANK, generator=made).to(dtype),
        "sparse_index": places[:ENTRIES].sort().values,
        "sparse_value": torch.randn(ENTRIES, generator=made).to(dtype),
    }


def save(save_dir, step, layers=None, config=CONFIG, others=None):
    """SAVE_DIR/model_N/ as the authors' script writes it for a model with two such layers."""
    directory = save_dir / f"model_{step}"
    directory.mkdir(parents=True)
    layers = layers or {path: parts(step + i) for i, path in enumerate(LAYERS)}
    tensors = {f"{path}.{part}": each for path, its in layers.items() for part, each in its.items()}
    tensors |= {"model.embed_tokens.weight": torch.randn(20, COLUMNS)} | (others or {})
    save_file(tensors, directory / "model.safetensors")
    (directory / "config.json").write_text(json.dumps({"model_type": "llama"}))
    (directory / "training_state.json").write_text(json.dumps({"tokens_seen": step * 10}))
    if config is not None:
        (directory / "splora_config.json").write_text(json.dumps(config))
    return layers


def expected(its, scale):
    """S and s·B·A, entry by entry, in float64."""
    base = np.zeros((ROWS, COLUMNS))
    for place, value in zip(its["sparse_index"].tolist(), its["sparse_value"], strict=True):
        base[divmod(place, COLUMNS)] = float(value)
    return base, scale * its["lora_B"].double().numpy() @ its["lora_A"].double().numpy()


def check(run, step, layers, scale=3.0):
    names = {f"{path}.weight" for path in layers}
    assert set(run.matrices) == {"model.embed_tokens.weight", *names}
    for path, its in layers.items():
        base, product = expected(its, scale)
        name = f"{path}.weight"
        np.testing.assert_array_equal(run.read(name, step, "base").values, base)
        adapter = run.read(name, step, "adapter")
        assert adapter.rank_bound == RANK
        np.testing.assert_allclose(adapter.product(), product, rtol=1e-14)
        np.testing.assert_allclose(
            run.read(name, step, "weight").values, base + product, rtol=1e-14
        )


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_sltrains_base_adapter_and_weight_are_read_and_its_base_trains(tmp_path, dtype):
    saved = {
        step: save(tmp_path, step, {path: parts(step + i, dtype) for i, path in enumerate(LAYERS)})
        for step in (10, 20, 30)
    }
    run = dy.open_run(tmp_path)
    assert run.format == "relora"
    assert run.scalars["tokens"].tolist() == [100, 200, 300]
    assert not run.account.left_out
    for step, layers in saved.items():
        check(run, step, layers)
    name = f"{LAYERS[0]}.weight"
    assert run.sparse_entries(name) == ENTRIES
    assert run.trains(name) is True
    assert run.merges_between(name, 10, 30) == 0
    found = dy.analyze(run, kinds=["displacement", "adapter"], select="*up_proj")
    assert found["rank_bound"].sel(kind="adapter").max() == RANK
    assert found["rank_bound"].sel(kind="displacement").isel(step=-1).min() == COLUMNS
    assert not dy.audit(run).failed


def test_a_support_that_changes_is_named_by_the_audit(tmp_path):
    for step in (10, 20, 30):
        layers = {path: parts(step + i) for i, path in enumerate(LAYERS)}
        if step == 30:
            layers[LAYERS[1]]["sparse_index"] = torch.arange(ENTRIES)
        save(tmp_path, step, layers)
    (verdict,) = [each for each in dy.audit(tmp_path).verdicts if each.severity == "fail"]
    assert (verdict.check, verdict.matrix, verdict.step) == (
        "sparse_support",
        f"{LAYERS[1]}.weight",
        30,
    )
    assert verdict.measured > verdict.threshold == ENTRIES


def test_the_scale_is_that_of_the_config_of_a_trained_one_or_the_users(tmp_path):
    trained = {f"{path}.scaling": torch.tensor([0.4]) for path in LAYERS}
    layers = save(tmp_path / "trained", 10, others=trained, config=None)
    check(dy.open_run(tmp_path / "trained"), 10, layers, math.tanh(float(torch.tensor(0.4))))
    layers = save(tmp_path / "unknown", 10, config=None)
    check(dy.open_run(tmp_path / "unknown", lora_alpha=4.0), 10, layers, 2.0)
    run = dy.open_run(tmp_path / "unknown")
    assert set(run.matrices) == {"model.embed_tokens.weight"}
    assert {each.name for each in run.account.left_out} == {f"{path}.weight" for path in LAYERS}
    assert all("scaling is not known" in each.reason for each in run.account.left_out)


def without(part):
    return lambda its: its.pop(part)


@pytest.mark.parametrize(
    ("damage", "reason"),
    [
        (without("sparse_index"), "without their sparse_index"),
        (without("sparse_value"), "without their sparse_value"),
        (without("lora_B"), "without their lora_B"),
        (lambda its: its.update(sparse_value=torch.ones(4)), "different lengths"),
        (lambda its: its.update(lora_A=torch.ones(5, COLUMNS)), "no rank in common"),
        (lambda its: its.update(sparse_index=torch.ones(ENTRIES)), "holds float32, not integers"),
    ],
)
def test_a_layer_whose_parts_do_not_fit_is_left_out_alone(tmp_path, damage, reason):
    layers = {path: parts(i) for i, path in enumerate(LAYERS)}
    damage(layers[LAYERS[1]])
    save(tmp_path, 10, layers)
    run = dy.open_run(tmp_path)
    check(run, 10, {LAYERS[0]: layers[LAYERS[0]]})
    (left_out,) = run.account.left_out
    assert left_out.name == f"{LAYERS[1]}.weight"
    assert reason in left_out.reason


@pytest.mark.parametrize(
    ("place", "message"),
    [(ROWS * COLUMNS, "the place 96 of"), (-1, "the place -1 of"), (0, "the place 0 twice")],
)
def test_places_that_cannot_be_are_one_line_of_their_layer_alone(tmp_path, place, message):
    layers = {path: parts(i) for i, path in enumerate(LAYERS)}
    index = torch.arange(ENTRIES)
    index[3] = place
    layers[LAYERS[1]]["sparse_index"] = index
    save(tmp_path, 10, layers)
    run = dy.open_run(tmp_path)
    with pytest.raises(FormatError, match=message) as raised:
        run.read(f"{LAYERS[1]}.weight", 10, "weight")
    assert "\n" not in str(raised.value)
    assert run.read(f"{LAYERS[1]}.weight", 10, "adapter").rank_bound == RANK
    with pytest.warns(dy.UnmeasuredWarning, match=message):
        found = dy.analyze(run, kinds=["weight"], select="*up_proj")
    measured = np.isfinite(found["effective_rank"].isel(step=0, kind=0))
    assert measured.values.tolist() == [True, False]


def test_colas_factors_are_matrices_of_their_own_and_it_has_no_circuits(tmp_path):
    paths = [f"model.layers.0.self_attn.{each}_proj" for each in "qkvo"]
    factors = {f"{path}.cola_a": torch.randn(COLUMNS, RANK) for path in paths}
    factors |= {f"{path}.cola_b": torch.randn(RANK, COLUMNS) for path in paths}
    save(tmp_path, 10, {LAYERS[0]: {}}, config=None, others=factors)
    run = dy.open_run(tmp_path)
    found = dy.analyze(run, kinds=["weight"], select="*cola*")
    assert set(found["module"].values.tolist()) == {
        f"self_attn.{each}_proj.cola_{factor}" for each in "qkvo" for factor in "ab"
    }
    assert (found["rank_bound"] == RANK).all()
    with pytest.raises(MissingError, match=r"No attention of .* has"):
        dy.analyze(run, components=["ov_circuit"])
