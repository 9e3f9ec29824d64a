"""What is said of the costs of histories on the hub is what is fetched, whatever measures them."""

import json
import time

import pytest

import dynamics as dy

torch = pytest.importorskip("torch")
safetensors = pytest.importorskip("safetensors.torch")

pytestmark = pytest.mark.slow
STEPS = (0, 100, 200)
WIDTH, HEADS = 192, 4
ONE = 4 * WIDTH**2  # bytes


@pytest.fixture
def models(hub, tmp_path):
    """Two histories of one attention: org/a and org/b."""
    config = {"model_type": "llama", "hidden_size": WIDTH, "num_attention_heads": HEADS}
    for number, name in enumerate(("org/a", "org/b")):
        for step in STEPS:
            torch.manual_seed(step + number)
            tensors = {
                f"model.layers.0.self_attn.{each}_proj.weight": torch.randn(WIDTH, WIDTH)
                for each in "qkvo"
            }
            folder = tmp_path / name / f"step{step}"
            folder.mkdir(parents=True)
            safetensors.save_file(tensors, folder / "model.safetensors")
            (folder / "config.json").write_text(json.dumps(config))
            hub.repo(name).push(folder, f"step{step}")
    return hub


def agreed(hub):
    """(what was agreed to, how many bytes had been fetched by then)."""
    costs = []

    def agree(cost):
        if not costs:
            hub.clear()
        costs.append((cost, hub.fetched))

    return costs, agree


@pytest.mark.parametrize("component", ["ov_circuit", "qk_circuit", "pico_ov_circuit"])
@pytest.mark.parametrize("kind", ["weight", "update", "displacement"])
def test_circuits_are_counted(models, component, kind):
    costs, agree = agreed(models)
    choice = {"components": [component], "kinds": [kind], "metrics": ["stable_rank"]}
    found = dy.analyze("hf://org/a", agree=agree, **choice)
    ((cost, before),) = costs
    if (component, kind) in {("pico_ov_circuit", "update"), ("pico_ov_circuit", "displacement")}:
        assert (cost.bytes, models.fetched) == (0, 0)  # it has no differences
        return
    assert before == 0
    assert cost.bytes == models.fetched
    assert cost.requests == len(models.asked("blob", "cdn"))
    assert 2 * len(STEPS) * ONE - len(STEPS) * 2**16 <= cost.bytes <= 1.1 * 2 * len(STEPS) * ONE
    local = dy.analyze("hf://org/a", **choice)
    assert local["stable_rank"].notnull().sum() == found["stable_rank"].notnull().sum() > 0


def test_a_comparison_tells_the_costs_of_all_runs_before_it_fetches(models, tmp_path):
    costs, agree = agreed(models)
    choice = {"kinds": ["weight"], "select": "*o_proj", "cache": tmp_path / "ranks.cache"}
    runs = {name: f"hf://org/{name}" for name in "ab"}
    dy.compare(runs, agree=agree, **choice)
    assert [cost.path for cost, _ in costs] == ["hf://org/a", "hf://org/b"]
    assert [before for _, before in costs] == [0, 0]
    assert sum(cost.bytes for cost, _ in costs) == models.fetched > 0
    costs, agree = agreed(models)
    dy.compare(runs, agree=agree, **choice)
    assert [cost.bytes for cost, _ in costs] == [0, 0]
    assert models.fetched == 0


def test_a_report_fetches_what_is_measured_and_audits_by_hashes(models, tmp_path, monkeypatch):
    from typer.testing import CliRunner

    from dynamics.cli import output
    from dynamics.cli.app import app

    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(output, "_MUCH", 1)
    runs = {name: dy.open_run(f"hf://org/{name}") for name in "ab"}
    models.clear()
    dy.report(runs, "python.html", select="*o_proj", kinds=["weight"])
    fetched = models.fetched
    assert 0 < fetched <= 2 * len(STEPS) * ONE
    words = ["--select=*o_proj", "--kinds=weight", "--no-cache", "--yes"]
    said = CliRunner().invoke(app, ["report", "a=hf://org/a", "b=hf://org/b", *words])
    assert said.exit_code == 0, said.output
    assert said.output.count("3 revisions") == 2
    assert "distinct_checkpoints" in (tmp_path / "report.html").read_text("utf-8")
    said = CliRunner().invoke(app, ["compare", "a=hf://org/a", "b=hf://org/b", *words])
    assert said.exit_code == 0, said.output
    assert said.output.count("3 revisions") == 2


def test_folders_are_opened_at_once(hub, tmp_path):
    for step in range(16):
        tensors = {"model.layers.0.self_attn.o_proj.weight": torch.full((64, 64), float(step))}
        folder = tmp_path / f"local/step_{step}"
        folder.mkdir(parents=True)
        safetensors.save_file(tensors, folder / "model.safetensors")
    hub.repo("org/folders").push(tmp_path / "local", inside="checkpoints/")
    hub.latency, began = 0.25, time.monotonic()
    run = dy.open_run("hf://org/folders")
    assert len(run.steps) == 16
    assert time.monotonic() - began < 16 * 0.25  # one after the other, it is twice that
