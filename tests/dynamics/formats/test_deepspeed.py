import json
import shutil
from importlib.util import find_spec

import pytest
import torch

import dynamics as dy
from dynamics.runs.attention_config import read_architecture
from dynamics.schema import Status
from tests.dynamics.formats.checking import Touch, assert_bits, assert_problem, assert_refused
from tests.dynamics.formats.sharded_training import DEEPSPEED, STEPS, matrices, torchrun

if find_spec("deepspeed") is None:  # not imported here: it looks for devices and compilers
    pytest.skip("needs deepspeed", allow_module_level=True)
if shutil.which("g++") is None:
    pytest.skip("needs g++, with which deepspeed builds its CPU kernels", allow_module_level=True)


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    """saved[processes]: what DeepSpeed wrote, training on CPUs."""
    folders = {n: tmp_path_factory.mktemp(f"deepspeed_{n}") for n in (1, 2)}
    return {n: torchrun("deepspeed", folder, n) for n, folder in folders.items()}


@pytest.fixture
def copied(saved, tmp_path):
    """copied(name): what two processes wrote in one configuration, to be changed."""
    return lambda name: shutil.copytree(saved[2] / name, tmp_path / name)


def untrained(folder, step):
    """The matrices without masters, as torch.load gives them: what stage 1 leaves to `module`."""
    file = folder / f"global_step{step}/mp_rank_00_model_states.pt"
    module = torch.load(file, weights_only=False)["module"]
    return {name: module[name] for name in ("frozen.weight", "table")}


@pytest.mark.slow
@pytest.mark.parametrize("processes", [1, 2])
@pytest.mark.parametrize("name", DEEPSPEED)
def test_values_are_those_that_deepspeeds_own_script_recovers(saved, name, processes):
    folder = saved[processes] / name
    run = dy.open_run(folder)
    assert run.format == "deepspeed"
    assert run.steps.tolist() == [1, 2]
    for step in range(1, STEPS + 1):
        expected = matrices(torch.load(folder / f"expected_{step}.pt"))
        if name.endswith("_1"):
            expected |= untrained(folder, step)
        if name != "fp32_3":  # all but this one tie their embeddings
            expected.pop("lm_head.weight", None)
        assert_bits(run, step, expected)


@pytest.mark.slow
def test_masters_are_float32_and_what_is_not_trained_keeps_its_dtype(saved):
    for name in ("bf16_1", "bf16_2", "bf16_3"):
        run = dy.open_run(saved[2] / name)
        dtypes = {each: run.read(each, 2, "weight").dtype for each in run.matrices}
        assert dtypes["layers.0.weight"] == dtypes["embed_tokens.weight"] == "float32"
        assert dtypes["frozen.weight"] == "bfloat16"
    assert dy.open_run(saved[2] / "bf16_0").read("layers.0.weight", 2, "weight").dtype == "bfloat16"


@pytest.mark.slow
def test_analyze_sees_the_masters_updates(saved):
    analysis = dy.analyze(saved[2] / "bf16_3", metrics=["frobenius_norm"])
    first, last = (matrices(torch.load(saved[2] / f"bf16_3/expected_{step}.pt")) for step in (1, 2))
    name = "layers.1.weight"
    norm = analysis["frobenius_norm"].sel(matrix=name, kind="update", step=2)
    assert float(norm) == pytest.approx(
        float((last[name].double() - first[name].double()).norm()), rel=1e-12
    )
    assert (analysis["status"].sel(kind="weight") == Status.MEASURED).all()
    assert int(analysis["layer"].sel(matrix=name)) == 1


@pytest.mark.slow
def test_one_step_a_tag_and_a_trainers_checkpoints_are_opened(copied, tmp_path):
    folder = copied("bf16_2")
    expected = dy.open_run(folder).read("layers.0.weight", 2, "weight").values
    assert dy.open_run(folder / "global_step2").steps.tolist() == [2]

    trainer = tmp_path / "trainer"
    for step in (10, 20):  # the Trainer's count differs where it resumed with a new optimizer
        shutil.copytree(
            folder / f"global_step{step // 10}",
            trainer / f"checkpoint-{step}/global_step{step // 10}",
        )
        (trainer / f"checkpoint-{step}/latest").write_text(f"global_step{step // 10}")
        (trainer / f"checkpoint-{step}/config.json").write_text(
            '{"num_attention_heads": 1, "hidden_size": 7}'
        )
        log = {"log_history": [{"step": step, "loss": 0.5}]}
        (trainer / f"checkpoint-{step}/trainer_state.json").write_text(json.dumps(log))
    run = dy.open_run(trainer)
    assert (run.format, run.steps.tolist()) == ("deepspeed", [10, 20])
    assert (run.read("layers.0.weight", 20, "weight").values == expected).all()
    assert run.scalars["loss"].tolist() == [0.5, 0.5]
    assert read_architecture(run.attrs, "x").num_heads == 1
    assert dy.open_run(trainer / "checkpoint-20").steps.tolist() == [20]

    (folder / "global_step2").rename(folder / "best")
    shutil.rmtree(folder / "global_step1")
    (folder / "latest").write_text("best")
    run = dy.open_run(folder)
    assert run.steps.tolist() == [2]  # global_steps, from the file
    assert (run.read("layers.0.weight", 2, "weight").values == expected).all()


