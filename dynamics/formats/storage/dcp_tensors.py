"""The tensors of a checkpoint of torch.distributed.checkpoint, put together when they are read.

`.metadata` is a pickle. It says which shape and chunks each tensor has, and where each chunk lies:
it is a file of torch.save inside a .distcp file. Layout: torch/distributed/checkpoint/metadata.py
and filesystem.py.
"""

import io
import re
from collections import defaultdict
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from math import prod
from pathlib import Path
from typing import Any

import numpy as np

from dynamics.errors import FormatError
from dynamics.formats.storage.files import (
    contained,
    entries,
    one_line,
    origin_of,
    plain_name,
    read_range,
    refuse_pointer,
    size_of,
)
from dynamics.formats.storage.tensors import (
    CODE_BYTES,
    ITEM_BYTES,
    AssembledTensor,
    StoredTensor,
    Tensor,
    UnreadTensor,
    checked_shape,
)
from dynamics.formats.storage.torch_files import torch_file
from dynamics.formats.storage.unpickling import Inert, TensorUnpickler, callable_from_files

METADATA = ".metadata"
_LONGEST_METADATA = 2**30
# Names of a model's state dict in a checkpoint, and of state dicts of other things.
_MODELS = {"model", "state_dict", "model_state_dict", "module"}
_NO_MODEL = re.compile(r"optim|scheduler|dataloader|train_state|(?:^|_)rng|scaler", re.IGNORECASE)


def has_shards(directory: Path) -> bool:
    """Whether a directory holds a distributed checkpoint, or one whose save did not finish.

    `.metadata` is written last; without it only .distcp files are there.
    """
    names = (each.name for each in entries(directory))
    return any(name == METADATA or name.endswith(".distcp") for name in names)


def dcp_tensors(directory: Path, root: Path) -> dict[str, Tensor]:
    """Name -> tensor of the model in a directory with .metadata.

    Raises:
        FormatError: .metadata is missing or damaged, a file or a chunk is missing, or it is not
            clear which of the saved state dicts is the model.
    """
    path = directory / METADATA
    if not path.is_file():
        if not has_shards(directory):
            raise FormatError(f"{directory} holds no matrices: it has no {METADATA}.")
        raise FormatError(
            f"{directory} has .distcp files but no .metadata: its save did not finish; remove it."
        )
    try:
        described, places, paths = _metadata(path, root)
        chosen = _of_the_model(paths, described, directory)
        return {
            name: _assembled(directory, root, key, described[key], places)
            for name, key in chosen.items()
        }
    except FormatError:
        raise
    # A pickle may hold anything anywhere; where it does not fit, one of these is raised.
    except (KeyError, IndexError, TypeError, AttributeError, ValueError) as error:
        raise _damage_error(path, f"{type(error).__name__}: {one_line(error)}") from error


# What .metadata says about a tensor: dtype, shape, and (offsets, sizes) of each chunk.
_Described = tuple[str, tuple[int, ...], list[tuple[tuple[int, ...], tuple[int, ...]]]]
_Places = Mapping[tuple[str, tuple[int, ...]], Mapping[str, Any]]


def _metadata(
    path: Path, root: Path
) -> tuple[dict[str, _Described], _Places, dict[str, tuple[str, ...]]]:
    """(Tensors by key, place of each chunk, path of each key in the saved dicts).

    A key is a path whose parts are joined. `planner_data` has the paths themselves, unless another
    planner than torch's saved the checkpoint.
    """
    state = _unpickled(path, root).state
    where = str(path)
    described: dict[str, _Described] = {}
    for key, entry in state["state_dict_metadata"].items():
        if not entry.name.endswith(".TensorStorageMetadata"):
            continue
        dtype = entry.state["properties"].state[0]
        dtype = dtype.name.removeprefix("torch.") if isinstance(dtype, Inert) else str(dtype)
        chunks = [
            (
                checked_shape(each.state["offsets"], f"{where}: {key}"),
                checked_shape(each.state["sizes"], f"{where}: {key}"),
            )
            for each in entry.state["chunks"]
        ]
        described[key] = dtype, checked_shape(entry.state["size"], f"{where}: {key}"), chunks
    places = {
        (index.state["fqn"], tuple(index.state.get("offset") or ())): info.state
        for index, info in state["storage_data"].items()
    }
    planned = state.get("planner_data")
    planned = planned if isinstance(planned, Mapping) else {}
    paths = {
        key: tuple(str(each) for each in planned[key]) if planned.get(key) else (key,)
        for key in described
    }
    return described, places, paths


