"""Quantised checkpoints: write one, read it, and look at its floor."""

import json

import numpy as np
from safetensors.torch import save_file

import dynamics as dy

NAME = "model.layers.0.mlp.up_proj.weight"


def write(folder, tensors, quantisation=None, *, metadata=None, **config):
    """A directory with one safetensors file and a config."""
    folder.mkdir(parents=True, exist_ok=True)
    contiguous = {name: each.detach().clone().contiguous() for name, each in tensors.items()}
    save_file(contiguous, folder / "model.safetensors", metadata=metadata)
    if quantisation is not None:
        config["quantization_config"] = quantisation
    (folder / "config.json").write_text(json.dumps(config))
    return folder


def read(folder, name=NAME):
    """The matrix of that name, as a run gives it."""
    run = dy.open_run(folder)
    assert not run.problems
    return run.read(name, int(run.steps[0]), "weight")


def left_out(folder):
    """Name -> reason of what is left out."""
    return {each.name: each.reason for each in dy.open_run(folder).account.left_out}


def matrix(kind="Gaussian", shape=(256, 384), seed=0):
    """A matrix to quantise, float32."""
    rng = np.random.default_rng(seed)
    values = rng.standard_normal(shape)
    if kind == "rows":
        values *= np.exp(rng.standard_normal((shape[0], 1)))
    elif kind == "rank 16":
        values = rng.standard_normal((shape[0], 16)) @ rng.standard_normal((16, shape[1])) / 4
    return (0.02 * values).astype(np.float32)


def floor_over_error(dense, original):
    """The noise floor of a dequantised matrix relative to the norm of its actual errors."""
    error = np.linalg.norm(dense.values.astype(np.float64) - original.astype(np.float64), 2)
    return dy.spectrum(dense).noise_floor / error
