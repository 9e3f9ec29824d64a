import io
import struct
import tracemalloc
import zipfile

import numpy as np
import pytest

import dynamics as dy
from dynamics.errors import FormatError
from tests.dynamics.formats.checking import Touch, assert_refused

MATRIX = np.random.default_rng(0).standard_normal((5, 3))


def read_npz(path, name="a"):
    matrix = dy.open_run(path).read(name, 0, "weight")
    return matrix.dtype, matrix.values


@pytest.mark.parametrize("write", [np.savez, np.savez_compressed])
@pytest.mark.parametrize("dtype", ["<f4", ">f4", "<f8", ">f8", "<f2", ">f2"])
@pytest.mark.parametrize("order", ["C", "F"])
def test_every_order_of_bytes_and_of_numbers_is_that_of_numpy(tmp_path, write, dtype, order):
    file = tmp_path / "x.npz"
    write(file, a=np.asarray(MATRIX.astype(dtype), order=order), i=np.ones((2, 2), int), s="text")
    found, values = read_npz(file)
    assert found == np.dtype(dtype).newbyteorder("=").name
    np.testing.assert_array_equal(values, np.load(file)["a"])
    assert values.dtype.isnative
    assert list(dy.open_run(file).matrices) == ["a"]


@pytest.mark.parametrize("write", [np.savez, np.savez_compressed])
def test_opening_reads_headers_only_and_a_wrong_checksum_is_seen_on_reading(tmp_path, write):
    write(tmp_path / "x.npz", a=MATRIX)
    content = bytearray((tmp_path / "x.npz").read_bytes())
    at = content.index(MATRIX.tobytes()[-24:] if write is np.savez else b"PK\x01\x02") - 10
    content[at : at + 4] = bytes(each ^ 0xFF for each in content[at : at + 4])
    (tmp_path / "x.npz").write_bytes(content)
    run = dy.open_run(tmp_path / "x.npz")
    with pytest.raises(FormatError, match=r"x\.npz is not a readable \.npz file.*") as caught:
        run.read("a", 0, "weight")
    assert "\n" not in str(caught.value)


def npy(array):
    file = io.BytesIO()
    np.lib.format.write_array(file, array)
    return file.getvalue()


def npy_of_shape(shape):
    file = io.BytesIO()
    header = {"descr": "<f8", "fortran_order": False, "shape": shape}
    np.lib.format.write_array_header_1_0(file, header)
    return file.getvalue()


def zipped(path, content, compression=zipfile.ZIP_DEFLATED):
    with zipfile.ZipFile(path, "w", compression) as archive:
        archive.writestr("a.npy", content)


@pytest.mark.parametrize(
    ("content", "match"),
    [
        (npy_of_shape((2**20, 2**20)), "in 128 bytes"),
        (npy_of_shape((2**30, 2**30)), "absurd shape"),
        (npy(MATRIX) + b"more", r"\(5, 3\) in 252 bytes"),
        (npy(MATRIX)[:-8], r"\(5, 3\) in 240 bytes"),
        (b"", "not a readable"),
        (b"\x93NUMPY\x01\x00\xff\xff{", "not a readable"),
        (b"\x93NUMPY\x03\x00" + npy(MATRIX)[8:], "version"),
        (b"\x93NUMPY\x01\x00v\x00" + b"[" * 118, "not a readable"),
        (npy_of_shape((-1, 3)), "expected a list of sizes"),
    ],
    ids=["huge", "absurd", "more", "less", "empty", "cut", "version", "nested", "negative"],
)
def test_arrays_that_do_not_fit_their_header_are_refused(tmp_path, content, match):
    zipped(tmp_path / "x.npz", content)
    assert_refused(tmp_path / "x.npz", match)


def declaring(path, size):
    """The file whose directory says that its first member has `size` bytes."""
    content = bytearray(path.read_bytes())
    at = content.index(b"PK\x01\x02") + 24
    content[at : at + 4] = struct.pack("<I", size)
    path.write_bytes(content)


def test_a_deflate_bomb_is_refused_before_memory_is_asked_for(tmp_path):
    file = tmp_path / "x.npz"
    header = npy_of_shape((2**14, 2**14))  # 2 GiB, of which nothing is there
    zipped(file, header)
    declaring(file, len(header) + 2**31)
    assert_refused(file, "claims more bytes than it can have")
    # A stream of 64 MiB that is declared as 15 numbers gives no more than these.
    zipped(file, npy(np.zeros((5, 3))) + bytes(2**26))
    declaring(file, len(npy(MATRIX)))
    run = dy.open_run(file)
    tracemalloc.start()
    with pytest.raises(FormatError, match="more bytes than the 248 that it declares"):
        run.read("a", 0, "weight")
    assert tracemalloc.get_traced_memory()[1] < 2**20
    tracemalloc.stop()


@pytest.mark.parametrize(
    ("array", "match"),
    [
        (
            np.array([[{"a": 1}]], dtype=object),
            r"holds Python objects as a\.npy; these are pickles",
        ),
        (np.ones((2, 2), complex), r"a\.npy as complex128; only float16"),
        (np.ones((2, 2), "V2"), r"a\.npy as \|V2; only float16"),
        (np.ones((2, 2), [("x", "f4")]), "only float16"),
        (np.ones((2, 2), int), "no floating-point arrays"),
    ],
    ids=["object", "complex", "void", "fields", "integers"],
)
def test_arrays_of_other_types_are_refused_by_name(tmp_path, array, match):
    np.savez(tmp_path / "x.npz", a=array)
    assert_refused(tmp_path / "x.npz", match)


def test_objects_are_never_unpickled(tmp_path):
    marker = tmp_path / "marker"
    np.savez(tmp_path / "x.npz", b=MATRIX, a=np.array([Touch(marker)], dtype=object))
    run = dy.open_run(tmp_path / "x.npz")
    np.testing.assert_array_equal(run.read("b", 0, "weight").values, MATRIX)
    assert [(each.name, each.shape) for each in run.account.left_out] == [("a", (1,))]
    assert "Python objects" in run.account.left_out[0].reason
    assert not marker.exists()
    np.load(tmp_path / "x.npz", allow_pickle=True)["a"]
    assert marker.exists()


def test_other_compression_is_refused(tmp_path):
    zipped(tmp_path / "x.npz", npy(MATRIX), zipfile.ZIP_BZIP2)
    assert_refused(tmp_path / "x.npz", "compressed in another way")
