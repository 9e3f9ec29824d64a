"""The base model of PEFT adapters: where it is, and which of its weights an adapter belongs to."""

import os
import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, cast

from dynamics.errors import FormatError
from dynamics.formats.peft.config import CONFIG
from dynamics.formats.quantised.dequantise import dequantised
from dynamics.formats.shared.adapters.stored import counterpart, stored_adapters
from dynamics.formats.shared.full_checkpoints import with_clean_names, without_tied_names
from dynamics.formats.shared.matrices import names_of
from dynamics.formats.shared.model_config import model_attrs
from dynamics.formats.storage.files import is_remote, root_of
from dynamics.formats.storage.hub.path import HubPath
from dynamics.formats.storage.model_files import has_model, model_tensors
from dynamics.formats.storage.tensors import Tensor
from dynamics.runs import parameter_names
from dynamics.runs.account import LeftOut

# The model inside a Hugging Face model with a head (`base_model_prefix`). The names of a model that
# was saved without its head lack this prefix.
_PREFIXES = ("model.", "transformer.", "gpt_neox.", "bert.", "roberta.", "model.decoder.")
# axolotl's ReLoRA, in a checkpoint: the weights without adapters, and the adapter just merged.
_RELORA, _MERGED = "relora", "adapter"
_HUB_NAME = re.compile(r"[\w.-]+(?:/[\w.-]+)?")


ADAPTER_ALONE = "Measure the adapter alone with kinds=['adapter'] (--kinds adapter)."


@dataclass(frozen=True)
class BaseModel:
    """The base model of one checkpoint.

    Attributes:
        directory: where it lies.
        is_merged: whether the adapter of this checkpoint is merged into it already, so that it
            must not be added again.
    """

    directory: Path
    is_merged: bool = False


class BaseModels:
    """Finds the base model of each checkpoint of a run.

    The places, in this order: the base model that the user gave; `base/` in the checkpoint; what
    axolotl's ReLoRA stored; `base/` in the run; what adapter_config.json names, a directory or a
    model in the local Hugging Face cache. Nothing is downloaded. Of a run on the hub, it is a model
    there.

    axolotl (src/axolotl/monkeypatch/relora.py) merges at the beginning of the step after N, into
    the model in memory. It leaves the merged adapter in `checkpoint-N/adapter/`, so `checkpoint-N`
    itself is the state before the merge. Usually `checkpoint-N/relora/` holds the weights without
    adapters. In a checkpoint with a merge (quantised training only), it holds the weights after the
    merge, in half precision: these are W itself.

    Args:
        run: the directory of the run.
        directories: step -> checkpoint.
        given: the base model that the user gave, or None.

    Raises:
        FormatError: `given` holds no model.
    """

    def __init__(self, run: Path, directories: Mapping[int, Path], given: Path | None):
        if given is not None and not has_model(given):
            raise FormatError(
                f"The base model {given} holds no model.safetensors; give another directory with "
                "base= (--base)."
            )
        self._run = run
        self._given = given
        self._directories = directories
        self._merges = [s for s, at in directories.items() if (at / _MERGED / CONFIG).is_file()]
        self._stored = {s: at / _RELORA for s, at in directories.items() if has_model(at / _RELORA)}

    def of(self, step: int, config: Mapping[str, Any], merges: float = 0) -> BaseModel | None:
        """The base model of a checkpoint; None where it is in none of the places.

        Args:
            step: of the checkpoint.
            config: its adapter_config.json.
            merges: how many merges axolotl had logged by then.
        """
        if self._given is None and not has_model(self._directories[step] / "base"):
            if step in self._stored:
                return BaseModel(self._stored[step], is_merged=step in self._merges)
            same = [each for each in self._stored if self._is_base_of(each, step)]
            if same:
                return BaseModel(self._stored[same[-1]])
            if self._cycle(step) is not None or merges > 0:
                return None  # after a merge, the model that training began with is not the base
        for candidate in self._candidates(step, config):
            if has_model(candidate):
                return BaseModel(candidate)
        return None

    def why_none(self, step: int, config: Mapping[str, Any], merges: float = 0) -> str:
        """What to say to the user where `of` returns None."""
        directory = self._directories[step]
        remedy = (
            "Give the base model with base= (--base DIR), or measure the adapter alone with "
            "kinds=['adapter'] (--kinds adapter)."
        )
        if self._cycle(step) is not None or merges > 0:
            return (
                f"{directory} holds only an adapter that was saved after a merge; no checkpoint "
                "between that merge and the next has the weights without adapters in "
                f"{_RELORA}/. {remedy}"
            )
        if isinstance(self._run, HubPath):
            return (
                f"{directory} holds an adapter only; its base model "
                f"{config.get('base_model_name_or_path')!r} cannot be read on the hub. {remedy}"
            )
        return (
            f"{directory} holds an adapter only; its base model is in neither "
            f"{directory / 'base'} nor {self._run / 'base'}, and "
            f"{config.get('base_model_name_or_path')!r} is neither a local directory with "
            f"model.safetensors nor a model in the local Hugging Face cache. {remedy}"
        )

    def model_config(
        self, step: int, base: BaseModel | None, config: Mapping[str, Any]
    ) -> dict[str, Any]:
        """config.json of the base model, or of a place where it may be; empty without any."""
        at = [base.directory] if base else []
        for directory in (*at, *self._candidates(step, config)):
            if (directory / "config.json").is_file():
                return dict(model_attrs(directory, self.root(directory))["config"])
        return {}

    def root(self, directory: Path) -> Path:
        """The directory that no file of a base model in `directory` may lead out of."""
        alike = is_remote(directory) == is_remote(self._run)
        inside = alike and directory.is_relative_to(self._run)
        return root_of(self._run if inside else directory)

    def _candidates(self, step: int, config: Mapping[str, Any]) -> Iterator[Path]:
        if self._given is not None:
            yield self._given
            return
        yield self._directories[step] / "base"
        yield self._run / "base"
        named = config.get("base_model_name_or_path")
        if isinstance(self._run, HubPath):
            on_hub = self._run.model(named, config.get("revision"))
            if on_hub is not None:
                yield cast(Path, on_hub)
        elif isinstance(named, str) and named and not is_remote(self._run):
            yield Path(named)
            cached = cached_snapshot(named, config.get("revision"))
            if cached is not None:
                yield cached

    def _cycle(self, step: int) -> int | None:
        """The step of the last merge before `step`; None before the first."""
        return max((merge for merge in self._merges if merge < step), default=None)

    def _is_base_of(self, stored: int, step: int) -> bool:
        cycle = self._cycle(step)
        if stored in self._merges:
            return stored == cycle
        # Before the first known merge, the checkpoint of an earlier merge may have been deleted.
        return self._cycle(stored) == cycle and (cycle is not None or stored < step)


