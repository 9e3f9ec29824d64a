"""Where an adapter lies: the directory of its adapter_config.json."""

from pathlib import Path

from dynamics.errors import FormatError
from dynamics.formats.shared.adapters.scaling import CONFIG
from dynamics.formats.shared.steps import BARE, named_step
from dynamics.formats.storage.files import entries

__all__ = ["CONFIG", "adapter_directory", "has_adapter"]

_MOST_ADAPTERS = 16  # each costs a look, or a request
# The name of the adapter that PEFT saves without a sub-directory.
_DEFAULT = "default"


def has_adapter(directory: Path) -> bool:
    """Whether a directory holds an adapter, or sub-directories that do."""
    return (directory / CONFIG).is_file() or bool(_named_adapters(directory))


def adapter_directory(directory: Path, adapter: str | None) -> Path:
    """The directory of the adapter in a checkpoint.

    PEFT saves the adapter called "default" in the directory itself, and other adapters in
    sub-directories of their names.

    Args:
        directory: the checkpoint.
        adapter: the adapter's name. None: the one in the directory itself, or else the only one.

    Raises:
        FormatError: there is no adapter, none of that name, or several to choose from.
    """
    at_root, others = (directory / CONFIG).is_file(), _named_adapters(directory)
    adapters = {**({_DEFAULT: directory} if at_root else {}), **others}
    if adapter is None and (at_root or len(others) == 1):
        return next(iter(adapters.values()))
    if adapter in adapters:
        return adapters[adapter]
    listed = ", ".join(adapters)
    if adapter is not None:
        raise FormatError(f"{directory} has no adapter {adapter!r}; it has {listed or 'none'}.")
    if not adapters:
        raise FormatError(f"{directory} has no {CONFIG}.")
    raise FormatError(
        f"{directory} holds several adapters: {listed}; choose one with adapter= "
        f"(adapter={min(adapters)!r}), or open its directory."
    )


def _named_adapters(directory: Path) -> dict[str, Path]:
    if not directory.is_dir():
        return {}
    inside = [each for each in entries(directory) if each.is_dir and not _is_checkpoint(each.name)]
    if len(inside) > _MOST_ADAPTERS:  # not a checkpoint, but a folder of many
        return {}
    return {each.name: each.path for each in inside if _has_config(each.path)}


def _has_config(directory: Path) -> bool:
    """Whether there is a config; the listing serves what else is asked of the directory."""
    try:
        return any(each.name == CONFIG for each in entries(directory))
    except FormatError:
        return False


def _is_checkpoint(name: str) -> bool:
    """Whether a sub-directory is one checkpoint of a run, and not one adapter of a checkpoint."""
    named = named_step(name)
    return named is not None and named.level < 2 and named.word != BARE
