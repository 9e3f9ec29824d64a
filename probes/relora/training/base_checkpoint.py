"""The base weights beside a PEFT checkpoint, which holds the adapter only.

A ReLoRA base changes at every merge, and its embeddings and norms at every step: an adapter
alone cannot be loaded onto anything.
"""

import os
from pathlib import Path
from typing import Any

import torch
from peft import PeftModel
from peft.tuners.lora import LoraModel
from safetensors.torch import load_file, save_file

from dynamics.errors import FormatError, MissingError
from dynamics.runs.parameter_names import clean_name

FOLDER = "base"
WEIGHTS_NAME = "model.safetensors"


def base_parameters(model: PeftModel) -> dict[str, torch.Tensor]:
    """Clean name -> parameter of the base model, as an unadapted model would spell it.

    Tied parameters appear once, under their first name, as in the library's own checkpoints.
    """
    return {
        clean_name(name): parameter
        for name, parameter in model.named_parameters()
        if LoraModel.prefix not in name
    }


def save_base(model: PeftModel, checkpoint: str | os.PathLike[str]) -> Path:
    """Write the base model to `checkpoint`/base and return that folder.

    config.json and model.safetensors, so that `from_pretrained` reads it. The weights come last
    and appear whole or not at all: a checkpoint with `base/model.safetensors` is complete.
    """
    folder = Path(checkpoint) / FOLDER
    folder.mkdir(parents=True, exist_ok=True)
    model.get_base_model().config.save_pretrained(folder)
    tensors = {
        name: parameter.detach().contiguous() for name, parameter in base_parameters(model).items()
    }
    unfinished = folder / f"{WEIGHTS_NAME}.tmp"
    save_file(tensors, unfinished, metadata={"format": "pt"})
    os.replace(unfinished, folder / WEIGHTS_NAME)
    return folder


def load_base(model: PeftModel, checkpoint: str | os.PathLike[str]) -> None:
    """Copy the base weights of `checkpoint`/base into the model, in place.

    Parameters keep their identity, so an optimizer that holds them stays valid.

    Raises:
        MissingError: the checkpoint has no base.
        FormatError: the base is another model's: names or shapes differ.
    """
    path = Path(checkpoint) / FOLDER / WEIGHTS_NAME
    if not path.is_file():
        raise MissingError(
            f"No {FOLDER}/{WEIGHTS_NAME} in {checkpoint}; resume from a checkpoint that has one."
        )
    stored: dict[str, Any] = load_file(path)
    parameters = base_parameters(model)
    shapes = {name: tuple(tensor.shape) for name, tensor in stored.items()}
    expected = {name: tuple(tensor.shape) for name, tensor in parameters.items()}
    if shapes != expected:
        name = next(
            name for name in {**expected, **shapes} if shapes.get(name) != expected.get(name)
        )
        raise FormatError(
            f"{path} is another model's: {name} is {shapes.get(name, 'absent')} there and "
            f"{expected.get(name, 'absent')} in this model; resume with the config it was made by."
        )
    with torch.no_grad():
        for name, parameter in parameters.items():
            parameter.copy_(stored[name])
