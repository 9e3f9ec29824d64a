import json
import os
import shutil
import subprocess
import sys

import numpy as np
import pytest
import zarr

import dynamics as dy
from dynamics import schema
from dynamics.recordings import RecordingWriter, matrix_path

UP1 = "model.layers.1.mlp.up_proj.weight"
PNG = b"\x89PNG\r\n\x1a\n"


@pytest.fixture
def recording(write_recording, tmp_path):
    return write_recording(tmp_path / "run.zarr", merges=(10,))


@pytest.fixture
def other(write_recording, tmp_path):
    return write_recording(tmp_path / "other.zarr", seed=1, steps=(0, 20))


@pytest.fixture
def with_nan(write_recording, tmp_path):
    def spoil(step, name, weight):
        if step == 10 and name == UP1:
            weight[0, 0] = np.nan

    return write_recording(tmp_path / "nan.zarr", spoil=spoil)


@pytest.fixture(scope="module")
def saved(write_recording, tmp_path_factory):
    """(an analysis, a comparison), saved."""
    directory = tmp_path_factory.mktemp("saved")
    a = dy.analyze(write_recording(directory / "a.zarr", merges=(10,)))
    b = dy.analyze(write_recording(directory / "b.zarr", seed=1))
    return (
        dy.save(a, directory / "a.analysis.zarr"),
        dy.save(dy.compare({"a": a, "b": b}), directory / "both.zarr"),
    )


def made_by_command(dataset):
    """A saved result without the command line in it, which must be there."""
    assert dataset.attrs["command"].startswith("dynamics ")
    return dataset.drop_attrs(deep=False).assign_attrs(
        {name: each for name, each in dataset.attrs.items() if name not in ("command", "made")}
    )


def tree(path):
    return {file: file.read_bytes() for file in sorted(path.rglob("*")) if file.is_file()}


# As a process -----------------------------------------------------------------------------------


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


# analyze ----------------------------------------------------------------------------------------


@pytest.mark.slow
def test_analyze_saves_what_the_library_measures(command, recording, here):
    code, out, err = command("analyze", recording)
    assert (code, err) == (0, "")
    names = sorted(child.name for child in here.iterdir())
    assert names == ["run.analysis.cache", "run.analysis.zarr"]
    loaded, expected = dy.load(here / "run.analysis.zarr"), dy.analyze(recording)
    assert made_by_command(loaded).identical(expected)
    for word in ("weight", "gradient", "update", "displacement", "up_proj", "Saved to"):
        assert word in out


def test_analyze_takes_every_choice(command, recording, here):
    code, _, err = command(
        "analyze", recording, "-o", "x/out.zarr", "--metrics", "stable_rank, effective_rank",
        "--kinds", "update,weight", "--components", "parameters", "--steps", "10:",
        "--select", "*up_proj", "--select", "*embed*", "--format", "recording",
    )  # fmt: skip
    assert (code, err) == (0, "")
    loaded = dy.load(here / "x/out.zarr")
    expected = dy.analyze(
        recording,
        metrics=["stable_rank", "effective_rank"],
        kinds=["update", "weight"],
        steps=[10, 20],
        select=["*up_proj", "*embed*"],
    )
    assert made_by_command(loaded).identical(expected)
    assert "numerical_rank" not in loaded


@pytest.mark.parametrize(
    ("text", "steps"),
    [
        ("0", [0]),
        ("20,0", [0, 20]),
        ("0:10", [0, 10]),
        ("5:", [10, 20]),
        (":15", [0, 10]),
        (":", [0, 10, 20]),
        ("0, 15:30", [0, 20]),
        ("10,10,10:10", [10]),
    ],
)
def test_steps_are_numbers_and_ranges(command, recording, here, text, steps):
    code, _, err = command("analyze", recording, "--metrics", "stable_rank", "--steps", text)
    assert (code, err) == (0, "")
    assert dy.load(here / "run.analysis.zarr")["step"].values.tolist() == steps


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("5", "No step 5 in .*run.zarr; available: 0, 10, 20"),
        ("11:19", "has no step in 11:19; it has 0, 10, 20"),
        ("20:0", "has no step in 20:0"),
        ("a", r"steps \(--steps\) takes numbers and ranges FIRST:LAST, found 'a'"),
        ("1:b", "found '1:b'"),
        ("1:2:3", "found '1:2:3'"),
        ("1.5", "found '1.5'"),
        ("-1", "No step -1"),
        ("", "steps"),
        (",", "steps"),
    ],
)
def test_steps_that_are_none_are_refused(refused, recording, here, text, message):
    import re

    assert re.search(message, refused("analyze", recording, f"--steps={text}"))
    assert list(here.iterdir()) == []


