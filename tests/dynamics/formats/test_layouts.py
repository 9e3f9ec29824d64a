"""Steps × a checkpoint: any directory whose entries carry a step and are each a checkpoint."""

import json
import os
import sys

import numpy as np
import pytest
import torch
import torch.distributed.checkpoint as dcp
from safetensors.torch import save_file

import dynamics as dy
from tests.dynamics.formats.checking import assert_bits, assert_problem, assert_refused

NAMES = ("model.layers.0.self_attn.q_proj.weight", "model.layers.0.mlp.up_proj.weight")


def weights(seed):
    generator = torch.Generator().manual_seed(seed)
    return {name: torch.randn(6, 4, generator=generator) for name in NAMES}


def adapter(folder, seed):
    generator = torch.Generator().manual_seed(seed)
    config = {"peft_type": "LORA", "lora_alpha": 4, "r": 2, "base_model_name_or_path": None}
    (folder / "adapter_config.json").write_text(json.dumps(config))
    module = "base_model.model.model.layers.0.mlp.up_proj"
    factors = {
        f"{module}.lora_A.weight": torch.randn(2, 4, generator=generator),
        f"{module}.lora_B.weight": torch.randn(6, 2, generator=generator),
    }
    save_file(factors, folder / "adapter_model.safetensors")


def deepspeed(folder, seed):
    """Stage 0 with one rank; keys as deepspeed/runtime/engine.py saves them."""
    states = {"module": weights(seed), "global_steps": seed, "optimizer": {}}
    torch.save(states, folder / "mp_rank_00_model_states.pt")


def olmo(folder, seed):
    """An unsharded checkpoint of OLMo: olmo/checkpoint.py, FullCheckpointer."""
    torch.save(weights(seed), folder / "model.pt")
    torch.save({"state": {}, "param_groups": []}, folder / "optim.pt")
    torch.save({"global_step": seed, "epoch": 0}, folder / "train.pt")
    (folder / "config.yaml").write_text("model:\n  d_model: 4\n")


def litgpt(folder, seed):
    """litgpt/pretrain.py: fabric.save of its state, which counts micro-batches as iter_num."""
    state = {"model": weights(seed), "iter_num": 8 * seed, "step_count": seed, "hparams": {}}
    torch.save(state, folder / "lit_model.pth")
    (folder / "model_config.yaml").write_text("n_layer: 1\n")


def megatron(folder, seed):
    """The legacy form of one rank: megatron/training/checkpointing.py."""
    (folder / "mp_rank_00").mkdir()
    state = {"model": weights(seed), "iteration": seed, "rng_state": [torch.get_rng_state()]}
    torch.save({**state, "checkpoint_version": 3.0}, folder / "mp_rank_00/model_optim_rng.pt")


def torchtune(folder, seed):
    """FullModelHFCheckpointer of torchtune: shards with an index, and the recipe's state."""
    shard = "ft-model-00001-of-00001.safetensors"
    save_file(weights(seed), folder / shard)
    index = {"weight_map": dict.fromkeys(weights(seed), shard)}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    torch.save({"seed": 1}, folder / "recipe_state.pt")


def safetensors(folder, seed):
    save_file(weights(seed), folder / "model.safetensors")


def pickled(folder, seed):
    torch.save(weights(seed), folder / "pytorch_model.bin")


def distributed(folder, seed):
    dcp.save({"model": weights(seed)}, checkpoint_id=folder, no_dist=True)


# kind -> (its writer into a directory, the format that results name)
KINDS = {
    "safetensors": (safetensors, "checkpoints"),
    "pickled": (pickled, "checkpoints"),
    "peft": (adapter, "peft"),
    "dcp": (distributed, "dcp"),
    "deepspeed": (deepspeed, "deepspeed"),
    "olmo": (olmo, "files"),
    "litgpt": (litgpt, "files"),
    "megatron": (megatron, "files"),
    "torchtune": (torchtune, "checkpoints"),
}
# How trainers name what they save -> the steps of two of them.
NAMINGS = {
    "checkpoint-{}": (20, 100), "step_{}": (20, 100), "step{}": (1000, 2000),
    "step_{:06}": (20, 100),
    "step-{:08}": (20, 100), "global_step_{}": (20, 100), "ckpt-{}": (20, 100), "{}": (20, 100),
    "iter_{:07}": (20, 100), "epoch_{}": (0, 1), "step{}-unsharded": (20, 100),
    "epoch=0-step={}": (20, 100), "model_{}": (20, 100), "stage1-step{}-tokens3B": (20, 100),
    "checkpoints/step_{}": (20, 100), "ckpts/{}": (20, 100), "step_{}/hf": (20, 100),
    "checkpoint/checkpoint-{}/model": (20, 100),
}  # fmt: skip


