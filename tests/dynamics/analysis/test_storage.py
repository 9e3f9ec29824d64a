import json
import os
import warnings

import numpy as np
import pytest
import xarray as xr
import zarr
from zarr.storage import MemoryStore

import dynamics as dy
from dynamics.analysis.storage import check_output, is_analysis
from dynamics.errors import FormatError, OutputExistsError
from dynamics.recordings import Recording, RecordingWriter


@pytest.fixture(scope="module")
def analysis(write_recording):
    return dy.analyze(write_recording(MemoryStore(), merges=(10,)))


def assert_same(found, expected):
    xr.testing.assert_identical(found, expected)
    for name, each in expected.variables.items():
        assert found[name].dtype == each.dtype, name


def tree(path):
    return {file: file.read_bytes() for file in sorted(path.rglob("*")) if file.is_file()}


@pytest.mark.slow
def test_an_analysis_is_loaded_as_it_was_saved(analysis, tmp_path):
    assert dy.save(analysis, tmp_path / "a.zarr") == tmp_path / "a.zarr"
    loaded = dy.load(tmp_path / "a.zarr")
    assert_same(loaded, analysis)
    assert is_analysis(tmp_path / "a.zarr")
    assert [child.name for child in tmp_path.iterdir()] == ["a.zarr"]


@pytest.mark.slow
@pytest.mark.skipif(not hasattr(os, "posix_fallocate"), reason="this system reserves no disk space")
@pytest.mark.filterwarnings("ignore::dynamics.UnmeasuredWarning")
@pytest.mark.parametrize("disk", ["free", "full"])
def test_singular_values_that_are_too_many_for_memory_are_the_same(
    write_recording, tmp_path, monkeypatch, disk
):
    def spoil(step, name, weight):
        if step == 10 and "layers.1" in name:
            weight[3, 4] = np.inf

    shapes = {f"model.layers.{i}.mlp.up_proj.weight": (16, 8 + i) for i in range(2)}
    run = write_recording(tmp_path / "run.zarr", shapes=shapes, spoil=spoil)
    expected = dy.analyze(run)
    monkeypatch.setattr("dynamics.analysis.results._IN_MEMORY", 0)
    monkeypatch.setattr("dynamics.analysis.results._AT_ONCE", 10)
    if disk == "full":

        def refuse(*_):
            raise OSError(28, "No space left on device")

        monkeypatch.setattr("os.posix_fallocate", refuse)
    found = dy.analyze(run)
    base = found["singular_value"].values
    while base.base is not None and not isinstance(base, np.memmap):
        base = base.base
    assert isinstance(base, np.memmap) == (disk == "free")
    assert_same(found, expected)
    dy.save(found, tmp_path / "a.zarr")
    assert_same(dy.load(tmp_path / "a.zarr"), expected)
    without = dy.load(tmp_path / "a.zarr", without=["singular_value"])
    assert_same(without, expected.drop_vars("singular_value"))


@pytest.mark.slow
def test_a_comparison_and_its_difference_are_loaded_as_they_were_saved(
    analysis, write_recording, tmp_path
):
    other = dy.analyze(write_recording(MemoryStore(), seed=1, shapes={"a": (3, 5), "b": (2, 2)}))
    both = dy.compare({"one": analysis, "other": other})
    for name, dataset in (("both", both), ("less", dy.difference(both, baseline="one"))):
        dy.save(dataset, tmp_path / name)
        assert_same(dy.load(tmp_path / name), dataset)


@pytest.mark.slow
def test_an_analysis_may_be_saved_again_after_loading(analysis, tmp_path):
    dy.save(analysis, tmp_path / "a.zarr")
    dy.save(dy.load(tmp_path / "a.zarr"), tmp_path / "b.zarr")
    assert_same(dy.load(tmp_path / "b.zarr"), analysis)


@pytest.mark.slow
def test_a_loaded_analysis_does_not_need_its_file_any_more(analysis, tmp_path):
    dy.save(analysis, tmp_path / "a.zarr")
    loaded = dy.load(tmp_path / "a.zarr")
    for file in tree(tmp_path / "a.zarr"):
        file.unlink()
    assert_same(loaded, analysis)