@pytest.mark.parametrize(
    ("option", "message"),
    [
        (["--metrics", "er"], "No metric 'er'; known: effective_rank,"),
        (["--kinds", "weights"], "No kind 'weights' (did you mean 'weight'?); known: weight,"),
        (["--kinds", "adapter"], "has no adapter matrices; it has weight, gradient,"),
        (["--kinds", ""], "--kinds is empty"),
        (["--components", "heads"], "No component 'heads'; known: parameters"),
        (["--select", "nothing*"], "No matrix of "),
        (["--format", "gguf"], "There is no format 'gguf'; give one of recording, hub_cache,"),
        (["--base", "."], "is of format 'recording', which takes no base model"),
    ],
)
def test_what_the_run_does_not_have_is_refused(refused, recording, here, option, message):
    assert message in refused("analyze", recording, *option)
    assert list(here.iterdir()) == []


@pytest.mark.parametrize("verb", ["analyze", "inspect"])
def test_bad_inputs_are_one_line(refused, tmp_path, here, write_recording, verb):
    bad = tmp_path / "bad"
    (bad / "empty").mkdir(parents=True)
    (bad / "file.safetensors").write_bytes(b"x" * 100)
    (bad / "other").mkdir()
    (bad / "other/notes.txt").write_text("x")
    (bad / "future.zarr").mkdir()
    RecordingWriter(bad / "future.zarr", {"format_version": 9})
    zarr.create_group(str(bad / "group.zarr"))
    zarr.create_array(str(bad / "array.zarr"), shape=(2,), dtype="float32")
    expected = {
        "nowhere": "does not exist",
        "empty": "is empty",
        "file.safetensors": "not a readable safetensors file",
        "other": "holds no run of a known format",
        "future.zarr": "version 9",
        "group.zarr": "of format None",
        "array.zarr": "holds no readable Zarr",
    }
    for index, content in enumerate(["", "{", "[]", "null", "\0", '{"zarr_format": 3}']):
        name = f"damaged{index}.zarr"
        write_recording(bad / name, steps=(0,), shapes={"a": (2, 2)})
        (bad / name / "zarr.json").write_text(content)
        expected[name] = name
    for name, content in {
        "cut": (100).to_bytes(8, "little") + b'{"a"',
        "garbage": b"\0\xff" * 300,
        "nothing": b"",
    }.items():
        (bad / name / "checkpoint-1").mkdir(parents=True)
        (bad / name / "checkpoint-1/model.safetensors").write_bytes(content)
        expected[name] = "is not a readable safetensors file"
    for name, content in {"index": "{", "map": '{"weight_map": {"a": "../x"}}'}.items():
        (bad / name / "checkpoint-1").mkdir(parents=True)
        (bad / name / "checkpoint-1/model.safetensors.index.json").write_text(content)
        expected[name] = "model.safetensors.index.json"
    (bad / "adapter").mkdir()
    (bad / "adapter/adapter_config.json").write_text('{"peft_type": "LORA", "use_dora": true}')
    expected["adapter"] = "lora_alpha"
    for name, message in expected.items():
        assert message in refused(verb, bad / name), name
    assert list(here.iterdir()) == []


def test_a_run_without_records_is_refused_by_analyze_and_inspected(refused, command, tmp_path):
    RecordingWriter(tmp_path / "run.zarr", {})
    assert "has no records yet" in refused("analyze", tmp_path / "run.zarr")
    assert "has no" in refused("analyze", tmp_path / "run.zarr", "--steps", "0:5")
    code, out, err = command("inspect", tmp_path / "run.zarr")
    assert (code, err) == (0, "")
    assert "recording" in out


