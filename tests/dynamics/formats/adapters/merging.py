"""A model with an adapter of PEFT, saved, and what PEFT's own merge makes of it."""

import copy
import json
import warnings

import numpy as np
import peft
import torch

import dynamics as dy

TOLERANCE = 4e-7  # relative to the largest number of a matrix: merging rounds in float32


def randomised(model, seed=3):
    """Move every parameter that trains: adapters often begin as the identity."""
    generator = torch.Generator().manual_seed(seed)
    for _name, parameter in model.named_parameters():
        if parameter.requires_grad:
            noise = torch.randn(parameter.shape, generator=generator)
            parameter.data.add_(0.2 * noise.to(parameter.dtype))
    return model


def saved_run(directory, model, config, *, base=True, randomise=True):
    """Save base/ and checkpoint-3/ below a directory; the PEFT model."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # PEFT's advice on these configurations
        if base:
            model.save_pretrained(directory / "base")
        adapted = peft.get_peft_model(model, config)
        if randomise:
            randomised(adapted)
        adapted.save_pretrained(directory / "checkpoint-3")
    return adapted


def merged_weights(model):
    """Name -> float32 weight of PEFT's merged model."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        merged = copy.deepcopy(model).merge_and_unload()
    return {name: each.detach().numpy() for name, each in merged.state_dict().items()}


def deviation(found, expected):
    """The largest difference, relative to the largest number."""
    expected = expected.reshape(found.shape)
    return np.abs(found - expected).max() / np.abs(expected).max()


def check_weights(path, expected, step=3, **options):
    """Every matrix of the run is the merged one; the run, and the largest deviation."""
    run = dy.open_run(path, split_fused=False, **options)
    assert dict(run.problems) == {}
    worst = 0.0
    assert run.matrices
    for name in run.matrices:
        found = run.read(name, step, "weight")
        assert found is not None, name
        off = deviation(found.values, expected[name])
        assert off < TOLERANCE, (name, off)
        worst = max(worst, off)
    return run, worst


def change_config(directory, **fields):
    """Change fields of the adapter's config."""
    file = directory / "checkpoint-3/adapter_config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | fields))
