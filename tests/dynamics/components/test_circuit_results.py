"""Circuits in a result: names, coordinates, tables, figures, files; and runs that have none."""

import io
import json

import numpy as np
import pytest
import xarray as xr
from rich.console import Console
from safetensors.numpy import save_file

import dynamics as dy
from dynamics.cli.tables import summary_table
from dynamics.components import COMPONENTS
from dynamics.errors import DynamicsError, MissingError
from dynamics.runs.fused import split_fused
from dynamics.schema import COMPONENTS as MEANINGS
from dynamics.schema import Status

CIRCUITS = ["ov_circuit", "qk_circuit", "pico_ov_circuit"]


@pytest.fixture(scope="module")
def analysis(llama_checkpoints):
    components = ["parameters", "ov_circuit", "qk_circuit"]
    return dy.analyze(llama_checkpoints, components=components)


def test_every_component_has_a_meaning():
    assert list(COMPONENTS) == list(MEANINGS)


def test_names_and_coordinates_say_layer_and_head(analysis):
    row = analysis.sel(matrix="model.layers.1.self_attn.ov_circuit.3")
    found = {name: row[name].item() for name in ("component", "layer", "module", "head", "rows")}
    assert found == {
        "component": "ov_circuit", "layer": 1, "module": "ov_circuit", "head": 3, "rows": 16,
    }  # fmt: skip
    assert analysis["head"].dtype == np.int64
    assert (analysis["head"][analysis["component"] == "parameters"] == -1).all()
    for component in ("ov_circuit", "qk_circuit"):
        of = analysis.sel(matrix=analysis["component"] == component)
        pairs = list(zip(of["layer"].values.tolist(), of["head"].values.tolist(), strict=True))
        assert pairs == [(layer, head) for layer in range(2) for head in range(4)]


def test_by_default_parameters_only_are_measured(llama_checkpoints):
    found = dy.analyze(llama_checkpoints, metrics=["stable_rank"], kinds=["weight"])
    assert set(found["component"].values.tolist()) == {"parameters"}


def test_a_component_asked_for_twice_is_measured_once(llama_checkpoints):
    found = dy.analyze(llama_checkpoints, components=["ov_circuit"] * 2, steps=[2],
                       kinds=["weight"])  # fmt: skip
    assert found.sizes["matrix"] == 8


def test_globs_select_circuits(llama_checkpoints):
    options = {"components": ["ov_circuit", "qk_circuit"], "steps": [2], "kinds": ["weight"]}
    found = dy.analyze(llama_checkpoints, select="*.1.*.ov_circuit.*", **options)
    assert set(found["module"].values.tolist()) == {"ov_circuit"}
    assert found["head"].values.tolist() == [0, 1, 2, 3]
    with pytest.raises(MissingError, match=r"matches 'x'; it has .*ov_circuit\.0"):
        dy.analyze(llama_checkpoints, select="x", **options)


@pytest.mark.slow
def test_tables_and_figures_group_by_module(analysis):
    import matplotlib.pyplot as plt

    text = io.StringIO()
    Console(file=text, width=120).print(summary_table(analysis))
    assert text.getvalue().count("ov_circuit") == 3  # weight, update and displacement
    ax = dy.plot_trajectory(analysis, "effective_rank", by="module")
    assert {"ov_circuit", "qk_circuit"} <= {text.get_text() for text in ax.texts}
    dy.plot_trajectory(analysis, "effective_rank", by="layer")
    dy.plot_heatmap(analysis, "effective_rank", module="ov_circuit")
    dy.plot_spectrum(analysis, "model.layers.0.self_attn.qk_circuit.2")
    plt.close("all")


@pytest.mark.slow
def test_the_head_survives_saving_comparing_and_subtracting(analysis, tmp_path):
    loaded = dy.load(dy.save(analysis, tmp_path / "a.zarr"))
    xr.testing.assert_identical(loaded, analysis)
    fewer = analysis.sel(matrix=analysis["head"] != 2)
    both = dy.compare({"all": analysis, "fewer": fewer})
    np.testing.assert_array_equal(both["head"].sel(matrix=analysis["matrix"]), analysis["head"])
    loaded = dy.load(dy.save(both, tmp_path / "both.zarr"))
    np.testing.assert_array_equal(loaded["head"], both["head"])
    less = dy.difference(both, baseline="all")
    np.testing.assert_array_equal(less["head"], both["head"])


