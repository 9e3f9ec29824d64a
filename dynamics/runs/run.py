"""A run: what every format offers to the analysis, one matrix at a time."""

from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from dynamics import schema
from dynamics.errors import MissingError
from dynamics.runs import parameter_names
from dynamics.runs.account import Account
from dynamics.runs.code_errors import CodeErrors

# (values (m, n), dtype), and the errors of numbers that were quantised
Stored = tuple[np.ndarray, str] | tuple[np.ndarray, str, CodeErrors]


@dataclass(frozen=True)
class MatrixInfo:
    """One matrix of a model: its name, where it belongs, and its shape.

    Attributes:
        name: the clean parameter name, or the name of a circuit.
        layer: the index of the layer, None outside the stack of layers.
        module: its role, see `parameter_names.module_of`.
        rows: m, of (m, n).
        cols: n.
        head: the query head of a circuit, None where it belongs to no single head.
    """

    name: str
    layer: int | None
    module: str
    rows: int
    cols: int
    head: int | None = None

    @property
    def expert(self) -> int | None:
        """The routed expert of a mixture, None outside of experts."""
        return parameter_names.expert_of(self.name)

    @property
    def stack(self) -> str:
        """Encoder, decoder, ...: see `parameter_names.stack_of`."""
        return parameter_names.stack_of(self.name)

    @property
    def attention(self) -> str:
        """Self or cross: see `parameter_names.attention_of`."""
        return parameter_names.attention_of(self.name)


def matrices_of(shapes: Mapping[str, tuple[int, ...]]) -> dict[str, MatrixInfo]:
    """Clean name -> MatrixInfo of the two-dimensional tensors among `shapes`, layer by layer."""
    clean = {parameter_names.clean_name(stored): shape for stored, shape in shapes.items()}
    return {
        name: MatrixInfo(
            name, parameter_names.layer_of(name), parameter_names.module_of(name), *clean[name]
        )
        for name in sorted(clean, key=parameter_names.natural_order)
        if len(clean[name]) == 2 and min(clean[name]) > 0
    }


@dataclass(frozen=True)
class Dense:
    """A matrix given by its entries.

    Attributes:
        values: (rows, cols), any float dtype that holds the stored numbers exactly.
        dtype: the dtype that the numbers were stored in, e.g. "bfloat16". It decides their noise.
        errors: of a quantised matrix, which decide its noise instead; `dtype` is then the one that
            the model computes with.
    """

    values: np.ndarray
    dtype: str
    errors: CodeErrors | None = None

    @property
    def shape(self) -> tuple[int, int]:
        """(rows, cols)."""
        rows, cols = self.values.shape
        return rows, cols

    @property
    def stored(self) -> tuple[Stored, ...]:
        """The stored numbers that its noise comes from."""
        if self.errors is not None:
            return ((self.values, self.dtype, self.errors),)
        return ((self.values, self.dtype),)

    def part(self, cut: Callable[[Any], Any]) -> "Dense":
        """The same part of the numbers and of their errors, cut out by an index or `.T`."""
        errors = None if self.errors is None else cut(self.errors)
        return Dense(cut(self.values), self.dtype, errors)


@dataclass(frozen=True)
class Factored:
    """A matrix scale · left @ right of known low rank, never multiplied out to be measured.

    Attributes:
        left: (rows, r).
        right: (r, cols).
        scale: the LoRA scaling s.
        dtype: the dtype that the factors were stored in.
        transposed: whether left is LoRA's Aᵀ and right its Bᵀ, not B and A.
        noise: the norms of the errors of left and of right, where other than their dtype decides
            them: they were quantised, or trained in place.
        storage_noise: the same without the roundings of training, where there were any.
    """

    left: np.ndarray
    right: np.ndarray
    scale: float
    dtype: str
    transposed: bool = False
    noise: tuple[float, float] | None = None
    storage_noise: tuple[float, float] | None = None

    @property
    def shape(self) -> tuple[int, int]:
        """(rows, cols) of the product."""
        return self.left.shape[0], self.right.shape[1]

    @property
    def rank_bound(self) -> int:
        """The largest rank that the product can have."""
        return min(self.left.shape[1], *self.shape)

    def product(self) -> np.ndarray:
        """The matrix itself, float64, (rows, cols)."""
        return self.scale * (self.left.astype(np.float64) @ self.right.astype(np.float64))