@pytest.mark.slow
def test_nan_exits_with_1_and_the_rest_is_saved(command, with_nan, here):
    code, out, err = command("analyze", with_nan)
    assert code == 1
    assert err == f"warning: {UP1} (weight) at step 10 holds NaN or Inf; it was not measured.\n"
    assert "Saved to" in out
    status = dy.load(here / "nan.analysis.zarr")["status"].sel(kind="weight")
    assert status.sel(matrix=UP1, step=10) == schema.Status.NON_FINITE
    assert (status.sel(step=[0, 20]) == schema.Status.MEASURED).all()


def test_a_damaged_checkpoint_exits_with_1_and_the_rest_is_saved(
    command, llama_checkpoints, tmp_path, here
):
    run = shutil.copytree(llama_checkpoints, tmp_path / "run")
    file = run / "checkpoint-4/model.safetensors"
    file.write_bytes(file.read_bytes()[:1000])
    code, _, err = command("analyze", run, "--metrics", "stable_rank")
    assert code == 1
    assert len(err.splitlines()) == 1
    assert err.startswith(f"warning: {file} (1000 bytes)")
    status = dy.load(here / "run.analysis.zarr")["status"].sel(kind="weight")
    assert (status.sel(step=[2, 6]) == schema.Status.MEASURED).all()
    code, out, err = command("inspect", run)
    assert (code, len(err.splitlines())) == (1, 1)
    assert "2, 4, 6" in out


@pytest.mark.slow
def test_an_output_that_exists_is_refused_before_the_work_and_left_alone(
    refused, command, recording, here
):
    assert command("analyze", recording)[0] == 0
    before = tree(here)
    assert "run.analysis.zarr exists" in refused("analyze", recording, "--steps", "0")
    assert tree(here) == before
    assert command("analyze", recording, "--steps", "0", "--overwrite")[0] == 0
    assert dy.load(here / "run.analysis.zarr")["step"].values.tolist() == [0]


def test_what_is_no_analysis_is_never_overwritten(refused, recording, tmp_path):
    (tmp_path / "home").mkdir()
    (tmp_path / "home/thesis.txt").write_text("years of work")
    (tmp_path / "notes.txt").write_text("more work")
    before = tree(tmp_path)
    for output in ("home", "notes.txt", "run.zarr"):
        message = refused("analyze", recording, "-o", tmp_path / output, "--overwrite")
        assert "left alone" in message
        assert "exists" in refused("analyze", recording, "-o", tmp_path / output)
        message = refused("compare", f"a={recording}", f"b={recording}", "-o", tmp_path / output,
                          "--overwrite")  # fmt: skip
        assert "left alone" in message
    assert "notes.txt is a file" in refused(
        "analyze", recording, "-o", tmp_path / "notes.txt/out.zarr"
    )
    assert tree(tmp_path) == before


@pytest.mark.skipif(not os.path.isdir("/proc/self"), reason="takes Linux's /proc")
def test_an_output_that_cannot_be_written_is_one_line(refused, recording, here):
    arguments = ["analyze", recording, "-o", "/proc/self/out.zarr"]
    assert "/proc/self/out.cache cannot be used as a cache" in refused(*arguments)
    assert "Cannot write /proc/self/out.zarr" in refused(*arguments, "--no-cache")


# compare ----------------------------------------------------------------------------------------


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


# plot -------------------------------------------------------------------------------------------


