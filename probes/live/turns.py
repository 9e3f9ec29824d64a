"""Which matrices a record measures, so that measuring takes no more than its share of the time."""

import time
from collections.abc import Callable, Iterator, Mapping
from itertools import zip_longest

from dynamics.runs.run import MatrixInfo

FIRST = 0.1  # seconds, for the first record, before which no step was taken
# Of a matrix of a shape that was not measured yet: seconds at all, and per m·n·min(m, n).
_AT_LEAST, _PER_PRODUCT = 1e-3, 1e-9


class Turns:
    """Hands out the matrices of a model in turn, as far as the time that is left goes.

    Matrices of all groups alternate. A matrix that costs more than is left waits for a later
    record, and saves half of what each record earns; the others have the rest meanwhile.

    Args:
        budget: seconds to spend per second of training; None hands out everything.
        clock: seconds.
    """

    def __init__(self, budget: float | None, clock: Callable[[], float] = time.perf_counter):
        self._budget, self._clock = budget, clock
        self._left = self._earned = FIRST
        self._trained_until: float | None = None
        self._order: list[str] = []  # those that wait begin, those that were measured last end
        self._took: dict[tuple[int, int], float] = {}  # shape -> seconds, all kinds

    def trained(self, until: float) -> None:
        """A record was made at this time: the training since the one before earns its share."""
        if self._budget is not None and self._trained_until is not None:
            self._earned = self._budget * (until - self._trained_until)
            self._left += self._earned
        self._trained_until = until

    def spend(self, seconds: float) -> None:
        """Take off what something else took, such as the calls of a tracker."""
        self._left -= seconds

    def of_record(
        self, matrices: Mapping[str, MatrixInfo], groups: Mapping[str, str], kinds: int
    ) -> Iterator[str]:
        """The names of the matrices to measure now; each is timed until the next one is asked for.

        Args:
            matrices: name -> matrix.
            groups: name -> group; groups alternate.
            kinds: how many matrices each name stands for.
        """
        order = [name for name in self._order if name in groups]
        known = {*order}
        order += [name for name in _alternating(groups) if name not in known]
        costs = {name: self._cost(matrices[name], kinds) for name in order}
        waiting: list[str] = []
        done: list[str] = []
        saved = 0.0  # for the first that waits
        for name in order:
            if self._budget is not None and costs[name] > self._left - saved:
                if not waiting:
                    saved = max(self._left - self._earned / 2, 0.0)
                waiting.append(name)
                continue
            info, begun = matrices[name], self._clock()
            yield name
            took = self._clock() - begun
            self._took[info.rows, info.cols] = took
            self._left -= took
            done.append(name)
        self._order = waiting + done
        # No more than a whole turn is saved up.
        self._left = min(self._left, sum(costs.values()) if waiting else 0.0)

    def _cost(self, info: MatrixInfo, kinds: int) -> float:
        guess = _AT_LEAST + _PER_PRODUCT * info.rows * info.cols * min(info.rows, info.cols)
        return self._took.get((info.rows, info.cols), kinds * guess)


def _alternating(groups: Mapping[str, str]) -> list[str]:
    """The names, one of each group after another."""
    members: dict[str, list[str]] = {}
    for name, group in groups.items():
        members.setdefault(group, []).append(name)
    return [name for row in zip_longest(*members.values()) for name in row if name is not None]
