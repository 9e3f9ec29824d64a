"""What measuring a run on the hub will fetch: told before the first tensor, then fetched ahead."""

import re
from ast import literal_eval
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from math import prod

from dynamics import schema
from dynamics.formats.storage.hub.repository import Range, Repository
from dynamics.formats.storage.tensors import CODE_BYTES, ITEM_BYTES
from dynamics.runs.run import Run

# The origin of a tensor in a file, which names all that is read of it (`StoredTensor.origin`).
_TENSOR = re.compile(
    r"hub (?P<content>\w+:\w+)\|(?P<offset>\d+)\|(?P<dtype>\w+)\|(?P<shape>\([\d, ]*\))"
    r"\|(?P<strides>None|\([\d, ]*\))"
)
_BYTES = ITEM_BYTES | CODE_BYTES
Cell = tuple[str, int, str]  # matrix, step, kind


@dataclass(frozen=True)
class Cost:
    """What will be fetched.

    Attributes:
        path: the address of the run.
        bytes: of tensors, and of the little that lies between them; the headers are here by then.
        of: bytes of all weights in its revisions.
        revisions: how many there are.
        requests: how many requests the tensors take, if none is repeated.
    """

    path: str
    bytes: int
    of: int
    revisions: int
    requests: int

    @property
    def line(self) -> str:
        """The cost in one line.

        >>> Cost("hf://org/name", 2_100_000_000, 341_000_000_000, 154, 2310).line
        'hf://org/name: 2.1 GB of 341 GB, 154 revisions, 2310 requests; --select, --steps narrow it'
        """
        return (
            f"{self.path}: {_readable(self.bytes)} of {_readable(self.of)}, {self.revisions} "
            f"revision{'s' * (self.revisions != 1)}, {self.requests} requests; --select, --steps "
            "narrow it"
        )


def expect(run: Run, cells: Iterable[Cell]) -> Cost | None:
    """Tell the hub which cells of a run will be measured, in which order; what that costs.

    None for a run that does not lie on the hub.
    """
    repository = run.source
    if not isinstance(repository, Repository):
        return None
    wanted = dict.fromkeys(cell for each in cells for cell in _read_for(run, *each))
    ranges = list(dict.fromkeys(each for cell in wanted for each in _ranges(run, cell)))
    fetched = [each.expect(ranges) for each in repository.family]
    size, requests = (sum(each) for each in zip(*fetched, strict=True))
    return Cost(run.path, size, repository.weights, len(run.steps), requests)


def _read_for(run: Run, name: str, step: int, kind: str) -> Iterator[Cell]:
    """The stored matrices that a cell is made from."""
    if name not in run.matrices:
        return
    if kind in run.stored_kinds:
        yield name, step, kind
        return
    first = int(run.steps[0])
    before = {schema.UPDATE: run.update_reference(step), schema.DISPLACEMENT: first}.get(kind, -1)
    if before is None or before == step:
        return  # there is no such difference, which nothing is read to tell
    for at in (before, step):
        if at >= 0:
            yield name, at, schema.WEIGHT


def _ranges(run: Run, cell: Cell) -> Iterator[Range]:
    for match in _TENSOR.finditer(run.origin(*cell) or ""):
        dtype, shape = match["dtype"], literal_eval(match["shape"])
        strides = literal_eval(match["strides"])
        numbers = prod(shape)
        if strides is not None and numbers:
            numbers = 1 + sum((n - 1) * s for n, s in zip(shape, strides, strict=True))
        if dtype in _BYTES:
            yield match["content"], int(match["offset"]), numbers * _BYTES[dtype]


def _readable(size: float) -> str:
    """A count of bytes as it is spoken.

    >>> _readable(341e9), _readable(2_140_000), _readable(12)
    ('341 GB', '2.1 MB', '12 B')
    """
    units = ["B", "kB", "MB", "GB", "TB"]
    while size >= 999.5 and len(units) > 1:
        size /= 1000
        del units[0]
    return f"{size:.1f} {units[0]}" if size < 10 and units[0] != "B" else f"{size:.0f} {units[0]}"
