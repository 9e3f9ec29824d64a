"""Which adapter of several is read, and where its base model is found."""

import json
import os
import re
import shutil

import numpy as np
import pytest

import dynamics as dy
from dynamics.errors import DynamicsError
from tests.dynamics.formats.checking import assert_refused
from tests.dynamics.formats.writers.hub_cache import Cache

torch = pytest.importorskip("torch")
peft = pytest.importorskip("peft")
transformers = pytest.importorskip("transformers")
huggingface_hub = pytest.importorskip("huggingface_hub")

from tests.dynamics.formats.writers.lora import adapted, randomized, save  # noqa: E402

Q_PROJ = "model.layers.0.self_attn.q_proj.weight"
BASE_NAME = "base_model_name_or_path"


def merged_weights(model):
    """Name -> weight after PEFT's own merge, computed in float64."""
    merged = model.double().merge_and_unload()
    return {name: each.detach().numpy() for name, each in merged.state_dict().items()}


def check_weights(run, step, model):
    """Every matrix of the run is that of PEFT's merged model."""
    merged = merged_weights(model)
    for name in run.matrices:
        found = run.read(name, step, "weight").values
        np.testing.assert_allclose(found, merged[name], rtol=1e-12, atol=1e-14)
    adapter = run.read(Q_PROJ, step, "adapter")
    assert adapter is None or adapter.product().any()


def rename_base(directory, name, **more):
    """Let an adapter name another base model."""
    file = directory / "adapter_config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | {BASE_NAME: name} | more))


# Several adapters --------------------------------------------------------------------------------


@pytest.fixture
def several(tiny_llama, tmp_path):
    """(run, PEFT model): checkpoint-4 with the adapters default, red and blue, and base/."""
    tiny_llama().save_pretrained(tmp_path / "run/base")
    model = adapted(tiny_llama())
    for name in ("red", "blue"):
        model.add_adapter(name, peft.LoraConfig(r=2, lora_alpha=3, target_modules=["q_proj"]))
    randomized(model)
    save(model, tmp_path / "run/checkpoint-4")
    return tmp_path / "run", model


@pytest.mark.parametrize("name", ["default", "red", "blue", None])
def test_an_adapter_is_chosen_by_name_and_is_the_default_one_without(several, name):
    run, model = several
    model.set_adapter(name or "default")
    opened = dy.open_run(run, adapter=name)
    assert dy.open_run(run, adapter=name, split_fused=False).format == "peft"
    assert opened.read(Q_PROJ, 4, "adapter").rank_bound == (2 if name in ("red", "blue") else 3)
    check_weights(opened, 4, model)


def test_a_single_adapter_in_a_sub_directory_is_found(several):
    run, model = several
    for each in ("adapter_config.json", "adapter_model.safetensors", "red/adapter_config.json"):
        (run / "checkpoint-4" / each).unlink()
    model.set_adapter("blue")
    check_weights(dy.open_run(run), 4, model)


def test_several_adapters_without_a_default_are_named_and_how_to_choose(several):
    run, model = several
    (run / "checkpoint-4/adapter_config.json").unlink()
    assert_refused(run, r"holds several adapters: blue, red; choose one with adapter=.*'blue'")
    model.set_adapter("red")
    check_weights(dy.open_run(run, adapter="red"), 4, model)


def test_an_adapter_that_is_not_there_is_refused_with_those_that_are(several):
    assert_refused(several[0], "no adapter 'green'; it has default, blue, red", adapter="green")


def test_an_adapters_name_is_refused_for_other_formats(llama_checkpoints):
    with pytest.raises(DynamicsError, match="'checkpoints', which takes no name of an adapter"):
        dy.open_run(llama_checkpoints, adapter="red")


# Where the base is -------------------------------------------------------------------------------


@pytest.mark.parametrize("size", ["1GB", "8KB"])
def test_a_pickled_base_is_read(tiny_llama, tmp_path, size):
    base = tiny_llama()
    (tmp_path / "run/base").mkdir(parents=True)
    huggingface_hub.save_torch_state_dict(
        base.state_dict(), tmp_path / "run/base", max_shard_size=size, safe_serialization=False
    )
    model = adapted(base)
    save(model, tmp_path / "run/checkpoint-1")
    check_weights(dy.open_run(tmp_path / "run"), 1, model)


@pytest.fixture
def cached(tiny_llama, tmp_path, monkeypatch):
    """(run without base, PEFT model, what the cache was asked for); HF_HUB_CACHE has its base."""
    cache = Cache(tmp_path / "hub")
    tiny_llama().save_pretrained(tmp_path / "saved")
    tiny_llama(seed=8).save_pretrained(tmp_path / "other")
    cache.add(["main"], tmp_path / "saved")
    cache.add(["v2"], tmp_path / "other")
    monkeypatch.setenv("HF_HUB_CACHE", str(cache.directory))
    model = adapted(tiny_llama())
    rename_base(save(model, tmp_path / "run/checkpoint-1"), "org/suite")
    return tmp_path / "run", model, cache


