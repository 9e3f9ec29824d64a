"""Parameters and scalars may be called anything: they are read back under the same names."""

import json

import numpy as np
import pytest
import xarray as xr
from zarr.storage import MemoryStore

from dynamics.recordings import Recording, RecordingWriter, factor_path, matrix_path, paths, verify
from dynamics.runs.run import Event
from tests.dynamics.recordings.small_matrices import is_same, matrix

ORDINARY = ("model.layers.0.self_attn.q_proj.weight", "loss", "grad_norm", "Träger", "a b", "MFU:1")
NAMES = (
    *ORDINARY,
    *("a/b", "/", "//", "/loss", "loss/", "loss/ce", "eval/loss", "..", ".", "../..", "...", ".x"),
    *("zarr.json", "ZARR.json", ".zgroup", "c", "c/0", "0", "A", "B", "step", "event", "bound"),
    *("out_4", "in_3", "rank_2", "index", "matrix", "Step", "tokens/s", "__proto__", "__init__"),
    *(
        "%",
        "100%",
        "%2F",
        "a%2Fb",
        "%~",
        "a*",
        "a?",
        "[0]",
        "{x}",
        "a\\b",
        "#",
        "~",
        "?versionId=1",
    ),
    *("new\nline", "tab\t", "nul\0", "\x1b[31m", "‮", "\ud800", " ", " x", "x ", "x.", "'", '"'),
    *(
        "Loss",
        "LOSS",
        "é",
        "e\u0301",
        "ß",
        "ss",
        "İ",
        "数据",
        "🙂",
        "n" * 239,
        "n" * 240,
        "n" * 241,
    ),
    *("n" * 5000, "n" * 5000 + "m", "数" * 100, "/" * 300, "%" * 300, "N" * 241, "数" * 100 + "据"),
)


def written(store):
    """A recording with each name as parameter, LoRA factors and scalar, one after another."""
    with RecordingWriter(store, {}) as writer:
        for step in range(2):
            matrices = {}
            for number, name in enumerate(NAMES):
                matrices[matrix_path("weight", name)] = matrix(number + step)
                matrices[factor_path(name, "A")] = matrix(number + step, (2, 3))
                matrices[factor_path(name, "B")] = matrix(number + step, (4, 2))
            scalars = {name: number + step for number, name in enumerate(NAMES)}
            writer.append(step, matrices, scalars=scalars)
        writer.event(Event(1, "merge", {}))


def check(store):
    recording = Recording(store)
    assert len(set(NAMES)) == len(NAMES)
    assert set(recording.parameters("weight")) == set(NAMES)
    assert set(recording.parameters("adapter")) == set(NAMES)
    assert set(recording.scalars) == set(NAMES)
    for number, name in enumerate(NAMES):
        for step in range(2):
            found = [
                recording.read(path, step)
                for path in (matrix_path("weight", name), *(factor_path(name, f) for f in "AB"))
            ]
            shapes = (4, 3), (2, 3), (4, 2)
            for values, shape in zip(found, shapes, strict=True):
                assert is_same(values, matrix(number + step, shape)), name
        assert recording.scalars[name].tolist() == [number, number + 1], name
    assert (verify(recording).damaged, verify(recording).sound) == ((), 2)
    assert verify(recording).leftovers == ()


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["folder", "memory"])
def test_every_name_is_read_back(tmp_path, kind):
    store = tmp_path / "run.zarr" if kind == "folder" else MemoryStore()
    written(store)
    check(store)
    with xr.open_datatree(str(store) if kind == "folder" else store, engine="zarr") as tree:
        named = {
            values.attrs.get("name", name): values
            for name, values in tree["scalars"].data_vars.items()
        }
        assert set(named) == set(NAMES)
        assert named["loss/ce"].values.tolist() == [NAMES.index("loss/ce") + at for at in (0, 1)]
        assert len(tree["weight"].data_vars) == len(tree["adapter"].children) == len(NAMES)


