"""config.json of a model: in its checkpoint, or beside it in the directory of the run."""

from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

from dynamics.errors import FormatError
from dynamics.formats.storage.files import contained, read_json
from dynamics.runs.attention_config import describes_a_model

CONFIG = "config.json"
# Where tools describe how weights are quantised, if not in config.json -> its quant_method
_QUANTISED_BY = {
    "quantize_config.json": "gptq",
    "quant_config.json": "awq",
    "hf_quant_config.json": "modelopt",
}
_LEVELS = 2  # directories above a checkpoint that may hold the config of the run


def model_attrs(directory: Path, root: Path) -> dict[str, Any]:
    """{"config": the content of config.json}; empty where the directory has none.

    What a file beside it says of quantised weights becomes the config's `quantization_config`.

    Raises:
        FormatError: config.json is damaged, or a link that leads out of `root`.
    """
    path = directory / CONFIG
    config = read_json(contained(path, root)) if path.is_file() else {}
    for file, method in _QUANTISED_BY.items():
        path = directory / file
        if "quantization_config" not in config and path.is_file():
            described = read_json(contained(path, root))
            described = {**described, **_mapping(described.get("quantization"))}
            config["quantization_config"] = {"quant_method": method, **described}
    return {"config": config} if config else {}


class ConfigBeside:
    """The config for checkpoints that do not describe their model: a config.json beside them.

    It lies in the directory of a checkpoint's file, or in one above it within the run. Each
    directory is looked at once.

    Attributes:
        damaged: name -> why it cannot be read, for the config of the whole run. One that lies
            deeper belongs to one checkpoint, and is a problem of it.

    Args:
        run: where the run lies, a directory or a file.
        root: the directory that no file may lead out of.
    """

    def __init__(self, run: Path, root: Path):
        self._run = run if run.is_dir() else run.parent
        self._root = root
        self._known: dict[Path, dict[str, Any]] = {}
        self.damaged: dict[str, str] = {}
        try:
            self._known[self._run] = model_attrs(self._run, root)
        except FormatError as problem:
            self._known[self._run] = {}
            self.damaged[CONFIG] = str(problem)

    def attrs(self, own: Callable[[], Mapping[str, Any]], where: Path) -> dict[str, Any]:
        """What a checkpoint says of its model, or what lies beside it where it says nothing.

        Args:
            own: returns what the checkpoint says.
            where: the checkpoint.

        Raises:
            FormatError: a config is damaged that belongs to this checkpoint alone.
        """
        attrs = dict(own())
        said = attrs.get("config")
        said = said if isinstance(said, Mapping) else {}
        if describes_a_model(said):
            return attrs
        for directory in around(where, self._run):
            if directory not in self._known:
                self._known[directory] = model_attrs(directory, self._root)
            if beside := self._known[directory]:
                return {**attrs, "config": {**beside["config"], **said}}
        return attrs


def around(where: Path, top: Path) -> Iterator[Path]:
    """The directory of a checkpoint, and those above it up to the top of the run.

    Args:
        where: a directory or a file.
        top: the directory of the run.
    """
    at = where if where.is_dir() else where.parent
    for _ in range(1 + _LEVELS):
        yield at
        if at in (top, at.parent) or not at.is_relative_to(top):
            return
        at = at.parent


def _mapping(value: Any) -> dict[str, Any]:
    return value if isinstance(value, dict) else {}