@pytest.mark.slow
@pytest.mark.parametrize(
    ("which", "options", "name"),
    [
        (0, [], "a.trajectory.effective_rank.weight.png"),
        (0, ["--style", "trajectory", "--by", "layer"], "a.trajectory.effective_rank.weight.png"),
        (0, ["--style", "heatmap", "--module", "up_proj"], "a.heatmap.effective_rank.weight.png"),
        (0, ["--style", "spectrum", "--matrix", UP1, "--kind", "update"],
         "a.spectrum.singular_value.update.png"),
        (1, ["--metric", "stable_rank"], "both.comparison.stable_rank.weight.png"),
        (1, ["--module", "q_proj"], "both.comparison.effective_rank.weight.png"),
        (1, ["--run", "b"], "both.trajectory.effective_rank.weight.png"),
        (1, ["--run", "b", "--style", "heatmap"], "both.heatmap.effective_rank.weight.png"),
        (0, ["--style", "spectra", "--matrix", UP1], "a.spectra.singular_value.weight.png"),
        (0, ["--style", "staircase", "--kind", "update"], "a.staircase.update.png"),
        (0, ["--style", "budget", "--by", "layer"], "a.budget.displacement.png"),
        (0, ["--style", "loss", "--x", "tokens"], "a.loss.effective_rank.weight.png"),
        (1, ["--style", "difference", "--baseline", "a"],
         "both.difference.effective_rank.weight.png"),
        (1, ["--style", "heatmap", "--panels", "run"], "both.heatmap.effective_rank.weight.png"),
        (1, ["--style", "trajectory", "--panels", "run", "--by", "layer"],
         "both.trajectory.effective_rank.weight.png"),
        (0, ["--style", "spectrum", "--matrix", UP1, "--steps", "0,20"],
         "a.spectrum.singular_value.weight.png"),
    ],
)  # fmt: skip
def test_each_style_writes_a_picture(command, saved, here, which, options, name):
    code, out, err = command("plot", saved[which], *options)
    assert (code, err) == (0, "")
    assert name in out
    assert [child.name for child in here.iterdir()] == [name]
    content = (here / name).read_bytes()
    assert content.startswith(PNG)
    assert len(content) > 5000


@pytest.mark.slow
def test_a_picture_has_the_size_that_is_asked_for_and_its_caption_is_printed(command, saved, here):
    from matplotlib.image import imread

    for options, width in (
        ([], 1020),
        (["--width", "page"], 2025),
        (["--width", "5", "--height", "2"], 1500),
        (["--slides"], 1500),
    ):
        code, out, _ = command("plot", saved[0], "-o", "figure.png", "--overwrite", *options)
        assert code == 0
        assert imread(here / "figure.png").shape[1] == width
    assert imread(here / "figure.png").shape[0] == 840  # 5.6 of 10 inches
    assert "Effective rank of the weight along optimizer steps." in " ".join(out.split())


@pytest.mark.parametrize(("suffix", "start"), [("pdf", b"%PDF"), ("svg", b"<?xml"), ("png", PNG)])
def test_the_suffix_chooses_the_format(command, saved, here, suffix, start):
    assert command("plot", saved[0], "-o", f"figure.{suffix}")[0] == 0
    assert (here / f"figure.{suffix}").read_bytes().startswith(start)


@pytest.mark.slow
def test_a_figure_that_exists_is_refused_and_left_alone(refused, command, saved, here):
    (here / "figure.png").write_bytes(b"mine")
    assert "figure.png exists" in refused("plot", saved[0], "-o", "figure.png")
    assert (here / "figure.png").read_bytes() == b"mine"
    assert command("plot", saved[0], "-o", "figure.png", "--overwrite")[0] == 0
    assert (here / "figure.png").read_bytes().startswith(PNG)


@pytest.mark.slow
def test_a_figure_that_cannot_be_written_is_one_line(refused, saved, here):
    (here / "directory.png").mkdir()
    for output in ("figure.gif.xyz", "missing/figure.png", "directory.png"):
        message = refused("plot", saved[0], "-o", output, "--overwrite")
        assert output in message
    assert [child.name for child in here.iterdir()] == ["directory.png"]


@pytest.mark.parametrize(
    ("which", "options", "message"),
    [
        (0, ["--metric", "er"], "No metric 'er' in this analysis; it has"),
        (0, ["--kind", "adapter"], "No kind 'adapter' in this analysis; it has weight,"),
        (0, ["--by", "head"], "No grouping 'head'; known: layer, module, matrix"),
        (0, ["--style", "spectrum"], "--style spectrum needs --matrix NAME"),
        (0, ["--style", "spectrum", "--matrix", "w"], "No measured weight of 'w'"),
        (0, ["--style", "heatmap", "--module", "x"], "No weight of a module 'x'"),
        (0, ["--style", "comparison"], "takes what compare() returns"),
        (0, ["--run", "a"], "No run 'a' in this result"),
        (1, ["--run", "c"], "No run 'c' in this result; it has a, b"),
        (1, ["--style", "heatmap"], "choose one of a, b"),
        (1, ["--module", "x"], "'x'"),
        (0, ["--x", "epoch"], "No 'epoch' to draw along in this result; it has step, tokens"),
        (0, ["--style", "spectra"], "--style spectra needs --matrix NAME"),
        (0, ["--style", "loss", "--metric", "er"], "No metric 'er'"),
        (1, ["--style", "difference"], "Give baseline (--baseline), one of a, b"),
        (1, ["--over", "seed"], "No setting 'seed' along run"),
        (0, ["--panels", "run"], "Panels by run are for several runs"),
        (0, ["--panels", "layers"], "did you mean 'layer'"),
        (0, ["--panels", "kind", "--kind", "weight"], "leave kind (--kind) out"),
        (0, ["--width", "colum"], "did you mean 'column'"),
        (0, ["--slides", "--width", "page"], "is a width of paper"),
        (0, ["--height", "0"], "height is 0"),
        (0, ["--style", "spectrum", "--matrix", UP1, "--steps", "0:10"], "--steps takes step num"),
        (0, ["--style", "spectrum", "--matrix", UP1, "--steps", "3"], "at step 3; steps: 0, 10"),
    ],
)
def test_what_a_result_does_not_have_cannot_be_drawn(refused, saved, here, which, options, message):
    assert message in refused("plot", saved[which], *options)
    assert list(here.iterdir()) == []