@pytest.mark.slow
def test_a_writer_goes_on_with_every_name(tmp_path):
    store = tmp_path / "run.zarr"
    written(store)
    with RecordingWriter(store, {}, resume=True) as writer:
        writer.append(
            2,
            {matrix_path("weight", name): matrix(0) for name in NAMES},
            scalars=dict.fromkeys(NAMES, 7.0),
        )
    recording = Recording(store)
    assert set(recording.scalars) == set(recording.parameters("weight")) == set(NAMES)
    assert all(values[-1] == 7 for values in recording.scalars.values())
    assert all(is_same(recording.read(matrix_path("weight", name), 2), matrix(0)) for name in NAMES)
    assert verify(recording).sound == 3


def test_no_two_names_share_a_folder_where_case_and_composition_do_not_count(tmp_path):
    store = tmp_path / "run.zarr"
    with RecordingWriter(store, {}) as writer:
        writer.append(
            0, {}, scalars={"loss": 1.0, "Loss": 2.0, "LOSS": 3.0, "é": 4.0, "e\u0301": 5.0}
        )
    folders = [each.name for each in (store / "scalars").iterdir() if each.is_dir()]
    assert len({each.casefold() for each in folders}) == len(folders) == 5
    scalars = Recording(store).scalars
    assert {name: each[0] for name, each in scalars.items()} == {
        "loss": 1.0, "Loss": 2.0, "LOSS": 3.0, "é": 4.0, "e\u0301": 5.0
    }  # fmt: skip


@pytest.mark.parametrize("name", ORDINARY)
def test_an_ordinary_name_is_its_path(name):
    assert matrix_path("weight", name) == f"weight/{name}"
    assert paths.scalar_path(name) == f"scalars/{name}"
    store = MemoryStore()
    RecordingWriter(store, {}).append(0, {matrix_path("weight", name): matrix(0)})
    assert "name" not in dict(Recording(store).array(f"weight/{name}").attrs)


@pytest.mark.parametrize("name", NAMES)
def test_a_path_shows_its_name(name):
    assert paths.decoded(paths.scalar_path(name)) == f"scalars/{name}"
    assert len(paths.encoded(name).encode()) <= 240
    assert "/" not in paths.encoded(name)


def test_a_recording_with_raw_names_reads_as_before_and_goes_on(tmp_path):
    """As earlier releases wrote them: paths spell the names, whatever they are."""
    store = tmp_path / "run.zarr"
    with RecordingWriter(store, {}) as writer:
        writer.append(0, {"weight/a": matrix(0)}, scalars={"loss": 1.0})
    raw = {"scalars/eval/loss": "scalars/loss", "scalars/MFU %": "scalars/loss",
           "scalars/a%2Fb": "scalars/loss", "weight/b%": "weight/a"}  # fmt: skip
    root = json.loads((store / "zarr.json").read_text())
    members = root["consolidated_metadata"]["metadata"]
    for path, like in raw.items():
        (store / path).parent.mkdir(exist_ok=True)
        shutil_copy(store / like, store / path)
        members[path] = members[like]
    members["scalars/eval"] = members["scalars"]
    (store / "scalars/eval/zarr.json").write_text((store / "scalars/zarr.json").read_text())
    root["consolidated_metadata"]["metadata"] = dict(
        sorted(members.items(), key=lambda member: (member[0].count("/"), member[0]))
    )
    (store / "zarr.json").write_text(json.dumps(root))

    recording = Recording(store)
    assert set(recording.scalars) == {"loss", "eval/loss", "MFU %", "a%2Fb"}
    assert recording.parameters("weight") == ["a", "b%"]
    assert is_same(recording.read(matrix_path("weight", "b%"), 0), matrix(0))
    more = {"eval/loss": 2.0, "MFU %": 3.0, "a%2Fb": 4.0, "a/b": 5.0}
    with RecordingWriter(store, {}, resume=True) as writer:
        writer.append(1, {matrix_path("weight", "b%"): matrix(1)}, scalars=more)
    recording = Recording(store)
    assert {name: values[-1] for name, values in recording.scalars.items()} | {"loss": 0} == {
        **more,
        "loss": 0,
    }
    assert np.isnan(recording.scalars["a/b"][0])
    assert is_same(recording.read(matrix_path("weight", "b%"), 1), matrix(1))
    assert not (store / "scalars/eval%2Floss").exists()


def shutil_copy(source, target):
    import shutil

    shutil.copytree(source, target)
