"""Errors, stops and missing packages are one line in the words of the command line."""

import ast
import os
import signal
import subprocess
import sys
import time
import tomllib
from pathlib import Path

import numpy as np
import pytest

import dynamics as dy

ROOT = Path(__file__).parents[3]


@pytest.fixture(scope="module")
def recording(write_recording, tmp_path_factory):
    return write_recording(tmp_path_factory.mktemp("run") / "run.zarr")


@pytest.fixture(scope="module")
def saved(recording, tmp_path_factory):
    """(an analysis, a comparison), saved."""
    folder = tmp_path_factory.mktemp("saved")
    one = dy.analyze(recording)
    both = dy.compare({"full_rank": one, "relora": one})
    return dy.save(one, folder / "one.zarr"), dy.save(both, folder / "both.zarr")


@pytest.mark.parametrize(
    ("arguments", "meant"),
    [
        (["analyze", "RUN", "--metrics", "stable_rnak"], "'stable_rank'"),
        (["analyze", "RUN", "--metrics", "Effective_Rank"], "'effective_rank'"),
        (["analyze", "RUN", "--kinds", "wieght"], "'weight'"),
        (["analyze", "RUN", "--kinds", "updates"], "'update'"),
        (["analyze", "RUN", "--components", "parameter"], "'parameters'"),
        (["analyze", "RUN", "--format", "recordings"], "'recording'"),
        (["analyze", "RUN", "--select", "*up_prj"], "'up_proj'"),
        (["analyze", "RUN", "--steps", "11"], "the nearest is 10"),
        (["compare", "full=RUN", "lora=RUN", "--baseline", "ful"], "'full'"),
        (["plot", "ONE", "--metric", "stable_ranks"], "'stable_rank'"),
        (["plot", "ONE", "--kind", "gradients"], "'gradient'"),
        (["plot", "ONE", "--by", "layers"], "'layer'"),
        (["plot", "ONE", "--style", "heatmap", "--module", "upproj"], "'up_proj'"),
        (["plot", "BOTH", "--module", "upproj"], "'up_proj'"),
        (["plot", "BOTH", "--run", "relroa"], "'relora'"),
        (["plot", "ONE", "--style", "spectrum", "--matrix", "model.layers.1.mlp.up_proj"],
         "'model.layers.1.mlp.up_proj.weight'"),
        (["export", "ONE", "--to", "csv", "--metrics", "stable_ranks"], "'stable_rank'"),
        (["export", "ONE", "--to", "csv", "--kinds", "gradients"], "'gradient'"),
    ],
)  # fmt: skip
def test_a_near_miss_is_told(refused, recording, saved, here, arguments, meant):
    places = {"RUN": str(recording), "ONE": str(saved[0]), "BOTH": str(saved[1])}
    for name, place in places.items():
        arguments = [each.replace(name, place) for each in arguments]
    text = refused(*arguments)
    assert meant in text.split(";")[0] or f"; {meant}" in text
    assert list(here.iterdir()) == []


def test_verbs_and_options_that_are_near_are_told(command, recording):
    for arguments, meant in (
        (["analyse", recording], "analyze"),
        (["analyze", recording, "--metric", "x"], "--metrics"),
        (["export", recording, "--to", "parqet"], "parquet"),
    ):
        code, _, err = command(*arguments)
        assert code == 2
        assert meant in err


@pytest.mark.parametrize(
    ("arguments", "option"),
    [
        (["analyze", "RUN", "--kinds", ""], "--kinds"),
        (["analyze", "RUN", "--metrics", ","], "--metrics"),
        (["analyze", "RUN", "--steps", "a"], "--steps"),
        (["analyze", "RUN", "--lag", "3"], "--lag"),
        (["analyze", "RUN", "--lag", "10", "--kinds", "weight"], "--lag"),
        (["plot", "BOTH", "--style", "heatmap"], "--run"),
        (["plot", "ONE", "--style", "comparison"], "--style"),
    ],
)
def test_errors_name_options(refused, recording, saved, arguments, option):
    places = {"RUN": str(recording), "ONE": str(saved[0]), "BOTH": str(saved[1])}
    for name, place in places.items():
        arguments = [each.replace(name, place) for each in arguments]
    assert option in refused(*arguments)


