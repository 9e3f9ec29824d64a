"""How long a processor needs for a matrix: a model of a few measured times, kept on disk."""

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
    """Seconds of the parts of a spectrum, on one processor.

    Attributes:
        start: whatever the size.
        number: of a number of the matrix: to bring it there, and its part of the noise.
        product: of a product of two numbers, in a Gram matrix.
        eigenvalues: of a Gram matrix of each of `_SIDES`.
    """

    start: float
    number: float
    product: float
    eigenvalues: tuple[float, ...]

    def seconds(self, rows: int, cols: int) -> float:
        """What an (m, n) matrix takes, n <= m: start + number·mn + product·mn² + eigenvalues(n).

        The last interpolated between the measured sides, as n^p between two of them, and likewise
        beyond the largest; below the smallest, that of the smallest.
        """
        n, m = sorted((rows, cols))
        side = max(n, _SIDES[0])
        nearest = int(np.clip(np.searchsorted(_SIDES, side), 1, len(_SIDES) - 1))
        pair = slice(nearest - 1, nearest + 1)
        sides, times = np.log(_SIDES[pair]), np.log(self.eigenvalues[pair])
        slope = (times[1] - times[0]) / (sides[1] - sides[0])
        eigenvalues = math.exp(times[0] + slope * (math.log(side) - sides[0]))
        return self.start + self.number * m * n + self.product * m * n * n + eigenvalues


def measured_rates(
    place: Callable[[np.ndarray], Array],
    noise: Callable[[Array], object],
    gram: Callable[[Array], Array],
    eigvalsh: Callable[[Array], object],
) -> Rates:
    """The rates of a processor, from its way to do each part of a spectrum.

    Args:
        place: brings an array there.
        noise: all that is done once for every number.
        gram: the Gram matrix of (m, n) numbers; may return before it is made.
        eigvalsh: its eigenvalues, on the CPU.
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


def kept_rates(name: str, measure: Callable[[], Rates]) -> Rates:
    """The rates of a processor of this machine, measured once and then read from a file.

    That is `learning-dynamics/rates.json` in the user's cache directory. Where it cannot be
    written or read, they are measured each time.

    Args:
        name: of the processor and of what computes on it.
        measure: measures them.
    """
    directory = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache")
    path = directory / "learning-dynamics" / "rates.json"
    key = f"{_VERSION} {platform.node()} {name}"
    known: dict[str, dict] = {}
    with suppress(OSError, ValueError, TypeError):
        known = dict(json.loads(path.read_text("utf-8")))
    with suppress(KeyError, TypeError):
        found = known[key]
        rates = Rates(**(found | {"eigenvalues": tuple(found["eigenvalues"])}))
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
    call()  # whatever is loaded or allocated at the first time
    times = []
    for _ in range(_REPEATS):
        started = time.perf_counter()
        call()
        times.append(time.perf_counter() - started)
    return min(times)
