"""Files of a stranger: nothing in them is run, nothing outside is read, no memory is wasted."""

import contextlib
import io
import json
import pickle
import shutil
import struct
import subprocess
import sys
import tracemalloc
import zipfile

import numpy as np
import pytest

import dynamics as dy
from dynamics.errors import FormatError
from dynamics.formats.storage.torch_files import tensors_of, torch_file
from dynamics.formats.storage.unpickling import Inert, TensorUnpickler

torch = pytest.importorskip("torch")


class Touch:
    """Creates a file when it is unpickled."""

    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return open, (str(self.path), "w")


@pytest.fixture
def marker(tmp_path):
    """A file that must not exist after the test; the pickle for it works, where it is run."""
    path = tmp_path / "marker"
    pickle.loads(pickle.dumps(Touch(path))).close()
    path.unlink()
    yield path
    assert not path.exists()


def refused(path, says, **options):
    """The one line with which a run is refused, without much memory."""
    tracemalloc.start()
    with pytest.raises(FormatError, match=says) as caught:
        dy.open_run(path, **options)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert "\n" not in str(caught.value)
    assert peak < 16 * 2**20
    return str(caught.value)


def checkpoint(tmp_path):
    """An empty checkpoint-1."""
    directory = tmp_path / "run/checkpoint-1"
    directory.mkdir(parents=True)
    return directory


# Pickles ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("zipped", [True, False])
@pytest.mark.parametrize("where", ["top", "beside", "inside"])
def test_a_marker_file_pickle_never_runs(tmp_path, marker, zipped, where):
    weights = {"layers.0.up_proj.weight": torch.randn(4, 3)}
    evil = Touch(marker)
    saved = {
        "top": evil,
        "beside": {**weights, "hyper_parameters": evil},
        "inside": {"layers.0.up_proj.weight": evil},
    }[where]
    file = checkpoint(tmp_path) / "pytorch_model.bin"
    torch.save(saved, file, _use_new_zipfile_serialization=zipped)
    if where == "beside":  # an object of any class is passed over
        found = dy.open_run(tmp_path / "run").read("layers.0.up_proj.weight", 1, "weight")
        np.testing.assert_array_equal(found.values, saved["layers.0.up_proj.weight"].numpy())
    else:
        message = refused(tmp_path / "run", "holds no tensors")
        assert where != "top" or "io.open" in message


def test_a_tensor_that_is_not_made_is_left_out_by_its_name(tmp_path):
    file = checkpoint(tmp_path) / "pytorch_model.bin"
    sparse = torch.eye(3).to_sparse()
    torch.save({"layers.0.up_proj.weight": torch.randn(4, 3), "mask": sparse}, file)
    left_out = dy.open_run(tmp_path / "run").account.left_out
    assert [(each.name, each.shape, each.reason) for each in left_out] == [
        ("mask", (3, 3), "sparse tensors")
    ]
    torch.save({"mask": sparse}, file)
    refused(tmp_path / "run", "holds none that is read: mask is sparse tensors")


@pytest.mark.slow
@pytest.mark.parametrize(
    "data",
    [
        b"\x80\x02]r\xff\xff\xff\xff.",  # a memo of four billion entries
        b"\x80\x05\x96" + struct.pack("<Q", 2**40) + b".",  # a buffer allocated before it is read
        b"\x80\x05\x8e" + struct.pack("<Q", 2**40) + b".",
        b"\x80\x04\x95" + struct.pack("<Q", 2**62) + b".",
        b"\x80\x02\x82\x01.",  # an extension code
        b"(S'x'\nios\nsystem\n.",  # old instances
        b"(c__builtin__\neval\nS'1'\no.",
        b"\x80\x02c__builtin__\neval\n\x8c\x0e__import__('x')\x85R.",
        b"\x80\x02cbuiltins\ngetattr\ncos\nsystem\n\x8c\x08__call__\x86R\x8c\x04true\x85R.",
        b"(" * 10**5,
        b"\x80\x02" + b"]" * 10**5 + b"a" * 10**5 + b".",
    ],
)
def test_a_made_up_pickle_neither_runs_nor_takes_memory(data):
    called = []
    found = []
    tracemalloc.start()
    with contextlib.suppress(Exception):  # whatever it is, `torch_file` makes one line of it
        found = TensorUnpickler(data, lambda *_: None, called.append).load()
    assert isinstance(found, Inert | list)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < 64 * 2**20
    assert called == []


