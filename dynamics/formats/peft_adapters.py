"""PEFT LoRA checkpoints: checkpoint-N/ with adapter_config.json, and the base model beside them.

The effective weight is W_base + s·B·A with s = alpha/r, alpha/sqrt(r) for rsLoRA. PEFT writes the
adapter only; the base model is the one the caller gives, or it is looked for in
`checkpoint-N/base/` (what ReLoRA needs, where the base changes at every merge), in `base/` beside
the checkpoints, and last where adapter_config.json says, if that is a local directory.
"""

import math
import re
from collections.abc import Mapping
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np

from dynamics import names, schema
from dynamics.errors import FormatError
from dynamics.formats.checkpoints import checkpoint_directories
from dynamics.formats.files import read_json, root_of
from dynamics.formats.model_files import ADAPTER, MODEL, has_model, model_tensors
from dynamics.formats.tensors import Tensor
from dynamics.run import Dense, Factored, Matrix, Run, matrices_of

_CONFIG = "adapter_config.json"
# Fields of an adapter_config.json with which a model computes something else than W + s·B·A.
_VARIANTS = {
    "use_dora": "DoRA",
    "kasa_config": "KaSA",
    "arrow_config": "Arrow",
    "monteclora_config": "MonteCLoRA",
    "use_bdlora": "BD-LoRA",
    "alora_invocation_tokens": "aLoRA",
}
# Beginnings of `init_lora_weights` that change the base weight before training.
_CHANGES_BASE = ("pissa", "olora", "corda", "loftq", "lora_ga")
_FACTOR = re.compile(r"(?P<path>.+)\.lora_(?:embedding_)?(?P<factor>[AB])(?:\.weight)?")


@dataclass(frozen=True)
class _Checkpoint:
    """One checkpoint: where each adapter's factors, each saved module and each base weight lies."""

    directory: Path
    adapter: Mapping[str, Tensor]
    base: Mapping[str, Tensor] | None
    base_directory: Path | None
    factors: dict[str, dict[str, str]]  # clean name -> {"A": stored, "B": stored}
    saved: dict[str, str]  # clean name -> stored, modules that PEFT trained in full
    base_names: dict[str, str]
    config: Mapping[str, Any]

    def adapter_matrix(self, name: str) -> Factored | None:
        """s·B·A of a parameter, in the orientation of its weight."""
        if name not in self.factors:
            return None
        stored = self.factors[name]
        a, b = (self.adapter[stored[factor]].read() for factor in "AB")
        dtype = self.adapter[stored["A"]].dtype
        scale = scaling(self.config, name.removesuffix(".weight"), rank=a.shape[0])
        if self._is_transposed(name):
            return Factored(a.T, b.T, scale, dtype)
        return Factored(b, a, scale, dtype)

    def adapter_shape(self, name: str) -> tuple[int, ...]:
        """(rows, cols) of s·B·A of an adapted parameter, from the files' headers."""
        stored = self.factors[name]
        out_in = self.adapter[stored["B"]].shape[0], self.adapter[stored["A"]].shape[1]
        return out_in[::-1] if self._is_transposed(name) else out_in

    def base_shape(self, name: str) -> tuple[int, ...] | None:
        """(rows, cols) of a parameter in the base model; None without one."""
        if name in self.saved:
            return self.adapter[self.saved[name]].shape
        if self.base is None or name not in self.base_names:
            return None
        return self.base[self.base_names[name]].shape

    def _is_transposed(self, name: str) -> bool:
        # Embeddings and GPT-2's Conv1D store (in, out).
        embedding = "lora_embedding" in self.factors[name]["A"]
        return embedding or bool(self.config.get("fan_in_fan_out"))

    def base_matrix(self, name: str) -> Dense | None:
        """The weight of a parameter without its adapter."""
        if name in self.saved:
            tensor = self.adapter[self.saved[name]]
        elif self.base is None or name not in self.base_names:
            return None
        else:
            tensor = self.base[self.base_names[name]]
        return Dense(tensor.read(), tensor.dtype)


