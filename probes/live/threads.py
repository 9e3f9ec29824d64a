"""One BLAS thread for what is measured beside a training."""

from collections.abc import Iterator
from contextlib import contextmanager
from functools import cache
from pathlib import Path

from threadpoolctl import ThreadpoolController


@contextmanager
def one_blas_thread() -> Iterator[None]:
    """The BLAS of NumPy and of SciPy uses one thread, as in the workers of `analyze`.

    Not that of torch, which trains meanwhile: it has its own, or NumPy's is left as it is.
    """
    with _own_blas().limit(limits=1):
        yield


@cache
def _own_blas() -> ThreadpoolController:
    import scipy.linalg  # noqa: F401  so that its BLAS is loaded, and found

    controller = ThreadpoolController()
    own = [
        each.filepath
        for each in controller.lib_controllers
        if each.user_api == "blas" and {"numpy", "scipy"} & _packages(Path(each.filepath))
    ]
    return controller.select(filepath=own)


def _packages(library: Path) -> set[str]:
    """The folders that a library lies in: numpy/.dylibs, numpy.libs, scipy_openblas64/lib."""
    return {part.partition(".")[0].partition("_")[0] for part in library.parts[-3:-1]}
