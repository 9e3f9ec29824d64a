"""`dynamics compare`: the same as the library, baselines, pairs, and errors of one line."""

import json

import numpy as np
import pytest

import dynamics as dy
from dynamics.recordings import RecordingWriter, matrix_path
from tests.dynamics.cli.conftest import UP1, made_by_command


@pytest.mark.slow
def test_compare_aligns_runs_and_saved_analyses(command, recording, other, here):
    assert command("analyze", recording, "-o", "a.zarr")[0] == 0
    code, out, err = command("compare", "a=a.zarr", f"b={other}", "-o", "both.zarr")
    assert code == 0
    with pytest.warns(dy.IntervalWarning, match="from step 10 to 20, 'b' from step 0 to") as said:
        expected = dy.compare({"a": dy.analyze(recording), "b": dy.analyze(other)})
    assert err == f"warning: {said[0].message}\n"
    both = made_by_command(dy.load(here / "both.zarr"))
    sources = json.loads(both.attrs.pop("sources"))
    assert sources["a"].pop("command").startswith("dynamics analyze")
    del sources["a"]["made"]
    assert sources == json.loads(expected.attrs.pop("sources"))
    assert both.identical(expected)
    assert "Saved to both.zarr" in out


def test_compare_measures_with_the_options(command, recording, other, here):
    code, _, err = command(
        "compare", f"a={recording}", f"b={other}", "--metrics", "stable_rank", "--kinds", "update",
        "--select", "*up_proj", "--components", "parameters",
    )  # fmt: skip
    assert (code, err) == (0, "")
    both = dy.load(here / "comparison.zarr")
    assert both["kind"].values.tolist() == ["update"]
    assert set(both["module"].values.tolist()) == {"up_proj"}
    assert "effective_rank" not in both


@pytest.mark.slow
def test_compare_takes_what_analyze_takes(command, recording, other, here):
    runs = (f"a={recording}", f"b={other}")
    options = ("--steps", "10:", "--workers", "2", "--format", "recording")
    code, _, err = command("compare", *runs, *options)
    assert (code, err) == (0, "")
    both = dy.load(here / "comparison.zarr")
    assert made_by_command(both).identical(dy.compare({"a": recording, "b": other}, steps="10:"))
    assert (here / "comparison.cache").is_file()


@pytest.mark.slow
def test_compare_again_measures_nothing_again(command, recording, other, here, monkeypatch):
    runs = (f"a={recording}", f"b={other}")
    assert command("compare", *runs)[0] == 0
    first = dy.load(here / "comparison.zarr")
    monkeypatch.setattr("dynamics.analysis.tasks.spectrum", lambda *_, **__: pytest.fail("again"))
    assert command("compare", *runs, "--overwrite")[0] == 0
    again = made_by_command(dy.load(here / "comparison.zarr"))
    assert again.identical(made_by_command(first))


@pytest.mark.parametrize("option", ["--base", "--adapter"])
def test_compare_hands_options_of_a_format_on(refused, recording, other, here, option):
    said = refused("compare", f"a={recording}", f"b={other}", option, "x")
    assert "format 'recording', which takes no" in said
    assert "no format 'x'" in refused("compare", f"a={recording}", f"b={other}", "--format", "x")
    assert "device 'x'" in refused("compare", f"a={recording}", f"b={other}", "--device", "x")
    assert list(here.iterdir()) == []


@pytest.mark.slow
def test_compare_with_a_baseline_saves_differences(command, recording, other, here):
    code, _, err = command("compare", f"a={recording}", f"b={other}", "--baseline", "a")
    assert (code, err) == (0, "")
    both = dy.compare({"a": recording, "b": other})
    less = made_by_command(dy.load(here / "comparison.zarr"))
    assert less.identical(dy.difference(both, baseline="a"))


@pytest.fixture
def swept(tmp_path):
    """NAME=RUN of two methods with two seeds each, one small matrix at one step."""
    runs = []
    for number, (method, seed) in enumerate([("full", 0), ("full", 1), ("lora", 1), ("lora", 0)]):
        at = tmp_path / f"{method}{seed}.zarr"
        writer = RecordingWriter(at, {"method": method, "seed": seed})
        weight = np.random.default_rng(number).standard_normal((4, 3))
        path = matrix_path("weight", "up.weight")
        writer.append(0, {path: weight}, attrs={path: {"source_dtype": "float64"}})
        runs.append(f"{method}{seed}={at}")
    return runs


@pytest.mark.slow
@pytest.mark.parametrize("baseline", ["full0", "method=full"])  # a run, or its setting
def test_compare_with_pairs_saves_the_differences_of_each_pair(command, swept, here, baseline):
    options = ("--kinds", "weight", "--metrics", "frobenius_norm", "--baseline", baseline)
    code, out, err = command("compare", *swept, *options, "--pair", "seed")
    assert (code, err) == (0, "")
    less = dy.load(here / "comparison.zarr")["frobenius_norm"]
    norms = {}
    for each in swept:
        name, path = each.split("=")
        values = dy.open_run(path).read("up.weight", 0, "weight").values
        norms[name] = np.linalg.norm(values)
    assert less["run"].values.tolist() == ["lora1", "lora0"]
    assert f"Saved the differences from {baseline} to comparison.zarr" in out
    _, shown, _ = command("show", "comparison.zarr")
    assert f"differences from {baseline} (pairs of one seed)" in shown
    assert f"less {baseline} (pairs of one seed)" in shown
    expected = [norms["lora1"] - norms["full1"], norms["lora0"] - norms["full0"]]
    np.testing.assert_allclose(less.values.ravel(), expected, rtol=1e-12)


def test_compare_refuses_pairs_without_a_baseline_or_a_setting(refused, swept, here):
    assert "give one with baseline=" in refused("compare", *swept, "--pair", "seed")
    assert "No setting 'sed'" in refused("compare", *swept, "--pair", "sed", "--baseline", "full0")
    assert not (here / "comparison.zarr").exists()


@pytest.mark.slow
def test_compare_reports_what_could_not_be_measured(command, recording, with_nan):
    code, _, err = command("compare", f"a={recording}", f"b={with_nan}")
    assert code == 1
    assert err.startswith(f"warning: b: {UP1} (weight) at step 10")
    assert len(err.splitlines()) == 1


def test_compare_refuses_what_it_cannot_serve(refused, saved, recording, tmp_path, here):
    a = f"a={recording}"
    assert "Expected NAME=RUN, found 'x'" in refused("compare", a, "x")
    assert "Expected NAME=RUN" in refused("compare", a, "=x")
    assert "The name 'a' is given twice" in refused("compare", a, a)
    assert "two runs or more; found 1" in refused("compare", a)
    assert "'c' is none of a, b" in refused("compare", a, f"b={recording}", "--baseline", "c")
    assert "nowhere does not exist" in refused("compare", a, f"b={tmp_path}/nowhere")
    assert "'b' compares runs already" in refused("compare", a, f"b={saved[1]}")
    assert "No metric 'er'" in refused("compare", a, f"b={recording}", "--metrics", "er")
    assert list(here.iterdir()) == []
    (here / "comparison.zarr").mkdir()
    assert "comparison.zarr exists" in refused("compare", a, f"b={recording}")
