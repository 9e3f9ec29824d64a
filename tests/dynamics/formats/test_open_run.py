import json
import shutil
import warnings

import numpy as np
import pytest
import zarr
from zarr.storage import MemoryStore

import dynamics as dy
from dynamics import formats
from dynamics.errors import DynamicsError, FormatError, MissingError
from dynamics.formats.format import Format
from dynamics.formats.shared.checkpoints import Checkpoint, CheckpointsRun
from dynamics.formats.storage.tensors import StoredTensor
from dynamics.recordings import RecordingWriter
from dynamics.schema import Status

UP_PROJ = "model.layers.1.mlp.up_proj.weight"


@pytest.fixture
def checkpoints(llama_checkpoints, tmp_path):
    """A copy of three checkpoints, to be damaged."""
    return shutil.copytree(llama_checkpoints, tmp_path / "run")


@pytest.fixture
def sharded(tiny_llama, tmp_path):
    """checkpoint-2 in one file, and checkpoint-4 in shards."""
    tiny_llama(0).save_pretrained(tmp_path / "run/checkpoint-2")
    tiny_llama(1).save_pretrained(tmp_path / "run/checkpoint-4", max_shard_size="8KB")
    return tmp_path / "run"


def measured(path, **options):
    """(analysis, its problems); every problem must be a warning too."""
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        analysis = dy.analyze(path, **options)
    problems = json.loads(analysis.attrs["problems"])
    warned = [str(each.message) for each in caught if each.category is dy.UnmeasuredWarning]
    assert warned == problems
    assert not any("\n" in problem for problem in problems)
    return analysis, problems


# Detection --------------------------------------------------------------------------------------


def test_each_layout_is_detected(write_recording, llama_checkpoints, tmp_path):
    assert dy.open_run(write_recording(tmp_path / "run.zarr")).format == "recording"
    assert dy.open_run(str(tmp_path / "run.zarr")).format == "recording"
    assert dy.open_run(write_recording(MemoryStore())).format == "recording"
    assert dy.open_run(llama_checkpoints).format == "checkpoints"
    assert dy.open_run(llama_checkpoints / "checkpoint-2").format == "checkpoints"
    (tmp_path / "adapters/checkpoint-1").mkdir(parents=True)
    (tmp_path / "adapters/checkpoint-1/adapter_config.json").write_text("{}")
    with pytest.raises(FormatError, match="adapter"):
        dy.open_run(tmp_path / "adapters")


def test_a_format_may_be_forced(llama_checkpoints, write_recording, tmp_path):
    assert dy.open_run(llama_checkpoints, format="checkpoints").format == "checkpoints"
    write_recording(tmp_path / "run.zarr")
    for format in ("checkpoints", "peft"):
        with pytest.raises(FormatError, match=r"run\.zarr"):
            dy.open_run(tmp_path / "run.zarr", format=format)
    with pytest.raises(FormatError, match="llama"):
        dy.open_run(llama_checkpoints, format="recording")


def test_an_unknown_format_lists_the_known_ones(llama_checkpoints):
    with pytest.raises(
        MissingError, match=r"'gguf'; give one of recording, .*checkpoints, .*files"
    ):
        dy.open_run(llama_checkpoints, format="gguf")


class OneArray(Format):
    """A directory with weights.npy, of which `--adapter` names the parameter."""

    name = "one_array"
    description = "weights.npy"
    options = ("adapter",)

    def recognises(self, path):
        return (path / "weights.npy").is_file()

    def open(self, path, options):
        def checkpoint():
            array = np.load(path / "weights.npy")
            offset = (path / "weights.npy").stat().st_size - array.nbytes
            weight = StoredTensor(path / "weights.npy", offset, "float32", (4, 3))
            return Checkpoint({options.adapter: weight})

        return CheckpointsRun(path, self.name, {7: checkpoint})


def test_a_format_of_ones_own_is_one_class_and_one_entry_of_the_list(monkeypatch, tmp_path):
    weights = np.arange(12, dtype=np.float32).reshape(4, 3)
    np.save(tmp_path / "weights.npy", weights)
    monkeypatch.setattr(formats, "FORMATS", (*formats.FORMATS, OneArray()))
    run = dy.open_run(tmp_path, adapter="a.weight")
    assert (run.format, run.steps.tolist()) == ("one_array", [7])
    np.testing.assert_array_equal(run.read("a.weight", 7, "weight").values, weights)
    with pytest.raises(DynamicsError, match="of format 'one_array', which takes no base model"):
        dy.open_run(tmp_path, base=tmp_path)
    with pytest.raises(FormatError, match="a file, but a run of format 'one_array' is a directory"):
        dy.open_run(tmp_path / "weights.npy", format="one_array")


