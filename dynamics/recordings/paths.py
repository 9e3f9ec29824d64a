"""The layout of a recording: names of its paths, dimensions and numbers.

    run.zarr/               attrs: format, format_version, definitions, configuration, versions
      step      (step,)     int64, optimizer steps done
      tokens    (step,)     int64, tokens seen, -1 where unknown
      checksum  (step,)     int64, CRC-32 of the record's numbers, -1 where none was made
      scalars/<name>        (step,) float64, NaN where nothing was logged
      weight/<parameter>    (step, out, in), one chunk per record, attrs: source_dtype
      gradient/<parameter>  the same
      base/<parameter>      weights without adapters where W is not base + s·B·A (modules_to_save,
                            DoRA): in the first record, and in those where they had changed
      adapter/<parameter>/  A (step, r, in), B (step, out, r), attrs: scaling, transposed
      spectra/<kind>/       in place of matrices: singular_value (step, matrix, index), padded with
                            NaN, attrs: matrices (name, rows, cols, ...); and
                            bounds (step, matrix, bound): error, noise floor, rank bound
      events/               step, kind, attrs (JSON) along `event`
      writer                an empty group while a writer is at work, attrs: host, pid, since

**Missing.** A record without a matrix has no chunk of that array, and reads as NaN. A record
without a spectrum has NaN as its rank bound. (The rank bound of a matrix with NaN or Inf is a
number, though its singular values are NaN.)

**Names.** <parameter> and <name> are one component of a path, `encoded` where a name cannot be one.
The attribute `name` of the array is then the name as it is; an array without it has its name in its
path. Recordings of before have raw names, and scalars such as `eval/loss` in groups of their own.

bfloat16 and float8 have no Zarr data type that every reader knows. They are stored as float32,
which represents them exactly; `source_dtype` is the dtype they had.
"""

import hashlib
import json
import re
import zlib
from collections.abc import Iterable, Mapping
from math import prod
from typing import NamedTuple
from urllib.parse import unquote

import numpy as np
import zarr

from dynamics.errors import FormatError

WEIGHT, GRADIENT, BASE, ADAPTER, SPECTRA = "weight", "gradient", "base", "adapter", "spectra"
SINGULAR_VALUE, BOUNDS, STORAGE_NOISE = "singular_value", "bounds", "storage_noise_floor"
# Attribute of a base that trains beside its adapter: how many places of it are not zero by design.
SPARSE_ENTRIES = "sparse_entries"
STEP, TOKENS, CHECKSUM = "step", "tokens", "checksum"
SCALARS, EVENTS = "scalars", "events"
ROOT, WRITER = "zarr.json", "writer/zarr.json"
# All that lies in the root of a recording, besides its own document and the lock.
MEMBERS = frozenset(
    (WEIGHT, GRADIENT, BASE, ADAPTER, SPECTRA, SCALARS, EVENTS, STEP, TOKENS, CHECKSUM)
)
EVENT_COLUMNS = ("step", "kind", "attrs")
SERIES_CHUNK = 1024
NO_TOKENS = NO_CHECKSUM = -1
# More than any recording has. Damaged metadata can make a reader allocate no more than this.
MOST_RECORDS, _LARGEST_MATRIX = 2**20, 2**36

NAME = "name"  # attribute of an array whose path does not spell its name
# Separators of paths, globs of fsspec, and the sign of the encoding itself.
_UNSAFE = frozenset("/\\%*?[]")
# Zarr's own documents (on file systems without case, too), and the dimensions of the arrays.
_RESERVED = re.compile(r"(?i:zarr\.json)|step|event|matrix|index|bound|(out|in|rank)_\d+")
# File systems have names of up to 255 bytes.
_LONGEST, _SHORTENED = 240, 200
_LONG_NAMES: dict[str, str] = {}  # component -> name, of those that cannot be decoded


class Place(NamedTuple):
    """Where an array belongs: in the group of a kind, under a name; `factor` is A, B or ""."""

    group: str
    name: str
    factor: str = ""

    @property
    def path(self) -> str:
        """The path that this release gives it."""
        return "/".join(filter(None, (self.group, encoded(self.name), self.factor)))


def encoded(name: str) -> str:
    """The component of a path that stands for the name of a parameter or scalar.

    A name stays as it is if it can be a file of every file system, a key of every object store, a
    node of Zarr and a variable of xarray. In other names, what is in the way is percent-encoded.
    Names of more than 240 bytes are cut, and end in a hash of the whole name.

    >>> encoded("model.layers.0.mlp.up_proj.weight"), encoded("loss/ce"), encoded("..")
    ('model.layers.0.mlp.up_proj.weight', 'loss%2Fce', '%2E%2E')
    """
    first = bool(_RESERVED.fullmatch(name)) or name.startswith((".", "__"))
    last = name.endswith((".", " "))
    component = "".join(
        _percent(each)
        if each in _UNSAFE
        or not each.isprintable()
        or (first and index == 0)
        or (last and index == len(name) - 1)
        else each
        for index, each in enumerate(name)
    )
    if len(component.encode()) > _LONGEST:
        begin = component.encode()[:_SHORTENED].decode(errors="ignore")
        mark = hashlib.sha256(name.encode(errors="surrogatepass")).hexdigest()[:32]
        component = re.sub("%.?$", "", begin) + "%~" + mark
        _LONG_NAMES[component] = name
    return component