def write(run, naming, kind="safetensors", steps=None):
    """A run of two checkpoints; their steps."""
    steps = NAMINGS[naming] if steps is None else steps
    for step in steps:
        folder = run / naming.format(step)
        folder.mkdir(parents=True)
        KINDS[kind][0](folder, step)
    return list(steps)


def read_step(run, step):
    return {name: run.read(name, step, "weight").values for name in run.matrices}


@pytest.mark.filterwarnings("ignore:torch.distributed is disabled")
@pytest.mark.parametrize("naming", NAMINGS)
@pytest.mark.parametrize("kind", KINDS)
def test_every_kind_of_checkpoint_is_read_under_every_naming(tmp_path, kind, naming):
    steps = write(tmp_path / "run", naming, kind)
    (tmp_path / "run/logs").mkdir()
    (tmp_path / "run/config.yaml").write_text("lr: 1\n")
    run = dy.open_run(tmp_path / "run")
    assert (run.format, run.steps.tolist()) == (KINDS[kind][1], steps)
    assert (dict(run.problems), dict(run.passed_over)) == ({}, {})
    if kind != "peft":
        for step in steps:
            assert_bits(run, step, weights(step))


def test_suffixes_of_thousands_and_numbers_of_other_things(tmp_path):
    for name, seed in (("step500", 1), ("step10k", 2), ("step1.5M", 3)):
        (tmp_path / name).mkdir()
        save_file(weights(seed), tmp_path / name / "model.safetensors")
    run = dy.open_run(tmp_path)
    assert run.steps.tolist() == [500, 10_000, 1_500_000]
    assert_bits(run, 1_500_000, weights(3))


def test_accelerates_own_states_are_read(tmp_path):
    accelerate = pytest.importorskip("accelerate")
    model = torch.nn.Sequential(torch.nn.Linear(4, 6), torch.nn.Linear(6, 4))
    run = accelerate.Accelerator(
        cpu=True,
        project_config=accelerate.utils.ProjectConfiguration(
            project_dir=str(tmp_path), automatic_checkpoint_naming=True
        ),
    )
    prepared, _ = run.prepare(model, torch.optim.AdamW(model.parameters()))
    saved = []
    for _ in range(2):
        with torch.no_grad():
            prepared[0].weight.add_(1)
        run.save_state()
        saved.append(prepared[0].weight.detach().clone())
    opened = dy.open_run(tmp_path)
    assert (opened.format, opened.steps.tolist()) == ("checkpoints", [0, 1])
    for step, weight in enumerate(saved):
        np.testing.assert_array_equal(opened.read("0.weight", step, "weight").values, weight)


def test_nanochats_files_are_read(tmp_path):
    """nanochat/checkpoint_manager.py: model_N.pt of a compiled model, meta_N.json, optim_N.pt."""
    for step in (100, 200):
        state = {f"_orig_mod.{name}": each for name, each in weights(step).items()}
        torch.save(state, tmp_path / f"model_{step:06}.pt")
        torch.save({"state": torch.ones(3, 3)}, tmp_path / f"optim_{step:06}_rank0.pt")
        (tmp_path / f"meta_{step:06}.json").write_text(json.dumps({"step": step}))
    run = dy.open_run(tmp_path)
    assert (run.format, run.steps.tolist(), dict(run.passed_over)) == ("files", [100, 200], {})
    assert_bits(run, 200, weights(200))


def test_steps_may_lie_in_directories_of_epochs(tmp_path):
    for epoch, step in ((0, 10), (0, 20), (1, 30)):
        folder = tmp_path / f"epoch_{epoch}/step_{step}"
        folder.mkdir(parents=True)
        safetensors(folder, step)
    run = dy.open_run(tmp_path)
    assert run.steps.tolist() == [10, 20, 30]
    assert_bits(run, 30, weights(30))


# What lies beside the checkpoints ---------------------------------------------------------------


def test_what_is_no_step_is_passed_over_by_name(tmp_path):
    steps = write(tmp_path, "step_{}")
    beside = ["final", "checkpoint-best", "v2", "llama-7b", "rank0", "2026-01-01", "eval_100",
              "epoch_1", "ema_step_20", "checkpoint-99999999999999999999"]  # fmt: skip
    for name in beside:
        (tmp_path / name).mkdir()
        save_file(weights(1), tmp_path / name / "model.safetensors")
    (tmp_path / "logs").mkdir()
    run = dy.open_run(tmp_path)
    assert run.steps.tolist() == steps
    assert set(run.passed_over) == set(beside)
    assert_bits(run, 20, weights(20))


