"""A router with an adapter has one name and one value in a recording and in files of PEFT."""

import numpy as np
import peft
import pytest
import torch
import transformers

import dynamics as dy
from dynamics.formats.shared.adapters.stored import counterpart
from probes import Recorder
from tests.probes.test_families import DEEPSEEK, SIZES, TOKENS

FAMILIES = {
    "Mixtral": ("mlp.gate", "block_sparse_moe.gate"),
    "Phimoe": ("mlp.router", "block_sparse_moe.gate"),
    "MiniMaxM2": ("mlp.gate", "block_sparse_moe.gate"),
    "Qwen3Moe": ("mlp.gate", "mlp.gate"),
    "DeepseekV3": ("mlp.gate", "mlp.gate"),
    "GptOss": ("mlp.router", "mlp.router"),
    "GraniteMoe": ("block_sparse_moe.router", "block_sparse_moe.router.layer"),
    "Jamba": ("feed_forward.router", "feed_forward.router"),
}
MORE = {
    "DeepseekV3": {**DEEPSEEK, "num_key_value_heads": 4},
    "Jamba": {
        "attn_layer_period": 1, "attn_layer_offset": 0, "expert_layer_period": 1,
        "expert_layer_offset": 0, "use_mamba_kernels": False,
    },
}  # fmt: skip


def tiny(family):
    torch.manual_seed(0)
    made = getattr(transformers, f"{family}ForCausalLM")
    return made(made.config_class(**SIZES | MORE.get(family, {})))


def on_router(model, live):
    """LoRA on the router, and on a projection whose name is the same everywhere."""
    module = model.get_submodule(f"model.layers.0.{live}")
    modules, parameters = ["q_a_proj", "q_proj"], []
    if type(module) is torch.nn.Linear:
        modules.append(live.rpartition(".")[2])
    else:
        parameters.append(f"{live}.weight")
    config = peft.LoraConfig(
        r=2, lora_alpha=5, target_modules=modules, target_parameters=parameters or None
    )
    return peft.get_peft_model(model, config)


def trained(family, directory):
    live, _ = FAMILIES[family]
    tiny(family).save_pretrained(directory / "run/base")
    model = on_router(tiny(family), live)
    for part, parameter in model.named_parameters():
        if ".lora_B." in part:
            torch.nn.init.normal_(parameter)
    optimizer = torch.optim.SGD([each for each in model.parameters() if each.requires_grad], lr=0.5)
    recorder = Recorder(model, optimizer, directory / "run.zarr", every=1).attach()
    for _ in range(2):
        model(**TOKENS).loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    recorder.close()
    model.save_pretrained(directory / "run/checkpoint-2")
    return model


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("base", ["saved", "config only", "whole state"])
def test_the_router_of_a_recording_is_that_of_the_files(family, base, tmp_path):
    model = trained(family, tmp_path)
    _, saved = FAMILIES[family]
    name = f"model.layers.0.{saved}.weight"
    recorded = dy.open_run(tmp_path / "run.zarr", split_fused=False)
    assert name in recorded.matrices
    if base == "config only":
        (tmp_path / "run/base/model.safetensors").unlink()
        config = (tmp_path / "run/base/config.json").read_text()
        (tmp_path / "run/checkpoint-2/config.json").write_text(config)
    path = tmp_path / "run"
    if base == "whole state":
        path = tmp_path / "whole"
        path.mkdir()
        torch.save(model.state_dict(), path / "step_2.pt")
        for file in ("base/config.json", "checkpoint-2/adapter_config.json"):
            (path / file.rpartition("/")[2]).write_text((tmp_path / "run" / file).read_text())
    run = dy.open_run(path, split_fused=False)
    assert dict(run.problems) == {}
    kinds = ("adapter",) if base == "config only" else ("weight", "base", "adapter")
    assert run.kinds[: len(kinds)] == kinds
    for kind in kinds:
        one, other = (each.read(name, 2, kind) for each in (run, recorded))
        if kind == "adapter":
            one, other = one.product(), other.product()
            assert np.abs(one).max() > 0
        else:
            one, other = one.values, other.values
        np.testing.assert_allclose(one, other, atol=1e-6)
    if base != "config only":
        assert set(run.matrices) == set(recorded.matrices)


@pytest.mark.parametrize(
    ("name", "names", "found"),
    [
        ("model.layers.0.mlp.gate.weight", ["model.layers.0.moe.gate.weight"], 0),
        ("model.layers.1.mlp.gate.weight", ["model.layers.0.moe.gate.weight"], None),
        ("lm_head.weight", ["embed_out.weight", "gpt_neox.embed_in.weight"], 0),
        ("lm_head.weight", ["embed_out.weight", "proj_out.weight"], None),
        # the rows of other projections may lie in another order
        ("model.layers.0.self_attn.q_proj.weight", ["layers.0.attention.wq.weight"], None),
    ],
)
def test_only_what_is_stored_alike_has_a_counterpart(name, names, found):
    assert counterpart(name, names, {}) == (None if found is None else names[found])
