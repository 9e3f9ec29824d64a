"""How an analysis is carried out: who measures, what is kept, when it gives up."""

from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, TypedDict

from dynamics.errors import DynamicsError
from dynamics.spectra.gpu_backend import CPU, backend_version


@dataclass(frozen=True, kw_only=True)
class Execution:
    """How an analysis is carried out. None of it changes what is measured.

    `analyze`, `measure`, `follow` and `compare` take it as `execution`, or its fields as keyword
    arguments.

    Attributes:
        cache: a file that keeps spectra; it is made if it is missing. What the file holds is not
            measured again, and not even read where nothing changed (`Run.origin`). The result is
            the same.
        strict: raise at the first matrix that cannot be read or is not finite, instead of listing
            it as a problem.
        workers: how many processes measure; with a GPU, how many threads. A script that asks for
            more than one needs `if __name__ == "__main__":`.
        scheduler: the address of a Dask scheduler, or the file (.json) that holds it. Its workers
            measure instead of this machine. Whoever measures, and in whatever order, the result
            is the same to the last bit.
        device: "cpu", "cuda" or "cuda:N". With a GPU, the GPU measures the matrices that it
            measures faster than a core of the CPU does; on a cluster it is each worker's GPU. Last
            digits differ from the CPU's, within `singular_value_error`. The cache keeps spectra
            of each of the two apart.

    Raises:
        DynamicsError: `workers` is below 1, or no device is called `device`.

    Example:
        >>> from dynamics.analysis.execution import Execution
        >>> Execution(workers=4, cache="ranks.cache")
        Execution(cache='ranks.cache', strict=False, workers=4, scheduler=None, device='cpu')
    """

    cache: str | Path | None = None
    strict: bool = False
    workers: int = 1
    scheduler: str | None = None
    device: str = CPU

    def __post_init__(self) -> None:
        if self.workers < 1:
            raise DynamicsError(f"workers is {self.workers}; at least 1 is needed.")
        backend_version(self.device)  # refuses an unknown one

    @property
    def is_local(self) -> bool:
        """Whether this process measures by itself."""
        return self.workers == 1 and self.scheduler is None


class ExecutionOptions(TypedDict, total=False):
    """The fields of `Execution` as keyword arguments."""

    cache: str | Path | None
    strict: bool
    workers: int
    scheduler: str | None
    device: str


def execution_with(execution: Execution | None, options: Any) -> Execution:
    """`execution`, or the default one, with these fields changed.

    Raises:
        TypeError: an option is no field of `Execution`.
    """
    known = ExecutionOptions.__annotations__
    for name in options:
        if name not in known:
            raise TypeError(f"There is no option {name!r} of an analysis; see help(analyze).")
    return replace(execution or Execution(), **options)
