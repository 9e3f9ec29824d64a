"""A run that remembers what was read of it: the dependencies of each cell of an analysis."""

import hashlib
import json
import threading
from collections import OrderedDict
from collections.abc import Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import asdict
from typing import NamedTuple

import numpy as np

from dynamics import schema
from dynamics.runs.run import Dense, Event, Matrix, Run, Spectrum

# Weight, update and displacement of a step share matrices, and so do all heads of a layer.
_MEMO_BYTES = 512 * 2**20
_MEMO_MATRICES = 4


class Dependency(NamedTuple):
    """Something of a run that a cell was made from.

    Attributes:
        name: of the matrix.
        step: the record it was read from.
        kind: the stored kind.
        since: None for a matrix; for the number of merges up to `step`, the step counted from.
    """

    name: str
    step: int
    kind: str
    since: int | None = None


Key = tuple[str, int, str]  # name, step, kind
Found = tuple[str | None, Matrix | None]  # the origin, the matrix


class TracedRun(Run):
    """A run whose matrices are kept for a while, and which notes what is read.

    A matrix is noted where it is asked for, also if it is still there from an earlier cell. As
    much is kept as fits into a fixed amount of memory, but four matrices at least. What is read
    ahead comes on top: the matrices of one step that a cell is made from.
    """

    def __init__(self, run: Run):
        self.path, self.format, self.steps = run.path, run.format, run.steps
        self.stored_kinds, self.matrices, self.attrs = run.stored_kinds, run.matrices, run.attrs
        self.problems, self.absent_kinds = run.problems, run.absent_kinds
        self.measured_kinds = run.measured_kinds
        self.merges_told_by_events = run.merges_told_by_events
        self._run = run
        self._known_steps = set(run.steps.tolist())
        self._memo: OrderedDict[Key, Found] = OrderedDict()
        self._ahead: dict[Key, Future[Found]] = {}
        self._asked: set[Key] = set()  # since something was last read ahead
        self._reader = ThreadPoolExecutor(1, "read-ahead")
        self._alone = threading.RLock()  # runs are not made for several threads
        self._bytes = self._largest = 0
        self._bases: dict[Key, str | None] = {}
        self._trace: dict[Dependency, str | None] | None = None
        self._common: dict[int, bytes] = {}

    @property
    def untraced(self) -> Run:
        """The run itself."""
        return self._run

    def start_cell(self) -> None:
        """Begin to note what the next cell is made from."""
        self._trace = {}

    @property
    def trace(self) -> Mapping[Dependency, str | None]:
        """What was read since `start_cell`, each with the origin that it had before it was read."""
        assert self._trace is not None
        return self._trace

    def read(self, name: str, step: int, kind: str) -> Matrix | None:
        """See `Run.read`."""
        key = (name, step, kind)
        self._asked.add(key)
        if key in self._memo:
            self._memo.move_to_end(key)
        else:
            ahead = self._ahead.pop(key, None)
            self._keep(key, self._read(key) if ahead is None else ahead.result())
        origin, matrix = self._memo[key]
        if self._trace is not None:
            self._trace[Dependency(*key)] = origin
        return matrix

    def _read(self, key: Key) -> Found:
        with self._alone:
            # Before it is read: a file that changes meanwhile must not pass for the one after.
            origin = None if self._trace is None else self.origin(*key)
            return origin, self._run.read(*key)

    def read_ahead(self, step: int, following: int) -> None:
        """Begin to read at `following` what was just read at `step`, in a thread of its own.

        The next cells of a matrix are most likely made from the same matrices of that step. What
        was read ahead for nothing is forgotten.
        """
        soon = (step, following)
        self._ahead = {key: each for key, each in self._ahead.items() if key[1] in soon}
        for name, at, kind in self._asked:
            key = (name, following, kind)
            if at == step and key not in self._memo and key not in self._ahead:
                self._ahead[key] = self._reader.submit(self._read, key)
        self._asked.clear()

    def measured(self, name: str, step: int, kind: str) -> Spectrum | None:
        """See `Run.measured`."""
        with self._alone:
            return self._run.measured(name, step, kind)

    def origin(self, name: str, step: int, kind: str) -> str | None:
        """See `Run.origin`; None for what cannot be read."""
        with self._alone:
            return None if step in self.problems else self._run.origin(name, step, kind)

    def merges_between(self, name: str, before: int, now: int) -> int:
        """See `Run.merges_between`."""
        if self._trace is not None and (merges := self._merges(name, before, now)) is not None:
            self._trace[merges] = self.origin_of(merges)
        with self._alone:
            return self._run.merges_between(name, before, now)

    def origin_of(self, dependency: Dependency) -> str | None:
        """The present origin of what a cell was made from, None where it cannot be told."""
        name, step, kind, since = dependency
        if not {step, step if since is None else since} <= self._known_steps:
            return None
        if since is None:
            return self.origin(name, step, kind)
        # Kept: `merges_between` compares the bases once, and tells of what they were then.
        digest = hashlib.blake2b(digest_size=16)
        for each in self.steps[(self.steps >= since) & (self.steps <= step)].tolist():
            key = (name, each, kind)
            if key not in self._bases:
                self._bases[key] = self.origin(*key)
            origin = self._bases[key]
            if origin is None:
                return None
            digest.update(f"{each} {origin}\n".encode())
        return digest.hexdigest()

    def cell_key(self, component: str, name: str, step: int, kind: str) -> bytes:
        """The cell's name, and all of the run that it may depend on besides what is read for it.

        A record that comes in between two others changes it, one that is appended does not.
        """
        if step not in self._common:
            visible = {
                "format": self.format,
                "path": self.path,
                "kinds": self.stored_kinds,
                "matrices": {each.name: (each.rows, each.cols) for each in self.matrices.values()},
                "attrs": dict(self.attrs),
                "events": [asdict(event) for event in self.events if event.step <= step],
                "steps": self.steps[self.steps <= step].tolist(),
            }
            self._common[step] = _digest(json.dumps(visible, sort_keys=True, default=str).encode())
        return _digest(json.dumps([component, name, step, kind]).encode(), self._common[step])

    @property
    def kinds(self) -> tuple[str, ...]:
        """See `Run.kinds`."""
        return self._run.kinds

    @property
    def events(self) -> tuple[Event, ...]:
        """See `Run.events`."""
        return self._run.events

    @property
    def scalars(self) -> dict[str, np.ndarray]:
        """See `Run.scalars`."""
        return self._run.scalars

    def _merges(self, name: str, before: int, now: int) -> Dependency | None:
        """What their number depends on; None if on nothing but events, which `cell_key` has."""
        if self.merges_told_by_events or schema.ADAPTER not in self.stored_kinds:
            return None
        kind = schema.BASE if schema.BASE in self.stored_kinds else schema.WEIGHT
        return Dependency(name, now, kind, since=before)

    def _keep(self, key: Key, found: Found) -> None:
        self._memo[key] = found
        size = _size(found[1])
        self._bytes, self._largest = self._bytes + size, max(self._largest, size)
        while self._bytes > max(_MEMO_BYTES, _MEMO_MATRICES * self._largest):
            _, (_, oldest) = self._memo.popitem(last=False)
            self._bytes -= _size(oldest)


def _size(matrix: Matrix | None) -> int:
    if matrix is None:
        return 0
    if isinstance(matrix, Dense):
        return matrix.values.nbytes
    return matrix.left.nbytes + matrix.right.nbytes


def _digest(*parts: bytes) -> bytes:
    return hashlib.blake2b(b"".join(parts), digest_size=20).digest()


def trace_to_json(trace: Mapping[Dependency, str | None]) -> str:
    """The dependencies with their origins as JSON."""
    return json.dumps([[*dependency, origin] for dependency, origin in trace.items()])


def trace_from_json(text: str | bytes) -> Sequence[tuple[Dependency, str]]:
    """What `trace_to_json` wrote."""
    return [(Dependency(*dependency), origin) for *dependency, origin in json.loads(text)]