@pytest.mark.parametrize(
    ("option", "name"),
    [
        (["--steps", "0"], "--steps"),
        (["--metrics", "stable_rank"], "--metrics"),
        (["--select", "*"], "--select"),
        (["--lag", "10"], "--lag"),
        (["--lora-alpha", "4"], "--lora-alpha"),
    ],
)
def test_what_only_measuring_takes_is_refused_for_saved_analyses(refused, saved, option, name):
    runs = (f"a={saved[0]}", f"b={saved[0]}")
    assert f"{name} has no effect on saved analyses" in refused("compare", *runs, *option)


def test_the_version_is_one_line(command):
    code, out, err = command("--version")
    assert (code, err) == (0, "")
    assert out.startswith("dynamics 0.")
    assert out.count("\n") == 1


# Ctrl-C -----------------------------------------------------------------------------------------


@pytest.mark.slow
@pytest.mark.parametrize("workers", [1, 2])
@pytest.mark.skipif(os.name != "posix", reason="sends SIGINT to a group of processes")
def test_ctrl_c_says_how_to_go_on(write_recording, tmp_path, workers):
    if workers > 1:
        pytest.importorskip("distributed")
    shapes = {f"layers.{i}.w": (300, 300) for i in range(12)}
    run = write_recording(tmp_path / "run.zarr", steps=range(0, 60, 10), shapes=shapes)
    words = ["analyze", str(run), "--workers", str(workers)]
    running = subprocess.Popen(
        [sys.executable, "-m", "dynamics.cli", *words],
        cwd=tmp_path,
        env={**os.environ, "PYTHONPATH": str(ROOT)},
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=True,
    )
    cache = tmp_path / "run.analysis.cache"
    while not cache.exists() and running.poll() is None:
        time.sleep(0.05)
    time.sleep(0.5)
    os.killpg(running.pid, signal.SIGINT)
    out, err = running.communicate(timeout=60)
    assert running.returncode == 130, err
    assert err.splitlines() == [
        "Stopped; what was measured is in run.analysis.cache. The same command goes on from there."
    ]
    assert out == ""


def test_ctrl_c_without_a_cache_says_that_nothing_is_kept(command, recording, monkeypatch):
    def stopped(*_, **__):
        raise KeyboardInterrupt

    monkeypatch.setattr("dynamics.analysis.saved.measure", stopped)
    code, out, err = command("analyze", recording, "--no-cache")
    assert (code, out) == (130, "")
    assert err == "Stopped; nothing is kept (--no-cache). The same command begins anew.\n"


# Extras -----------------------------------------------------------------------------------------


def blocked(packages, words, cwd):
    """A command in a process that cannot import some packages."""
    code = f"import sys; [sys.modules.update({{name: None}}) for name in {packages!r}]; "
    code += f"sys.argv = {['command', *words[1:]]!r}; import runpy; "
    code += f"runpy.run_module({words[0]!r}, run_name='__main__', alter_sys=False)"
    return subprocess.run(
        [sys.executable, "-c", code],
        cwd=cwd,
        capture_output=True,
        text=True,
        env={**os.environ, "PYTHONPATH": str(ROOT), "COLUMNS": "160"},
    )


@pytest.mark.slow
@pytest.mark.parametrize(
    ("packages", "words", "extra"),
    [
        (["peft"], ["probes.relora", "demo", "x"], "relora"),
        (["transformers"], ["probes.relora", "train", "micro", "--output", "x"], "relora"),
        (["peft"], ["probes.relora", "sweep", "micro", "--output", "x"], "relora"),
        (["fsspec", "upath"], ["dynamics.cli", "analyze", "s3://bucket/run"], "remote"),
        (["pyarrow"], ["dynamics.cli", "export", "ONE", "--to", "parquet"], "exports"),
        (["distributed"], ["dynamics.cli", "analyze", "RUN", "--scheduler", "x"], "distributed"),
    ],
)
def test_a_missing_package_is_one_line(recording, saved, here, packages, words, extra):
    places = {"RUN": str(recording), "ONE": str(saved[0])}
    words = [places.get(each, each) for each in words]
    done = blocked(packages, words, here)
    assert (done.returncode, done.stdout) == (2, ""), done.stderr
    assert len(done.stderr.splitlines()) == 1, done.stderr
    assert done.stderr.startswith("error: ")
    assert f"pip install 'learning-dynamics[{extra}]'" in done.stderr
    help_text = blocked(packages, [words[0], "--help"], here)
    assert help_text.returncode == 0, help_text.stderr