Matrix = Dense | Factored


@dataclass(frozen=True)
class Spectrum:
    """All singular values of one matrix, or of several of one shape along leading axes.

    Attributes:
        s: (k,) float64, descending, >= 0, k = min(rows, cols).
        rows: m.
        cols: n.
        rank_bound: the largest rank the matrix can have: r for a factored one, that of the
            adapters for a difference that adapters alone made, else k.
        error: bound on |computed - exact| for every singular value. Where they come from a Gram
            matrix it is that of the smallest, and the others are nearer to theirs by s_k/s.
        noise_floor: spectral norm of the noise of all roundings that are behind the numbers: those
            of the stored numbers and, in a difference of weights that were trained in place, one
            for each optimizer step.
        storage_noise_floor: that of the stored numbers alone; None where it is the same.

    Example:
        >>> spectrum = dy.spectrum(np.diag([3.0, 1.0]))
        >>> spectrum.s.tolist(), spectrum.rank_bound
        ([3.0, 1.0], 2)
    """

    s: np.ndarray
    rows: int
    cols: int
    rank_bound: int
    error: float
    noise_floor: float
    storage_noise_floor: float | None = None

    @property
    def floor(self) -> float:
        """What a singular value must exceed to be a property of the model: noise or error."""
        return np.maximum(self.noise_floor, self.error)


@dataclass(frozen=True)
class Event:
    """Something that happened after optimizer step `step`: merge, optimizer_reset, resume."""

    step: int
    kind: str
    attrs: Mapping[str, Any]