def test_only_saved_results_are_drawn(refused, recording, tmp_path):
    (tmp_path / "file").write_text("x")
    assert "is not an analysis" in refused("plot", recording)
    assert "does not exist" in refused("plot", tmp_path / "nowhere")
    assert "file" in refused("plot", tmp_path / "file")


@pytest.mark.parametrize("content", [None, "", "{", "[]", '{"zarr_format": 3}', "\0\1"])
def test_a_damaged_analysis_is_one_line(refused, saved, recording, tmp_path, content):
    damaged = shutil.copytree(saved[0], tmp_path / "damaged.zarr")
    if content is None:
        (damaged / "zarr.json").unlink()
    else:
        (damaged / "zarr.json").write_text(content)
    assert "damaged.zarr" in refused("plot", damaged)
    assert "damaged.zarr" in refused("compare", f"a={recording}", f"b={damaged}")


# inspect and list -------------------------------------------------------------------------------


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
        ("metrics", dy.METRICS),
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


def test_an_adapter_without_base_says_how_to_go_on(refused, command, tmp_path, here):
    from safetensors.numpy import save_file

    directory = tmp_path / "run/checkpoint-1"
    directory.mkdir(parents=True)
    config = {"peft_type": "LORA", "lora_alpha": 4, "r": 2, "base_model_name_or_path": "org/x"}
    (directory / "adapter_config.json").write_text(json.dumps(config))
    prefix = "base_model.model.model.layers.0.mlp.up_proj.lora_"
    rng = np.random.default_rng(0)
    factors = {
        f"{prefix}A.weight": rng.standard_normal((2, 6), np.float32),
        f"{prefix}B.weight": rng.standard_normal((8, 2), np.float32),
    }
    save_file(factors, directory / "adapter_model.safetensors")
    message = refused("analyze", tmp_path / "run")
    for text in ("--base DIR", "--kinds adapter", "'org/x'", str(directory / "base")):
        assert text in message
    assert command("analyze", tmp_path / "run", "--kinds", "adapter")[0] == 0
    measured = dy.load(here / "run.analysis.zarr")
    assert measured["matrix"].values.tolist() == ["model.layers.0.mlp.up_proj.weight"]
    code, _, err = command("inspect", tmp_path / "run")
    assert (code, len(err.splitlines())) == (1, 1)


@pytest.mark.slow
def test_workers_save_the_same_result_and_a_scheduler_that_is_not_there_is_named(
    command, refused, recording, here, monkeypatch
):
    pytest.importorskip("distributed")
    assert command("analyze", recording, "-o", "one.zarr")[0] == 0
    assert command("analyze", recording, "-o", "two.zarr", "--workers", 2, "--no-cache")[0] == 0
    one, two = (made_by_command(dy.load(f"{each}.zarr")) for each in ("one", "two"))
    assert one.identical(two)
    monkeypatch.setattr("dynamics.analysis.workers._SECONDS_TO_CONNECT", 1)
    address = ("--scheduler", "tcp://127.0.0.1:1")
    assert "No Dask scheduler" in refused("analyze", recording, "-o", "three.zarr", *address)
    assert not (here / "three.zarr").exists()
