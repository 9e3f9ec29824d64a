"""What each cell of an analysis was made from, so that a later analysis can tell what changed."""

import hashlib
import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from typing import NamedTuple

from dynamics import schema
from dynamics.runs.matrix_cache import CachedRun
from dynamics.runs.run import Matrix, Run
from dynamics.runs.run_view import RunView


class Dependency(NamedTuple):
    """Something of a run that a cell was made from.

    Attributes:
        name: the matrix.
        step: the record that it was read from.
        kind: the stored kind.
        since: None for a matrix. For the number of merges up to `step`: the step that the count
            begins at.
    """

    name: str
    step: int
    kind: str
    since: int | None = None


class TracedRun(RunView):
    """A run that notes what is read of it, from one `start_cell` to the next.

    A matrix is noted where it is asked for, also if it was kept from an earlier cell.
    """

    inner: CachedRun

    def __init__(self, run: Run):
        super().__init__(CachedRun(run))
        self._known_steps = set(run.steps.tolist())
        self._base_origins: dict[tuple[str, int, str], str | None] = {}
        self._trace: dict[Dependency, str | None] | None = None
        self._digests: dict[int, bytes] = {}

    @property
    def untraced(self) -> Run:
        """The run itself, which keeps and notes nothing."""
        return self.inner.inner

    def start_cell(self) -> None:
        """Begin to note what the next cell is made from."""
        self._trace = {}
        self.inner.keeps_origins = True

    @property
    def trace(self) -> Mapping[Dependency, str | None]:
        """What was read since `start_cell`, each with the origin that it had before it was read."""
        assert self._trace is not None
        return self._trace

    def read(self, name: str, step: int, kind: str) -> Matrix | None:
        """See `Run.read`."""
        origin, matrix = self.inner.read_with_origin(name, step, kind)
        if self._trace is not None:
            self._trace[Dependency(name, step, kind)] = origin
        return matrix

    def read_ahead(self, step: int, following: int) -> None:
        """See `CachedRun.read_ahead`."""
        self.inner.read_ahead(step, following)

    def merges_between(self, name: str, before: int, now: int) -> int:
        """See `Run.merges_between`."""
        if self._trace is not None and (merges := self._merges(name, before, now)) is not None:
            self._trace[merges] = self.origin_of(merges)
        return self.inner.merges_between(name, before, now)

    def origin_of(self, dependency: Dependency) -> str | None:
        """The present origin of what a cell was made from, None where it cannot be told."""
        name, step, kind, since = dependency
        if not {step, step if since is None else since} <= self._known_steps:
            return None
        if since is None:
            return self.origin(name, step, kind)
        # Kept, because `merges_between` compares the bases only once: its answer stays that of
        # the bases as they were then.
        digest = hashlib.blake2b(digest_size=16)
        for each in self.steps[(self.steps >= since) & (self.steps <= step)].tolist():
            key = (name, each, kind)
            if key not in self._base_origins:
                self._base_origins[key] = self.origin(*key)
            origin = self._base_origins[key]
            if origin is None:
                return None
            digest.update(f"{each} {origin}\n".encode())
        return digest.hexdigest()

    def cell_key(self, component: str, name: str, step: int, kind: str) -> bytes:
        """The cell's name, and all of the run that it may depend on besides what is read for it.

        A record that comes in between two others changes the key. One that is appended does not.
        """
        named: list[str | int | None] = [component, name, step, kind]
        if kind == schema.UPDATE:
            reference = self.update_reference(step)
            if reference != Run.update_reference(self, step):
                named.append(reference)  # left out elsewhere: caches of earlier releases hold
        if step not in self._digests:
            visible = {
                "format": self.format,
                "path": self.path,
                "kinds": self.stored_kinds,
                "matrices": {each.name: (each.rows, each.cols) for each in self.matrices.values()},
                "attrs": dict(self.attrs),
                "events": [asdict(event) for event in self.events if event.step <= step],
                "steps": self.steps[self.steps <= step].tolist(),
            }
            self._digests[step] = _digest(json.dumps(visible, sort_keys=True, default=str).encode())
        return _digest(json.dumps(named).encode(), self._digests[step])

    def _merges(self, name: str, before: int, now: int) -> Dependency | None:
        """What the number of merges depends on; None if only on events, which `cell_key` has."""
        if self.merges_told_by_events or schema.ADAPTER not in self.stored_kinds:
            return None
        kind = schema.BASE if schema.BASE in self.stored_kinds else schema.WEIGHT
        return Dependency(name, now, kind, since=before)


def _digest(*parts: bytes) -> bytes:
    return hashlib.blake2b(b"".join(parts), digest_size=20).digest()


def trace_to_json(trace: Mapping[Dependency, str | None]) -> str:
    """The dependencies with their origins as JSON."""
    return json.dumps([[*dependency, origin] for dependency, origin in trace.items()])


def trace_from_json(text: str | bytes) -> Sequence[tuple[Dependency, str]]:
    """The dependencies with their origins that `trace_to_json` wrote."""
    return [(Dependency(*dependency), origin) for *dependency, origin in json.loads(text)]