class Run(ABC):
    """One training run, read lazily. Formats derive from this and nothing derives from them.

    Attributes:
        path: where it was opened, for messages.
        format: the name of its layout, e.g. "recording".
        steps: (n,) int64, strictly increasing: optimizer steps done when each record was made.
        stored_kinds: the kinds it holds; `update` and `displacement` are derived from `weight`.
        spectrum_kinds: the kinds that it holds as spectra, not as matrices, see `read_spectrum`.
        matrices: clean name -> MatrixInfo, every two-dimensional parameter.
        attrs: configuration, versions and definitions, JSON-like.
        problems: step -> why nothing can be read there (a damaged checkpoint).
        places: step -> the file or directory that it is read from; empty where one store has all.
        passed_over: name -> why it is not part of the run, for files and directories beside it that
            look like a part.
        account: which tensors of the model are measured, and why the others are not; None where the
            run does not tell.
        absent_kinds: kind -> why a run of this format usually has it and this one does not.
        source: the repository on a network that it is read from; None for one on a disk.
        merges_told_by_events: whether `merges_between` looks at `events` only, and not at bases.

    Example:
        >>> run = dy.open_run("run.zarr")
        >>> name, info = next(iter(run.matrices.items()))
        >>> run.read(name, run.steps[0], "weight").shape == (info.rows, info.cols)
        True
    """

    path: str
    format: str
    steps: np.ndarray
    stored_kinds: tuple[str, ...]
    spectrum_kinds: tuple[str, ...] = ()
    matrices: dict[str, MatrixInfo]
    attrs: Mapping[str, Any]
    problems: Mapping[int, str] = {}
    places: Mapping[int, str] = {}
    passed_over: Mapping[str, str] = {}
    account: Account | None = None
    absent_kinds: Mapping[str, str] = {}
    source: Any = None
    merges_told_by_events: bool = False

    @property
    def kinds(self) -> tuple[str, ...]:
        """Every kind that can be measured, stored or derived, in the order of `schema.KINDS`."""
        derived: list[str] = []
        adapted = schema.ADAPTER in self.stored_kinds
        if schema.WEIGHT in self.stored_kinds:
            derived += [schema.UPDATE, schema.DISPLACEMENT]
            derived += [schema.CYCLE_UPDATE] if adapted else []
            derived += [schema.OPTIMIZER_UPDATE] if (np.diff(self.steps) == 1).any() else []
        if adapted and any(event.kind == schema.MERGE for event in self.events):
            derived.append(schema.ACCUMULATED_ADAPTER)
        found = {*self.stored_kinds, *self.spectrum_kinds, *derived}
        return tuple(kind for kind in schema.KINDS if kind in found)

    @abstractmethod
    def read(self, name: str, step: int, kind: str) -> Matrix | None:
        """The stored matrix of a parameter, or None where the run has none at this step.

        Raises:
            FormatError: its file is damaged.
        """

    def group_of(self, name: str) -> tuple[str, ...]:
        """The matrices that are read in one go with this one, itself among them."""
        return (name,)

    def read_group(self, name: str, step: int, kind: str) -> dict[str, Matrix | None]:
        """What `read` gives for each matrix of `group_of(name)`, with the work done once."""
        return {each: self.read(each, step, kind) for each in self.group_of(name)}

    def read_spectrum(self, name: str, step: int, kind: str) -> Spectrum | None:
        """The spectrum that was measured while the model trained, None where there is none.

        All NaN where the matrix held NaN or Inf.

        Raises:
            FormatError: its file is damaged.
        """
        return None

    def origin(self, name: str, step: int, kind: str) -> str | None:
        """A cheap token of where `read` takes this matrix from, without reading its numbers.

        It changes whenever what `read` returns may have changed, also where nothing is stored: a
        file's size, times and inode (`origins.file_origin`), or an ETag, and whatever else the
        matrix is made with (offset, dtype, scaling). A second analysis does not read a matrix
        whose origin is the one it had before.

        Returns:
            None where nothing cheap can tell; the numbers are then read and compared. None for a
            step in `problems`, too.
        """
        return None

    @property
    def events(self) -> tuple[Event, ...]:
        """What happened during the run, in order."""
        return ()

    @property
    def scalars(self) -> dict[str, np.ndarray]:
        """Series along `steps`, float64, NaN where nothing was recorded: loss, tokens, ..."""
        return {}

    def merges_between(self, name: str, before: int, now: int) -> int:
        """How often an adapter was merged into this weight between two steps, as far as it shows.

        Each merge rounds the weight once more, which the noise of a difference has to count.
        """
        return 0

    def update_reference(self, step: int) -> int | None:
        """The step whose weight an `update` subtracts: the previous record, None at the first."""
        position = int(np.searchsorted(self.steps, step))
        return int(self.steps[position - 1]) if position else None

    def trains(self, name: str) -> bool | None:
        """Whether the whole weight trains by its settings, not only an adapter of it.

        None where the run does not tell, as checkpoints do not.
        """
        return None

    def sparse_entries(self, name: str) -> int | None:
        """How many entries the base of a weight has by design, where it is sparse and trains.

        Such a weight is s·B·A + S (SLTrain). None for any other weight.
        """
        return None

    def require_matrices(self, purpose: str) -> None:
        """Refuse what needs the matrices themselves where only their spectra were recorded.

        Raises:
            MissingError: `purpose` needs matrices, and the run has none.
        """
        if self.spectrum_kinds:
            raise MissingError(
                f"{purpose} needs the matrices, and {self.path} holds their singular values only "
                "(it was recorded with spectra_only=True): record matrices, or measure checkpoints."
            )

    def check_step(self, step: int) -> int:
        """The step itself if the run has it; MissingError names those it has."""
        if step not in self.steps:
            known = self.steps.tolist()
            nearest = min(known, key=lambda each: abs(each - step), default=None)
            also = "" if nearest is None else f"; the nearest is {nearest}"
            raise MissingError(
                f"No step {step} in {self.path}; available: {abridged(known)}{also}."
            )
        return step


def abridged(items: Sequence[object], at_most: int = 12) -> str:
    """The items with commas in between, and with dots in the place of too many.

    >>> abridged(range(5), at_most=4)
    '0, 1, ..., 4'
    """
    shown = [str(item) for item in items]
    if len(shown) > at_most:
        shown = [*shown[: at_most - 2], "...", shown[-1]]
    return ", ".join(shown)
