"""Small runs that the tests of this directory share: recordings, and a tiny Llama."""

import shutil
from pathlib import Path

import matplotlib
import numpy as np
import pytest

from dynamics.recordings import GRADIENT, WEIGHT, RecordingWriter, matrix_path
from dynamics.runs.run import Event

matplotlib.use("Agg")

SHAPES = {
    "model.embed_tokens.weight": (12, 8),
    "model.layers.0.self_attn.q_proj.weight": (8, 8),
    "model.layers.0.mlp.up_proj.weight": (16, 8),
    "model.layers.1.self_attn.q_proj.weight": (8, 8),
    "model.layers.1.mlp.up_proj.weight": (16, 8),
}


@pytest.fixture(scope="session")
def write_recording(tmp_path_factory):
    """write_recording(store, ...): a finished recording with weights, gradients and a loss.

    In a directory it is a copy of one that is written once.
    """
    written = {}

    def write_or_copy(store, **options):
        if not isinstance(store, Path) or store.exists() or "spoil" in options:
            return write(store, **options)
        key = repr(sorted(options.items()))
        if key not in written:
            written[key] = write(tmp_path_factory.mktemp("recording") / "run.zarr", **options)
        # Files as new as written ones: the age of a file matters to a cache.
        return shutil.copytree(written[key], store, copy_function=shutil.copy)

    def write(store, *, steps=(0, 10, 20), seed=0, shapes=SHAPES, merges=(), spoil=None):
        """`spoil(step, name, weight)` may change a weight before it is written."""
        rng = np.random.default_rng(seed)
        weights = {name: rng.standard_normal(shape, np.float32) for name, shape in shapes.items()}
        writer = RecordingWriter(store, {"config": {"hidden_size": 8}})
        attrs = {
            matrix_path(group, name): {"source_dtype": "float32"}
            for group in (WEIGHT, GRADIENT)
            for name in shapes
        }
        for step in steps:
            matrices = {}
            for name, weight in weights.items():
                gradient = rng.standard_normal(weight.shape, np.float32)
                weight -= np.float32(0.1) * gradient
                recorded = weight.copy()
                if spoil is not None:
                    spoil(step, name, recorded)
                matrices[matrix_path(WEIGHT, name)] = recorded
                if step > 0:
                    matrices[matrix_path(GRADIENT, name)] = gradient
            loss = {"loss": 5.0 - step / 10} if step > 0 else {}
            writer.append(step, matrices, attrs=attrs, scalars=loss, tokens=64 * step)
            if step in merges:
                writer.event(Event(step, "merge", {"index": 1}))
        writer.close()
        return store

    return write_or_copy


@pytest.fixture(scope="session")
def tiny_llama():
    """tiny_llama(seed=0, **config): a LlamaForCausalLM of two layers, float32."""
    torch = pytest.importorskip("torch")
    transformers = pytest.importorskip("transformers")

    def build(seed=0, **config):
        torch.manual_seed(seed)
        settings = {
            "vocab_size": 40,
            "hidden_size": 16,
            "intermediate_size": 24,
            "num_hidden_layers": 2,
            "num_attention_heads": 4,
            "num_key_value_heads": 2,
            "max_position_embeddings": 32,
            "tie_word_embeddings": False,
        }
        return transformers.LlamaForCausalLM(transformers.LlamaConfig(**(settings | config)))

    return build


@pytest.fixture(scope="session")
def llama_checkpoints(tiny_llama, tmp_path_factory) -> Path:
    """A directory with checkpoint-2, checkpoint-4 and checkpoint-6; copy it to change it."""
    directory = tmp_path_factory.mktemp("llama")
    for seed, step in enumerate((2, 4, 6)):
        tiny_llama(seed).save_pretrained(directory / f"checkpoint-{step}")
    return directory
