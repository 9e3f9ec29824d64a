"""The base weights beside a PEFT checkpoint, which holds only the adapter.

The base of ReLoRA changes at every merge, and its embeddings and norms change at every step. So
an adapter alone cannot be loaded.
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
    """Name -> parameter of the base model, with the names that the model has without adapters.

    Tied parameters appear once, under their first name, as in checkpoints of transformers.
    """
    return {
        clean_name(name): parameter
        for name, parameter in model.named_parameters()
        if LoraModel.prefix not in name
    }


def save_base(model: PeftModel, checkpoint: str | os.PathLike[str]) -> Path:
    """Write the base model to `checkpoint`/base and return that folder.

    It holds config.json and model.safetensors, so `from_pretrained` reads it. The weights are
    written last, and their file is never incomplete: a checkpoint that has
    `base/model.safetensors` is complete.

    Args:
        model: a PEFT model with LoRA layers.
        checkpoint: the folder of the checkpoint.

    Example:
        >>> from dataclasses import replace
        >>> from probes.relora import add_adapters, build_model, load_base, micro, save_base
        >>> config = replace(micro(), num_layers=1, hidden_size=16, intermediate_size=16)
        >>> model = add_adapters(build_model(config), config)
        >>> folder = save_base(model, "checkpoint-100")
        >>> sorted(path.name for path in folder.glob("*.*"))
        ['config.json', 'model.safetensors']
        >>> load_base(model, "checkpoint-100")
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

    The parameters stay the same objects, so an optimizer that holds them stays valid.

    Args:
        model: a PEFT model of the same config.
        checkpoint: the folder of the checkpoint.

    Raises:
        MissingError: the checkpoint has no base.
        FormatError: the base belongs to another model: names or shapes differ.

    Example:
        >>> from dataclasses import replace
        >>> from probes.relora import add_adapters, build_model, load_base, micro, save_base
        >>> config = replace(micro(), num_layers=1, hidden_size=16, intermediate_size=16)
        >>> model = add_adapters(build_model(config), config)
        >>> folder = save_base(model, "checkpoint-100")
        >>> load_base(model, "checkpoint-100")
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
            f"{path} belongs to another model: {name} is {shapes.get(name, 'absent')} there and "
            f"{expected.get(name, 'absent')} in this model; resume with the config that made it."
        )
    with torch.no_grad():
        for name, parameter in parameters.items():
            parameter.copy_(stored[name])
