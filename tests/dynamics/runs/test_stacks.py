"""Tensors of three and more dimensions are the matrices that their models compute with."""

import numpy as np
import pytest
import torch
import transformers
from safetensors.torch import load_file

from dynamics.runs.parameter_names import expert_of, module_of
from dynamics.runs.stacks import parts_of

HIDDEN, EXPERTS = 16, 4
SIZES = {
    "vocab_size": 40, "hidden_size": HIDDEN, "intermediate_size": 24, "num_hidden_layers": 1,
    "num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 4, "pad_token_id": 0,
    "moe_intermediate_size": 12, "num_experts_per_tok": 2, "num_local_experts": EXPERTS,
    "num_experts": EXPERTS, "n_routed_experts": EXPERTS, "tie_word_embeddings": False,
}  # fmt: skip
FAMILIES = {
    "Mixtral": {},
    "Phimoe": {},
    "MiniMax": {"layer_types": ["full_attention"]},
    "MiniMaxM2": {},
    "Qwen2Moe": {"shared_expert_intermediate_size": 20},
    "Qwen3Moe": {},
    "Olmoe": {},
    "DeepseekV3": {
        "q_lora_rank": 8, "kv_lora_rank": 8, "qk_rope_head_dim": 4, "qk_nope_head_dim": 4,
        "v_head_dim": 4, "first_k_dense_replace": 0, "n_group": 1, "topk_group": 1,
    },
    "Lfm2Moe": {"layer_types": ["full_attention"], "num_dense_layers": 0},
    "Jamba": {
        "attn_layer_period": 1, "attn_layer_offset": 0, "expert_layer_period": 1,
        "expert_layer_offset": 0, "use_mamba_kernels": False,
    },
    "GraniteMoe": {},
    "GptOss": {},
    "Llama4": {},
}  # fmt: skip
# Families whose files hold the experts of a layer as one tensor.
WHOLE = ("GraniteMoe", "GptOss", "Llama4")


def tiny(family):
    made = getattr(transformers, f"{family}ForCausalLM")
    config = transformers.Llama4TextConfig if family == "Llama4" else made.config_class
    torch.manual_seed(0)
    model = made(config(**SIZES | FAMILIES[family]))
    for parameter in model.parameters():  # some families begin with zeros, or with uninitialised
        torch.nn.init.normal_(parameter)
    return model


def matrices_in(named, config):
    """Name -> matrix, of every part of the tensors that live inside of experts."""
    found = {}
    for name, tensor in named:
        parts = parts_of(name, tuple(tensor.shape), config)
        if not isinstance(parts, str):
            found |= {part.name: part.of(tensor.detach()) for part in parts}
    return {name: each for name, each in found.items() if expert_of(name) is not None}


@pytest.mark.parametrize("family", FAMILIES)
def test_experts_of_a_live_model_are_those_of_its_files(family, tmp_path):
    model = tiny(family)
    config = model.config.to_dict()
    model.save_pretrained(tmp_path)
    live = matrices_in(model.named_parameters(), config)
    stored = matrices_in(load_file(tmp_path / "model.safetensors").items(), config)
    assert set(live) == set(stored)
    assert all(torch.equal(live[name], stored[name]) for name in live)
    assert len(live) == 3 * EXPERTS
    assert {expert_of(name) for name in live} == set(range(EXPERTS))
    modules = {f"experts.{name}" for name in ("gate_proj", "up_proj", "down_proj")}
    assert {module_of(name) for name in live} == modules
    if family not in WHOLE:
        assert all(name in load_file(tmp_path / "model.safetensors") for name in live)