def test_a_base_in_the_local_cache_is_used(cached):
    run, model, cache = cached
    found = huggingface_hub.try_to_load_from_cache(
        "org/suite", "config.json", cache_dir=cache.directory
    )
    assert found == str(cache.repository / "snapshots" / _commit(cache, "main") / "config.json")
    opened = dy.open_run(run)
    check_weights(opened, 1, model)
    assert opened.attrs["config"]["hidden_size"] == 16


@pytest.mark.parametrize("by", ["ref", "commit"])
def test_the_revision_of_the_base_is_the_one_that_was_adapted(cached, tiny_llama, by):
    run, _, cache = cached
    revision = "v2" if by == "ref" else _commit(cache, "v2")
    rename_base(run / "checkpoint-1", "org/suite", revision=revision)
    check_weights(dy.open_run(run), 1, adapted(tiny_llama(seed=8)))


@pytest.mark.parametrize("variable", ["HF_HOME", "XDG_CACHE_HOME"])
def test_the_cache_is_where_huggingface_hub_puts_it(cached, monkeypatch, tmp_path, variable):
    run, model, cache = cached
    home = {"HF_HOME": "home/hub", "XDG_CACHE_HOME": "home/huggingface/hub"}[variable]
    shutil.move(cache.directory, tmp_path / home)
    for each in ("HF_HUB_CACHE", "HF_HOME"):
        monkeypatch.delenv(each, raising=False)
    monkeypatch.setenv(variable, str(tmp_path / "home"))
    check_weights(dy.open_run(run), 1, model)


@pytest.mark.parametrize(
    ("name", "revision"),
    [
        ("org/other", None),
        ("org/suite", "v3"),
        ("../../suite", None),
        ("org/suite", "../refs/main"),
    ],
)
def test_a_base_that_is_not_cached_is_missing_and_says_so(cached, name, revision):
    run, _, _ = cached
    rename_base(run / "checkpoint-1", name, revision=revision)
    assert dy.open_run(run).kinds == ("adapter",)
    with pytest.raises(
        DynamicsError, match=f"'{name}' is neither a local directory .* Hugging Face cache"
    ):
        dy.analyze(run)


def _commit(cache, ref):
    return (cache.repository / "refs" / ref).read_text()


# Names that differ -------------------------------------------------------------------------------


@pytest.mark.parametrize("family", ["llama", "gpt2"])
def test_a_base_that_was_saved_without_its_head_is_read(tiny_llama, tmp_path, family):
    if family == "llama":
        base, inner = tiny_llama(), "model"
        config = {}
    else:
        torch.manual_seed(0)
        sizes = {"n_layer": 1, "n_embd": 16, "n_head": 2, "vocab_size": 40, "n_positions": 8}
        base, inner = transformers.GPT2LMHeadModel(transformers.GPT2Config(**sizes)), "transformer"
        config = {"target_modules": ["c_fc"], "fan_in_fan_out": True}
    getattr(base, inner).save_pretrained(tmp_path / "run/base")
    model = adapted(base, **config)
    save(model, tmp_path / "run/checkpoint-1")
    opened = dy.open_run(tmp_path / "run", split_fused=False)
    assert all(name.startswith(inner) for name in opened.matrices)
    check_weights(opened, 1, model)


def test_an_adapter_of_a_model_without_head_finds_its_base_with_one(tiny_llama, tmp_path):
    base = tiny_llama()
    base.save_pretrained(tmp_path / "run/base")
    model = adapted(base.model)
    save(model, tmp_path / "run/checkpoint-1")
    opened = dy.open_run(tmp_path / "run")
    merged = merged_weights(model)
    name = "layers.0.self_attn.q_proj.weight"
    assert "lm_head.weight" in opened.matrices
    np.testing.assert_allclose(
        opened.read(name, 1, "weight").values, merged[name], rtol=1e-12, atol=1e-14
    )


def test_an_output_embedding_that_is_tied_has_the_input_embedding_as_base(tiny_llama, tmp_path):
    from safetensors.torch import load_file, save_file

    base = tiny_llama(tie_word_embeddings=True)
    base.save_pretrained(tmp_path / "run/base")
    model = adapted(base, target_modules=["q_proj", "lm_head"])
    expected = base.get_input_embeddings().weight.detach().numpy().copy()
    at = save(model, tmp_path / "run/checkpoint-1")
    file = at / "adapter_model.safetensors"
    tensors = load_file(file)
    # PEFT saves a copy of an adapted output embedding's weight where it can; older ones do not.
    save_file({name: each for name, each in tensors.items() if "lora_" in name}, file)
    opened = dy.open_run(tmp_path / "run")
    np.testing.assert_array_equal(opened.read("lm_head.weight", 1, "base").values, expected)
    layer = model.base_model.model.lm_head
    delta = layer.double().get_delta_weight("default").detach().numpy()
    found = opened.read("lm_head.weight", 1, "weight").values
    np.testing.assert_allclose(found, expected + delta, rtol=1e-12, atol=1e-14)
    config = tmp_path / "run/base/config.json"
    content = json.loads(config.read_text()) | {"tie_word_embeddings": False}
    config.write_text(json.dumps(content))
    opened = dy.open_run(tmp_path / "run")
    assert opened.kinds == ("adapter",)
    assert "has no lm_head.weight, so it is not the base" in opened.absent_kinds["weight"]