@pytest.mark.slow
def test_scalars_with_a_slash_in_their_name_are_kept(tmp_path):
    store = MemoryStore()
    RecordingWriter(store, {}).append(
        0,
        {"weight/a": np.eye(3)},
        attrs={"weight/a": {"source_dtype": "float64"}},
        scalars={"train/loss": 2.5, "eval/loss/mean": 3.5},
    )
    analysis = dy.analyze(dy.open_run(store))
    assert analysis["train.loss"].values.tolist() == [2.5]
    assert analysis["train.loss"].attrs["long_name"] == "train/loss"
    dy.save(analysis, tmp_path / "a.zarr")
    assert_same(dy.load(tmp_path / "a.zarr"), analysis)


@pytest.mark.slow
def test_saving_and_loading_warn_about_nothing(analysis, tmp_path):
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        dy.save(analysis, tmp_path / "a.zarr")
        dy.load(tmp_path / "a.zarr")
        dy.save(analysis, tmp_path / "a.zarr", overwrite=True)


def test_plain_xarray_opens_what_was_saved(analysis, tmp_path):
    dy.save(analysis, tmp_path / "a.zarr")
    with xr.open_zarr(tmp_path / "a.zarr") as opened:
        np.testing.assert_array_equal(opened["effective_rank"], analysis["effective_rank"])
        assert opened["kind"].values.tolist() == analysis["kind"].values.tolist()
        assert opened["stable_rank"].attrs["long_name"] == "stable rank"


def test_the_saved_file_has_the_permissions_of_any_other(analysis, tmp_path):
    (tmp_path / "ordinary").mkdir()
    dy.save(analysis, tmp_path / "a.zarr")
    assert (tmp_path / "a.zarr").stat().st_mode == (tmp_path / "ordinary").stat().st_mode


def test_missing_parents_are_made(analysis, tmp_path):
    dy.save(analysis, tmp_path / "x/y/a.zarr")
    assert is_analysis(tmp_path / "x/y/a.zarr")


def test_a_save_that_fails_leaves_nothing_behind(analysis, tmp_path):
    with pytest.raises(TypeError):
        dy.save(analysis.assign_attrs(bad=object()), tmp_path / "a.zarr")
    assert list(tmp_path.iterdir()) == []


@pytest.mark.slow
def test_a_save_that_fails_keeps_the_old_output(analysis, tmp_path):
    dy.save(analysis, tmp_path / "a.zarr")
    before = tree(tmp_path)
    with pytest.raises(TypeError):
        dy.save(analysis.assign_attrs(bad=object()), tmp_path / "a.zarr", overwrite=True)
    assert tree(tmp_path) == before
    assert_same(dy.load(tmp_path / "a.zarr"), analysis)


@pytest.mark.slow
def test_an_output_is_replaced_only_where_asked(analysis, tmp_path):
    dy.save(analysis, tmp_path / "a.zarr")
    before = tree(tmp_path)
    with pytest.raises(OutputExistsError, match=r"a\.zarr exists; .*--overwrite"):
        dy.save(analysis.isel(step=[0]), tmp_path / "a.zarr")
    assert tree(tmp_path) == before
    dy.save(analysis.isel(step=[0]), tmp_path / "a.zarr", overwrite=True)
    assert dy.load(tmp_path / "a.zarr").sizes["step"] == 1
    assert [child.name for child in tmp_path.iterdir()] == ["a.zarr"]


def test_an_empty_directory_may_be_overwritten(analysis, tmp_path):
    (tmp_path / "a.zarr").mkdir()
    dy.save(analysis, tmp_path / "a.zarr", overwrite=True)
    assert is_analysis(tmp_path / "a.zarr")


def test_what_is_not_ours_is_left_alone_even_with_overwrite(analysis, tmp_path):
    (tmp_path / "home").mkdir()
    (tmp_path / "home/thesis.txt").write_text("years of work")
    (tmp_path / "notes.txt").write_text("more work")
    zarr.create_group(str(tmp_path / "theirs.zarr"), attributes={"data": "precious"})
    zarr.create_array(str(tmp_path / "array.zarr"), shape=(2,), dtype="float32")
    before = tree(tmp_path)
    for name in ("home", "notes.txt", "theirs.zarr", "array.zarr"):
        with pytest.raises(OutputExistsError, match=f"{name} .*left alone"):
            dy.save(analysis, tmp_path / name, overwrite=True)
        with pytest.raises(OutputExistsError, match=name):
            dy.save(analysis, tmp_path / name)
    assert tree(tmp_path) == before


