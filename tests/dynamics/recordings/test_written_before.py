"""What the version before wrote is still read, with the same numbers."""

import json
import math
import zipfile
from pathlib import Path

import numpy as np
import pytest
import scipy

import dynamics as dy
from dynamics.analysis import tasks
from dynamics.runs.differences import Difference

ARCHIVES = sorted((Path(__file__).parent / "written_before").glob("version_*.zip"))


@pytest.fixture(params=ARCHIVES, ids=lambda path: path.stem)
def written(request, tmp_path):
    """Directory with run.zarr, run.analysis.zarr, run.cache and expected.json of a version."""
    with zipfile.ZipFile(request.param) as archive:
        archive.extractall(tmp_path)
    return tmp_path


@pytest.fixture
def expected(written):
    return json.loads((written / "expected.json").read_text())


def hexadecimal(values):
    return [float(value).hex() for value in np.ravel(values).tolist()]


def test_a_recording_has_the_same_numbers(written, expected):
    run = dy.open_run(written / "run.zarr")
    assert run.steps.tolist() == expected["steps"]
    assert list(run.kinds) == expected["kinds"]
    assert [[e.step, e.kind, dict(e.attrs)] for e in run.events] == expected["events"]
    assert {name: hexadecimal(each) for name, each in run.scalars.items()} == expected["scalars"]
    kinds = set()
    for key, summary in expected["matrices"].items():
        kind, name, step, dtype = key.split()
        matrix = run.read(name, int(step), kind)
        parts = [matrix.left, matrix.right] if kind == "adapter" else [matrix.values]
        flat = np.concatenate([part.ravel() for part in parts]).astype(np.float64)
        numbers = (flat[0], flat[-1], math.fsum(flat))
        assert matrix.dtype == dtype
        if kind == "base":  # weight - s·B·A, whose product rounds differently on other processors
            np.testing.assert_allclose(numbers, [*map(float.fromhex, summary)], rtol=1e-9)
        else:
            assert hexadecimal(numbers) == summary
        kinds.add(kind)
    assert kinds == {"weight", "base", "adapter", "gradient"}
    assert run.verify().sound == len(expected["steps"])


def test_a_saved_analysis_has_the_same_numbers(written, expected):
    result = dy.load(written / "run.analysis.zarr")
    for name, numbers in expected["metrics"].items():
        assert hexadecimal(result[name].values) == numbers
    again = dy.analyze(written / "run.zarr", metrics=list(expected["metrics"]))
    since = set(again.variables) - set(result.variables)
    assert since == {"reference_step"}
    assert result["noise_floor"].equals(result["storage_noise_floor"])  # there was one floor
    assert "stored numbers" in result["noise_floor"].attrs["long_name"]
    for name in ("singular_value", *expected["metrics"]):
        assert again[name].dims == result[name].dims
        np.testing.assert_allclose(again[name].values, result[name].values, rtol=1e-9, atol=1e-12)


def test_a_cache_is_accepted(written, expected, monkeypatch):
    measured = []
    monkeypatch.setattr(
        tasks,
        "spectrum",
        lambda *args, _of=tasks.spectrum, **kw: measured.append(args[0]) or _of(*args, **kw),
    )
    # Without the kinds that subtract s·B·A: their numbers depend on the processor's rounding.
    kinds = ["weight", "adapter", "gradient", "update", "displacement"]
    result = dy.analyze(
        written / "run.zarr",
        kinds=kinds,
        metrics=list(expected["metrics"]),
        cache=written / "run.cache",
    )
    saved = dy.load(written / "run.analysis.zarr")
    for name in expected["metrics"]:
        np.testing.assert_allclose(
            result[name].sel(kind=kinds), saved[name].sel(kind=kinds), rtol=1e-9, atol=1e-12
        )
    # A cache is for the releases of NumPy and SciPy that measured; others measure once more.
    if (np.__version__, scipy.__version__) == (expected["numpy"], expected["scipy"]):
        # But for the floors of what adapters changed, which count more than they did.
        adapted = [each for each in measured if isinstance(each, Difference) and any(each.adapters)]
        assert len(measured) == len(adapted)
