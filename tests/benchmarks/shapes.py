"""Time and error of each way to the singular values, shape by shape, on one thread.

    python tests/benchmarks/shapes.py [--cuda] [ROWSxCOLS ...]

The matrices are Gaussian, float32. Errors are the largest of a singular value relative to the
largest one, against float64 gesvd. Peak memory is what a process of its own needs for the
singular values beyond the matrix and its imports.

With --cuda on a GPU, of matrices that are there, beside one core's `dynamics.spectrum`; that of
the GPU begins and ends on the CPU. Peak memory is that of the GPU beyond the matrix.
"""

import subprocess
import sys
import time

from timing import best, one_thread, peak_memory, table

SHAPES = ["96x96", "384x96", "128x384", "384x384", "1536x384", "2048x2048", "50304x96", "50304x384"]
METHODS = ["svd", "svdvals f32", "svdvals f64", "gesdd f64", "gram", "dynamics.spectrum"]


def matrix(shape):
    """A Gaussian float32 matrix of shape "mxn"."""
    import numpy as np

    m, n = map(int, shape.split("x"))
    return np.random.default_rng(0).standard_normal((m, n), np.float32)


def methods(values):
    """Method -> function that gives the singular values."""
    import numpy as np
    import torch

    from dynamics import spectrum
    from dynamics.runs.run import Dense
    from dynamics.spectra.gram import gram, singular_values_from_gram

    tensor = torch.from_numpy(values)
    return {
        "svd": lambda: torch.linalg.svd(tensor, full_matrices=False)[1],
        "svdvals f32": lambda: torch.linalg.svdvals(tensor),
        "svdvals f64": lambda: torch.linalg.svdvals(tensor.double()),
        "gesdd f64": lambda: np.linalg.svd(values.astype(np.float64), compute_uv=False),
        "gram": lambda: singular_values_from_gram(gram(values), max(values.shape))[0],
        "dynamics.spectrum": lambda: spectrum(Dense(values, "float32")).s,
    }


def gpu_methods(values):
    """The same on a GPU."""
    import torch

    from dynamics import spectrum
    from dynamics.runs.run import Dense
    from dynamics.spectra import torch_spectrum
    from dynamics.spectra.calibration import Rates
    from dynamics.spectra.gpu_backend import GpuBackend

    gpu = torch.device("cuda")
    tensor = torch.from_numpy(values).to(gpu)
    slow, fast = Rates(1.0, 1.0, 1.0, (1.0,) * 5), Rates(0.0, 0.0, 0.0, (1e-9,) * 5)

    def on_gpu():
        return spectrum(Dense(values, "float32"), backend=GpuBackend(gpu, slow, fast)).s

    return {
        "svd": lambda: torch.linalg.svd(tensor, full_matrices=False)[1].cpu(),
        "svdvals f32": lambda: torch.linalg.svdvals(tensor).cpu(),
        "svdvals f64, gesvd": lambda: torch_spectrum.singular_values(tensor),
        "gram": lambda: torch_spectrum.eigvalsh(torch_spectrum.gram(tensor))[::-1] ** 0.5,
        "dynamics.spectrum": on_gpu,
        "dynamics.spectrum, 1 core": lambda: spectrum(Dense(values, "float32")).s,
    }


def gpu_memory(function):
    """MB of the GPU that a call needs beyond what was there."""
    import torch

    before = torch.cuda.memory_allocated()
    torch.cuda.reset_peak_memory_stats()
    function()
    return (torch.cuda.max_memory_allocated() - before) / 2**20


def reference(values):
    """Singular values by float64 gesvd, of R for tall matrices."""
    import numpy as np
    import scipy.linalg

    tall = (values if values.shape[0] >= values.shape[1] else values.T).astype(np.float64)
    tall = np.linalg.qr(tall, mode="r") if tall.shape[0] > 8 * tall.shape[1] else tall
    return scipy.linalg.svd(tall, compute_uv=False, lapack_driver="gesvd")


def memory(shape, method):
    """MB that a method needs beyond the matrix, in a process of its own."""
    command = [sys.executable, __file__, "--memory", shape, method]
    return float(subprocess.run(command, check=True, capture_output=True, text=True).stdout)


def main(shapes, cuda):
    """Print the table."""
    import numpy as np

    one_thread()
    clock = time.perf_counter if cuda else time.process_time
    rows = []
    for shape in shapes:
        values = matrix(shape)
        exact = reference(values)
        times = {}
        for name, function in (gpu_methods if cuda else methods)(values).items():
            error = np.abs(np.asarray(function(), dtype=np.float64) - exact).max() / exact[0]
            times[name] = best(function, clock=clock)
            needs = ""
            if cuda:
                needs = f"{gpu_memory(function):.0f}"
            elif values.size > 2**22:
                needs = f"{memory(shape, name):.0f}"
            ratio = times["svdvals f32"] / times[name] if "svdvals f32" in times else None
            speed = "" if ratio is None else f"{ratio:.2f}"
            rows.append([shape, name, f"{1e3 * times[name]:.2f}", speed, f"{error:.0e}", needs])
        print(f"{shape} done", file=sys.stderr, flush=True)
    table(
        ["shape", "method", "ms", "times faster than svdvals f32", "error / s1", "MB beside it"],
        rows,
    )


if __name__ == "__main__":
    if sys.argv[1:2] == ["--memory"]:
        one_thread()
        data = matrix(sys.argv[2])
        small = methods(matrix("384x96"))
        small[sys.argv[3]]()  # whatever is loaded at the first call
        before = peak_memory()
        methods(data)[sys.argv[3]]()
        print(peak_memory() - before)
    else:
        cuda = sys.argv[1:2] == ["--cuda"]
        main(sys.argv[1 + cuda :] or SHAPES, cuda)