@pytest.mark.parametrize("family", FAMILIES)
def test_gate_and_up_are_what_an_expert_computes_with(family):
    # One token through the first expert alone: down · (act(gate · x) ∘ (up · x)).
    model = tiny(family)
    (experts,) = (m for m in model.modules() if type(m).__name__.endswith("Experts"))
    config = model.config.to_dict()
    named = [(f"experts.{name}", each) for name, each in experts.named_parameters()]
    parts = {
        module_of(name).removeprefix("experts."): each.double()
        for name, each in matrices_in(named, config).items()
        if expert_of(name) == 0
    }
    x = torch.randn(1, HIDDEN)
    in_out = parts["gate_proj"].shape[0] == HIDDEN
    gate, up, down = (parts[name] if in_out else parts[name].T
                      for name in ("gate_proj", "up_proj", "down_proj"))  # fmt: skip
    before, through = x.double() @ gate, x.double() @ up
    if family == "GptOss":
        for parameter in (experts.gate_up_proj_bias, experts.down_proj_bias):
            torch.nn.init.zeros_(parameter)
        before, through = before.clamp(max=7.0), through.clamp(-7.0, 7.0)
        expected = (before * torch.sigmoid(1.702 * before) * (through + 1)) @ down
    else:
        expected = (torch.nn.functional.silu(before) * through) @ down
    with torch.no_grad():
        if family == "Llama4":
            got = experts(torch.cat([x] + [torch.zeros_like(x)] * (EXPERTS - 1)))[:1]
        else:
            got = experts(x, torch.tensor([[0]]), torch.ones(1, 1))
    torch.testing.assert_close(got.double(), expected, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize(
    ("name", "shape", "family", "names"),
    [
        # no config, or one that contradicts the shape: gate and up stay together
        ("mlp.experts.gate_up_proj", (1, 8, 4), "", ["mlp.experts.0.gate_up_proj.weight"]),
        ("mlp.experts.gate_up_proj", (1, 8, 5), "qwen3_moe", ["mlp.experts.0.gate_up_proj.weight"]),
        # models of users
        ("blocks.0.moe.w1", (1, 8, 4), "", ["blocks.0.moe.experts.0.w1.weight"]),
        ("experts.mlp.fc.weight", (1, 8, 4), "", ["experts.0.mlp.fc.weight"]),
        ("mlp.shared_experts.up_proj", (1, 8, 4), "", ["mlp.shared_experts.0.up_proj.weight"]),
    ],
)
def test_what_is_not_known_stays_whole_and_named(name, shape, family, names):
    config = {"model_type": family, "hidden_size": 4} if family else {}
    assert [part.name for part in parts_of(name, shape, config)] == names


@pytest.mark.parametrize(
    ("name", "shape", "convolution", "expected"),
    [
        ("conv.weight", (8, 3, 2, 2), True, (8, 12)),
        ("patchify.weight", (8, 3, 2, 2), None, (8, 12)),
        ("mixer.conv1d.weight", (8, 1, 4), None, (8, 4)),
        ("stem.weight", (8, 3, 5), True, (8, 15)),
        ("cls_token", (1, 1, 8), None, "vectors (norms, biases)"),
        ("norm.bias", (8,), None, "vectors (norms, biases)"),
        ("scale", (), None, "vectors (norms, biases)"),
        ("w", (0, 4), None, "empty tensors"),
        ("experts.down_proj_bias", (4, 8), None, "vectors of experts or states (biases, A_log)"),
        ("mixer.A_log", (8, 4), None, "vectors of experts or states (biases, A_log)"),
        ("heads", (4, 8, 2), None,
         "tensors of 3 dimensions that are neither experts nor convolutions"),
        ("score.weight", (1, 8), None, (1, 8)),
        ("position_embeddings", (1, 5, 8), None, (5, 8)),
    ],
)  # fmt: skip
def test_other_tensors(name, shape, convolution, expected):
    parts = parts_of(name, shape, convolution=convolution)
    if isinstance(expected, str):
        assert parts == expected
        return
    (part,) = parts
    assert (part.rows, part.cols) == expected
    values = np.arange(np.prod(shape), dtype=float).reshape(shape)
    assert np.array_equal(part.of(values), values.reshape(expected))
    assert np.array_equal(part.of(torch.from_numpy(values)).numpy(), values.reshape(expected))
