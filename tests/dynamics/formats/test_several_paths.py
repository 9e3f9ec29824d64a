"""Several paths, or a glob, are the checkpoints of one run."""

import shutil

import pytest
import torch
from safetensors.torch import save_file

import dynamics as dy
from dynamics.errors import FormatError
from tests.dynamics.formats.checking import assert_bits, assert_problem
from tests.dynamics.formats.test_layouts import adapter, weights


@pytest.fixture
def files(tmp_path):
    for step in (5, 20, 100):
        torch.save(weights(step), tmp_path / f"step_{step}.pt")
    torch.save({"state": torch.ones(3, 3)}, tmp_path / "optimizer_5.pt")
    (tmp_path / "notes.txt").write_text("x")
    return tmp_path


def actors(path, name="actor"):
    for step in (5, 20):
        for each in (name, "critic"):
            folder = path / f"global_step_{step}" / each
            folder.mkdir(parents=True)
            save_file(weights(step), folder / "model.safetensors")


def test_files_are_a_run(files):
    for given in ([files / "step_20.pt", str(files / "step_5.pt")], f"{files}/step_[25]*.pt"):
        run = dy.open_run(given)
        assert (run.format, run.path, run.steps.tolist()) == ("files", str(files), [5, 20])
        assert_bits(run, 20, weights(20))


def test_a_glob_passes_over_what_is_none(files):
    run = dy.open_run(files / "*")
    assert run.steps.tolist() == [5, 20, 100]
    assert set(run.passed_over) == {"notes.txt", "optimizer_5.pt"}


def test_the_step_may_be_in_the_name_of_a_directory_above(tmp_path):
    actors(tmp_path)
    run = dy.open_run(f"{tmp_path}/*/actor")
    assert (run.format, run.steps.tolist(), dict(run.passed_over)) == ("checkpoints", [5, 20], {})
    assert_bits(run, 20, weights(20))


def test_adapters_of_several_directories_are_a_run(tmp_path):
    for step in (5, 20):
        (tmp_path / f"a{step}/checkpoint-{step}").mkdir(parents=True)
        adapter(tmp_path / f"a{step}/checkpoint-{step}", step)
    run = dy.open_run(sorted(tmp_path.glob("*/*")))
    assert (run.format, run.steps.tolist(), run.kinds) == ("peft", [5, 20], ("adapter",))


def test_a_damaged_one_and_two_of_one_step_are_problems_of_their_steps(files):
    (files / "step_20.pt").write_bytes(b"")
    shutil.copy(files / "step_5.pt", files / "step_05.pt")
    run = dy.open_run(f"{files}/*.pt")
    assert list(run.problems) == [5, 20]
    assert "step_05.pt and" in run.problems[5]
    assert_bits(run, 100, weights(100))
    (files / "step_05.pt").unlink()
    assert_problem(dy.open_run(f"{files}/*.pt"), 20, "not a readable file")


@pytest.mark.parametrize(
    ("given", "match"),
    [
        (lambda at: [], "No path is given"),
        (lambda at: [at / "step_5.pt", at / "step_7.pt"], r"step_7\.pt does not exist"),
        (lambda at: f"{at}/*.zip", r"No path matches .*\*\.zip"),
        (lambda at: [at / "sub", at], "is a run of 3 checkpoints; give it alone"),
        (lambda at: [at / "final.pt", at / "notes.txt"], "neither its name nor its files tell"),
    ],
)
def test_what_is_no_run_is_refused(files, given, match):
    (files / "sub").mkdir()
    for name in ("sub/step_1.pt", "final.pt"):
        torch.save(weights(1), files / name)
    with pytest.raises(FormatError, match=match) as caught:
        dy.open_run(given(files))
    assert "\n" not in str(caught.value)


def test_a_recording_among_several_paths_is_refused(write_recording, tmp_path):
    paths = [write_recording(tmp_path / f"{name}.zarr") for name in "ab"]
    with pytest.raises(FormatError, match=r"one path is a whole run.*dynamics compare"):
        dy.open_run(paths)


def test_a_path_with_signs_of_a_glob_is_itself(tmp_path):
    (tmp_path / "lr[1e-3]").mkdir()
    torch.save(weights(5), tmp_path / "lr[1e-3]/step_5.pt")
    assert dy.open_run(tmp_path / "lr[1e-3]").steps.tolist() == [5]
    assert dy.open_run([tmp_path / "lr[1e-3]/step_5.pt"]).steps.tolist() == [5]
