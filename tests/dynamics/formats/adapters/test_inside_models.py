"""Adapters inside the state dict of a whole model: base, adapter and weight, or a reason."""

import json
import warnings

import numpy as np
import pytest
from safetensors.torch import save_file

import dynamics as dy
from dynamics.runs.run import Factored

torch = pytest.importorskip("torch")
peft = pytest.importorskip("peft")
transformers = pytest.importorskip("transformers")

import torch.distributed.checkpoint as dcp  # noqa: E402
from torch import nn  # noqa: E402

from tests.dynamics.formats.adapters.merging import (  # noqa: E402
    TOLERANCE,
    deviation,
    merged_weights,
    randomised,
)
from tests.dynamics.formats.adapters.test_experts import (  # noqa: E402
    merged_matrices,
    mixture,
    on_experts,
    parameters,
)

Q_PROJ = "model.layers.0.self_attn.q_proj.weight"
CONFIG = {"r": 3, "lora_alpha": 7, "target_modules": ["q_proj", "down_proj"]}


def adapted(model, config=None, **settings):
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return randomised(
            peft.get_peft_model(model, config or peft.LoraConfig(**CONFIG | settings))
        )


def beside(directory, model):
    """adapter_config.json alone."""
    directory.mkdir(parents=True, exist_ok=True)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        model.peft_config["default"].save_pretrained(directory)


def check(path, expected, step, **options):
    """Every matrix has the merged weight, and no factor is a matrix of its own."""
    run = dy.open_run(path, split_fused=False, **options)
    assert dict(run.problems) == {}
    assert dict(run.absent_kinds) == {}
    matrices = {name for name, each in expected.items() if each.ndim == 2}
    assert set(run.matrices) == matrices
    for name in matrices:
        found = run.read(name, step, "weight").values
        assert deviation(found, expected[name]) < TOLERANCE, name
    return run


def write_pt(model, directory):
    torch.save(model.state_dict(), directory / "step5.pt")


def write_nested(model, directory):
    torch.save({"model_state_dict": model.state_dict(), "step": 5}, directory / "step5.pt")


def write_safetensors(model, directory):
    save_file({n: t.contiguous().clone() for n, t in model.state_dict().items()},
              directory / "step5.safetensors")  # fmt: skip


def write_dcp(model, directory):
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        dcp.save({"model": model.state_dict()}, checkpoint_id=directory / "step-5")


def write_model(model, directory):
    (directory / "checkpoint-5").mkdir()
    torch.save(model.state_dict(), directory / "checkpoint-5/pytorch_model.bin")


WRITERS = [write_pt, write_nested, write_safetensors, write_dcp, write_model]


@pytest.mark.parametrize("write", WRITERS, ids=lambda each: each.__name__)
def test_alpha_of_the_user_or_of_a_config_beside_it_scales_the_factors(tiny_llama, tmp_path, write):
    model = adapted(tiny_llama())
    expected = merged_weights(model)
    tmp_path = tmp_path / "run"
    tmp_path.mkdir()
    write(model, tmp_path)
    run = check(tmp_path, expected, 5, lora_alpha=7)
    adapter = run.read(Q_PROJ, 5, "adapter")
    assert isinstance(adapter, Factored)
    assert (adapter.scale, adapter.rank_bound) == (7 / 3, 3)
    base = run.read(Q_PROJ, 5, "base").values
    np.testing.assert_array_equal(base, tiny_llama().state_dict()[Q_PROJ])
    beside(tmp_path, model)
    if write is not write_model:  # there it is a checkpoint of PEFT
        check(tmp_path, expected, 5)


@pytest.mark.parametrize("write", WRITERS, ids=lambda each: each.__name__)
def test_without_alpha_the_layer_is_left_out_and_the_base_is_never_its_weight(
    tiny_llama, tmp_path, write
):
    write(adapted(tiny_llama()), tmp_path)
    run = dy.open_run(tmp_path)
    assert Q_PROJ not in run.matrices
    assert not any("lora" in name for name in run.matrices)
    for kind in ("adapter", "base"):
        assert "LoRA layers whose scaling is not known" in run.absent_kinds[kind]
        assert "--lora-alpha" in run.absent_kinds[kind]
    left_out = {each.name: each.reason for each in run.account.left_out}
    assert "LoRA" in left_out[Q_PROJ]
    assert run.read("lm_head.weight", 5, "weight") is not None
    with pytest.raises(dy.DynamicsError, match="--lora-alpha"):
        dy.analyze(tmp_path)


