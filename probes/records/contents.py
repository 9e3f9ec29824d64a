"""What a record may hold, and what the two forms of it, matrices and spectra, share."""

from collections.abc import Collection, Iterator, Sequence
from typing import Any

import torch

from dynamics import schema
from dynamics.errors import DynamicsError
from dynamics.recordings import ADAPTER, GRADIENT, WEIGHT, Recording, factor_path
from dynamics.runs.run import Event
from dynamics.runs.stacks import Part
from probes.gradients.of_step import GRADIENT_BEFORE_CLIPPING, PROBED_GRADIENT, Gradients
from probes.model.parameters import Tracked
from probes.model.sharding import gather, is_sharded
from probes.model.weights import Factors
from probes.records.record import Record

DEFAULT_CONTENTS = (WEIGHT, GRADIENT, ADAPTER, PROBED_GRADIENT)
DIFFERENCES = (schema.UPDATE, schema.DISPLACEMENT)


class Contents:
    """Fills the records of one training run.

    Args:
        tracked: the recorded weights.
        record: the words that `Recorder` was given as `record`.
        writes: whether this process writes. Other processes only help to gather sharded tensors.
    """

    def __init__(self, tracked: Sequence[Tracked], record: frozenset[str], writes: bool):
        self._tracked, self._record, self._writes = tracked, record, writes

    def keep(self, gradient: torch.Tensor, *, owned: bool = False) -> Any:
        """What a record keeps of a gradient, taken now.

        Args:
            gradient: whole, on any device.
            owned: nobody else will change this tensor.
        """
        raise NotImplementedError

    def fill(self, record: Record, gradients: Gradients) -> None:
        """Add everything that belongs into a record.

        Every process that holds a part of a sharded tensor must call this.
        """
        raise NotImplementedError

    def release(self, record: Record) -> None:
        """Take back what a written record no longer needs."""

    def note(self, event: Event) -> None:
        """Learn of an event of the training."""

    def resume(self, recording: Recording) -> None:
        """Continue from what an earlier process has recorded."""

    def _needed(self) -> Iterator[Tracked]:
        """The weights that this process must read: for its own record, or for another process."""
        return (
            each
            for each in self._tracked
            if self._writes or any(is_sharded(part) for part in each.weight.parts)
        )


def gathered_factors(each: Tracked, *, keep: bool) -> Iterator[tuple[Part, Factors]]:
    """(part, its LoRA factors) of each matrix of a weight; nothing without an adapter.

    Every process that holds a part of a sharded factor must call this.

    Args:
        each: the weight.
        keep: whether this process wants the values. Otherwise it gets nothing.
    """
    factors = each.weight.factors()
    if factors is None:
        return
    a, b = (gather(factor, keep=keep) for factor in (factors.a, factors.b))
    if a is not None and b is not None:
        whole = factors._replace(a=a, b=b)
        yield from ((part, each.factors_of(part, whole)) for part in each.parts)


def factor_arrays(
    name: str, factors: Factors
) -> Iterator[tuple[str, torch.Tensor, dict[str, Any]]]:
    """(array path, factor, attributes of the array) of A and of B."""
    attrs = {"scaling": factors.scaling, "transposed": bool(factors.transposed)}
    yield factor_path(name, "A"), factors.a, attrs
    yield factor_path(name, "B"), factors.b, attrs


def recorded_kinds(record: Collection[str], spectra_only: bool) -> set[str]:
    """The kinds that can be measured of a recording with these words in `Recorder(record=...)`."""
    kinds = {*record} & {WEIGHT, ADAPTER, *DIFFERENCES}
    if {GRADIENT, PROBED_GRADIENT, GRADIENT_BEFORE_CLIPPING} & {*record}:
        kinds.add(GRADIENT)
    if WEIGHT in kinds and not spectra_only:
        kinds.add(schema.UPDATE)
    return kinds


def check_contents(record: Sequence[str], spectra_only: bool) -> None:
    """Refuse words of `Recorder(record=...)` that do not go together.

    Raises:
        DynamicsError: an unknown word, no word, two words that would fill the same arrays, or
            differences of weights where matrices are recorded.
    """
    takes = (*DEFAULT_CONTENTS, GRADIENT_BEFORE_CLIPPING, *(DIFFERENCES if spectra_only else ()))
    if not record or set(record) - set(takes):
        derived = " and ".join(sorted(set(record) & set(DIFFERENCES)))
        why = f" No need for {derived}: analyze computes it from the weights." if derived else ""
        raise DynamicsError(f"record takes some of {', '.join(takes)}; found {list(record)}.{why}")
    if {GRADIENT, GRADIENT_BEFORE_CLIPPING} <= set(record):
        raise DynamicsError(
            f"{GRADIENT} and {GRADIENT_BEFORE_CLIPPING} would be the same arrays: record one "
            "of them, or attach two recorders with a store each."
        )
