"""What the commands print: whole in a pipe, as wide as a terminal, names as they are."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

NAME = (
    "language_model.model.layers.0.self_attn.attention_block_of_the_decoder.query_projection.weight"
)
MODULE = "self_attn.attention_block_of_the_decoder.query_projection"
RUNS = ["a_run_with_a_rather_long_name_[r=8]", "closing[/b]", "[red]", "plain"]


@pytest.fixture(scope="module")
def results(write_recording, tmp_path_factory):
    """A folder with a recording of a long name in the model and in the path."""
    folder = tmp_path_factory.mktemp("results")
    write_recording(folder / "run [r=8] [/b].zarr", steps=(0, 10), shapes={NAME: (8, 8)})
    return folder


@pytest.fixture
def commands(results):
    path = str(results / "run [r=8] [/b].zarr")
    runs = [f"{run}={path}" for run in RUNS]
    return {
        "inspect": (["inspect", path], [path, NAME]),
        "analyze": (["analyze", path, "-o", f"{results}/a.zarr", "--overwrite"], [MODULE]),
        "compare": (["compare", *runs, "-o", f"{results}/c.zarr", "--overwrite"], RUNS),
        "audit": (["audit", path], [f"Audit of {path}", "not checked"]),
        "list": (["list", "metrics"], ["effective_rank_above_floor", "arXiv 2410.11451"]),
    }


@pytest.mark.slow
@pytest.mark.parametrize("verb", ["inspect", "analyze", "compare", "audit", "list"])
def test_a_pipe_has_no_width(command, commands, verb):
    arguments, wanted = commands[verb]
    code, out, err = command(*arguments)  # with COLUMNS, which is about terminals
    assert (code, err) == (0, "")
    assert "…" not in out
    for name in wanted:
        assert any(name in line for line in out.splitlines()), name
    assert all(line == line.rstrip() for line in out.splitlines())


def shown_in_a_terminal(arguments, columns=80):
    """What a process prints in a pseudo-terminal."""
    pty = pytest.importorskip("pty")
    import fcntl
    import re
    import struct
    import termios

    outside, inside = pty.openpty()
    fcntl.ioctl(inside, termios.TIOCSWINSZ, struct.pack("HHHH", 40, columns, 0, 0))
    environment = {name: each for name, each in os.environ.items() if name != "COLUMNS"}
    environment |= {"TERM": "xterm", "PYTHONPATH": str(Path(__file__).parents[3])}
    running = subprocess.Popen(
        [sys.executable, "-m", "dynamics.cli", *arguments],
        stdout=inside,
        stderr=subprocess.PIPE,
        env=environment,
    )
    os.close(inside)
    printed = b""
    try:
        while part := os.read(outside, 2**16):
            printed += part
    except OSError:  # Linux's end of a pseudo-terminal
        pass
    os.close(outside)
    _, err = running.communicate()
    assert running.returncode == 0, err
    return re.sub(r"\x1b\[[0-9;?]*[A-Za-z]", "", printed.decode()).replace("\r\n", "\n")


@pytest.mark.slow
@pytest.mark.parametrize("verb", ["inspect", "analyze", "compare", "audit", "list"])
def test_a_terminal_gets_tables_of_its_width_and_nothing_is_cut(commands, verb):
    arguments, wanted = commands[verb]
    out = shown_in_a_terminal(arguments)
    assert "…" not in out
    table = [line for line in out.splitlines() if line.startswith(" ")]
    assert table
    assert max(map(len, table)) <= 80
    for name in wanted:  # goes on in the next line of its column, beside the other columns
        letters = iter(out)
        assert all(letter in letters for letter in name), name
    if verb == "list":
        assert "effective_rank_above_floor" in out


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--by", "layer"], "--by has no effect on --style comparison; it is for trajectory"),
        (["--matrix", "w"], "--matrix has no effect on --style comparison"),
        (["--steps", "1"], "--steps has no effect on --style comparison; it is for spectrum"),
        (["--baseline", "a"], "--baseline has no effect on --style comparison"),
        (["--style", "budget", "--metric", "x"], "--metric has no effect on --style budget"),
        (["--style", "budget", "--x", "tokens"], "--x has no effect on --style budget"),
        (["--run", "a", "--over", "seed"], "--over has no effect on --style trajectory"),
        (["--style", "heatmap", "--run", "a", "--by", "layer"], "--by has no effect"),
        (["--run", "a", "--module", "up_proj"], "--module has no effect on --style trajectory"),
        (
            ["--run", "a", "--style", "spectrum", "--matrix", "w", "--metric", "stable_rank"],
            "--metric has no effect on --style spectrum",
        ),
    ],
)
def test_an_option_of_another_style_is_refused(refused, two_runs, here, options, message):
    assert message in refused("plot", two_runs, *options)
    assert list(here.iterdir()) == []


@pytest.fixture(scope="module")
def two_runs(write_recording, tmp_path_factory):
    import dynamics as dy

    folder = tmp_path_factory.mktemp("two")
    runs = {name: write_recording(folder / f"{name}.zarr", seed=i) for i, name in enumerate("ab")}
    return dy.save(dy.compare(runs, kinds=["weight"]), folder / "both.zarr")


def test_an_interval_without_follow_is_refused(refused, tmp_path):
    assert "--interval has no effect without --follow" in refused(
        "analyze", tmp_path / "run.zarr", "--interval", "5"
    )


def test_names_of_runs_may_have_equals_signs(command, refused, write_recording, tmp_path, here):
    for name in ("a", "lr=1"):
        write_recording(tmp_path / f"{name}.zarr", steps=(0, 10), shapes={"w": (3, 3)})
    runs = (f"lr=0.1={tmp_path}/a.zarr", f"plain={tmp_path}/lr=1.zarr")
    assert command("compare", *runs, "--kinds", "weight")[0] == 0
    import dynamics as dy

    assert dy.load("comparison.zarr").run.values.tolist() == ["lr=0.1", "plain"]
    assert "nowhere does not exist" in refused(
        "compare", f"a={tmp_path}/nowhere", runs[1], "-o", "x"
    )