class PeftAdaptersRun(Run):
    """A directory of PEFT LoRA checkpoints, or a single one."""

    format = "peft"
    description = "checkpoint-N/ with adapter_config.json (PEFT LoRA), base model beside it"

    @staticmethod
    def recognises(path: Path) -> bool:
        """Whether a checkpoint below (or at) `path` has an adapter_config.json."""
        directories = checkpoint_directories(path).values()
        return any((directory / _CONFIG).is_file() for directory in directories)

    def __init__(self, path: Path, base: Path | None = None):
        self.path = str(path)
        directories = checkpoint_directories(path)
        self.steps = np.array(list(directories), dtype=np.int64)
        self.problems: dict[int, str] = {}
        self.attrs: dict[str, Any] = {}
        shapes: dict[str, tuple[int, ...]] = {}
        self.stored_kinds: tuple[str, ...] = (schema.WEIGHT, schema.BASE, schema.ADAPTER)
        self.absent_kinds: dict[str, str] = {}
        self._checkpoints: dict[int, _Checkpoint] = {}
        self._changed: dict[tuple[str, int], bool] = {}  # base since the checkpoint before
        for step, directory in directories.items():
            try:
                checkpoint = _open(directory, path, base)
                attrs = _attrs(checkpoint)
                shapes |= _shapes(checkpoint)
            except FormatError as problem:
                self.problems[step] = str(problem)
                continue
            self._checkpoints[step] = checkpoint
            self.attrs = self.attrs or attrs
            if checkpoint.base is None:
                self.stored_kinds = (schema.ADAPTER,)
                reason = (
                    f"{directory} holds an adapter only; its base model is in neither "
                    f"{directory / 'base'} nor {path / 'base'}, and "
                    f"{checkpoint.config.get('base_model_name_or_path')!r} is no local directory "
                    "with model.safetensors. Give it with base= (--base DIR), or measure the "
                    "adapter alone with kinds=['adapter'] (--kinds adapter)."
                )
                self.absent_kinds = dict.fromkeys((schema.WEIGHT, schema.BASE), reason)
        self.matrices = matrices_of(shapes)
        if not self.matrices:
            raise FormatError(next(iter(self.problems.values()), f"{path} holds no adapters."))

    def read(self, name: str, step: int, kind: str) -> Matrix | None:
        """The effective weight, base weight or adapter of a parameter; see `Run.read`."""
        if step in self.problems:
            raise FormatError(self.problems[step])
        checkpoint = self._checkpoints[step]
        if kind == schema.ADAPTER:
            return checkpoint.adapter_matrix(name)
        if kind not in (schema.WEIGHT, schema.BASE):
            return None
        base = checkpoint.base_matrix(name)
        adapter = checkpoint.adapter_matrix(name) if kind == schema.WEIGHT else None
        if base is None or adapter is None:
            return base
        return Dense(base.values.astype(np.float64) + adapter.product(), base.dtype)

    def merges_between(self, name: str, before: int, now: int) -> int:
        """How often the frozen base of an adapted weight changed from a checkpoint to the next.

        At least one merge each time; several between two checkpoints count as one.
        """
        steps = [int(step) for step in self.steps if before <= step <= now]
        return sum(self._base_changed(name, *pair) for pair in pairwise(steps))

    def _base_changed(self, name: str, before: int, now: int) -> bool:
        if (name, now) not in self._changed:
            one, other = self._checkpoints.get(before), self._checkpoints.get(now)
            known = one is not None and other is not None and name in other.factors
            matrices = [each.base_matrix(name) for each in (one, other) if known and each]
            values = [matrix.values for matrix in matrices if matrix is not None]
            self._changed[name, now] = len(values) == 2 and not np.array_equal(values[0], values[1])
        return self._changed[name, now]


def scaling(config: Mapping[str, Any], module: str, rank: int) -> float:
    """The LoRA scaling s of a module: alpha/r, or alpha/sqrt(r) where `use_rslora` is set.

    `alpha_pattern` overrides `lora_alpha` for module paths that end in one of its keys (regular
    expressions), as PEFT's `get_pattern_key` matches them. `rank` is that of the stored factors.

    Raises:
        FormatError: the config has no usable alpha.
    """
    alpha = config.get("lora_alpha")
    for pattern, value in (config.get("alpha_pattern") or {}).items():
        if re.match(rf"(?:.*\.)?(?:{pattern})$", module):
            alpha = value
            break
    if not isinstance(alpha, int | float):
        raise FormatError(f"{_CONFIG} has lora_alpha {alpha!r} for {module}, expected a number.")
    return alpha / math.sqrt(rank) if config.get("use_rslora") else alpha / rank


