"""`dynamics` as a process, its help, and what `list` and `inspect` say."""

import os
import subprocess
import sys

import pytest

import dynamics as dy
from dynamics import schema
from dynamics.metrics import STUDY_METRICS
from tests.dynamics.cli.conftest import UP1

PNG = b"\x89PNG\r\n\x1a\n"


def process(*arguments, cwd):
    return subprocess.run(
        [sys.executable, "-m", "dynamics.cli", *map(str, arguments)],
        cwd=cwd,
        capture_output=True,
        text=True,
        timeout=120,
        env={**os.environ, "COLUMNS": "160"},
    )


@pytest.mark.slow
def test_the_process_measures_and_draws(recording, here):
    done = process("analyze", recording, cwd=here)
    assert (done.returncode, done.stderr) == (0, "")
    assert "Saved to run.analysis.zarr" in done.stdout
    drawn = process("plot", "run.analysis.zarr", cwd=here)
    assert (drawn.returncode, drawn.stderr) == (0, "")
    picture = here / "run.trajectory.effective_rank.weight.png"
    assert picture.read_bytes().startswith(PNG)


@pytest.mark.slow
def test_the_process_says_what_is_wrong_in_one_line(tmp_path, here):
    done = process("analyze", tmp_path / "nowhere", cwd=here)
    assert done.returncode == 2
    assert done.stdout == ""
    assert done.stderr == f"error: {tmp_path}/nowhere does not exist.\n"
    assert list(here.iterdir()) == []


def test_help_comes_without_loading_torch(here):
    script = (
        "import sys\nsys.argv = ['dynamics', '--help']\nfrom dynamics import cli\n"
        "try:\n    cli.main()\nexcept SystemExit:\n    pass\n"
        "assert not {'torch', 'xarray', 'matplotlib'} & set(sys.modules), 'loaded'\n"
    )
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, cwd=here)
    assert done.returncode == 0, done.stderr
    for verb in ("analyze", "compare", "plot", "inspect", "list"):
        assert verb in done.stdout


@pytest.mark.parametrize("verb", ["analyze", "compare", "plot", "inspect", "export", "list"])
def test_the_help_of_each_verb_has_an_example(command, verb):
    code, out, err = command(verb, "--help")
    assert (code, err) == (0, "")
    assert "Example" in out
    assert f"dynamics {verb} " in out.split("Example")[1]


def test_an_unknown_verb_or_option_is_a_usage_error(command):
    for arguments in (["measure"], ["analyze"], ["analyze", "x", "--stepz", "1"], ["list", "cats"]):
        code, out, err = command(*arguments)
        assert (code, out) == (2, "")
        assert "Usage" in err
        assert "Traceback" not in err


def test_inspect_says_what_a_run_holds(command, recording, here):
    code, out, err = command("inspect", recording)
    assert (code, err) == (0, "")
    for text in ("recording", "0, 10, 20", "weight, gradient, update, displacement", "loss",
                 "tokens", "merge at 10", UP1, "16 × 8", "embed_tokens"):  # fmt: skip
        assert text in out
    assert list(here.iterdir()) == []


@pytest.mark.slow
def test_inspect_abridges_many_steps(command, write_recording, tmp_path):
    write_recording(tmp_path / "long.zarr", steps=range(40), shapes={"a": (2, 2)})
    _, out, _ = command("inspect", tmp_path / "long.zarr")
    assert "8, 9, ..., 39" in " ".join(out.split())


@pytest.mark.parametrize(
    ("what", "words"),
    [
        ("metrics", {**dy.METRICS, **STUDY_METRICS}),
        ("kinds", schema.KINDS),
        ("components", schema.COMPONENTS),
        ("formats", ["recording", "peft", "checkpoints"]),
    ],
)
def test_list_names_everything(command, what, words):
    code, out, err = command("list", what)
    assert (code, err) == (0, "")
    for word in words:
        assert word in out


def test_list_without_an_argument_lists_metrics(command):
    assert command("list")[1] == command("list", "metrics")[1]