@pytest.mark.parametrize(
    "settings",
    [
        {"use_rslora": True},
        {"alpha_pattern": {"q_proj": 2}},
        {"use_dora": True},
        {"init_lora_weights": "pissa"},  # the base in the file is what it left
        {"modules_to_save": ["lm_head"]},
        {"trainable_token_indices": [3, 1]},
        {"target_modules": ["q_proj", "embed_tokens"]},
        {"lora_bias": True, "target_modules": ["q_proj"]},
    ],
    ids=str,
)
def test_what_the_config_beside_it_says_is_applied(tiny_llama, tmp_path, settings):
    model = adapted(tiny_llama(attention_bias=True), **settings)
    expected = merged_weights(model)
    write_pt(model, tmp_path)
    beside(tmp_path, model)
    check(tmp_path, expected, 5)


@pytest.mark.parametrize(
    "config",
    [
        peft.LoHaConfig(r=2, alpha=5, target_modules=["q_proj"]),
        peft.OFTConfig(oft_block_size=4, target_modules=["q_proj"]),
        peft.VeraConfig(r=4, target_modules=["q_proj"]),
        peft.IA3Config(target_modules=["q_proj"], feedforward_modules=[]),
    ],
    ids=lambda each: str(each.peft_type),
)
def test_other_methods_inside_a_model_need_their_config(tiny_llama, tmp_path, config):
    model = adapted(tiny_llama(), config)
    expected = merged_weights(model)
    write_pt(model, tmp_path)
    if not isinstance(config, peft.VeraConfig | peft.IA3Config):
        run = dy.open_run(tmp_path)
        assert Q_PROJ not in run.matrices
    beside(tmp_path, model)
    check(tmp_path, expected, 5)


def test_factors_on_parameters_that_are_not_known_leave_the_whole_module_out(tmp_path):
    model = adapted(mixture("Mixtral"), on_experts(parameters("Mixtral")))
    # The parameters under other names than those that the factors were made for.
    state = {name.replace("gate_up_proj", "w13"): each for name, each in model.state_dict().items()}
    state = {name: each.flatten(0, 1) if name.endswith(("w13", "down_proj")) else each
             for name, each in state.items()}  # fmt: skip
    torch.save(state, tmp_path / "step_1.pt")
    run = dy.open_run(tmp_path, lora_alpha=5)
    assert not any("experts" in name for name in run.matrices)
    left_out = [each.name for each in run.account.left_out]
    assert {each.rpartition(".")[2] for each in left_out if "experts" in each} == {
        "w13", "down_proj",
    }  # fmt: skip


def test_experts_inside_a_model(tmp_path):
    model = adapted(mixture("Mixtral"), on_experts(parameters("Mixtral")))
    torch.save(model.state_dict(), tmp_path / "pytorch_model.bin")
    expected = merged_matrices(model)
    (tmp_path / "config.json").write_text(model.config.to_json_string())
    run = dy.open_run(tmp_path, lora_alpha=5)
    adapted_ones = [name for name in run.matrices if run.read(name, 0, "adapter") is not None]
    assert len([name for name in adapted_ones if "experts" in name]) >= 6
    for name in adapted_ones:
        found = run.read(name, 0, "weight").values
        if name in expected:
            assert deviation(found, expected[name]) < TOLERANCE
    assert not any("lora" in name or "base_layer" in name for name in run.matrices)


def test_one_of_several_adapters_is_chosen_by_name(tiny_llama, tmp_path):
    model = adapted(tiny_llama())
    model.add_adapter("red", peft.LoraConfig(**CONFIG | {"r": 2}))
    model.add_adapter("blue", peft.LoraConfig(**CONFIG | {"r": 5}))
    for name, parameter in model.named_parameters():
        if "lora_" in name:
            parameter.data.normal_()
    write_pt(model, tmp_path)
    for name, rank in (("default", 3), ("red", 2), ("blue", 5)):
        model.set_adapter(name)
        run = check(tmp_path, merged_weights(model), 5, lora_alpha=7, adapter=name)
        assert run.read(Q_PROJ, 5, "adapter").rank_bound == rank
    with pytest.raises(dy.DynamicsError, match="no adapter 'green'; it has blue, default, red"):
        dy.open_run(tmp_path, adapter="green")
    model.delete_adapter("default")
    write_pt(model, tmp_path)
    run = dy.open_run(tmp_path, lora_alpha=7)
    reasons = {each.name: each.reason for each in run.account.left_out}
    assert "several adapters (blue, red): choose one with adapter=" in reasons[Q_PROJ]
    assert Q_PROJ not in run.matrices


# Other libraries, whose layers are a few lines each ---------------------------------------------


def linear(rows, cols, seed=0):
    return torch.randn(rows, cols, generator=torch.Generator().manual_seed(seed))