def _open(directory: Path, run: Path, base: Path | None) -> _Checkpoint:
    if not (directory / _CONFIG).is_file():
        raise FormatError(f"{directory} has no {_CONFIG}.")
    config = read_json(directory / _CONFIG)
    _check_is_plain(config, directory)
    if not has_model(directory, ADAPTER):
        raise FormatError(f"{directory} has {_CONFIG} but no adapter_model.safetensors.")
    adapter = model_tensors(directory, root_of(run), ADAPTER)
    factors: dict[str, dict[str, str]] = {}
    saved: dict[str, str] = {}
    for stored in adapter:
        found = _FACTOR.fullmatch(stored)
        if found:
            name = names.clean_name(found["path"]) + ".weight"
            factors.setdefault(name, {})[found["factor"]] = stored
        else:
            saved[names.clean_name(stored)] = stored
    for name, pair in factors.items():
        if len(pair) != 2:
            raise FormatError(f"{directory} holds lora_{next(iter(pair))} of {name} only.")
    found = _base_directory(directory, run, base, config)
    inside = found is not None and found.is_relative_to(run)
    files = model_tensors(found, root_of(run if inside else found), MODEL) if found else None
    base_names = {names.clean_name(stored): stored for stored in files} if files else {}
    checkpoint = _Checkpoint(directory, adapter, files, found, factors, saved, base_names, config)
    for name in factors:
        _check_fits(checkpoint, name)
    return checkpoint


def _check_is_plain(config: Mapping[str, Any], directory: Path) -> None:
    """Refuse what is not W_base + s·B·A: other adapters than LoRA, variants of it, no alpha."""
    variants = [name for field, name in _VARIANTS.items() if config.get(field)]
    if config.get("peft_type") != "LORA" or variants:
        kind = variants[0] if variants else config.get("peft_type")
        raise FormatError(f"{directory} holds a {kind} adapter; only LoRA's s·B·A can be measured.")
    if not isinstance(config.get("lora_alpha"), int | float):
        raise FormatError(
            f"{directory / _CONFIG} has lora_alpha {config.get('lora_alpha')!r}, expected a number."
        )
    init = config.get("init_lora_weights")
    if isinstance(init, str) and init.lower().startswith(_CHANGES_BASE):
        raise FormatError(
            f"{directory} was initialised with {init!r}, which changed the base weights too: "
            "W_base + s·B·A is not its effective weight. Save it converted "
            "(save_pretrained(..., path_initial_model_for_weight_conversion=...))."
        )


def _check_fits(checkpoint: _Checkpoint, name: str) -> None:
    """Refuse an adapter that has no counterpart of its shape in the base model."""
    base, adapter = checkpoint.base_shape(name), checkpoint.adapter_shape(name)
    found = checkpoint.base_directory or checkpoint.directory
    if base is None and checkpoint.base is not None:
        raise FormatError(f"{found} has no {name}; it is not the adapter's base.")
    if base is not None and base != adapter:
        hint = "; fan_in_fan_out does not suit all of its layers" * (base == adapter[::-1])
        raise FormatError(
            f"{found} has {name} in shape {base}, the adapter in {checkpoint.directory} fits "
            f"{adapter}{hint or '; it is not the base of this adapter'}."
        )


def _base_directory(
    directory: Path, run: Path, base: Path | None, config: Mapping[str, Any]
) -> Path | None:
    if base is not None and not has_model(base):
        raise FormatError(f"The base model {base} holds no model.safetensors.")
    named = config.get("base_model_name_or_path")
    candidates = [base, directory / "base", run / "base", Path(named) if named else None]
    for candidate in candidates:
        if candidate is not None and has_model(candidate):
            return candidate
    return None


def _attrs(checkpoint: _Checkpoint) -> dict[str, Any]:
    attrs: dict[str, Any] = {"adapter_config": dict(checkpoint.config)}
    base = checkpoint.base_directory
    if base is not None and (base / "config.json").is_file():
        attrs["config"] = read_json(base / "config.json")
    return attrs


def _shapes(checkpoint: _Checkpoint) -> dict[str, tuple[int, ...]]:
    shapes = {stored: tensor.shape for stored, tensor in (checkpoint.base or {}).items()}
    for name in checkpoint.factors if checkpoint.base is None else ():
        shapes[name] = checkpoint.adapter_shape(name)
    shapes |= {stored: checkpoint.adapter[stored].shape for stored in checkpoint.saved.values()}
    return shapes