def _unpickled(path: Path, root: Path) -> Inert:
    contained(path, root)
    size = size_of(path)
    if size > _LONGEST_METADATA:
        raise _damage_error(path, f"{size} bytes")
    refuse_pointer(path, size)
    raw = read_range(path, 0, size)
    try:
        metadata = TensorUnpickler(io.BytesIO(raw), _stand_in, _no_storage).load()
    # A damaged pickle is a program of random instructions: it can raise any error.
    except Exception as error:
        raise _damage_error(path, one_line(error)) from error
    if not isinstance(metadata, Inert) or not metadata.name.endswith(".Metadata"):
        raise _damage_error(
            path, f"it holds a {getattr(metadata, 'name', type(metadata).__name__)}"
        )
    return metadata


def _stand_in(module: str, name: str) -> Any:
    if (module, name) == ("torch", "Size"):
        return callable_from_files(lambda sizes=(): tuple(sizes))
    return name if module == "torch" and (name in ITEM_BYTES or name in CODE_BYTES) else None


def _no_storage(_: Any) -> Any:
    raise ValueError("a tensor where none belongs")


def _of_the_model(
    paths: Mapping[str, tuple[str, ...]], described: Mapping[str, _Described], directory: Path
) -> dict[str, str]:
    """Name -> key of each tensor of the model, without those of optimizers.

    A checkpoint is one of three: a dict of state dicts, {"model": ..., "optimizer": ...}; the same
    within the state of an application, {"app": {"model": ...}}; or a state dict itself.
    """
    kept = {
        key: path
        for key, path in paths.items()
        if not any(_NO_MODEL.search(part) for part in path[:-1] or [path[0].split(".")[0]])
    }
    # Floats tell where the model is; integers belong to it where they lie beside them.
    floats = [key for key in kept if described[key][0] in ITEM_BYTES]
    if all(len(kept[key]) == 1 for key in floats):
        kept = _split(kept, floats)
    holders: dict[tuple[str, ...], dict[str, str]] = defaultdict(dict)
    for key, path in kept.items():
        holders[path[:-1]][path[-1]] = key
    named = [holder for holder in holders if holder and holder[-1] in _MODELS]
    candidates = named or [
        holder
        for holder, held in holders.items()
        if any(
            described[key][0] in ITEM_BYTES and len(described[key][1]) == 2 for key in held.values()
        )
    ]
    if len(candidates) == 1:
        return holders[candidates[0]]
    listed = ", ".join(".".join(each) or "the top" for each in sorted(candidates)) or "nothing"
    raise FormatError(
        f"{directory} holds tensors in {listed}, where one model was expected; save the model "
        "as 'model' or 'state_dict'."
    )


def _split(keys: Iterable[str], floats: list[str]) -> dict[str, tuple[str, ...]]:
    """Key -> path, where only keys are known: what all floats begin with is the model's name."""
    for prefix in ("app.model.", *(f"{name}." for name in sorted(_MODELS - {"model"}))):
        if floats and all(key.startswith(prefix) for key in floats):
            within = (prefix[:-1].split(".")[-1],)
            return {
                key: (*within, key.removeprefix(prefix)) if key.startswith(prefix) else (key,)
                for key in keys
            }
    return {key: (key,) for key in keys}


