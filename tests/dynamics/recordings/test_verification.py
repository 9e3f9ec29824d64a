"""`dynamics inspect --verify`: damage in any number of any record is found and named."""

import json
import shutil

import numpy as np
import pytest
from typer.testing import CliRunner
from zarr.storage import MemoryStore

import dynamics as dy
from dynamics.cli.app import app
from dynamics.errors import FormatError
from dynamics.recordings import Compression, Recording, RecordingWriter, verify
from dynamics.runs.run import Event

WEIGHT, GRADIENT = "weight/a.weight", "gradient/a.weight"
ATTRS = {path: {"source_dtype": "float32"} for path in (WEIGHT, GRADIENT)}


def matrix(seed, shape=(40, 30)):
    return np.random.default_rng(seed).standard_normal(shape, np.float32)


@pytest.fixture(params=["lz4", "zstd", "none"])
def recording(request, tmp_path):
    path = tmp_path / "run.zarr"
    with RecordingWriter(path, {}, compression=Compression(request.param)) as writer:
        for step in (0, 10, 20):
            gradient = {GRADIENT: matrix(step + 1)} if step else {}
            scalars = {"loss": step / 7} if step else {}
            writer.append(
                step,
                {WEIGHT: matrix(step), **gradient},
                attrs=ATTRS,
                scalars=scalars,
                tokens=3 * step,
            )
        writer.event(Event(20, "merge", {"index": 1}))
    return path


def test_a_recording_that_nobody_touched_is_sound(recording):
    found = verify(Recording(recording))
    assert (found.damaged, found.sound, found.unchecked, found.leftovers) == ((), 3, 0, ())


def flip(path, at):
    """Flip one bit of a file."""
    content = bytearray(path.read_bytes())
    content[at] ^= 1
    path.write_bytes(bytes(content))


@pytest.mark.parametrize("where", [0.0, 0.3, 0.7, 1.0])
def test_one_flipped_bit_of_a_matrix_is_found_by_verifying_and_by_reading(recording, where):
    chunk = recording / WEIGHT / "c/1/0/0"
    flip(chunk, int(where * (chunk.stat().st_size - 1)))
    found = verify(Recording(recording))
    assert len(found.damaged) == 1
    assert found.damaged[0].startswith("Record at step 10: The chunk of weight/a.weight in record")
    assert found.sound == 2
    with pytest.raises(FormatError, match=r"weight/a\.weight"):
        Recording(recording).read(WEIGHT, 1)
    with pytest.warns(dy.UnmeasuredWarning):
        status = dy.analyze(recording, kinds=["weight"])["status"]
    assert (status.sel(step=10) == dy.Status.UNREADABLE).all()
    assert (status.sel(step=[0, 20]) == dy.Status.MEASURED).all()


def test_a_matrix_that_is_gone_is_found(recording):
    (recording / GRADIENT / "c/2/0/0").unlink()
    found = verify(Recording(recording))
    assert [line.split(" of ")[0] for line in found.damaged] == ["Record at step 20"]
    assert found.sound == 2


def test_a_matrix_of_another_record_is_found_although_it_decodes(recording):
    shutil.copy(recording / WEIGHT / "c/0/0/0", recording / WEIGHT / "c/2/0/0")
    assert Recording(recording).read(WEIGHT, 2) is not None
    found = verify(Recording(recording))
    assert [line.split(" of ")[0] for line in found.damaged] == ["Record at step 20"]


def test_a_matrix_that_no_writer_wrote_is_found(recording):
    (recording / GRADIENT / "c/0/0").mkdir(parents=True)
    shutil.copy(recording / GRADIENT / "c/1/0/0", recording / GRADIENT / "c/0/0/0")
    assert [line.split(" of ")[0] for line in verify(Recording(recording)).damaged] == [
        "Record at step 0"
    ]


def test_a_changed_scalar_is_found(recording):
    import zarr

    losses = zarr.open_array(str(recording / "scalars/loss"), mode="r+")
    losses[1] = 0.5
    found = verify(Recording(recording))
    assert [line.split(" of ")[0] for line in found.damaged] == ["Record at step 10"]