@pytest.mark.slow
def test_a_result_saved_before_there_were_heads_still_compares(analysis, tmp_path):
    old = analysis.sel(matrix=analysis["component"] == "parameters").drop_vars("head")
    loaded = dy.load(dy.save(old, tmp_path / "old.zarr"))
    assert (loaded["head"] == -1).all()
    both = dy.compare({"old": loaded, "new": analysis})
    assert both["head"].max() == 3


# Runs without circuits --------------------------------------------------------------------------


@pytest.mark.parametrize("component", CIRCUITS)
@pytest.mark.parametrize("name", ["GPT2Config", "GPTNeoXConfig"])
def test_fused_projections_are_split_or_refused_with_the_reason(name, component, tmp_path):
    transformers, torch = pytest.importorskip("transformers"), pytest.importorskip("torch")
    torch.manual_seed(0)
    config = getattr(transformers, name)(
        vocab_size=16, hidden_size=8, num_hidden_layers=1, num_attention_heads=2,
        intermediate_size=8, pad_token_id=0, bos_token_id=0, eos_token_id=0,
    )  # fmt: skip
    transformers.AutoModelForCausalLM.from_config(config).save_pretrained(tmp_path / "run")
    measured = dy.analyze(split_fused(dy.open_run(tmp_path / "run")), components=[component])
    assert measured.sizes["matrix"] == (1 if component == "pico_ov_circuit" else 2)
    assert (measured["status"].sel(kind="weight") == Status.MEASURED).all()
    (tmp_path / "run/config.json").write_text(
        json.dumps(config.to_dict() | {"model_type": "our_own"})
    )
    run = split_fused(dy.open_run(tmp_path / "run"))
    reason = r"fuses query, key and value in one matrix .* type 'our_own' is not known"
    with pytest.raises(MissingError, match=reason):
        dy.analyze(run, components=[component])
    assert dy.analyze(run, kinds=["weight"]).sizes["matrix"] > 3


@pytest.mark.parametrize("component", CIRCUITS)
def test_a_run_without_the_projections_says_which(component, write_recording, tmp_path):
    run = write_recording(tmp_path / "run.zarr")  # has q_proj only
    wanted = {
        "ov_circuit": "o_proj and v_proj",
        "qk_circuit": "q_proj and k_proj",
        "pico_ov_circuit": "v_proj and o_proj",
    }[component]
    with pytest.raises(MissingError, match=f"has {wanted} side by side"):
        dy.analyze(run, components=[component])
    dy.analyze(run)


def test_a_run_without_config_says_what_to_do(write_run, random_attention):
    _, tensors = random_attention(2, 2, 2, 4)
    run = write_run(None, {1: tensors})
    with pytest.raises(MissingError, match=r"no model config.*config\.json"):
        dy.analyze(run, components=["ov_circuit"])
    dy.analyze(run)


def test_a_config_of_another_model_is_refused(write_run, random_attention):
    config, tensors = random_attention(4, 2, 2, 8)
    run = write_run(config | {"num_key_value_heads": 4}, {1: tensors})
    with pytest.raises(DynamicsError, match=r"v_proj.weight in shape \(4, 8\), but .* \(8, 8\)"):
        dy.analyze(run, components=["ov_circuit"])


def test_adapters_without_their_base_have_no_circuits(tmp_path):
    directory = tmp_path / "run/checkpoint-1"
    directory.mkdir(parents=True)
    config = {"peft_type": "LORA", "lora_alpha": 4, "r": 2, "base_model_name_or_path": "org/x"}
    (directory / "adapter_config.json").write_text(json.dumps(config))
    prefix = "base_model.model.model.layers.0.self_attn"
    factors = {
        f"{prefix}.{module}.lora_{factor}.weight": np.ones(shape, np.float32)
        for module in ("v_proj", "o_proj")
        for factor, shape in {"A": (2, 8), "B": (8, 2)}.items()
    }
    save_file(factors, directory / "adapter_model.safetensors")
    with pytest.raises(MissingError, match="holds no weights; circuits are made of them"):
        dy.analyze(tmp_path / "run", components=["ov_circuit"], kinds=["adapter"])