def test_every_extra_that_an_error_names_is_there():
    with (ROOT / "pyproject.toml").open("rb") as file:
        known = tomllib.load(file)["project"]["optional-dependencies"]
    named = {}
    for path in [*(ROOT / "dynamics").rglob("*.py"), *(ROOT / "probes").rglob("*.py")]:
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if isinstance(node, ast.Call) and getattr(node.func, "id", "") == "require_extra":
                extra = node.args[0]
                if isinstance(extra, ast.Constant):
                    named[extra.value] = path
    assert len(named) > 5
    assert {extra: path for extra, path in named.items() if extra not in known} == {}


# show and doctor --------------------------------------------------------------------------------


def test_show_tells_what_a_result_holds_and_what_made_it(command, recording, here):
    assert command("analyze", recording, "-o", "a [1].zarr", "--kinds", "weight,update")[0] == 0
    printed = command("analyze", recording, "-o", "a [1].zarr", "--kinds", "weight,update")[1]
    code, out, err = command("show", "a [1].zarr")
    assert (code, err) == (0, "")
    made_by = f"dynamics analyze {recording} -o 'a [1].zarr' --kinds weight,update"
    for text in ("a [1].zarr", "weight, update", "0, 10, 20", "5: embed_tokens", made_by,
                 "1 undefined".replace("1", "5"), "numpy 2."):  # fmt: skip
        assert text in out, text
    table = printed.split("Saved to")[0].strip()
    assert table in out


def test_show_takes_comparisons_differences_and_results_of_python(command, saved, here, tmp_path):
    code, out, _ = command("show", saved[1])
    assert code == 0
    assert "full_rank, relora" in out
    assert "none; it was made in Python" in out
    runs = (f"a={saved[0]}", f"b={saved[0]}")
    assert command("compare", *runs, "--baseline", "a", "-o", "less.zarr")[0] == 0
    code, out, _ = command("show", "less.zarr")
    assert code == 0
    assert "differences from a" in out
    assert "mean over the matrices of the layers, less a" in out
    both = dy.load(saved[1]).assign_coords(seed=("run", [0, 1]))
    dy.save(dy.over(both, "seed"), "means.zarr")
    code, out, _ = command("show", "means.zarr")
    assert code == 0


def test_show_says_what_could_not_be_measured(command, write_recording, tmp_path, here):
    def spoil(step, name, weight):
        if step == 10:
            weight[0, 0] = np.nan

    run = write_recording(tmp_path / "nan.zarr", spoil=spoil, shapes={"w": (3, 3)})
    assert command("analyze", run, "--kinds", "weight")[0] == 1
    code, out, err = command("show", "nan.analysis.zarr")
    assert code == 0
    assert "1 non finite" in out
    assert "holds NaN or Inf" in err


def test_doctor_tells_what_is_here_and_how_to_clear_caches(command, recording, here):
    assert command("analyze", recording, "--kinds", "weight")[0] == 0
    code, out, err = command("doctor")
    assert (code, err) == (0, "")
    import torch

    for text in (torch.__version__, np.__version__, "cores usable", "OMP_NUM_THREADS",
                 "rm run.analysis.cache", "rates.json"):  # fmt: skip
        assert text in out, text


def test_doctor_says_how_to_get_an_extra(monkeypatch):
    from dynamics.cli import doctor

    monkeypatch.setattr(
        doctor.metadata,
        "requires",
        lambda _: [
            "numpy>=2.0",
            "missing-package>=1; extra == 'remote'",
            'numpy>=2; extra == "dev"',
            "scipy>=1; python_version > '3' and extra == 'gguf'",
        ],
    )
    assert doctor.extras() == {"remote": ["missing_package"], "gguf": ["scipy"]}
    found = dict(doctor.diagnosis()["extras"])
    assert found["remote"] == "without missing_package: pip install 'learning-dynamics[remote]'"
    assert found["gguf"].startswith("scipy 1.")