def test_steps_count_where_epochs_lie_beside_them(tmp_path):
    write(tmp_path, "epoch_{}")
    steps = write(tmp_path, "step_{}", steps=(5, 10))
    run = dy.open_run(tmp_path)
    assert run.steps.tolist() == steps
    assert set(run.passed_over) == {"epoch_0", "epoch_1"}


@pytest.mark.parametrize("name", ["checkpoint-last", "best", "final", "latest", "current-model"])
def test_a_last_checkpoint_is_at_the_step_that_its_files_tell(tmp_path, name):
    steps = write(tmp_path, "checkpoint-{}")
    (tmp_path / name).mkdir()
    save_file(weights(7), tmp_path / name / "model.safetensors")
    state = tmp_path / name / "trainer_state.json"
    state.write_text(json.dumps({"global_step": 300}))
    run = dy.open_run(tmp_path)
    assert run.steps.tolist() == [*steps, 300]
    assert_bits(run, 300, weights(7))
    for content in ('{"global_step": 100}', "{damaged", '{"global_step": 1e9}'):
        state.write_text(content)
        run = dy.open_run(tmp_path)
        assert (run.steps.tolist(), list(run.passed_over)) == (steps, [name])
        assert_bits(run, 100, weights(100))


@pytest.mark.parametrize("kind", ["olmo", "litgpt", "megatron"])
def test_the_last_one_of_other_trainers_tells_its_step_too(tmp_path, kind):
    steps = write(tmp_path, "step-{:08}", kind)
    (tmp_path / "final").mkdir()
    KINDS[kind][0](tmp_path / "final", 300)
    run = dy.open_run(tmp_path)
    assert run.steps.tolist() == [*steps, 300]
    assert dy.open_run(tmp_path / "final").steps.tolist() == [300]


def test_best_and_last_alone_are_a_run_of_the_steps_that_they_tell(tmp_path):
    for name, step in (("best", 20), ("last", 40)):
        (tmp_path / name).mkdir()
        save_file(weights(step), tmp_path / name / "model.safetensors")
        (tmp_path / name / "trainer_state.json").write_text(json.dumps({"global_step": step}))
    run = dy.open_run(tmp_path)
    assert run.steps.tolist() == [20, 40]
    assert_bits(run, 40, weights(40))


def test_links_are_not_read_twice_and_dangling_ones_are_named(tmp_path):
    steps = write(tmp_path, "checkpoint-{}")
    (tmp_path / "latest").symlink_to("checkpoint-100")
    (tmp_path / "last").symlink_to("checkpoint-500")
    run = dy.open_run(tmp_path)
    assert (run.steps.tolist(), dict(run.problems)) == (steps, {})
    assert "a link to checkpoint-100" in run.passed_over["latest"]
    assert "leads nowhere" in run.passed_over["last"]
    (tmp_path / "checkpoint-300").symlink_to("checkpoint-500")
    assert_problem(dy.open_run(tmp_path), 300, "checkpoint-300")


@pytest.mark.parametrize("other", ["critic", "reference"])
def test_two_readings_that_fit_equally_are_shown(tmp_path, other):
    for step in (20, 100):
        for part in ("actor", other):
            (tmp_path / f"run/step_{step}/{part}").mkdir(parents=True)
            save_file(weights(step), tmp_path / f"run/step_{step}/{part}/model.safetensors")
    assert_refused(tmp_path / "run", rf"step_\d+/actor, \.\.\., or as step_\d+/{other}")
    write(tmp_path / "two", "actor_{}", steps=(20, 100))
    write(tmp_path / "two", "critic_{}", steps=(20, 100))
    assert_refused(tmp_path / "two", "actor_100, actor_20, or as critic_100, critic_20")
    write(tmp_path / "places", "step_{}", steps=(20, 100))
    write(tmp_path / "places", "checkpoints/step_{}", steps=(20, 100))
    assert_refused(tmp_path / "places", "step_100, step_20, or as checkpoints/step_100")


def test_a_model_spread_over_ranks_is_refused_by_name(tmp_path):
    for step in (1, 2):
        folder = tmp_path / f"iter_{step:07}"
        (folder / "mp_rank_01").mkdir(parents=True)
        megatron(folder, step)
        torch.save({}, folder / "mp_rank_01/model_optim_rng.pt")
    assert_refused(tmp_path, "spread over 2 ranks")


# Damages ----------------------------------------------------------------------------------------


