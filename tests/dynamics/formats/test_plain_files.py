import shutil

import numpy as np
import pytest
import torch
from safetensors.torch import save_file

import dynamics as dy
from dynamics.formats.shared.steps import step_in_name
from dynamics.schema import Status
from tests.dynamics.formats.checking import Touch, assert_bits, assert_problem, assert_refused
from tests.dynamics.formats.sharded_training import Small, matrices

NAME = "layers.1.weight"
SQUARE = torch.ones(2, 2)


def weights(seed=0):
    torch.manual_seed(seed)
    return {name: tensor.contiguous() for name, tensor in Small().state_dict().items()}


def arrays(state):
    return {name: tensor.numpy() for name, tensor in state.items()}


WRITERS = {
    ".pt": torch.save,
    ".pth": lambda state, path: torch.save(state, path, _use_new_zipfile_serialization=False),
    ".bin": torch.save,
    ".safetensors": lambda state, path: save_file(state, path),
    ".npz": lambda state, path: np.savez(path, **arrays(state)),
}


# Names and steps --------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("stem", "step"),
    [
        ("weights_step100", 100),
        ("model-000200", 200),
        ("step=300", 300),
        ("100", 100),
        ("step_40_of_90", 40),
        ("epoch=3-step=1500-loss=2.71", 1500),
        ("ckpt_1000_v2", 1000),
        ("iter7.seed3", 7),
        ("Step12", 12),
        ("llama-7b-final", None),
        ("best", None),
        ("run-20260101000000000000", None),
    ],
)
def test_the_step_is_the_number_after_its_word_else_the_last_one(stem, step):
    assert step_in_name(stem) == step


@pytest.mark.parametrize("suffix", WRITERS)
def test_files_of_every_kind_are_at_their_steps(tmp_path, suffix):
    for step in (100, 20):
        WRITERS[suffix](weights(step), tmp_path / f"model_step{step}{suffix}")
    run = dy.open_run(tmp_path)
    assert (run.format, run.steps.tolist()) == ("files", [20, 100])
    for step in (20, 100):
        assert_bits(run, step, matrices(weights(step)))


@pytest.mark.parametrize("suffix", WRITERS)
def test_one_file_is_a_run(tmp_path, suffix):
    for name, step in (("model_step30", 30), ("final", 0)):
        WRITERS[suffix](weights(), tmp_path / f"{name}{suffix}")
        for options in ({}, {"format": "files"}):
            run = dy.open_run(str(tmp_path / f"{name}{suffix}"), **options)
            assert (run.format, run.steps.tolist()) == ("files", [step])
            assert_bits(run, step, matrices(weights()))


def test_kinds_of_files_mix_and_analyze_measures_them(tmp_path):
    for step, suffix in enumerate(WRITERS):
        WRITERS[suffix](weights(step), tmp_path / f"step_{step}{suffix}")
    analysis = dy.analyze(tmp_path, metrics=["frobenius_norm"])
    assert analysis["step"].values.tolist() == [0, 1, 2, 3, 4]
    update = weights(4)[NAME].double() - weights(3)[NAME].double()
    found = analysis["frobenius_norm"].sel(matrix=NAME, kind="update", step=4)
    assert float(found) == pytest.approx(float(update.norm()), rel=1e-12)
    assert (analysis["status"].sel(kind="weight") == Status.MEASURED).all()


def test_what_trainers_save_beside_a_model_is_passed_over(tmp_path):
    torch.save(weights(), tmp_path / "model_5.pt")
    beside = ["optimizer.pt", "optimizer_5.pt", "rng_state_0.pth", "scheduler.pt", "scaler.pt"]
    for name in [*beside, "training_args.bin", "model_5_optim.pt"]:
        torch.save({"state": torch.ones(3, 3)}, tmp_path / name)
    assert_bits(dy.open_run(tmp_path), 5, matrices(weights()))
    (tmp_path / "model_5.pt").unlink()
    assert_refused(tmp_path, "holds no run of a known format")


def test_a_model_of_hugging_face_goes_first(tmp_path):
    save_file(weights(), tmp_path / "model.safetensors")
    torch.save(weights(1), tmp_path / "old_3.pt")
    assert dy.open_run(tmp_path).format == "checkpoints"
    assert dy.open_run(tmp_path / "model.safetensors").format == "files"