def base_tensors(
    base: BaseModel, root: Path, with_adapter: set[str], config: Mapping[str, Any]
) -> tuple[dict[str, Tensor], tuple[LeftOut, ...]]:
    """(Clean name -> tensor of a base model, what is left out of it).

    Names are spelled as those of the adapters.

    Args:
        base: where it lies.
        root: the directory that its files may not lead out of.
        with_adapter: clean names of the parameters, or of matrices in them, that have an adapter.
        config: the config.json of the model.

    Raises:
        FormatError: the model is damaged, or lacks a weight that has an adapter.
    """
    stored, not_dequantised = dequantised(model_tensors(base.directory, root), config)
    weights = with_clean_names(stored_adapters(stored, in_model=True).others, base.directory)
    weights = _spelled_like(with_adapter, weights, config)
    tensors = without_tied_names(weights, {"config": config})
    own = names_of(tensors, config)
    attention = {f"{each.removesuffix('.in_proj_weight')}.weight" for each in own}
    elsewhere = {each for each in with_adapter - own if counterpart(each, own, config)}
    missing = with_adapter - own - attention - elsewhere
    left_out = tuple(
        replace(each, name=parameter_names.clean_name(each.name)) for each in not_dequantised
    )
    for name in sorted(missing):
        weight = weights.get(name) or _output_embedding(name, tensors, config)
        if weight is None:
            for each in left_out:
                if each.name == name:
                    raise FormatError(
                        f"{base.directory} holds {name}, which is {each.reason}; give a base that "
                        "is not quantised with base= (--base DIR)."
                    )
            more = f" and {len(missing) - 1} others" if len(missing) > 1 else ""
            raise FormatError(
                f"The base model {base.directory} has no {name}{more}, so it is not the base of "
                "this adapter, or names its weights otherwise; give another with base= (--base)."
            )
        tensors[name] = weight
    return tensors, left_out


def _output_embedding(
    name: str, base: Mapping[str, Tensor], config: Mapping[str, Any]
) -> Tensor | None:
    """The input embedding, where `name` is an output embedding that the base ties to it."""
    inputs = [each for each in base if parameter_names.module_of(each) == "embed_tokens"]
    # config.json has no flag where the flag has transformers' default value for the model.
    tied = config.get("tie_word_embeddings") is not False
    if parameter_names.module_of(name) == "lm_head" and tied and len(inputs) == 1:
        return base[inputs[0]]
    return None


def _spelled_like(
    with_adapter: set[str], base: dict[str, Tensor], config: Mapping[str, Any]
) -> dict[str, Tensor]:
    """`base`, with the one known prefix added or removed that makes all names of adapters match."""
    # The output embedding has no prefix, and routers may have another name in files.
    own_ways = ("lm_head", "router")
    wanted = {name for name in with_adapter if parameter_names.module_of(name) not in own_ways}
    if wanted <= set(base) or wanted <= names_of(base, config):
        return base
    spellings = [{prefix + name: each for name, each in base.items()} for prefix in _PREFIXES]
    spellings += [
        {name.removeprefix(prefix): each for name, each in base.items()} for prefix in _PREFIXES
    ]
    matching = [
        each for each in spellings if len(each) == len(base) and wanted <= names_of(each, config)
    ]
    return matching[0] if len(matching) == 1 else base


def cached_snapshot(name: str, revision: Any = None) -> Path | None:
    """The snapshot of a model in the local Hugging Face cache; None where it is not there.

    Args:
        name: "organisation/model".
        revision: a branch, tag or commit; "main" by default.
    """
    if not _HUB_NAME.fullmatch(name) or ".." in name:
        return None
    repository = _hub_cache() / f"models--{name.replace('/', '--')}"
    revision = revision if isinstance(revision, str) and revision else "main"
    if ".." in revision:
        return None
    ref = repository / "refs" / revision
    try:
        commit = ref.read_text(encoding="utf-8").strip() if ref.is_file() else revision
    except (OSError, ValueError):
        return None
    snapshot = repository / "snapshots" / commit
    plain = commit and not set(commit) & set("/\\\0")
    return snapshot if plain and snapshot.is_dir() else None


def _hub_cache() -> Path:
    """Where huggingface_hub keeps models: see HF_HUB_CACHE, HF_HOME and XDG_CACHE_HOME."""
    for variable in ("HF_HUB_CACHE", "HUGGINGFACE_HUB_CACHE"):
        if os.environ.get(variable):
            return Path(os.environ[variable]).expanduser()
    caches = Path(os.environ.get("XDG_CACHE_HOME") or "~/.cache").expanduser()
    home = os.environ.get("HF_HOME")
    return (Path(home).expanduser() if home else caches / "huggingface") / "hub"
