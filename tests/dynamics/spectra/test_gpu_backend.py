"""Matrices measured by torch, on a GPU: the same bounds, and only what it is faster at.

All but the choice of a device runs on torch's CPU device as well.
"""

import gc
import warnings

import numpy as np
import pytest
import torch
import xarray as xr

import dynamics as dy
from dynamics import schema
from dynamics.cli.app import main
from dynamics.errors import DynamicsError
from dynamics.runs.differences import Difference
from dynamics.runs.run import Dense
from dynamics.spectra import gpu_backend, rounding
from dynamics.spectra.backend import NumpyBackend
from dynamics.spectra.calibration import Rates
from dynamics.spectra.gpu_backend import GpuBackend, backend_for
from dynamics.spectra.spectrum import spectrum
from tests.dynamics.spectra.conftest import needs_cuda
from tests.dynamics.spectra.hard_matrices import reference
from tests.dynamics.spectra.stored_matrices import DTYPES, weight_with_zeros_and_powers
from tests.dynamics.spectra.test_calibration import FAST, SIDES, SLOW


@pytest.fixture
def backend(device):
    """What takes every matrix that is not small."""
    return GpuBackend(device, SLOW, FAST)


# Numbers ------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", DTYPES)
def test_noise_floors_are_those_of_numpy(dtype, backend):
    stored = weight_with_zeros_and_powers(dtype)
    array = (stored if dtype == "float64" else stored.float()).numpy()

    here, there = spectrum(Dense(array, dtype)), spectrum(Dense(array, dtype), backend=backend)

    assert there.noise_floor == pytest.approx(here.noise_floor, rel=1e-12)
    assert np.abs(there.s - here.s).max() <= there.error + here.error


def test_differences_and_integers_are_measured_as_by_numpy(backend):
    rng = np.random.default_rng(0)
    now, before = (Dense(rng.standard_normal((300, 200), np.float32), "float32") for _ in "ab")
    difference = Difference(now, before, merges=2, rank_bound=40)
    here, there = spectrum(difference), spectrum(difference, backend=backend)
    exact = reference(now.values.astype(np.float64) - before.values)
    assert np.abs(there.s - exact).max() <= there.error
    assert there.rank_bound == 40
    assert there.noise_floor == pytest.approx(here.noise_floor, rel=1e-12)
    scaled = (now.values, "int8", np.full((300, 1), 0.01))
    np.testing.assert_array_equal(
        backend.variance_sums(scaled)[0], rounding.variance_sums(scaled)[0]
    )


def test_arrays_as_files_give_them_are_taken_without_a_warning(backend):
    values = np.random.default_rng(0).standard_normal((300, 200), np.float32)
    for array in (values.astype(">f4"), values[::-1], values.T, values.copy()):
        array.flags.writeable = False
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            computed = spectrum(Dense(array, "float32"), backend=backend)
        assert np.abs(computed.s - spectrum(Dense(values, "float32")).s).max() <= 2 * computed.error
        assert backend.is_finite(array)
    values[7, 8] = np.nan
    assert not backend.is_finite(values)


@pytest.mark.slow
def test_an_array_is_copied_once_and_its_copy_goes_with_it(backend, monkeypatch):
    copies = []
    monkeypatch.setattr(gpu_backend, "_tensor", lambda a: copies.append(1) or torch.tensor(a))
    values, other = (np.random.default_rng(s).standard_normal((300, 200)) for s in (0, 1))
    for _ in range(2):
        spectrum(Dense(values, "float64"), backend=backend)
        spectrum(Difference(Dense(values, "float64"), Dense(other, "float64")), backend=backend)
    assert len(copies) == 2
    assert backend._kept
    del values, other
    gc.collect()
    assert not backend._kept


# Choice -------------------------------------------------------------------------------------------


def test_a_matrix_goes_where_it_takes_less_time():
    # A GPU that is slower at what is moved and at small matrices, faster at large ones.
    gpu = Rates(1e-3, 2e-8, 1e-11, (5e-4,) * len(SIDES))
    backend = GpuBackend(torch.device("cpu"), SLOW, gpu)
    assert backend.takes((1024, 1024))
    assert backend.takes((50304, 96))  # its Gram matrix costs more than moving it
    assert not backend.takes((900, 40))  # but not of this one
    assert not GpuBackend(torch.device("cpu"), SLOW, SLOW).takes((1024, 1024))
    small = np.ones((100, 100))
    assert not GpuBackend(torch.device("cpu"), SLOW, FAST).takes(small.shape)


# Analyses -----------------------------------------------------------------------------------------


def _assert_alike(here, there):
    for name in (schema.STATUS, "rank_bound", "numerical_rank", "rows"):
        np.testing.assert_array_equal(here[name], there[name], err_msg=name)
    errors = here[schema.SINGULAR_VALUE_ERROR] + there[schema.SINGULAR_VALUE_ERROR]
    apart = abs(here[schema.SINGULAR_VALUE] - there[schema.SINGULAR_VALUE])
    assert (apart <= errors).where(apart.notnull(), True).all()
    np.testing.assert_allclose(there[schema.NOISE_FLOOR], here[schema.NOISE_FLOOR], rtol=1e-12)


