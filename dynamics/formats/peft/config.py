"""adapter_config.json: where an adapter lies, its scaling, and whether W is W_base + s·B·A."""

import math
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from dynamics.errors import FormatError
from dynamics.formats.shared.steps import BARE, named_step
from dynamics.formats.storage.files import entries

CONFIG = "adapter_config.json"
_MOST_ADAPTERS = 16  # each costs a look, or a request
# The name of the adapter that PEFT saves without a sub-directory.
_DEFAULT = "default"
# With one of these fields in adapter_config.json, a model computes something else than W + s·B·A.
_VARIANTS = {
    "use_dora": "DoRA",
    "kasa_config": "KaSA",
    "arrow_config": "Arrow",
    "monteclora_config": "MonteCLoRA",
    "use_bdlora": "BD-LoRA",
    "alora_invocation_tokens": "aLoRA",
    "target_parameters": "LoRA (target_parameters)",
    "layer_replication": "LoRA (layer_replication)",
    "trainable_token_indices": "LoRA (trainable_token_indices)",
}
# With an `init_lora_weights` that begins so, the base weight changes before training.
_CHANGES_BASE = ("pissa", "olora", "corda", "loftq", "lora_ga")


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


def scaling(config: Mapping[str, Any], module: str, rank: int) -> float:
    """The LoRA scaling s of a module: alpha/r, or alpha/sqrt(r) where `use_rslora` is set.

    Args:
        config: adapter_config.json. Its `alpha_pattern` replaces `lora_alpha` for modules whose
            path ends in one of its keys (regular expressions), as in PEFT's `get_pattern_key`.
        module: the module's path.
        rank: r of the stored factors; `rank_pattern` had its effect when they were made.

    Raises:
        FormatError: the config has no usable alpha.
    """
    alpha = config.get("lora_alpha")
    patterns = config.get("alpha_pattern") or {}
    if not isinstance(patterns, Mapping):
        raise FormatError(f"{CONFIG} has alpha_pattern {patterns!r}, expected an object.")
    for pattern, value in patterns.items():
        try:
            match = re.match(rf"(?:.*\.)?(?:{pattern})$", module)
        except re.error as error:
            raise FormatError(
                f"{CONFIG} has the alpha_pattern {pattern!r}, not a regular expression: {error}."
            ) from error
        if match:
            alpha = value
            break
    if not isinstance(alpha, int | float):
        raise FormatError(f"{CONFIG} has lora_alpha {alpha!r} for {module}, expected a number.")
    return alpha / math.sqrt(rank) if config.get("use_rslora") else alpha / rank


def check_is_plain(config: Mapping[str, Any], directory: Path) -> None:
    """Check that the effective weight is W_base + s·B·A.

    Raises:
        FormatError: it is not (another adapter than LoRA, a variant of LoRA), or there is no alpha;
            the message names what it is.
    """
    variants = [name for field, name in _VARIANTS.items() if config.get(field)]
    if config.get("peft_type") != "LORA" or variants:
        kind = variants[0] if variants else config.get("peft_type")
        raise FormatError(f"{directory} holds a {kind} adapter; only LoRA's s·B·A can be measured.")
    if not isinstance(config.get("lora_alpha"), int | float):
        raise FormatError(
            f"{directory / CONFIG} has lora_alpha {config.get('lora_alpha')!r}, expected a number."
        )
    init = config.get("init_lora_weights")
    if isinstance(init, str) and init.lower().startswith(_CHANGES_BASE):
        raise FormatError(
            f"{directory} was initialised with {init!r}, which changed the base weights too: "
            "W_base + s·B·A is not its effective weight. Save it converted "
            "(save_pretrained(..., path_initial_model_for_weight_conversion=...))."
        )


def _named_adapters(directory: Path) -> dict[str, Path]:
    if not directory.is_dir():
        return {}
    inside = [each for each in entries(directory) if each.is_dir and not _is_checkpoint(each.name)]
    if len(inside) > _MOST_ADAPTERS:  # not a checkpoint, but a folder of many
        return {}
    return {each.name: each.path for each in inside if (each.path / CONFIG).is_file()}


def _is_checkpoint(name: str) -> bool:
    """Whether a sub-directory is one checkpoint of a run, and not one adapter of a checkpoint."""
    named = named_step(name)
    return named is not None and named.level < 2 and named.word != BARE