def decoded(path: str) -> str:
    """A path with its names as they are, for messages.

    >>> decoded(matrix_path(WEIGHT, "a//b")), decoded("scalars/100%")
    ('weight/a//b', 'scalars/100%')
    """
    return "/".join(
        _LONG_NAMES.get(each) or unquote(each, errors="surrogatepass") for each in path.split("/")
    )


def other_encoding(component: str, turn: int) -> str:
    """The same component with its first `turn` characters encoded.

    For names that differ in nothing but case, or in the composition of their letters.

    >>> other_encoding("Loss", 1)
    '%4Coss'
    """
    parts = re.findall(r"%[0-9A-F]{2}|.", component, re.DOTALL)
    return "".join(
        _percent(each) if number < turn and len(each) == 1 else each
        for number, each in enumerate(parts)
    )


def _percent(character: str) -> str:
    return "".join(f"%{byte:02X}" for byte in character.encode(errors="surrogatepass"))


def place(path: str, name: object = None) -> Place | None:
    """Which parameter or scalar an array is of; None for the other arrays of a recording.

    Args:
        path: of the array in the store.
        name: its attribute `name`, if it has one.
    """
    group, _, rest = path.partition("/")
    if group not in (WEIGHT, GRADIENT, BASE, ADAPTER, SCALARS) or not rest:
        return None
    factor = ""
    if group == ADAPTER:
        rest, _, factor = rest.rpartition("/")
    return Place(group, name if isinstance(name, str) and name else rest, factor)


def matrix_path(group: str, parameter: str) -> str:
    """Path of a parameter's matrices in the group `weight`, `gradient` or `base`."""
    return Place(group, parameter).path


def factor_path(parameter: str, factor: str) -> str:
    """Path of a LoRA factor, "A" or "B"."""
    return Place(ADAPTER, parameter, factor).path


def spectra_path(kind: str, array: str) -> str:
    """Path of the spectra of a kind: `array` is one of the three that there are."""
    return f"{SPECTRA}/{kind}/{array}"


def scalar_path(name: str) -> str:
    """Path of the scalar that was logged under a name."""
    return Place(SCALARS, name).path


def event_path(column: str) -> str:
    """Path of a column of the events."""
    return f"{EVENTS}/{column}"


def is_matrix(path: str) -> bool:
    """Whether an array has a matrix per record, and one chunk for each."""
    return path.split("/")[0] in (WEIGHT, GRADIENT, BASE, ADAPTER, SPECTRA)


def is_event(path: str) -> bool:
    """Whether an array has one entry per event instead of one per record."""
    return path.startswith(f"{EVENTS}/")


def dimension_names(path: str, shape: tuple[int, ...]) -> tuple[str, ...]:
    """Names of the dimensions of an array; `shape` is given without the first dimension."""
    if is_event(path):
        return ("event",)
    if not shape:
        return (STEP,)
    rows, cols = shape
    if path.startswith(f"{SPECTRA}/"):
        along = {BOUNDS: "bound", STORAGE_NOISE: "floor"}
        return STEP, "matrix", along.get(path.rpartition("/")[2], "index")
    if path.startswith(f"{ADAPTER}/"):
        return (
            (STEP, f"rank_{rows}", f"in_{cols}")
            if path.endswith("/A")
            else (STEP, f"out_{rows}", f"rank_{cols}")
        )
    return STEP, f"out_{rows}", f"in_{cols}"


def check_shape(what: str, path: str, shape: tuple[int, ...]) -> None:
    """Raise FormatError for shapes that no recording has, before memory is allocated."""
    wanted = 3 if is_matrix(path) else 1
    if len(shape) != wanted or shape[0] > MOST_RECORDS or prod(shape[1:]) > _LARGEST_MATRIX:
        raise FormatError(f"{what} has the absurd shape {shape}; its metadata are damaged.")


def chunk_key(array: zarr.Array, index: int) -> str:
    """Key of the chunk of record `index`, below the array's path."""
    return array.metadata.encode_chunk_key((index, *(0 for _ in array.shape[1:])))


def record_checksum(
    step: int,
    tokens: int,
    scalars: Mapping[str, float],
    matrices: Iterable[tuple[str, np.ndarray]],
) -> int:
    """CRC-32 of the exact numbers of a record: step, tokens and scalars first, then the matrices.

    Args:
        step: of the record.
        tokens: seen so far, -1 where unknown.
        scalars: name -> value; NaN is left out, as a missing scalar reads as NaN.
        matrices: (path, numbers), sorted by path.
    """
    logged = {name: value.hex() for name, value in sorted(scalars.items()) if value == value}
    crc = zlib.crc32(json.dumps([step, tokens, logged]).encode())
    for path, values in matrices:
        numbers = np.ascontiguousarray(values, dtype=values.dtype.newbyteorder("<"))
        crc = zlib.crc32(f"{path} {numbers.dtype.str} {numbers.shape}".encode(), crc)
        crc = zlib.crc32(numbers.data, crc)
    return crc