@pytest.mark.parametrize(
    ("a", "b", "base"),
    [
        ("lora_a.weight", "lora_b.weight", "weight"),  # torchtune, torchtitan
        ("lora_A", "lora_B", "weight"),  # loralib
        ("lora_A", "lora_B", "linear.weight"),  # litgpt
        ("lora_A.weight", "lora_B.weight", "weight"),  # the original ReLoRA
        ("A_lora.weight", "B_lora.weight", "weight"),  # relora-pico
        ("lora_down.weight", "lora_up.weight", "weight"),  # kohya
        ("adapter.linear_in.weight", "adapter.linear_out.weight", "to_wrap.weight"),  # NeMo
        ("lora.A", "lora.B", "weight"),
    ],
)
def test_the_names_of_other_libraries(tmp_path, a, b, base):
    path = "layers.0.attn.q_proj"
    tensors = {f"{path}.{a}": linear(2, 6, 1), f"{path}.{b}": linear(4, 2, 2)}
    tensors |= {f"{path}.{base}": linear(4, 6), "layers.0.norm.scale": torch.ones(6)}
    save_file(tensors, tmp_path / "step1.safetensors")
    run = dy.open_run(tmp_path, lora_alpha=4)
    assert list(run.matrices) == [f"{path}.weight"]
    expected = linear(4, 6) + 2 * linear(4, 2, 2) @ linear(2, 6, 1)
    assert deviation(run.read(f"{path}.weight", 1, "weight").values, expected.numpy()) < TOLERANCE
    with pytest.raises(dy.DynamicsError, match="LoRA layers whose scaling is not known"):
        dy.open_run(tmp_path)


def test_alpha_that_is_stored_with_each_layer_scales_it(tmp_path):
    tensors = {
        "up.lora_down.weight": linear(2, 6, 1), "up.lora_up.weight": linear(4, 2, 2),
        "up.alpha": torch.tensor(3.0), "up.weight": linear(4, 6),
    }  # fmt: skip
    save_file(tensors, tmp_path / "step1.safetensors")
    run = dy.open_run(tmp_path)
    assert run.read("up.weight", 1, "adapter").scale == 1.5


def test_doras_magnitude_of_torchtune(tmp_path):
    path = "layers.0.attn.q_proj"
    magnitude = torch.rand(4) + 1
    tensors = {
        f"{path}.lora_a.weight": linear(2, 6, 1), f"{path}.lora_b.weight": linear(4, 2, 2),
        f"{path}.magnitude": magnitude, f"{path}.weight": linear(4, 6),
    }  # fmt: skip
    save_file(tensors, tmp_path / "step1.safetensors")
    direction = linear(4, 6) + 2 * linear(4, 2, 2) @ linear(2, 6, 1)
    expected = magnitude[:, None] * direction / direction.norm(dim=1, keepdim=True)
    run = dy.open_run(tmp_path, lora_alpha=4)
    found = run.read(f"{path}.weight", 1, "weight").values
    assert deviation(found, expected.numpy()) < TOLERANCE
    assert run.read(f"{path}.weight", 1, "adapter") is None


class LitGPTQKV(nn.Module):
    """LoRAQKVLinear of litgpt's lora.py: `lora_ind`, `conv1d` by groups, `zero_pad`."""

    def __init__(self, heads, groups, size, inputs, rank, enabled):
        super().__init__()
        widths = [heads * size, groups * size, groups * size]
        self.linear = nn.Linear(inputs, sum(widths), bias=False)
        self.widths, self.enabled = widths, enabled
        own = [width for width, each in zip(widths, enabled, strict=True) if each]
        self.lora_A = nn.Parameter(torch.randn(rank * len(own), inputs))
        self.lora_B = nn.Parameter(torch.randn(sum(own), rank))
        self.own, self.rank = own, rank

    def merged(self, alpha):
        split_a = self.lora_A.chunk(len(self.own))
        split_b = self.lora_B.split(self.own)
        delta = torch.cat([b @ a for a, b in zip(split_a, split_b, strict=True)])
        rows, first = [], 0
        for width, each in zip(self.widths, self.enabled, strict=True):
            rows += list(range(first, first + width)) if each else []
            first += width
        weight = self.linear.weight.clone()
        weight[rows] += alpha / self.rank * delta
        return weight.detach().numpy()