# Where matrices come from ------------------------------------------------------------------------


def aged(directory):
    """Files that were changed long enough ago for their time to tell a change."""
    for each in directory.rglob("*"):
        os.utime(each, (1e9, 1e9))
    return directory


@pytest.fixture
def two_checkpoints(tiny_llama, tmp_path):
    """A run with checkpoint-1 and checkpoint-2, which share a base."""
    tiny_llama().save_pretrained(tmp_path / "run/base")
    model = adapted(tiny_llama())
    for step in (1, 2):
        save(randomized(model, seed=step), tmp_path / f"run/checkpoint-{step}")
    return aged(tmp_path / "run")


def origins(run):
    opened = dy.open_run(run)
    return {
        (kind, name): opened.origin(name, 1, kind)
        for kind in ("weight", "base", "adapter")
        for name in (Q_PROJ, "lm_head.weight")
    }


@pytest.mark.parametrize(
    ("file", "changed"),
    [
        ("checkpoint-1/adapter_model.safetensors", {("weight", Q_PROJ), ("adapter", Q_PROJ)}),
        ("checkpoint-1/adapter_config.json", {("weight", Q_PROJ), ("adapter", Q_PROJ)}),
        (
            "base/model.safetensors",
            {(kind, name) for kind in ("weight", "base") for name in (Q_PROJ, "lm_head.weight")},
        ),
        ("checkpoint-2/adapter_model.safetensors", set()),
    ],
)
def test_an_origin_changes_with_the_files_that_its_matrix_is_made_of(
    two_checkpoints, file, changed
):
    before = origins(two_checkpoints)
    assert None not in before.values()
    assert origins(two_checkpoints) == before
    path = two_checkpoints / file
    if path.suffix == ".json":
        rename_base(path.parent, "nowhere", lora_alpha=8)
    os.utime(path, (1.1e9, 1.1e9))
    after = origins(two_checkpoints)
    assert {key for key in before if before[key] != after[key]} == changed


def test_a_base_that_two_checkpoints_share_is_not_read_to_count_merges(two_checkpoints):
    opened = dy.open_run(two_checkpoints)
    (two_checkpoints / "base/model.safetensors").write_bytes(b"")
    aged(two_checkpoints)
    with pytest.raises(DynamicsError):
        opened.read(Q_PROJ, 1, "base")
    assert opened.merges_between(Q_PROJ, 1, 2) == 0


def test_bases_of_equal_numbers_are_no_merge_and_others_are(two_checkpoints, tiny_llama):
    shutil.copytree(two_checkpoints / "base", two_checkpoints / "checkpoint-2/base")
    assert dy.open_run(two_checkpoints).merges_between(Q_PROJ, 1, 2) == 0
    tiny_llama(seed=3).save_pretrained(two_checkpoints / "checkpoint-2/base")
    run = dy.open_run(two_checkpoints)
    assert run.merges_between(Q_PROJ, 1, 2) == 1
    assert run.merges_between("lm_head.weight", 1, 2) == 0


# Damage ------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("content", "match"),
    [
        ({"alpha_pattern": [1]}, "alpha_pattern"),
        ({"alpha_pattern": {"(": 1}}, "not a regular expression"),
        ({"alpha_pattern": {"q_proj": "x", "up_proj": None}}, "lora_alpha 'x'"),
        ({"kasa_config": {"k": 1}}, "KaSA"),
    ],
)
def test_a_config_that_cannot_be_served_is_named(tiny_llama, tmp_path, content, match):
    at = save(adapted(tiny_llama()), tmp_path / "run/checkpoint-1")
    rename_base(at, "nowhere", **content)
    assert_refused(tmp_path / "run", match)


def test_repeated_layers_are_measured_as_adapters_alone(tiny_llama, tmp_path):
    tiny_llama().save_pretrained(tmp_path / "run/base")
    at = save(adapted(tiny_llama()), tmp_path / "run/checkpoint-1")
    rename_base(at, "nowhere", layer_replication=[[0, 1], [0, 1]])
    opened = dy.open_run(tmp_path / "run")
    assert opened.kinds == ("adapter",)
    assert "layer_replication" in opened.absent_kinds["weight"]


def test_a_missing_shard_of_the_base_is_named(tiny_llama, tmp_path):
    base = tiny_llama()
    base.save_pretrained(tmp_path / "run/base", max_shard_size="8KB")
    save(adapted(base), tmp_path / "run/checkpoint-1")
    next((tmp_path / "run/base").glob("*-of-*")).unlink()
    opened = dy.open_run(tmp_path / "run")
    assert opened.kinds == ("adapter",)
    reason = opened.absent_kinds["weight"]
    assert re.search(r"base lacks the shard model-\d+-of-\d+\.safetensors", reason)
