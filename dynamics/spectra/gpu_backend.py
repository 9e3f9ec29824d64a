"""Where matrices are measured: by NumPy on the CPU, or on a GPU those that it is faster at.

A GPU is used where it is asked for: a training may be running on it, and last digits differ (each
within its `singular_value_error`).
"""

import re
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from functools import cache
from typing import TYPE_CHECKING

import numpy as np
from threadpoolctl import threadpool_limits

from dynamics.errors import DynamicsError, one_line
from dynamics.runs.differences import Difference
from dynamics.runs.run import Dense
from dynamics.spectra import gram, noise
from dynamics.spectra.backend import Backend, NumpyBackend
from dynamics.spectra.calibration import Rates, kept_rates, measured_rates
from dynamics.spectra.numpy_spectrum import SMALL

if TYPE_CHECKING:
    import torch

CPU = "cpu"


def backend_version(device: str) -> str:
    """What decides last digits besides NumPy and SciPy, "" where nothing does.

    Raises:
        DynamicsError: `device` is neither "cpu" nor "cuda" nor "cuda:N".
    """
    if device == CPU:
        return ""
    if re.fullmatch(r"cuda(:\d+)?", device, re.ASCII) is None:
        raise DynamicsError(f"No device {device!r}; known: cpu, cuda, cuda:N (the N-th GPU).")
    import torch

    return f"cuda torch {torch.__version__}"


def backend_for(device: str) -> Backend:
    """The backend that computes on a device.

    Raises:
        DynamicsError: it is unknown, or this machine does not have it.
    """
    if not backend_version(device):
        return NumpyBackend()
    import torch

    gpu = torch.device(device)
    try:
        torch.zeros(1, device=gpu)
    except (RuntimeError, AssertionError) as error:  # the latter from a torch without CUDA
        raise DynamicsError(
            f"{device} cannot be used here: {one_line(error)}. Measure on the CPU instead."
        ) from error
    return GpuBackend(gpu, *_rates(gpu))


class GpuBackend(Backend):
    """Computes with torch on a GPU what that is faster at, and the rest with NumPy on the CPU.

    An array is copied there once; the copy lives as long as the array. It goes there if the GPU
    needs less time for such a matrix than a core of the CPU, by the rates of both. All is done in
    a stream of its own, so that several threads, each with such a backend, use more of the GPU.
    """

    def __init__(self, device: "torch.device", cpu: Rates, gpu: Rates):
        import torch

        super().__init__()
        self.version = backend_version("cuda")
        self._device, self._cpu, self._gpu = device, cpu, gpu
        self._numpy = NumpyBackend()
        self._stream = torch.cuda.Stream(device) if device.type == "cuda" else None

    def takes(self, shape: tuple[int, ...]) -> bool:
        """Whether an (m, n) matrix is measured on the GPU."""
        rows, cols = shape
        if rows * cols <= SMALL:
            return False
        return self._gpu.seconds(rows, cols) < self._cpu.seconds(rows, cols)

    def singular_values(self, matrix: Dense | Difference) -> tuple[np.ndarray, float]:
        """See `Backend`."""
        if not self.takes(matrix.shape):
            return self._numpy.singular_values(matrix)
        from dynamics.spectra.torch_spectrum import of_dense

        terms = [matrix] if isinstance(matrix, Dense) else [matrix.now, matrix.before]
        with self._in_stream():
            return of_dense(*(self._copy(each.values) for each in terms))

    def is_finite(self, array: np.ndarray) -> bool:
        """See `Backend`."""
        if not self.takes(array.shape):
            return self._numpy.is_finite(array)
        from dynamics.spectra.torch_spectrum import is_finite

        with self._in_stream():
            return self._once(array, "finite", lambda: is_finite(self._copy(array)))

    def variance_sums(self, term: noise.Stored) -> tuple[np.ndarray, np.ndarray]:
        """See `Backend`."""
        array, dtype, *scale = term
        if scale or not self.takes(array.shape):
            return self._numpy.variance_sums(term)
        from dynamics.spectra.torch_spectrum import variance_sums

        with self._in_stream():
            return self._once(
                array, f"variance of {dtype}", lambda: variance_sums(self._copy(array), dtype)
            )

    def _copy(self, array: np.ndarray) -> "torch.Tensor":
        return self._once(array, f"on {self._device}", lambda: _tensor(array).to(self._device))

    @contextmanager
    def _in_stream(self) -> Iterator[None]:
        import torch

        try:
            with torch.cuda.stream(self._stream):
                yield
        except torch.OutOfMemoryError as error:
            raise DynamicsError(
                f"The memory of {self._device} is too small, or others use it. "
                "Measure with fewer workers, or on the CPU."
            ) from error


@cache
def _rates(device: "torch.device") -> tuple[Rates, Rates]:
    """Those of a core of this machine, and of its GPU."""
    import torch

    from dynamics.spectra import torch_spectrum

    def of_cpu() -> Rates:
        def look(values: np.ndarray) -> None:
            np.isfinite(values).all()
            noise.variance_sums((values, "float32"))

        with threadpool_limits(1):
            return measured_rates(lambda values: values, look, gram.gram, gram.eigvalsh)

    def of_gpu() -> Rates:
        def look(values: torch.Tensor) -> None:
            torch_spectrum.is_finite(values)
            torch_spectrum.variance_sums(values, "float32")

        return measured_rates(
            lambda values: _tensor(values).to(device),
            look,
            torch_spectrum.gram,
            torch_spectrum.eigvalsh,
        )

    name = f"{torch.cuda.get_device_name(device)}, torch {torch.__version__}"
    return kept_rates(f"core, numpy {np.__version__}", of_cpu), kept_rates(name, of_gpu)


def _tensor(array: np.ndarray) -> "torch.Tensor":
    """The array as a tensor on the CPU, without a copy where that can be."""
    import torch

    # torch knows no other order of bytes, and none backwards through memory.
    backwards = min(array.strides, default=0) < 0
    native = array.astype(array.dtype.newbyteorder("="), copy=backwards)
    with warnings.catch_warnings():  # of an array of a file, which nobody writes to
        warnings.filterwarnings("ignore", message="The given NumPy array is not writable")
        return torch.from_numpy(native)
