"""Small PEFT models with factors that are not zero."""

import warnings

import peft
import torch


def adapted(model, **config):
    """A PEFT model whose factors are random: B = 0 would hide mistakes."""
    settings = {"r": 3, "lora_alpha": 7, "target_modules": ["q_proj", "up_proj"]}
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return randomized(peft.get_peft_model(model, peft.LoraConfig(**(settings | config))))


def randomized(model, seed=1):
    """The model, with random factors from now on."""
    generator = torch.Generator().manual_seed(seed)
    for name, parameter in model.named_parameters():
        if "lora_" in name:
            parameter.data.copy_(0.3 * torch.randn(parameter.shape, generator=generator))
    return model


def save(model, directory):
    """save_pretrained without PEFT's advice; the directory."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        model.save_pretrained(directory)
    return directory