@pytest.mark.slow
def test_the_engines_save_for_lightnings_strategy_is_a_run_of_lightning(saved):
    run = dy.open_run(saved[2] / "lightning")
    assert (run.format, run.steps.tolist()) == ("lightning", [2])
    assert run.attrs["config"] == {"n_head": 1}
    expected = matrices(torch.load(saved[2] / "bf16_2/expected_2.pt"))
    del expected["lm_head.weight"]
    assert_bits(run, 2, expected)


@pytest.mark.slow
def test_without_optimizer_states_the_modules_weights_count_unless_they_are_partitioned(copied):
    folder = copied("bf16_1")
    for file in folder.glob("global_step*/*optim_states.pt"):
        file.unlink()
    assert dy.open_run(folder).read("layers.0.weight", 2, "weight").dtype == "bfloat16"
    folder = copied("bf16_3")
    for file in folder.glob("global_step*/*optim_states.pt"):
        file.unlink()
    assert_refused(folder, "lacks the files .*optim_states.*stage 3")


@pytest.mark.slow
@pytest.mark.parametrize("name", ["bf16_2", "bf16_3"])
def test_a_missing_rank_is_named_and_the_other_step_measured(copied, name):
    folder = copied(name)
    (folder / "global_step2/bf16_zero_pp_rank_1_mp_rank_00_optim_states.pt").unlink()
    run = dy.open_run(folder)
    assert_problem(run, 2, r"ranks \[0\], but 2 ranks saved them")
    assert run.read("layers.0.weight", 1, "weight") is not None


@pytest.mark.slow
def test_missing_model_states_are_named(copied):
    folder = copied("bf16_3")
    (folder / "global_step2/zero_pp_rank_1_mp_rank_00_model_states.pt").unlink()
    assert_problem(dy.open_run(folder), 2, "lacks zero_pp_rank_1_mp_rank_00_model_states.pt")


@pytest.mark.slow
@pytest.mark.parametrize("name", ["bf16_2", "bf16_3"])
@pytest.mark.parametrize("change", ["shorter", "longer"])
def test_partitions_that_do_not_fit_the_shapes_are_refused(copied, name, change):
    folder = copied(name)
    for file in (folder / "global_step2").glob("*optim_states.pt"):
        saved = torch.load(file, weights_only=False)
        key = "fp32_flat_groups" if name == "bf16_3" else "single_partition_of_fp32_groups"
        groups = saved["optimizer_state_dict"][key]
        groups[0] = groups[0][:-9].clone() if change == "shorter" else groups[0].repeat(2)
        torch.save(saved, file)
    assert_problem(dy.open_run(folder), 2, "numbers in its partitions, but its parameters take")


@pytest.mark.slow
@pytest.mark.parametrize(
    "name",
    [
        "mp_rank_01_model_states.pt",
        "layer_00-model_00-model_states.pt",
        "zero_pp_rank_0_mp_rank_01_optim_states.pt",
    ],
)
def test_a_model_spread_over_ranks_is_refused_by_name(copied, name):
    folder = copied("bf16_2")
    for step in (1, 2):
        (folder / f"global_step{step}/{name}").write_bytes(b"")
    assert_refused(folder, f"{name}, a part of a model")


@pytest.mark.slow
def test_two_saves_in_one_directory_are_refused(copied):
    folder = copied("bf16_2")
    file = folder / "global_step2/bf16_zero_pp_rank_0_mp_rank_00_optim_states.pt"
    shutil.copy(file, file.with_name(file.name.removeprefix("bf16_")))
    assert_problem(dy.open_run(folder), 2, "both of rank 0")


@pytest.mark.slow
@pytest.mark.parametrize("garbage", [b"", b"garbage", None])
def test_damaged_files_are_named(copied, garbage):
    folder = copied("bf16_2")
    file = folder / "global_step2/bf16_zero_pp_rank_1_mp_rank_00_optim_states.pt"
    file.write_bytes(file.read_bytes()[:2000] if garbage is None else garbage)
    assert_problem(
        dy.open_run(folder), 2, "rank_1_mp_rank_00_optim_states.pt .*not a readable file"
    )


@pytest.mark.slow
def test_a_file_without_deepspeeds_states_is_refused(copied):
    folder = copied("bf16_2")
    torch.save(
        {"optimizer_state_dict": [1]},
        folder / "global_step2/bf16_zero_pp_rank_1_mp_rank_00_optim_states.pt",
    )
    torch.save({"module": 3}, folder / "global_step1/mp_rank_00_model_states.pt")
    assert_refused(folder, "does not hold states as DeepSpeed saves them")


@pytest.mark.slow
def test_nothing_in_a_file_is_run(copied, tmp_path):
    folder, marker = copied("bf16_2"), tmp_path / "marker"
    file = folder / "global_step2/mp_rank_00_model_states.pt"
    saved = torch.load(file, weights_only=False)
    torch.save({**saved, "lr_scheduler": Touch(marker)}, file)
    assert dy.open_run(folder).read("layers.0.weight", 2, "weight") is not None
    assert not marker.exists()
    torch.load(file, weights_only=False)
    assert marker.exists()