def _assembled(
    directory: Path, root: Path, key: str, described: _Described, places: _Places
) -> Tensor:
    dtype, shape, chunks = described
    if dtype not in ITEM_BYTES and dtype not in CODE_BYTES:
        return UnreadTensor(shape, f"numbers of the dtype {dtype}", dtype)
    where = directory / METADATA
    _check_covered(where, key, shape, chunks)
    pieces: list[tuple[tuple[slice, ...], Tensor]] = []
    for offsets, sizes in chunks:
        if 0 in sizes:
            continue
        info = places.get((key, offsets))
        if info is None and len(chunks) == 1:
            info = places.get((key, ()))
        if info is None:
            raise _damage_error(
                where, f"it does not say where the chunk of {key} at {offsets} lies"
            )
        if info.get("transform_descriptors"):
            raise FormatError(
                f"{directory} holds {key} transformed by {info['transform_descriptors']}; only "
                "plain chunks can be read. Save it without extensions."
            )
        file = directory / plain_name(str(info["relative_path"]), where)
        first, length = int(info["offset"]), int(info["length"])
        if not file.is_file():
            raise FormatError(
                f"{directory} lacks {file.name}, which holds a part of {key}; copy it there or "
                "remove the checkpoint."
            )
        if first < 0 or length < 0 or first + length > size_of(file):
            raise FormatError(
                f"{file} ends before the part of {key} at {first}; copy it again or remove the "
                "checkpoint."
            )
        # Checked before memory is allocated: a file of torch.save is longer than its numbers.
        if length < prod(sizes) * (ITEM_BYTES | CODE_BYTES)[dtype]:
            raise _damage_error(
                where, f"{key} would have a {dtype} chunk {sizes} in {length} bytes"
            )
        at = tuple(slice(o, o + n) for o, n in zip(offsets, sizes, strict=True))
        pieces.append((at, _Chunk(file, root, first, length, dtype, sizes)))
    if len(pieces) == 1:
        return pieces[0][1]
    return AssembledTensor(shape, dtype, tuple(pieces))


def _check_covered(
    where: Path,
    key: str,
    shape: tuple[int, ...],
    chunks: list[tuple[tuple[int, ...], tuple[int, ...]]],
) -> None:
    """Check that chunks leave no gap, do not overlap, and do not reach beyond the tensor."""
    chunks = [chunk for chunk in chunks if 0 not in chunk[1]]
    inside = all(
        len(offsets) == len(sizes) == len(shape)
        and all(o + n <= whole for o, n, whole in zip(offsets, sizes, shape, strict=True))
        for offsets, sizes in chunks
    )
    if not inside or sum(prod(sizes) for _, sizes in chunks) != prod(shape):
        raise _damage_error(where, f"the chunks of {key} do not make up its shape {shape}")
    if len(chunks) > 1:
        first = np.array([offsets for offsets, _ in chunks])
        last = first + np.array([sizes for _, sizes in chunks])
        meet = (first[:, None] < last[None]).all(axis=2)
        if (meet & meet.T).sum() != len(chunks):
            raise _damage_error(where, f"chunks of {key} overlap")


@dataclass(frozen=True)
class _Chunk:
    """A tensor of a .distcp file, whose own header is read together with it."""

    path: Path
    root: Path
    first: int
    length: int
    dtype: str
    shape: tuple[int, ...]

    @property
    def place(self) -> object:
        return (str(self.path), self.first, self.length)

    @property
    def origin(self) -> str | None:
        file = origin_of(self.path)
        return file and f"{file}|{self.first}|{self.length}|{self.dtype}|{self.shape}"

    def read(self) -> np.ndarray:
        tensor = torch_file(self.path, self.root, self.first, self.length)
        if (
            not isinstance(tensor, StoredTensor)
            or tensor.dtype != self.dtype
            or tensor.shape != self.shape
        ):
            raise FormatError(
                f"{self.path} holds at {self.first} something else than the {self.dtype} "
                f"{self.shape} that {METADATA} promises; copy the checkpoint again."
            )
        return tensor.read()


def _damage_error(path: Path, what: str) -> FormatError:
    return FormatError(f"{path} is not readable metadata of a distributed checkpoint: {what}.")
