"""PEFT checkpoints: checkpoint-N/ with adapter_config.json, and the base model beside them.

PEFT writes the adapter only. `base_model` says where the base model is looked for, and
`shared.adapters` what the adapter makes of its weights: for LoRA W_base + s·B·A, with
s = alpha/r, or alpha/sqrt(r) for rsLoRA. A base model that does not fit never hides the adapter.
"""

from collections.abc import Mapping
from functools import partial
from pathlib import Path
from typing import Any

from dynamics.errors import FormatError
from dynamics.formats.format import OpenOptions
from dynamics.formats.peft.base_model import ADAPTER_ALONE, BaseModel, BaseModels, base_tensors
from dynamics.formats.peft.config import CONFIG, adapter_directory, has_adapter
from dynamics.formats.quantised.dequantise import floats_of
from dynamics.formats.shared.adapters.adapt import adapt
from dynamics.formats.shared.adapters.adapted import Adapted, Settings
from dynamics.formats.shared.adapters.inside import with_clean_names_left_out
from dynamics.formats.shared.adapters.scaling import is_number
from dynamics.formats.shared.adapters.stored import AdapterLayer, counterpart, stored_adapters
from dynamics.formats.shared.checkpoints import Checkpoint
from dynamics.formats.shared.found import CheckpointsFormat, Found, OpenedBy, found_in_series
from dynamics.formats.shared.full_checkpoints import with_clean_names
from dynamics.formats.shared.hugging_face_files import logged_scalars, trainer_step
from dynamics.formats.shared.look import Look, Series
from dynamics.formats.shared.series import find_series
from dynamics.formats.storage.files import contained, entries, is_directory, read_json, root_of
from dynamics.formats.storage.model_files import ADAPTER, has_model, model_tensors
from dynamics.formats.storage.tensors import Tensor
from dynamics.runs.account import LeftOut

_MERGES = "num_lora_restarts"  # as axolotl's ReLoRA logs it


class PeftFormat(CheckpointsFormat):
    """A directory of PEFT checkpoints, or a single one."""

    name = "peft"
    description = "checkpoint-N/ with adapter_config.json (PEFT), base model beside it"
    options = ("base", "adapter", "lora_alpha", "expert_blocks")

    def recognises(self, path: Path) -> bool:
        """Whether a checkpoint below (or at) `path` has an adapter_config.json and weights.

        The config may lie beside a whole model, in a file of another format.
        """
        series = self.series(path)
        return series is not None and any(map(_has_weights, series.steps.values()))

    def resembles(self, path: Path) -> bool:
        """Whether a checkpoint below (or at) `path` has an adapter_config.json."""
        return self.series(path) is not None

    def series(self, path: Path) -> Series | None:
        """See `CheckpointsFormat.series`."""
        return find_series(path, Look(has_adapter, own_step=trainer_step, beside=_has_config))

    def holds_one(self, path: Path) -> bool:
        """See `CheckpointsFormat.holds_one`."""
        return is_directory(path) and _has_config(path) and has_model(path, ADAPTER)

    def holds_beside(self, path: Path) -> bool:
        """See `CheckpointsFormat.holds_beside`."""
        return self.holds_one(path)

    def found(self, path: Path, options: OpenOptions) -> Found:
        """See `CheckpointsFormat.found`."""
        series = self.series(path) or Series({0: path})
        bases = BaseModels(path, series.steps, options.base)
        root = root_of(path)
        return found_in_series(
            series,
            lambda step, at: OpenedBy(at, partial(_open, step, at, root, bases, options)),
        )


def _has_weights(directory: Path) -> bool:
    if has_model(directory, ADAPTER):
        return True
    if not directory.is_dir():
        return False
    return any(each.is_dir and has_model(each.path, ADAPTER) for each in entries(directory)[:64])


def _has_config(directory: Path) -> bool:
    return (directory / CONFIG).is_file()


