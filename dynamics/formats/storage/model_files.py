"""The files of one Hugging Face model: safetensors or pickled, single or sharded with an index."""

from collections.abc import Callable, Mapping
from pathlib import Path

from dynamics.errors import FormatError
from dynamics.formats.storage.files import entries, plain_name, read_json
from dynamics.formats.storage.safetensors_files import safetensors_tensors
from dynamics.formats.storage.tensors import Tensor
from dynamics.formats.storage.torch_files import tensors_of, torch_file

# In the order in which transformers looks for them.
MODEL = (
    "model.safetensors",
    "pytorch_model.bin",
    "diffusion_pytorch_model.safetensors",  # diffusers
    "diffusion_pytorch_model.bin",
)
ADAPTER = ("adapter_model.safetensors", "adapter_model.bin")
_INDEX = ".index.json"


def has_model(directory: Path, files: tuple[str, ...] = MODEL) -> bool:
    """Whether the directory holds one of the files, or its sharded form."""
    return _file_name(directory, files) is not None


def model_tensors(
    directory: Path, root: Path, files: tuple[str, ...] = MODEL
) -> Mapping[str, Tensor]:
    """Stored name -> tensor of the model in a directory.

    Where several files hold the model, the one that transformers loads is read: safetensors before
    pickles, a single file before a sharded one.

    Raises:
        FormatError: there is no model, a shard is missing, or a file is damaged.
    """
    name = _file_name(directory, files)
    if name is None:
        raise FormatError(_why_none(directory, files))
    read = pickled_tensors if name.removesuffix(_INDEX).endswith(".bin") else safetensors_tensors
    if name.endswith(_INDEX):
        return _sharded(directory / name, root, read)
    return read(directory / name, root)


def pickled_tensors(path: Path, root: Path) -> Mapping[str, Tensor]:
    """Name -> tensor of a state dict that torch.save wrote.

    Raises:
        FormatError: see `torch_files.torch_file` and `tensors_of`.
    """
    return tensors_of(torch_file(path, root), str(path))


def _file_name(directory: Path, files: tuple[str, ...]) -> str | None:
    candidates = [name + suffix for name in files for suffix in ("", _INDEX)]
    return next((name for name in candidates if (directory / name).is_file()), None)


def _why_none(directory: Path, files: tuple[str, ...]) -> str:
    listed = entries(directory) if directory.is_dir() else []
    stems = tuple(name.rpartition(".")[0] + "-" for name in files)
    parts = [each.name for each in listed if each.name.startswith(stems) and "-of-" in each.name]
    if parts:
        return (
            f"{directory} holds {parts[0]}, a part of a model, but not the index that puts the "
            "parts together; copy the index there, or save the model in one file."
        )
    return f"{directory} holds no {' or '.join(files[:2])}."


def _sharded(
    index: Path, root: Path, read: Callable[[Path, Path], Mapping[str, Tensor]]
) -> dict[str, Tensor]:
    weight_map = read_json(index).get("weight_map")
    if not isinstance(weight_map, dict) or not weight_map:
        raise FormatError(f"{index} has no weight_map, so it is not an index of shards.")
    model: dict[str, Tensor] = {}
    shards: dict[str, set[str]] = {}
    for name, shard in weight_map.items():
        if not isinstance(shard, str):
            raise FormatError(f"{index} names {shard!r} for {name}, which is not a file.")
        shards.setdefault(plain_name(shard, index), set()).add(name)
    for shard, promised in sorted(shards.items()):
        path = index.parent / shard
        if not path.is_file():
            raise FormatError(
                f"{index.parent} lacks the shard {shard} that {index.name} names; "
                "copy it there or remove the checkpoint."
            )
        tensors = read(path, root)
        model |= tensors
        if missing := promised - set(tensors):
            raise FormatError(
                f"{path} lacks {min(missing)}, which {index.name} names; "
                "copy the checkpoint again or remove it."
            )
    return model