@pytest.mark.parametrize("format", [None, "checkpoints", "peft", "recording"])
def test_a_path_that_does_not_exist_is_said_to(tmp_path, format):
    with pytest.raises(FormatError, match="nowhere does not exist"):
        dy.open_run(tmp_path / "nowhere", format=format)


@pytest.mark.parametrize("format", ["checkpoints", "peft", "recording", "deepspeed", "dcp"])
def test_a_file_is_no_run_of_a_format_of_directories(tmp_path, format):
    (tmp_path / "model.safetensors").write_bytes(b"x")
    with pytest.raises(FormatError, match=f"a file, but a run of format '{format}' is a"):
        dy.open_run(tmp_path / "model.safetensors", format=format)


def test_an_empty_directory_is_said_to_be_empty(tmp_path):
    with pytest.raises(FormatError, match="is empty"):
        dy.open_run(tmp_path)


def test_an_unknown_layout_lists_what_is_recognised_and_what_was_found(tmp_path):
    (tmp_path / "weights.h5").write_bytes(b"x")
    (tmp_path / "logs").mkdir()
    with pytest.raises(FormatError) as caught:
        dy.open_run(tmp_path)
    message = str(caught.value)
    assert "found logs/, weights.h5" in message
    for word in ("model.safetensors", "adapter_config.json", "Zarr"):
        assert word in message


def test_of_many_files_some_are_listed(tmp_path):
    for index in range(30):
        (tmp_path / f"{index:02}.txt").touch()
    with pytest.raises(FormatError, match=r"00\.txt, .*07\.txt, \.\.\. \(30 entries\)"):
        dy.open_run(tmp_path)


# Damaged checkpoints ----------------------------------------------------------------------------


def header_length(file):
    return int.from_bytes(file.read_bytes()[:8], "little")