def _open(
    step: int, directory: Path, root: Path, bases: BaseModels, options: OpenOptions
) -> Checkpoint:
    at = adapter_directory(directory, options.adapter)
    config = read_json(contained(at / CONFIG, root))
    _check_config(config, at)
    if not has_model(at, ADAPTER):
        raise FormatError(f"{at} has {CONFIG} but no adapter_model.safetensors; copy it there.")
    if options.lora_alpha is not None:
        config = {**config, "lora_alpha": options.lora_alpha, "alpha_pattern": {}}
    tensors = model_tensors(at, root, ADAPTER)
    if not tensors:
        raise FormatError(
            f"{at} holds an adapter without tensors, as FSDP and ZeRO 3 leave it where the state "
            "of all ranks was not gathered; save it again from the gathered state."
        )
    stored = stored_adapters(tensors)
    layers = stored.layers.get(stored.chosen(options.adapter) or next(iter(stored.layers), ""), [])
    others, not_read = floats_of(stored.others)
    full_modules = with_clean_names(others, at)
    left_out = list(with_clean_names_left_out(not_read))
    scalars = logged_scalars(directory, root, step)
    merges = scalars.get(_MERGES, 0)
    base = bases.of(step, config, merges)
    no_base = "" if base else bases.why_none(step, config, merges)
    model_config = bases.model_config(step, base, config)
    settings = Settings(config, model_config, stored.shared, bool(options.expert_blocks))
    attrs: dict[str, Any] = {"adapter_config": config}
    if model_config:
        attrs["config"] = model_config
    alone = adapt(layers, None, settings)
    found, bad_base = None, ""
    if base is not None:
        needed = {*alone.adapters, *alone.unknown} - set(full_modules)
        try:
            found = _with_base(base, bases, needed, layers, full_modules, settings, at)
        except FormatError as problem:
            bad_base = f"{problem} {ADAPTER_ALONE}"
    if found is None:
        reason = "modules saved as a whole, without the base model"
        left_out += [LeftOut(name, each.shape, reason) for name, each in full_modules.items()]
    result = found or alone
    return Checkpoint(
        result.weights,
        result.adapters,
        result.effective,
        result.unknown,
        is_merged=base is not None and base.is_merged,
        left_out=(*result.left_out, *left_out),
        no_base=no_base,
        bad_base=bad_base,
        attrs=attrs,
        scalars=scalars,
    )


def _check_config(config: Mapping[str, Any], at: Path) -> None:
    """Refuse what no layer of an adapter can be read without.

    Raises:
        FormatError: the config is not one of PEFT's.
    """
    method = config.get("peft_type")
    if not isinstance(method, str):
        raise FormatError(f"{at / CONFIG} has peft_type {method!r}, expected the name of a method.")
    if method == "LORA" and not is_number(config.get("lora_alpha")):
        raise FormatError(
            f"{at / CONFIG} has lora_alpha {config.get('lora_alpha')!r}, expected a number."
        )


def _with_base(
    base: BaseModel,
    bases: BaseModels,
    needed: set[str],
    layers: list[AdapterLayer],
    full_modules: dict[str, Tensor],
    settings: Settings,
    at: Path,
) -> Adapted:
    """The adapter on its base model.

    Raises:
        FormatError: the base model is damaged, or is not that of the adapter.
    """
    config = settings.config
    if config.get("layer_replication"):
        raise FormatError(
            f"{at} was trained on repeated layers (layer_replication), which {base.directory} "
            "holds once."
        )
    root = bases.root(base.directory)
    weights, left_out = base_tensors(base, root, needed, settings.model_config)
    saved, others = _saved_in_full(full_modules, weights, settings)
    result = adapt(layers, weights | saved, settings)
    result.left_out += left_out
    for name, tensor in others.items():
        # A part of an adapter that is not known: the weight of its module is not known either.
        reason = f"tensors of {config['peft_type']} adapters that are not known"
        result.left_out.append(LeftOut(name, tensor.shape, reason))
        for weight in [f"{above}.weight" for above in _above(name)]:
            if weight in weights:
                result.leave_out(weight, tensor.shape, reason)
    if 2 * len(result.misfits) > len(layers):
        raise FormatError(
            f"The base model {base.directory} has {result.misfits[0]}; it is not the base of the "
            f"adapter in {at}."
        )
    return result


def _saved_in_full(
    modules: Mapping[str, Tensor], weights: Mapping[str, Tensor], settings: Settings
) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """(Tensors that were saved as a whole: `modules_to_save`, some embeddings; all others)."""
    given = settings.config.get("modules_to_save")
    named = [each for each in given if isinstance(each, str)] if isinstance(given, list) else []
    saved: dict[str, Tensor] = {}
    others: dict[str, Tensor] = {}
    for name, tensor in modules.items():
        own = any(f".{module}." in f".{name}" for module in named)
        known = counterpart(name, weights, settings.model_config)
        (saved if known or own else others)[known or name] = tensor
    return saved, others


def _above(name: str) -> list[str]:
    """The paths of the modules that a parameter lies in, the innermost first."""
    parts = name.split(".")
    return [".".join(parts[:end]) for end in range(len(parts) - 1, 0, -1)][:3]
