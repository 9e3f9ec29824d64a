"""`CachedRun`: keeps the matrices that were read lately, and reads the next step's ahead."""

import threading
from collections import OrderedDict
from concurrent.futures import Future, ThreadPoolExecutor

from dynamics.runs.run import Dense, Matrix, Run, Spectrum
from dynamics.runs.run_view import RunView

# Weight, update and displacement of a step share matrices. So do all heads of a layer, and the
# parts of a fused matrix, which are measured one after the other.
_KEPT_BYTES = 512 * 2**20
_KEPT_MATRICES = 4

Key = tuple[str, int, str]  # name, step, kind
Entry = tuple[str | None, Matrix | None]  # the origin before it was read, the matrix


class CachedRun(RunView):
    """A run whose matrices are kept for a while. The only cache of matrices that there is.

    As many matrices are kept as fit into 512 MiB, but at least four. What is read ahead comes on
    top: the matrices of one step that a cell is made from.

    Attributes:
        keeps_origins: whether the origin of a matrix is asked for before it is read.
    """

    def __init__(self, run: Run):
        super().__init__(run)
        self.keeps_origins = False
        self._entries: OrderedDict[Key, Entry] = OrderedDict()
        self._bytes = self._largest = 0
        self._ahead: dict[Key, Future[dict[str, Entry]]] = {}
        self._requested: set[Key] = set()  # since something was last read ahead
        self._reader = ThreadPoolExecutor(1, "read-ahead")
        self._lock = threading.RLock()  # formats are not written for several threads

    def read(self, name: str, step: int, kind: str) -> Matrix | None:
        """See `Run.read`."""
        return self.read_with_origin(name, step, kind)[1]

    def read_with_origin(self, name: str, step: int, kind: str) -> Entry:
        """(the origin that the matrix had before it was read, the matrix).

        The origin is None without `keeps_origins`.
        """
        key = (name, step, kind)
        self._requested.add(key)
        if key in self._entries:
            self._entries.move_to_end(key)
            return self._entries[key]
        ahead = self._ahead.pop(key, None)
        group = self._read_group(key) if ahead is None else ahead.result()
        # The one that was asked for comes last, so that it is the last to go.
        for each in sorted(group, key=lambda member: member == name):
            self._keep((each, step, kind), group[each])
        return group[name]

    def read_ahead(self, step: int, following: int) -> None:
        """Begin to read at `following` what was just read at `step`, in a thread of its own.

        The next cells of a matrix are most likely made from the same matrices of that step. What
        was read ahead and never asked for is dropped.
        """
        soon = (step, following)
        self._ahead = {key: each for key, each in self._ahead.items() if key[1] in soon}
        for name, at, kind in self._requested:
            key = (name, following, kind)
            if at == step and key not in self._entries and key not in self._ahead:
                self._ahead[key] = self._reader.submit(self._read_group, key)
        self._requested.clear()

    def read_spectrum(self, name: str, step: int, kind: str) -> Spectrum | None:
        """See `Run.read_spectrum`."""
        with self._lock:
            return self.inner.read_spectrum(name, step, kind)

    def origin(self, name: str, step: int, kind: str) -> str | None:
        """See `Run.origin`."""
        with self._lock:
            return self.inner.origin(name, step, kind)

    def merges_between(self, name: str, before: int, now: int) -> int:
        """See `Run.merges_between`."""
        with self._lock:
            return self.inner.merges_between(name, before, now)

    def _read_group(self, key: Key) -> dict[str, Entry]:
        name, step, kind = key
        with self._lock:
            # Before it is read: a file that changes meanwhile must not pass for the one after.
            origins = {
                each: self.origin(each, step, kind) if self.keeps_origins else None
                for each in self.inner.group_of(name)
            }
            group = self.inner.read_group(name, step, kind)
            return {each: (origins[each], matrix) for each, matrix in group.items()}

    def _keep(self, key: Key, entry: Entry) -> None:
        if key in self._entries:
            self._bytes -= _size(self._entries.pop(key)[1])
        self._entries[key] = entry
        size = _size(entry[1])
        self._bytes, self._largest = self._bytes + size, max(self._largest, size)
        while self._bytes > max(_KEPT_BYTES, _KEPT_MATRICES * self._largest):
            _, (_, oldest) = self._entries.popitem(last=False)
            self._bytes -= _size(oldest)


def _size(matrix: Matrix | None) -> int:
    if matrix is None:
        return 0
    if isinstance(matrix, Dense):
        codes = None if matrix.errors is None else matrix.errors.codes
        return matrix.values.nbytes + (0 if codes is None else codes.nbytes)
    return matrix.left.nbytes + matrix.right.nbytes