@pytest.mark.parametrize("name", ["scalars/loss/c/0", "tokens/c/0", "checksum/c/0"])
def test_a_damaged_series_is_named(recording, name):
    flip(recording / name, 5)
    found = verify(Recording(recording))
    assert len(found.damaged) == 1
    assert name.removesuffix("/c/0") in found.damaged[0]
    assert found.sound == 0


def test_damaged_events_are_named(recording):
    flip(recording / "events/attrs/c/0", 5)
    found = verify(Recording(recording))
    assert found.damaged[0].startswith("Events: ")
    assert found.sound == 3


def test_what_killed_writers_leave_is_listed_does_no_harm_and_goes_when_resuming(recording):
    left = [f"{WEIGHT}/c/3/0/0", f"{WEIGHT}/zarr.{'0' * 32}.partial", "events/kind/c/1"]
    kept = f"{WEIGHT}/notes.txt"  # not ours to delete
    for name in (*left, kept):
        (recording / name).parent.mkdir(parents=True, exist_ok=True)
        (recording / name).write_bytes(b"left")
    found = verify(Recording(recording))
    assert found.damaged == ()
    assert found.sound == 3
    assert sorted(found.leftovers) == sorted(left)
    RecordingWriter(recording, {}, resume=True).close()
    assert verify(Recording(recording)).leftovers == ()
    assert (recording / kept).is_file()


def test_nan_and_records_without_matrices_have_checksums_too():
    store = MemoryStore()
    writer = RecordingWriter(store, {})
    writer.append(0, {WEIGHT: np.full((3, 2), np.nan, np.float32)}, scalars={"loss": float("nan")})
    writer.append(1, {})
    writer.append(2, {WEIGHT: np.asfortranarray(matrix(0, (3, 2)))}, scalars={"late": float("inf")})
    found = verify(Recording(store))
    assert (found.damaged, found.sound) == ((), 3)


def as_version_1(path):
    """The same recording as the first release would have left it."""
    document = json.loads((path / "zarr.json").read_text())
    document["attributes"]["format_version"] = 1
    del document["consolidated_metadata"]["metadata"]["checksum"]
    (path / "zarr.json").write_text(json.dumps(document))
    shutil.rmtree(path / "checksum")


def test_a_recording_of_version_1_is_read_and_goes_on_as_version_2(recording):
    as_version_1(recording)
    assert dy.open_run(recording).steps.tolist() == [0, 10, 20]
    found = verify(Recording(recording))
    assert (found.damaged, found.sound, found.unchecked) == ((), 0, 3)
    with RecordingWriter(recording, {}, resume=True) as writer:
        writer.append(30, {WEIGHT: matrix(30)}, scalars={"loss": 1.0})
    reopened = Recording(recording)
    assert reopened.attrs["format_version"] == 2
    np.testing.assert_array_equal(reopened.read(WEIGHT, 1), matrix(10))
    found = verify(reopened)
    assert (found.damaged, found.sound, found.unchecked) == ((), 1, 3)


def inspect(*arguments):
    return CliRunner().invoke(app, ["inspect", *map(str, arguments), "--verify"])


def test_the_command_line_says_so_by_a_line_per_record_and_the_exit_code(recording):
    done = inspect(recording)
    assert done.exit_code == 0
    assert "3 of 3 records hold what was written" in done.stdout
    flip(recording / WEIGHT / "c/0/0/0", 20)
    (recording / GRADIENT / "c/2/0/0").unlink()
    done = inspect(recording)
    assert done.exit_code == 1
    assert "1 of 3 records hold what was written" in done.stdout
    warned = [line for line in done.stderr.splitlines() if line]
    assert [line.startswith("warning: Record at step ") for line in warned] == [True, True]


def test_what_has_no_checksums_cannot_be_verified(llama_checkpoints):
    done = inspect(llama_checkpoints)
    assert isinstance(done.exception, dy.DynamicsError)
    assert "is not a recording" in str(done.exception)
