"""The choice of a device: NumPy on the CPU, or a GPU for the matrices that it measures faster.

A GPU is used only if it is asked for. A training may be running on it, and the last digits differ
from the CPU's (each singular value is within its `singular_value_error`).
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
from dynamics.spectra import gram, rounding
from dynamics.spectra.backend import Backend, NumpyBackend
from dynamics.spectra.calibration import Rates, load_rates, measure_rates
from dynamics.spectra.numpy_spectrum import SMALL

if TYPE_CHECKING:
    import torch

CPU = "cpu"


def backend_version(device: str) -> str:
    """What decides the last digits of results on a device, besides NumPy and SciPy.

    It is part of the keys of a cache, and a result names it.

    Args:
        device: "cpu", "cuda" or "cuda:N".

    Returns:
        "" for "cpu", else for example "cuda torch 2.7.0".

    Raises:
        DynamicsError: another `device`.

    Example:
        >>> backend_version("cpu"), backend_version("cuda:1").split()[0]
        ('', 'cuda')
    """
    if device == CPU:
        return ""
    if re.fullmatch(r"cuda(:\d+)?", device, re.ASCII) is None:
        raise DynamicsError(f"No device {device!r}; known: cpu, cuda, cuda:N (the N-th GPU).")
    import torch

    return f"cuda torch {torch.__version__}"


def backend_for(device: str) -> Backend:
    """The backend that computes on a device: "cpu", "cuda" or "cuda:N".

    Raises:
        DynamicsError: `device` is unknown, or this machine does not have it.

    Example:
        >>> type(backend_for("cpu")).__name__
        'NumpyBackend'
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
    """Computes with torch on a GPU where that is faster, and with NumPy on the CPU elsewhere.

    The rates of both decide: a matrix goes to the GPU if it takes less time there than on one core
    of the CPU. Its array is copied to the GPU once, and the copy lives as long as the array.
    Everything runs in a CUDA stream of this backend, so several threads with one backend each use
    more of the GPU.

    Args:
        device: the GPU.
        cpu: rates of one core of the CPU.
        gpu: rates of the GPU.
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

    def variance_sums(self, term: rounding.Stored) -> tuple[np.ndarray, np.ndarray]:
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
                f"The memory of {self._device} is too small, or other programs use it. "
                "Measure with fewer workers, or on the CPU."
            ) from error


@cache
def _rates(device: "torch.device") -> tuple[Rates, Rates]:
    """The rates of a core of this machine and of its GPU."""
    import torch

    from dynamics.spectra import torch_spectrum

    def of_cpu() -> Rates:
        def look(values: np.ndarray) -> None:
            np.isfinite(values).all()
            rounding.variance_sums((values, "float32"))

        with threadpool_limits(1):
            return measure_rates(lambda values: values, look, gram.gram, gram.eigvalsh)

    def of_gpu() -> Rates:
        def look(values: torch.Tensor) -> None:
            torch_spectrum.is_finite(values)
            torch_spectrum.variance_sums(values, "float32")

        return measure_rates(
            lambda values: _tensor(values).to(device),
            look,
            torch_spectrum.gram,
            torch_spectrum.eigvalsh,
        )

    name = f"{torch.cuda.get_device_name(device)}, torch {torch.__version__}"
    return load_rates(f"core, numpy {np.__version__}", of_cpu), load_rates(name, of_gpu)


def _tensor(array: np.ndarray) -> "torch.Tensor":
    """The array as a tensor on the CPU, without a copy where possible."""
    import torch

    # torch takes neither another byte order nor negative strides.
    backwards = min(array.strides, default=0) < 0
    native = array.astype(array.dtype.newbyteorder("="), copy=backwards)
    with warnings.catch_warnings():  # a mapped file cannot be written; nobody writes to it
        warnings.filterwarnings("ignore", message="The given NumPy array is not writable")
        return torch.from_numpy(native)