@pytest.mark.parametrize("groups", [4, 2])
@pytest.mark.parametrize("enabled", [(True, True, True), (True, False, True), (False, True, True)])
def test_fused_projections_of_litgpt(tmp_path, groups, enabled):
    torch.manual_seed(0)
    layer = LitGPTQKV(4, groups, 3, 8, 2, enabled)
    name = "transformer.h.0.attn.qkv"
    state = {f"{name}.{key}": each for key, each in layer.state_dict().items()}
    torch.save(state, tmp_path / "step-1.pt")
    hyper = {
        f"lora_{each}": on for each, on in zip(("query", "key", "value"), enabled, strict=True)
    }
    hyper |= {"lora_r": 2, "lora_alpha": 5}
    (tmp_path / "hyperparameters.yaml").write_text(
        json.dumps(hyper | {"n_head": 4, "n_query_groups": groups})
    )
    run = dy.open_run(tmp_path)
    found = run.read(f"{name}.weight", 1, "weight").values
    assert deviation(found, layer.merged(5)) < TOLERANCE
    adapter = run.read(f"{name}.weight", 1, "adapter")
    assert adapter.rank_bound == 2 * sum(enabled)
    if not all(enabled):
        (tmp_path / "hyperparameters.yaml").unlink()
        with pytest.raises(dy.DynamicsError, match="LoRA on some of query, key and value"):
            dy.open_run(tmp_path, lora_alpha=5)


def test_factors_without_the_base_are_measured_alone(tmp_path):
    path = "layers.0.attn.q_proj"
    tensors = {f"{path}.lora_a.weight": linear(2, 6, 1), f"{path}.lora_b.weight": linear(4, 2, 2)}
    save_file(tensors, tmp_path / "step1.safetensors")
    run = dy.open_run(tmp_path, lora_alpha=4)
    assert run.kinds == ("adapter",)
    assert "without the base weights" in run.absent_kinds["weight"]
    assert run.read(f"{path}.weight", 1, "adapter").scale == 2


def test_low_rank_maps_that_are_the_models_own_are_matrices(tmp_path):
    """RWKV-7's and DeepSeek's."""
    names = ["blocks.0.att.w_lora.lora.0.weight", "layers.0.self_attn.q_a_proj.weight",
             "road_map.weight", "blocks.0.vera_mixer.weight"]  # fmt: skip
    save_file({name: linear(4, 6) for name in names}, tmp_path / "step1.safetensors")
    assert set(dy.open_run(tmp_path).matrices) == set(names)


@pytest.mark.parametrize("option", [{"lora_alpha": 3.0}, {"expert_blocks": True}, {"adapter": "x"}])
def test_an_option_without_effect_is_refused(tiny_llama, tmp_path, option):
    torch.save(tiny_llama().state_dict(), tmp_path / "step1.pt")
    with pytest.raises(dy.DynamicsError, match="'files', which takes no"):
        dy.open_run(tmp_path, **option)


@pytest.mark.parametrize("alpha", [0, -1, float("nan"), "x", True])
def test_an_alpha_that_is_none_is_refused(tmp_path, alpha):
    with pytest.raises(dy.DynamicsError, match="give a positive number"):
        dy.open_run(tmp_path, lora_alpha=alpha)


@pytest.mark.slow
@pytest.mark.parametrize("stored", ["hyper_parameters", "nested", "nothing"])
def test_a_checkpoint_of_lightning(tiny_llama, tmp_path, stored):
    lightning = pytest.importorskip("lightning")

    class Module(lightning.LightningModule):
        def __init__(self, model, **hyper):
            super().__init__()
            self.save_hyperparameters(hyper)
            self.model = model

        def training_step(self, batch, _):
            return self.model(input_ids=batch, labels=batch).loss

        def configure_optimizers(self):
            return torch.optim.SGD([p for p in self.parameters() if p.requires_grad], lr=0.1)

    model = adapted(tiny_llama())
    hyper = {
        "hyper_parameters": {"lora_alpha": 7, "lora_r": 3},
        "nested": {"lora": {"alpha": 7, "r": 3}, "other": {"alpha": 1}},
        "nothing": {},
    }[stored]
    module = Module(model, **hyper)
    trainer = lightning.Trainer(
        max_steps=2, accelerator="cpu", logger=False, enable_progress_bar=False,
        enable_model_summary=False, enable_checkpointing=False,
    )  # fmt: skip
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        trainer.fit(module, torch.utils.data.DataLoader(torch.randint(0, 40, (4, 8)), batch_size=2))
        trainer.save_checkpoint(tmp_path / "last.ckpt")
    expected = merged_weights(model)
    if stored == "nothing":
        assert "LoRA" in dy.open_run(tmp_path).absent_kinds["adapter"]
        check(tmp_path, expected, 2, lora_alpha=7)
    else:
        check(tmp_path, expected, 2)