@pytest.mark.parametrize(
    ("names", "match"),
    [
        (
            ["step_5.pt", "step-05.safetensors"],
            r"step-05\.safetensors and step_5\.pt, both of step 5",
        ),
        (["x-00001-of-00002.pt", "x-00002-of-00002.pt"], "but not the index"),
        (["consolidated.00.pth", "consolidated.01.pth"], "a part of a model"),
    ],
)
def test_files_of_which_none_is_clear_are_refused(tmp_path, names, match):
    for name in names:
        WRITERS[name[name.rindex(".") :]](weights(), tmp_path / name)
    assert_refused(tmp_path, match)


def test_a_file_that_is_no_checkpoint_is_refused(tmp_path):
    (tmp_path / "notes.txt").write_text("x")
    assert_refused(tmp_path / "notes.txt", r"notes\.txt is a file, but not a checkpoint")
    torch.save(weights(), tmp_path / "a.pt")
    assert_refused(tmp_path / "a.pt", "a run of format 'dcp' is a directory", format="dcp")


# State dicts in pickles -------------------------------------------------------------------------


@pytest.mark.parametrize("key", ["model", "state_dict", "model_state_dict", "module"])
def test_the_state_dict_may_be_an_entry_beside_an_optimizers(tmp_path, key):
    optimizer = {"state": {0: {"exp_avg": torch.ones(3, 3)}}}
    torch.save({key: weights(), "optimizer": optimizer, "step": 5}, tmp_path / "5.pt")
    assert_bits(dy.open_run(tmp_path), 5, matrices(weights()))


def test_tensors_at_the_top_are_told_from_an_optimizers_state(tmp_path):
    optimizer = {"state": {0: {"exp_avg": torch.ones(3, 3)}}}
    torch.save({**weights(), "optimizer": optimizer}, tmp_path / "5.pt")
    assert_bits(dy.open_run(tmp_path), 5, matrices(weights()))


@pytest.mark.parametrize(
    ("saved", "match"),
    [
        (
            {"model": {"a": torch.ones(2, 2)}, "module": {"a": torch.ones(2, 2)}},
            "'model' and 'module'",
        ),
        ({"net": {"a": torch.ones(2, 2)}, "opt": {}}, "it has 'net', 'opt'"),
        ({}, "it has nothing"),
        ([torch.ones(2, 2)], "holds no tensors by name"),
        (Small(), "it is an object of tests.*Small"),
        ({"model": Small()}, "'model' holds no tensors by name: it is an object of tests.*Small"),
        ({"a": torch.ones(2, 2, dtype=torch.int64)}, "holds no tensors"),
        ({"a": torch.ones(2)}, "holds no matrices"),
    ],
    ids=["two", "unknown", "empty", "list", "object", "model object", "integers", "vectors"],
)
def test_what_is_no_state_dict_is_refused(tmp_path, saved, match):
    torch.save(saved, tmp_path / "5.pt")
    assert_refused(tmp_path, match)


@pytest.mark.parametrize("suffix", WRITERS)
@pytest.mark.parametrize("garbage", [b"", b"garbage", None])
def test_a_damaged_file_is_the_problem_of_its_step(tmp_path, suffix, garbage):
    for step in (1, 2):
        WRITERS[suffix](weights(step), tmp_path / f"step_{step}{suffix}")
    file = tmp_path / f"step_2{suffix}"
    file.write_bytes(file.read_bytes()[:200] if garbage is None else garbage)
    assert_problem(dy.open_run(tmp_path), 2, f"step_2{suffix} .*not a readable .*file")


def test_nothing_in_a_file_is_run(tmp_path):
    marker, file = tmp_path / "marker", tmp_path / "5.pt"
    torch.save({"model": weights(), "args": Touch(marker)}, file)
    assert_bits(dy.open_run(tmp_path), 5, matrices(weights()))
    assert not marker.exists()
    torch.load(file, weights_only=False)
    assert marker.exists()


def test_links_out_of_the_run_are_not_followed(tmp_path):
    (tmp_path / "run").mkdir()
    np.savez(tmp_path / "x_1.npz", a=np.ones((3, 3)))
    (tmp_path / "run/x_1.npz").symlink_to(tmp_path / "x_1.npz")
    assert_refused(tmp_path / "run", "outside of a run are not read")
    shutil.copy(tmp_path / "x_1.npz", tmp_path / "run/x_2.npz")
    assert_problem(dy.open_run(tmp_path / "run"), 1, "outside")