@pytest.fixture(scope="module")
def recording(write_recording, tmp_path_factory):
    shapes = {f"model.layers.{i}.mlp.up_proj.weight": (384, 256) for i in range(2)}
    shapes["model.layers.0.self_attn.q_proj.weight"] = (32, 32)

    def spoil(step, name, weight):
        if step == 10 and "layers.1" in name:
            weight[3, 4] = np.inf

    path = tmp_path_factory.mktemp("run") / "run.zarr"
    return write_recording(path, shapes=shapes, spoil=spoil)


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore::dynamics.UnmeasuredWarning")
def test_an_analysis_on_a_device_is_that_of_the_cpu_with_a_cache_of_its_own(
    recording, device, tmp_path, monkeypatch
):
    monkeypatch.setattr(
        "dynamics.analysis.analyze.backend_for", lambda _: GpuBackend(device, SLOW, FAST)
    )
    cache = tmp_path / "spectra.cache"
    there = dy.analyze(recording, device="cuda", cache=cache)
    monkeypatch.undo()
    here = dy.analyze(recording, cache=cache)

    _assert_alike(here, there)
    assert here.attrs["measured_by"] == "cpu"
    assert there.attrs["measured_by"] == f"cuda torch {torch.__version__}"
    assert (here[schema.SINGULAR_VALUE] != there[schema.SINGULAR_VALUE]).any(), "not measured there"
    # What either measured, it does not measure again, and has the same last digits.
    on = {"cuda": GpuBackend(device, SLOW, FAST), "cpu": NumpyBackend()}
    monkeypatch.setattr("dynamics.analysis.analyze.backend_for", on.get)
    monkeypatch.setattr(
        "dynamics.analysis.tasks.spectrum", lambda *_, **__: pytest.fail("measured")
    )
    for known, name in ((there, "cuda"), (here, "cpu")):
        xr.testing.assert_identical(dy.analyze(recording, cache=cache, device=name), known)


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore::dynamics.UnmeasuredWarning")
def test_threads_give_the_serial_result(recording, device, monkeypatch):
    for module in ("analyze", "tasks"):
        name = f"dynamics.analysis.{module}.backend_for"
        monkeypatch.setattr(name, lambda _: GpuBackend(device, SLOW, FAST))
    one, two = (dy.analyze(recording, device="cuda", workers=workers) for workers in (1, 2))
    _assert_alike(one, two)
    if device.type == "cuda":  # torch's CPU device has other numbers of threads in each thread
        xr.testing.assert_identical(one, two)


@pytest.mark.parametrize("device", ["gpu", "cuda:", "cuda:x", "mps", ""])
def test_an_unknown_device_is_refused(recording, device):
    with pytest.raises(DynamicsError, match="known: cpu, cuda, cuda:N"):
        dy.analyze(recording, device=device)


@pytest.mark.parametrize("workers", [1, 2])
def test_a_device_that_is_not_there_is_one_line(recording, workers, tmp_path, monkeypatch, capsys):
    with pytest.raises(DynamicsError, match=r"cuda:99 cannot be used here: .*Measure on the CPU"):
        dy.analyze(recording, device="cuda:99", workers=workers)
    output = tmp_path / "out.zarr"
    options = ["--device", "cuda:99", "--workers", str(workers), "-o", str(output)]
    monkeypatch.setattr("sys.argv", ["dynamics", "analyze", str(recording), *options])
    with pytest.raises(SystemExit, match="2"):
        main()
    assert len(capsys.readouterr().err.strip().splitlines()) == 1
    assert not output.exists()


@needs_cuda
@pytest.mark.filterwarnings("ignore::dynamics.UnmeasuredWarning")
def test_an_analysis_with_a_gpu_is_that_without(recording, tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    _assert_alike(dy.analyze(recording), dy.analyze(recording, device="cuda", workers=2))


@needs_cuda
def test_the_measured_rates_send_large_matrices_to_the_gpu(tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    backend = backend_for("cuda")
    assert isinstance(backend, GpuBackend)
    assert backend.takes((2048, 2048))
    assert not backend.takes((5000, 8))


@needs_cuda
def test_a_gpu_without_memory_is_one_line():
    backend = GpuBackend(torch.device("cuda"), SLOW, FAST)
    values = np.ones((4000, 4000))
    torch.cuda.empty_cache()
    torch.cuda.set_per_process_memory_fraction(1e-4)
    try:
        with pytest.raises(DynamicsError, match="memory of cuda is too small"):
            spectrum(Dense(values, "float64"), backend=backend)
    finally:
        torch.cuda.set_per_process_memory_fraction(1.0)