@pytest.mark.slow
def test_no_module_is_imported_for_a_name_in_a_pickle(tmp_path):
    file = tmp_path / "weights.pt"
    data = b"\x80\x02cantigravity\nfly\n)R."
    with zipfile.ZipFile(file, "w") as archive:
        archive.writestr("archive/data.pkl", data)
    code = (
        "import sys; from pathlib import Path; "
        "from dynamics.formats.storage.torch_files import torch_file;"
        f"path = Path({str(file)!r}); print(torch_file(path, path.parent));"
        "print('antigravity' in sys.modules)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.splitlines() == ["Inert('antigravity.fly')", "False"]


def test_a_tensor_may_not_reach_beyond_its_storage(tmp_path):
    file = tmp_path / "weights.pt"
    torch.save({"w": torch.randn(4, 3)}, file)
    stored = torch_file(file, tmp_path)["w"]
    content = file.read_bytes()
    # the shape (4, 3) in the pickle's bytes: BININT1 4, BININT1 3, TUPLE2
    shape, larger = b"K\x04K\x03\x86", b"K\xffK\x03\x86"
    assert content.count(shape) == 1
    with zipfile.ZipFile(io.BytesIO(content)) as seed:
        data = next(n for n in seed.namelist() if n.endswith("data.pkl"))
        with zipfile.ZipFile(file, "w") as archive:
            for name in seed.namelist():
                member = seed.read(name)
                archive.writestr(name, member.replace(shape, larger) if name == data else member)
    assert stored.shape == (4, 3)
    with pytest.raises(FormatError, match=r"shape \(255, 3\) in a storage of 48 bytes"):
        tensors_of(torch_file(file, tmp_path), "weights.pt")


@pytest.mark.slow
def test_a_compressed_archive_is_refused_before_it_is_unpacked(tmp_path):
    file = checkpoint(tmp_path) / "pytorch_model.bin"
    with zipfile.ZipFile(file, "w", zipfile.ZIP_DEFLATED) as archive:
        archive.writestr("archive/data.pkl", b"\0" * 2**28)
    assert file.stat().st_size < 2**20
    refused(tmp_path / "run", "data.pkl' is compressed")


# Outside ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["../secret.safetensors", "/etc/passwd", "a/b", "..", "", "C:\\x"])
def test_an_index_cannot_name_a_file_outside_its_directory(tmp_path, name):
    directory = checkpoint(tmp_path)
    index = {"metadata": {}, "weight_map": {"layers.0.up_proj.weight": name}}
    for stem in ("model.safetensors", "pytorch_model.bin"):
        (directory / f"{stem}.index.json").write_text(json.dumps(index))
        refused(tmp_path / "run", "names a file outside its directory")
        (directory / f"{stem}.index.json").unlink()


@pytest.mark.parametrize("link", ["file", "directory"])
def test_a_link_cannot_lead_outside_the_run(tiny_llama, tmp_path, link):
    tiny_llama().save_pretrained(tmp_path / "elsewhere")
    directory = checkpoint(tmp_path)
    if link == "file":
        (directory / "model.safetensors").symlink_to(tmp_path / "elsewhere/model.safetensors")
    else:
        directory.rmdir()
        directory.symlink_to(tmp_path / "elsewhere")
    message = refused(tmp_path / "run", "outside of")
    assert str(tmp_path / "elsewhere") in message


def test_a_link_within_the_run_is_followed(tiny_llama, tmp_path):
    tiny_llama().save_pretrained(tmp_path / "run/checkpoint-1")
    (tmp_path / "run/checkpoint-2").symlink_to("checkpoint-1")
    assert dy.open_run(tmp_path / "run").steps.tolist() == [1, 2]
    (tmp_path / "link").symlink_to("run")  # what the user names is the user's decision
    assert dy.open_run(tmp_path / "link").steps.tolist() == [1, 2]


# Memory -----------------------------------------------------------------------------------------


def header(document, data=b""):
    encoded = json.dumps(document).encode()
    return len(encoded).to_bytes(8, "little") + encoded + data


@pytest.mark.parametrize(
    "content",
    [
        (2**63).to_bytes(8, "little"),
        (2**33).to_bytes(8, "little") + b"{}",
        (10**8 + 1).to_bytes(8, "little") + b" " * 100,
        header(
            {"w": {"dtype": "F32", "shape": [2**31, 2**31], "data_offsets": [0, 16]}}, b"0" * 16
        ),
        header({"w": {"dtype": "F32", "shape": [2, 2], "data_offsets": [0, 2**60]}}, b"0" * 16),
        header({"w": {"dtype": "F32", "shape": [2, 2], "data_offsets": [16, 0]}}, b"0" * 16),
        header({"w": {"dtype": "F32", "shape": [2, 2], "data_offsets": [-16, 0]}}, b"0" * 16),
        header({"w": {"dtype": "F32", "shape": [-2, -2], "data_offsets": [0, 16]}}, b"0" * 16),
        header({"w": {"dtype": "F32", "shape": [2, 2], "data_offsets": [0, 16]}}, b"0" * 17),
        header([]),
        (3).to_bytes(8, "little") + b"\xff\xfe{",
        header({"w": 3}),
        (10**5).to_bytes(8, "little") + b"[" * 10**5,
    ],
)
def test_a_made_up_safetensors_header_is_refused(tmp_path, content):
    (checkpoint(tmp_path) / "model.safetensors").write_bytes(content)
    refused(tmp_path / "run", "model.safetensors")


@pytest.mark.parametrize("shape", [[3, 2**31, 2**31], [2**40, 8, 8], [3, 8], [3, -8, 8]])
def test_absurd_shapes_in_zarr_metadata_are_refused(write_recording, tmp_path, shape):
    write_recording(tmp_path / "run.zarr")
    root = tmp_path / "run.zarr/zarr.json"
    document = json.loads(root.read_text())
    name = "weight/model.layers.0.self_attn.q_proj.weight"
    document["consolidated_metadata"]["metadata"][name]["shape"] = shape
    root.write_text(json.dumps(document))
    refused(tmp_path / "run.zarr", "run.zarr")


def test_a_chunk_that_is_not_there_is_not_made_up(write_recording, tmp_path):
    write_recording(tmp_path / "run.zarr")
    root = tmp_path / "run.zarr/zarr.json"
    document = json.loads(root.read_text())
    name = "weight/model.layers.0.self_attn.q_proj.weight"
    document["consolidated_metadata"]["metadata"][name]["shape"] = [3, 2**17, 2**17]
    root.write_text(json.dumps(document))
    shutil.rmtree(tmp_path / f"run.zarr/{name}/c")
    run = dy.open_run(tmp_path / "run.zarr")
    tracemalloc.start()
    assert run.read("model.layers.0.self_attn.q_proj.weight", 10, "weight") is None
    assert tracemalloc.get_traced_memory()[1] < 2**24
    tracemalloc.stop()