DAMAGES = {
    "empty": lambda content, header: b"",
    "in the length": lambda content, header: content[:5],
    "after the length": lambda content, header: content[:8],
    "in the header": lambda content, header: content[: 8 + header // 2],
    "after the header": lambda content, header: content[: 8 + header],
    "in the tensors": lambda content, header: content[: len(content) // 2],
    "one byte short": lambda content, header: content[:-1],
    "one byte long": lambda content, header: content + b"\0",
    "garbage": lambda content, header: b"\x93NUMPY" * 500,
    "huge header": lambda content, header: b"\xff" * 8 + content[8:],
    "text": lambda content, header: b"version https://git-lfs.github.com/spec/v1\n",
    "header no json": lambda content, header: content[:8] + b"x" * header + content[8 + header :],
}


@pytest.mark.parametrize("damage", DAMAGES)
def test_a_damaged_file_is_named_and_the_other_checkpoints_are_measured(checkpoints, damage):
    file = checkpoints / "checkpoint-4/model.safetensors"
    file.write_bytes(DAMAGES[damage](file.read_bytes(), header_length(file)))
    analysis, problems = measured(checkpoints, metrics=["stable_rank"])
    assert len(problems) == 1
    assert str(file) in problems[0]
    status = analysis["status"].sel(matrix=UP_PROJ)
    assert status.sel(kind="weight").values.tolist() == [
        Status.MEASURED, Status.UNREADABLE, Status.MEASURED
    ]  # fmt: skip
    assert status.sel(kind="update").values.tolist() == [
        Status.UNDEFINED, Status.UNREADABLE, Status.UNREADABLE
    ]  # fmt: skip
    assert status.sel(kind="displacement", step=6) == Status.MEASURED
    assert analysis["stable_rank"].sel(kind="weight", step=4).isnull().all()
    assert analysis["stable_rank"].sel(kind="weight", step=[2, 6]).notnull().all()


@pytest.mark.parametrize("damage", ["empty", "in the header", "in the tensors", "garbage"])
def test_a_directory_in_which_nothing_can_be_read_is_refused(checkpoints, damage):
    for step in (2, 4, 6):
        file = checkpoints / f"checkpoint-{step}/model.safetensors"
        file.write_bytes(DAMAGES[damage](file.read_bytes(), header_length(file)))
    with pytest.raises(FormatError, match=r"checkpoint-2/model\.safetensors \(\d+ bytes\)"):
        dy.open_run(checkpoints)


def test_a_model_without_matrices_is_refused(tmp_path):
    from safetensors.numpy import save_file

    (tmp_path / "checkpoint-1").mkdir()
    save_file({"norm": np.ones(4, np.float32)}, tmp_path / "checkpoint-1/model.safetensors")
    with pytest.raises(FormatError, match="holds no matrices"):
        dy.open_run(tmp_path)


def test_a_missing_shard_is_named(sharded):
    shard = sorted((sharded / "checkpoint-4").glob("model-*.safetensors"))[1]
    shard.unlink()
    analysis, problems = measured(sharded)
    assert len(problems) == 1
    assert shard.name in problems[0]
    assert "checkpoint-4" in problems[0]
    assert (analysis["status"].sel(kind="weight", step=4) == Status.UNREADABLE).all()
    assert (analysis["status"].sel(kind="weight", step=2) == Status.MEASURED).all()


def test_a_damaged_shard_is_named(sharded):
    shard = sorted((sharded / "checkpoint-4").glob("model-*.safetensors"))[1]
    shard.write_bytes(shard.read_bytes()[:-3])
    _, problems = measured(sharded)
    assert len(problems) == 1
    assert str(shard) in problems[0]


def test_a_shard_that_lacks_a_tensor_of_the_index_is_named(sharded):
    first, second, *_ = sorted((sharded / "checkpoint-4").glob("model-*.safetensors"))
    shutil.copy(first, second)
    _, problems = measured(sharded)
    assert len(problems) == 1
    assert f"{second} lacks " in problems[0]


INDEXES = {
    "empty": "",
    "garbage": "\0\1\2",
    "no utf-8": b"\xff\xfe{}",
    "list": "[1, 2]",
    "no weight_map": '{"metadata": {}}',
    "weight_map list": '{"weight_map": ["a"]}',
    "weight_map empty": '{"weight_map": {}}',
    "number": '{"weight_map": {"a": 3}}',
    "file list": '{"weight_map": {"a": ["x", "y"]}}',
    "outside": '{"weight_map": {"a": "../checkpoint-2/model.safetensors"}}',
    "absolute": '{"weight_map": {"a": "/etc/passwd"}}',
    "directory": '{"weight_map": {"a": ".."}}',
}


@pytest.mark.parametrize("index", INDEXES)
def test_a_damaged_index_is_named(sharded, index):
    file = sharded / "checkpoint-4/model.safetensors.index.json"
    content = INDEXES[index]
    file.write_bytes(content if isinstance(content, bytes) else content.encode())
    analysis, problems = measured(sharded, kinds=["weight"])
    assert len(problems) == 1
    assert "checkpoint-4" in problems[0]
    assert file.name in problems[0]
    assert (analysis["status"].sel(step=2) == Status.MEASURED).all()
    assert (analysis["status"].sel(step=4) == Status.UNREADABLE).all()
    shutil.rmtree(sharded / "checkpoint-2")
    with pytest.raises(FormatError, match="checkpoint-4"):
        dy.open_run(sharded)


def test_a_checkpoint_without_a_model_among_good_ones_is_named(checkpoints):
    (checkpoints / "checkpoint-4/model.safetensors").unlink()
    (checkpoints / "checkpoint-8").mkdir()
    analysis, problems = measured(checkpoints, kinds=["weight"])
    assert [
        f"checkpoint-{step} holds no model.safetensors" in problem
        for step, problem in zip((4, 8), problems, strict=True)
    ] == [True, True]
    status = analysis["status"].sel(kind="weight", matrix=UP_PROJ)
    assert status.values.tolist() == [
        Status.MEASURED, Status.UNREADABLE, Status.MEASURED, Status.UNREADABLE
    ]  # fmt: skip


def test_a_damaged_config_is_named(checkpoints):
    (checkpoints / "checkpoint-2/config.json").write_text("{")
    analysis, problems = measured(checkpoints, kinds=["weight"])
    assert len(problems) == 1
    assert "checkpoint-2/config.json is not readable JSON" in problems[0]
    assert (analysis["status"].sel(step=[4, 6]) == Status.MEASURED).all()


# Numbers that are none --------------------------------------------------------------------------


@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf])
def test_a_matrix_with_a_number_that_is_none_is_named_and_the_rest_measured(write_recording, value):
    def spoil(step, name, weight):
        if step == 10 and name == UP_PROJ:
            weight[3, 2] = value

    analysis, problems = measured(dy.open_run(write_recording(MemoryStore(), spoil=spoil)))
    assert len(problems) == 1
    assert f"{UP_PROJ} (weight) at step 10 holds NaN or Inf" in problems[0]
    status = analysis["status"]
    assert status.sel(kind="weight", matrix=UP_PROJ).values.tolist() == [
        Status.MEASURED, Status.NON_FINITE, Status.MEASURED
    ]  # fmt: skip
    assert status.sel(kind="update", matrix=UP_PROJ).values.tolist() == [
        Status.UNDEFINED, Status.NON_FINITE, Status.NON_FINITE
    ]  # fmt: skip
    assert status.sel(kind="displacement", matrix=UP_PROJ, step=20) == Status.MEASURED
    others = status.drop_sel(matrix=UP_PROJ)
    assert not (others == Status.NON_FINITE).any()
    assert (others.sel(kind="weight") == Status.MEASURED).all()
    assert analysis["effective_rank"].sel(kind="weight", step=10, matrix=UP_PROJ).isnull()


