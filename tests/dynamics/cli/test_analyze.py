"""`dynamics analyze`: the same as the library, and errors of one line."""

import json
import os
import shutil

import numpy as np
import pytest
import zarr

import dynamics as dy
from dynamics import schema
from dynamics.recordings import RecordingWriter
from tests.dynamics.cli.conftest import UP1, made_by_command


def tree(path):
    return {file: file.read_bytes() for file in sorted(path.rglob("*")) if file.is_file()}


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