def test_a_directory_that_may_not_be_read_is_a_problem_of_its_step(tmp_path, monkeypatch):
    write(tmp_path, "step_{}", steps=(20, 100, 200))
    scandir, stat = os.scandir, os.stat
    closed = str(tmp_path / "step_100")

    def refusing(function):
        def call(path=".", *args, **kwargs):
            if str(path).startswith(f"{closed}/") or (str(path) == closed and function is scandir):
                raise PermissionError(13, "Permission denied", str(path))
            return function(path, *args, **kwargs)

        return call

    monkeypatch.setattr(os, "scandir", refusing(scandir))  # root may read everything
    monkeypatch.setattr(os, "stat", refusing(stat))
    run = dy.open_run(tmp_path)
    assert run.steps.tolist() == [20, 100, 200]
    assert_problem(run, 100, "step_100.*Permission denied")
    assert_bits(run, 200, weights(200))


def test_a_damaged_state_of_the_run_does_not_hide_the_checkpoints(tmp_path):
    steps = write(tmp_path, "checkpoint-{}")
    save_file(weights(1), tmp_path / "model.safetensors")
    for content in ("{", "[]", "", '{"log_history": 3}'):
        (tmp_path / "trainer_state.json").write_text(content)
        run = dy.open_run(tmp_path)
        assert (run.steps.tolist(), dict(run.problems)) == (steps, {})
        assert "trainer_state.json" in str(run.passed_over)


def test_a_damaged_evaluation_is_named_and_the_weights_are_measured(tmp_path):
    steps = write(tmp_path, "checkpoint-{}")
    (tmp_path / "evaluation.jsonl").write_text("garbage\n")
    run = dy.open_run(tmp_path)
    assert (run.steps.tolist(), dict(run.scalars)) == (steps, {})
    assert "Line 1 of" in run.passed_over["evaluation.jsonl"]


def test_two_files_of_one_step_are_its_problem(tmp_path):
    for name in ("step_5.pt", "step-05.pt", "step_7.pt"):
        torch.save(weights(5), tmp_path / name)
    run = dy.open_run(tmp_path)
    assert run.steps.tolist() == [5, 7]
    assert_problem(run, 5, r"step-05\.pt and step_5\.pt, both of step 5")


def test_files_without_a_step_are_passed_over_or_tell_it(tmp_path):
    torch.save(weights(5), tmp_path / "step_5.pt")
    torch.save({"model": weights(9), "step": 9}, tmp_path / "last.pt")
    torch.save(weights(1), tmp_path / "final.pt")
    (tmp_path / "best.pt").write_bytes(b"")
    (tmp_path / "current.pt").symlink_to("gone.pt")
    (tmp_path / "vocabulary.pt").write_bytes(b"")
    run = dy.open_run(tmp_path)
    assert (run.steps.tolist(), dict(run.problems)) == ([5, 9], {})
    assert set(run.passed_over) == {"final.pt", "best.pt", "current.pt", "vocabulary.pt"}
    assert "not a readable file" in run.passed_over["best.pt"]
    assert_bits(run, 9, weights(9))


# How much is looked at --------------------------------------------------------------------------


def opened_by(action):
    """How many files an action opens."""
    opened = []
    is_on = [True]

    def hook(event, arguments):
        if is_on and event == "open" and isinstance(arguments[0], str | bytes):
            opened.append(arguments[0])

    sys.addaudithook(hook)
    action()
    is_on.clear()
    return len(opened)


def refused(path):
    with pytest.raises(dy.DynamicsError):
        dy.open_run(path)


@pytest.mark.slow
def test_detection_looks_at_few_of_ten_thousand(tmp_path):
    from dynamics.formats import FORMATS
    from dynamics.formats.choice import detected_format

    for i in range(10_000):
        (tmp_path / f"empty/step_{i}").mkdir(parents=True)
        (tmp_path / f"empty/sample_{i}.png").touch()
    assert opened_by(lambda: refused(tmp_path / "empty")) < 20
    write(tmp_path / "empty", "checkpoint-{}", steps=(20_000, 20_001))
    assert opened_by(lambda: dy.open_run(tmp_path / "empty")) < 20
    for i in range(10_000):
        (tmp_path / f"empty/step_{i}/model.safetensors").touch()
    assert opened_by(lambda: detected_format(tmp_path / "empty", FORMATS)) < 20
    for suffix in (".pt", ".ckpt"):
        (tmp_path / suffix).mkdir()
        for i in range(10_000):
            (tmp_path / suffix / f"{i}{suffix}").touch()
        assert opened_by(lambda at=tmp_path / suffix: detected_format(at, FORMATS)) < 20