def test_nan_in_a_checkpoint_is_named(checkpoints):
    from safetensors.numpy import load_file, save_file

    file = checkpoints / "checkpoint-6/model.safetensors"
    tensors = load_file(file)
    tensors[UP_PROJ][0, 0] = np.nan
    save_file(tensors, file)
    analysis, problems = measured(checkpoints)
    assert problems == [f"{UP_PROJ} (weight) at step 6 holds NaN or Inf; it was not measured."]
    assert (analysis["status"].sel(kind="weight", step=[2, 4]) == Status.MEASURED).all()


# Requests that cannot be served -----------------------------------------------------------------


@pytest.fixture(scope="module")
def run(write_recording):
    return dy.open_run(write_recording(MemoryStore()))


@pytest.mark.parametrize(
    ("request_", "message"),
    [
        ({"steps": [5]}, r"No step 5 in .*; available: 0, 10, 20"),
        ({"steps": [0, 11]}, r"No step 11"),
        ({"metrics": ["er"]}, r"No metric 'er'; known: effective_rank, "),
        (
            {"kinds": ["weights"]},
            r"No kind 'weights' \(did you mean 'weight'\?\); known: weight, base, ",
        ),
        ({"kinds": ["adapter"]}, r"has no adapter matrices; it has weight, gradient, update, "),
        ({"components": ["heads"]}, r"'heads'.*parameters"),
        (
            {"select": "*_proj_"},
            r"matches '\*_proj_' \(did you mean '._proj'\?\); it has model\.embed",
        ),
        ({"steps": []}, "steps"),
        ({"kinds": []}, "kind"),
        ({"components": []}, "component"),
    ],
    ids=str,
)
def test_what_the_run_does_not_have_is_refused_with_what_it_has(run, request_, message):
    with pytest.raises(MissingError, match=message) as caught:
        dy.analyze(run, **request_)
    assert "\n" not in str(caught.value)


def test_of_many_steps_the_first_and_the_last_are_listed(write_recording):
    shapes = {"a.weight": (2, 2)}
    run = dy.open_run(write_recording(MemoryStore(), steps=range(0, 300, 10), shapes=shapes))
    with pytest.raises(
        MissingError, match=r"available: 0, 10, .*90, \.\.\., 290; the nearest is 0\."
    ):
        dy.analyze(run, steps=[5])


def test_selecting_takes_globs_with_and_without_the_suffix(run):
    up = dy.analyze(run, select=["*.0.*up_proj", "*embed_tokens.weight"], metrics=[])
    assert up["matrix"].values.tolist() == [
        "model.embed_tokens.weight", "model.layers.0.mlp.up_proj.weight"
    ]  # fmt: skip


def test_a_run_without_records_is_refused(tmp_path):
    RecordingWriter(tmp_path / "run.zarr", {})
    with pytest.raises(MissingError, match=r"run\.zarr has no records yet"):
        dy.analyze(tmp_path / "run.zarr")


def test_a_logged_scalar_never_takes_the_place_of_a_result():
    rng = np.random.default_rng(0)
    for name in ("stable_rank", "status", "step", "kind", "matrix", "rows"):
        store = MemoryStore()
        RecordingWriter(store, {}).append(
            3,
            {"weight/a": rng.standard_normal((4, 4))},
            attrs={"weight/a": {"source_dtype": "float64"}},
            scalars={name: 123.0},
        )
        analysis = dy.analyze(dy.open_run(store))
        assert analysis["step"].values.tolist() == [3]
        assert analysis["matrix"].values.tolist() == ["a"]
        assert analysis["status"].values.tolist() == [[[Status.MEASURED]], [[2]], [[2]]]
        assert float(analysis["stable_rank"].sel(kind="weight").squeeze()) < 4
        assert analysis[f"logged_{name}"].values.tolist() == [123.0]


# Recordings that are none -----------------------------------------------------------------------


def test_a_recording_of_an_unknown_version_is_refused(tmp_path):
    RecordingWriter(tmp_path / "run.zarr", {"format_version": 9})
    with pytest.raises(FormatError, match="recording of version 9; this release reads"):
        dy.open_run(tmp_path / "run.zarr")