def test_a_recording_is_never_overwritten_by_an_analysis(analysis, write_recording, tmp_path):
    write_recording(tmp_path / "run.zarr")
    with pytest.raises(OutputExistsError, match=r"run\.zarr .*left alone"):
        dy.save(analysis, tmp_path / "run.zarr", overwrite=True)
    assert Recording(tmp_path / "run.zarr").steps.tolist() == [0, 10, 20]


def test_checking_an_output_writes_nothing(tmp_path):
    assert check_output(str(tmp_path / "a.zarr"), overwrite=False) == tmp_path / "a.zarr"
    assert list(tmp_path.iterdir()) == []


def test_an_output_below_a_file_is_refused_before_the_work(tmp_path):
    (tmp_path / "file").write_text("x")
    with pytest.raises(OutputExistsError, match="file is a file"):
        check_output(tmp_path / "file/a.zarr", overwrite=False)


def test_loading_what_does_not_exist_is_refused(tmp_path):
    with pytest.raises(FormatError, match="nowhere does not exist"):
        dy.load(tmp_path / "nowhere")
    assert not is_analysis(tmp_path / "nowhere")


def test_loading_something_else_is_refused(write_recording, tmp_path):
    write_recording(tmp_path / "run.zarr")
    zarr.create_group(str(tmp_path / "group.zarr"))
    zarr.create_array(str(tmp_path / "array.zarr"), shape=(2,), dtype="float32")
    (tmp_path / "file").write_text("x")
    (tmp_path / "directory").mkdir()
    (tmp_path / "directory/x").write_text("x")
    for name in ("run.zarr", "group.zarr", "array.zarr", "file", "directory"):
        with pytest.raises(FormatError, match=name) as caught:
            dy.load(tmp_path / name)
        assert "\n" not in str(caught.value)
        assert not is_analysis(tmp_path / name)


def test_an_analysis_of_an_unknown_version_is_refused(analysis, tmp_path):
    dy.save(analysis.assign_attrs(format_version=99), tmp_path / "a.zarr")
    with pytest.raises(FormatError, match="version 99; this release reads 1"):
        dy.load(tmp_path / "a.zarr")


@pytest.mark.slow
@pytest.mark.parametrize("content", [None, "", "{", "[]", "null", '{"zarr_format": 3}', "\0\1"])
def test_a_damaged_root_is_one_clear_error(analysis, tmp_path, content):
    path = dy.save(analysis, tmp_path / "a.zarr")
    if content is None:
        (path / "zarr.json").unlink()
    else:
        (path / "zarr.json").write_text(content)
    with pytest.raises(FormatError, match=r"a\.zarr") as caught:
        dy.load(path)
    assert "\n" not in str(caught.value)
    assert not is_analysis(path)


@pytest.mark.slow
@pytest.mark.parametrize("cut", [0, 10, 200, -1])
def test_a_truncated_root_is_one_clear_error(analysis, tmp_path, cut):
    path = dy.save(analysis, tmp_path / "a.zarr")
    content = (path / "zarr.json").read_bytes()
    (path / "zarr.json").write_bytes(content[:cut])
    with pytest.raises(FormatError, match=r"a\.zarr"):
        dy.load(path)


def test_a_truncated_chunk_is_one_clear_error(analysis, tmp_path):
    path = dy.save(analysis, tmp_path / "a.zarr")
    chunk = next(file for file in tree(path) if "singular_value/c" in str(file))
    chunk.write_bytes(chunk.read_bytes()[:-20])
    with pytest.raises(FormatError, match=r"a\.zarr") as caught:
        dy.load(path)
    assert "\n" not in str(caught.value)


@pytest.mark.slow
def test_what_is_said_of_the_run_survives(analysis, tmp_path):
    loaded = dy.load(dy.save(analysis, tmp_path / "a.zarr"))
    assert json.loads(loaded.attrs["events"])[0]["kind"] == "merge"
    assert json.loads(loaded.attrs["source_attrs"])["config"] == {"hidden_size": 8}
