"""The models and the tokenizer of a trained run, as transformers objects."""

import hashlib
import json
import os
import warnings
from dataclasses import fields
from pathlib import Path
from typing import Any

import torch
from peft import PeftModel
from safetensors.torch import load_file
from tokenizers import Tokenizer
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedTokenizerFast

from dynamics.errors import DynamicsError, FormatError, MissingError, one_line
from probes.relora.config import TrainConfig
from probes.relora.data.text import END_OF_TEXT
from probes.relora.layers.of_method import with_layers_of
from probes.relora.model import build_model
from probes.relora.training.base_checkpoint import FOLDER
from probes.relora.training.progress import no_file_progress
from probes.relora.training.run_directory import CONFIG_NAME, TOKENIZER_NAME, read_identity

ADAPTER_CONFIG = "adapter_config.json"
_TOKENIZER_CONFIG = "tokenizer_config.json"


def load_model(
    checkpoint: str | os.PathLike[str],
    device: str | torch.device = "cpu",
    base: str | None = None,
) -> Any:
    """Load the model of a checkpoint in float32, with its adapter if it has one.

    Args:
        checkpoint: a folder of transformers or PEFT.
        device: where to put the model.
        base: name or path of the model that an adapter belongs to. By default it is `base/` in the
            checkpoint, or what the adapter's config names. Nothing is downloaded.

    Raises:
        MissingError: an adapter whose base is not on this machine.
        FormatError: the libraries cannot load it, or it does not hold the whole model.
    """
    folder = Path(checkpoint)
    adapted = (folder / ADAPTER_CONFIG).is_file()
    source = _base_of(folder, base) if adapted else folder
    try:
        with no_file_progress(), warnings.catch_warnings():
            # PEFT reads a property that transformers has renamed; users can do nothing about it.
            warnings.filterwarnings("ignore", "`is_gradient_checkpointing` is deprecated")
            model, loading = _loaded(Path(source or ""), source)
            if adapted:
                model = PeftModel.from_pretrained(model, str(folder))
    # The libraries raise all kinds of errors for a damaged file.
    except Exception as error:
        if adapted and not (folder / FOLDER).is_dir():
            raise MissingError(
                f"Cannot load the base model {str(source)!r} of the adapter {folder}: "
                f"{one_line(error)}; name the model that it belongs to (--base)."
            ) from error
        raise FormatError(
            f"Cannot load the model of {folder}: {one_line(error)}; remove that checkpoint, or "
            "train it again."
        ) from error
    if absent := sorted(loading["missing_keys"]):
        raise FormatError(
            f"{source} lacks {len(absent)} weights of {type(model).__name__}, such as {absent[0]}, "
            "which transformers would draw at random; give a checkpoint of the whole model, as "
            "transformers knows it."
        )
    return model.to(device)


def _loaded(folder: Path, source: str | Path | None) -> tuple[Any, dict[str, Any]]:
    """(The model, what is absent); transformers does not know the layers of CoLA and SLTrain."""
    config = _own_config(folder.parent / CONFIG_NAME)
    if config is None or not config.factored:
        model, loading = AutoModelForCausalLM.from_pretrained(
            source, dtype=torch.float32, local_files_only=True, output_loading_info=True
        )
        return model, loading
    model = with_layers_of(config, build_model(config)).eval()
    model.load_state_dict(load_file(folder / "model.safetensors"))
    return model, {"missing_keys": ()}


def _own_config(path: Path) -> TrainConfig | None:
    """The config of a run of the experiment; None where the file is none."""
    if not path.is_file():
        return None
    stored = read_identity(path)
    try:
        return TrainConfig(**{each.name: stored[each.name] for each in fields(TrainConfig)})
    except (KeyError, TypeError, DynamicsError):
        return None


def _base_of(folder: Path, base: str | None) -> str | Path:
    if base is not None:
        return base
    if (folder / FOLDER).is_dir():
        return folder / FOLDER
    try:
        named = json.loads((folder / ADAPTER_CONFIG).read_text()).get("base_model_name_or_path")
    except (OSError, ValueError, AttributeError):
        named = None
    if not named:
        raise MissingError(
            f"{folder} holds an adapter and no {FOLDER}/ with the weights that it belongs to, and "
            "its config names no base model; name it (--base)."
        )
    return str(named)


def load_tokenizer(
    run_dir: str | os.PathLike[str],
    name: str | None = None,
    *checkpoints: str | os.PathLike[str],
) -> Any:
    """Load the tokenizer that a run was trained with.

    Args:
        run_dir: the run's folder.
        name: name, folder or tokenizer.json of a tokenizer to take instead.
        checkpoints: folders that are asked for a tokenizer if the run's folder has none.

    Raises:
        MissingError: the run has no tokenizer and none is named, or it cannot be loaded.
    """
    path: Path | None = None if name is None else Path(name)
    if name is None:
        for folder in map(Path, (run_dir, *checkpoints)):
            if (folder / _TOKENIZER_CONFIG).is_file():  # with its special tokens
                path, name = None, str(folder)
                break
            if (folder / TOKENIZER_NAME).is_file():
                path = folder / TOKENIZER_NAME
                break
        else:
            raise MissingError(
                f"No {Path(run_dir) / TOKENIZER_NAME}; name the tokenizer that made its tokens "
                "(--tokenizer)."
            )
    try:
        if path is not None and path.is_file():
            return as_transformers(Tokenizer.from_file(str(path)))
        return AutoTokenizer.from_pretrained(name)
    # The libraries raise Exception itself.
    except Exception as error:
        raise MissingError(
            f"Cannot load the tokenizer {str(name or path)!r}: {one_line(error)}; give a "
            "tokenizer.json, or the name of one on the Hugging Face hub."
        ) from error


def as_transformers(tokenizer: Tokenizer) -> Any:
    """A tokenizer as the class of transformers; texts begin after its end-of-text token, if any."""
    known = tokenizer.token_to_id(END_OF_TEXT) is not None
    special = {"bos_token": END_OF_TEXT, "eos_token": END_OF_TEXT} if known else {}
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, **special)


def weights_digest(checkpoint: str | os.PathLike[str]) -> str:
    """SHA-256 over the weight and config files of a checkpoint, with its adapter and base."""
    seen = hashlib.sha256()
    folder = Path(checkpoint)
    files = [*folder.glob("*.safetensors"), *folder.glob(f"{FOLDER}/*.safetensors")]
    for path in sorted([*files, *folder.glob("pytorch_model*.bin"), *folder.glob("*config.json")]):
        with path.open("rb") as file:
            seen.update(hashlib.file_digest(file, "sha256").digest())
    return seen.hexdigest()