def test_a_zarr_store_that_is_no_recording_is_refused(tmp_path):
    zarr.create_group(str(tmp_path / "group.zarr"), attributes={"format": "their-thing"})
    zarr.create_array(str(tmp_path / "array.zarr"), shape=(3,), dtype="float32")
    with pytest.raises(FormatError, match=r"group\.zarr is a Zarr store of format 'their-thing'"):
        dy.open_run(tmp_path / "group.zarr")
    with pytest.raises(FormatError, match=r"array\.zarr"):
        dy.open_run(tmp_path / "array.zarr")


@pytest.mark.slow
def test_an_analysis_is_no_run(write_recording, tmp_path):
    dy.save(dy.analyze(write_recording(MemoryStore())), tmp_path / "a.zarr")
    with pytest.raises(FormatError, match=r"a\.zarr is a Zarr store of format '.*analysis'"):
        dy.open_run(tmp_path / "a.zarr")


@pytest.mark.parametrize("content", ["", "{", "[]", "null", '{"zarr_format": 3}', "\0"])
def test_a_damaged_root_of_a_recording_is_named(write_recording, tmp_path, content):
    write_recording(tmp_path / "run.zarr")
    (tmp_path / "run.zarr/zarr.json").write_text(content)
    with pytest.raises(FormatError, match=r"run\.zarr (holds no readable|is a) Zarr") as caught:
        dy.open_run(tmp_path / "run.zarr")
    assert "\n" not in str(caught.value)


def test_a_damaged_chunk_of_a_recording_is_named_and_the_rest_measured(write_recording, tmp_path):
    path = write_recording(tmp_path / "run.zarr")
    chunk = path / f"weight/{UP_PROJ}/c/1/0/0"
    chunk.write_bytes(chunk.read_bytes()[:20])
    analysis, problems = measured(path)
    assert len(problems) == 1
    assert f"weight/{UP_PROJ}" in problems[0]
    assert analysis["status"].sel(kind="weight", matrix=UP_PROJ).values.tolist() == [
        Status.MEASURED, Status.UNREADABLE, Status.MEASURED
    ]  # fmt: skip


@pytest.mark.parametrize("transposed", [False, True])
def test_a_recording_of_adapters_alone_is_measured(transposed):
    store, rng = MemoryStore(), np.random.default_rng(0)
    a, b = rng.standard_normal((2, 5)), rng.standard_normal((7, 2))
    attrs = {"source_dtype": "float64", "scaling": 3.0, "transposed": transposed}
    paths = ["adapter/w.weight/A", "adapter/w.weight/B"]
    RecordingWriter(store, {}).append(
        4, dict(zip(paths, (a, b), strict=True)), attrs=dict.fromkeys(paths, attrs)
    )
    analysis = dy.analyze(dy.open_run(store))
    assert analysis["kind"].values.tolist() == ["adapter"]
    shape = int(analysis["rows"].item()), int(analysis["cols"].item())
    assert shape == ((5, 7) if transposed else (7, 5))
    expected = np.linalg.svd(3 * b @ a, compute_uv=False)
    found = analysis["singular_value"].squeeze().values
    np.testing.assert_allclose(found, expected, atol=1e-12 * expected[0])


def test_a_recording_read_by_itself_gives_the_values_and_differences(write_recording):
    run = dy.open_run(write_recording(MemoryStore(), merges=(10,)))
    weights = [run.read(UP_PROJ, step, "weight").values.astype(float) for step in (0, 10, 20)]
    analysis = dy.analyze(run, metrics=["frobenius_norm"])
    norm = analysis["frobenius_norm"].sel(matrix=UP_PROJ)
    expected = {
        ("weight", 20): weights[2],
        ("update", 20): weights[2] - weights[1],
        ("displacement", 20): weights[2] - weights[0],
    }
    for (kind, step), matrix in expected.items():
        found = float(norm.sel(kind=kind, step=step))
        assert found == pytest.approx(np.linalg.norm(matrix), rel=1e-12)
    assert analysis["status"].sel(kind="gradient", step=0, matrix=UP_PROJ) == Status.NOT_RECORDED
    assert analysis["loss"].values.tolist()[1:] == [4.0, 3.0]
    assert analysis["tokens"].values.tolist() == [0, 640, 1280]
    assert json.loads(analysis.attrs["events"]) == [
        {"step": 10, "kind": "merge", "attrs": {"index": 1}}
    ]
    assert isinstance(DynamicsError("x"), ValueError)
