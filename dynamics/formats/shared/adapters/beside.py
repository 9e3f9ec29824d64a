"""The scaling of LoRA that lies inside a model's own file: what stands beside it says alpha."""

from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from dynamics.errors import FormatError
from dynamics.formats.shared.adapters.scaling import CONFIG, is_number
from dynamics.formats.shared.model_config import around
from dynamics.formats.storage.files import contained, one_line, read_json, read_range, size_of

# Written by litgpt, and by Lightning's loggers.
_YAML = ("hyperparameters.yaml", "hparams.yaml")
# Written by the authors' code of SLTrain.
SPLORA_CONFIG = "splora_config.json"
_LONGEST_YAML = 2**20
_DEEPEST = 4


def adapter_config(
    where: Path, root: Path, attrs: Mapping[str, Any], adapter: str
) -> tuple[dict[str, Any], dict[str, Any]]:
    """(What stands for adapter_config.json, litgpt's hyperparameters); empty where there is none.

    Args:
        where: the checkpoint, a file or directory.
        root: the directory that no file may lie out of.
        attrs: what the checkpoint says of its model; its "config" may have the alpha.
        adapter: the name of the adapter, "" where there is none.
    """
    settings: dict[str, Any] = {}
    for directory in around(where, root):
        for file in _YAML:
            if not settings and (directory / file).is_file():
                settings = _yaml(contained(directory / file, root))
        for at in (directory, directory / adapter) if adapter else (directory,):
            for file in (CONFIG, SPLORA_CONFIG):
                if (at / file).is_file():
                    return read_json(contained(at / file, root)), settings
    config = attrs.get("config")
    for given in (config, settings):
        if isinstance(given, Mapping) and (found := _alpha(given, adapter)):
            return found, settings
    return {}, settings


def _alpha(config: Mapping[str, Any], adapter: str) -> dict[str, Any]:
    """lora_alpha in a config, or in the section on LoRA in it; empty where several contradict."""
    own = config.get(f"{adapter}_lora")  # one section for each adapter, as of Phi-4
    found = list(_sections(own if isinstance(own, Mapping) else config, "", 0))
    if isinstance(own, Mapping) and not found and is_number(own.get("alpha")):
        found = [{**own, "lora_alpha": own["alpha"]}]
    alphas = {(each["lora_alpha"], bool(each.get("use_rslora"))) for each in found}
    return dict(found[0]) if len(alphas) == 1 else {}


def _sections(config: Mapping[str, Any], name: str, depth: int) -> Iterator[dict[str, Any]]:
    plain = {key: value for key, value in config.items() if not isinstance(value, Mapping)}
    if is_number(config.get("lora_alpha")):
        yield {**plain, "alpha_pattern": config.get("alpha_pattern") or {}}
    elif is_number(config.get("alpha")) and ("lora" in name.lower() or "peft" in name.lower()):
        yield {**plain, "lora_alpha": config["alpha"]}
    if depth < _DEEPEST:
        for key, value in config.items():
            if isinstance(value, Mapping):
                yield from _sections(value, str(key), depth + 1)


def _yaml(file: Path) -> dict[str, Any]:
    import yaml

    size = size_of(file)
    if size > _LONGEST_YAML:
        return {}
    try:
        read = yaml.safe_load(read_range(file, 0, size).decode("utf-8"))
    except (yaml.YAMLError, ValueError, RecursionError) as error:
        raise FormatError(f"{file} is not readable YAML: {one_line(error)}.") from error
    return {str(key): value for key, value in read.items()} if isinstance(read, dict) else {}
