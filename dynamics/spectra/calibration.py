"""How long a processor needs for a matrix: a model of a few measured times, kept in a file."""

import json
import math
import os
import platform
import time
from collections.abc import Callable
from contextlib import suppress
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import Any, TypeVar

import numpy as np

Array = TypeVar("Array", bound=Any)

_VERSION = 1  # of the file, and of what is measured
_SIDES = (64, 128, 256, 512, 1024)
_REPEATS = 3


@dataclass(frozen=True)
class Rates:
    """How many seconds the parts of a spectrum take on one processor.

    Attributes:
        start: per matrix, whatever its size.
        number: per entry: to move it to the processor, and its share of the noise floor.
        product: per product of two entries in the Gram matrix.
        eigenvalues: for the eigenvalues of a Gram matrix, one time for each side in `_SIDES`.
    """

    start: float
    number: float
    product: float
    eigenvalues: tuple[float, ...]

    def seconds(self, rows: int, cols: int) -> float:
        """Seconds for an (m, n) matrix, n <= m: start + number·mn + product·mn² + eigenvalues(n).

        The last term is interpolated between two measured sides as n^p, and extrapolated likewise
        beyond the largest side. Below the smallest side it is the time of the smallest.

        Example:
            >>> rates = Rates(1.0, 0.0, 0.0, tuple(side**3 / 1e9 for side in _SIDES))
            >>> round(rates.seconds(4000, 2000), 6)  # 1 + 2000³ / 10⁹
            9.0
        """
        n, m = sorted((rows, cols))
        side = max(n, _SIDES[0])
        nearest = int(np.clip(np.searchsorted(_SIDES, side), 1, len(_SIDES) - 1))
        pair = slice(nearest - 1, nearest + 1)
        sides, times = np.log(_SIDES[pair]), np.log(self.eigenvalues[pair])
        slope = (times[1] - times[0]) / (sides[1] - sides[0])
        eigenvalues = math.exp(times[0] + slope * (math.log(side) - sides[0]))
        return self.start + self.number * m * n + self.product * m * n * n + eigenvalues


def measure_rates(
    place: Callable[[np.ndarray], Array],
    noise: Callable[[Array], object],
    gram: Callable[[Array], Array],
    eigvalsh: Callable[[Array], object],
) -> Rates:
    """Measure the rates of a processor, given the functions that do each part of a spectrum there.

    Args:
        place: moves an array to the processor.
        noise: does all that is done once for every entry.
        gram: computes the Gram matrix of (m, n) numbers; it may return before it is done.
        eigvalsh: computes the eigenvalues of that, on the CPU in the end.
    """
    rng = np.random.default_rng(0)
    largest = rng.standard_normal((_SIDES[-1], _SIDES[-1]), np.float32)
    placed = place(largest)
    products = [gram(placed[:side, :side]) for side in _SIDES]
    eigenvalues = tuple(_seconds(partial(eigvalsh, each)) for each in products)
    both = _seconds(lambda: eigvalsh(gram(placed)))
    smallest = largest[: _SIDES[0], : _SIDES[0]].copy()
    start = _seconds(lambda: noise(place(smallest)))
    return Rates(
        start,
        max(_seconds(lambda: noise(place(largest))) - start, 0.0) / largest.size,
        max(both - eigenvalues[-1], 0.0) / (largest.size * _SIDES[-1]),
        eigenvalues,
    )


def rates_path() -> Path:
    """Where the rates of this user's machines are kept."""
    directory = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache")
    return directory / "learning-dynamics" / "rates.json"


def load_rates(name: str, measure: Callable[[], Rates]) -> Rates:
    """The rates of a processor of this machine: measured once, and then read from a file.

    The file is `learning-dynamics/rates.json` in the user's cache directory. Where it cannot be
    written or read, the rates are measured each time.

    Args:
        name: names the processor and the software that computes on it.
        measure: measures the rates.
    """
    path = rates_path()
    key = f"{_VERSION} {platform.node()} {name}"
    known: dict[str, dict] = {}
    with suppress(OSError, ValueError, TypeError):
        known = dict(json.loads(path.read_text("utf-8")))
    with suppress(KeyError, TypeError):
        entry = known[key]
        rates = Rates(**(entry | {"eigenvalues": tuple(entry["eigenvalues"])}))
        rates.seconds(1, 1)
        return rates
    rates = measure()
    with suppress(OSError):
        path.parent.mkdir(parents=True, exist_ok=True)
        whole = path.with_name(f"{path.name}.{os.getpid()}")
        whole.write_text(json.dumps({**known, key: asdict(rates)}, indent=1), "utf-8")
        whole.replace(path)
    return rates


def _seconds(call: Callable[[], object]) -> float:
    call()  # the first call also loads and allocates
    times = []
    for _ in range(_REPEATS):
        started = time.perf_counter()
        call()
        times.append(time.perf_counter() - started)
    return min(times)
