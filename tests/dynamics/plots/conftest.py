"""Analyses to draw."""

import matplotlib.pyplot as plt
import numpy as np
import pytest
from zarr.storage import MemoryStore

import dynamics as dy
from dynamics.recordings import RecordingWriter


@pytest.fixture(autouse=True)
def _figures_are_closed():
    plt.close("all")
    yield
    plt.close("all")


@pytest.fixture(scope="session")
def analysis(write_recording):
    return dy.analyze(write_recording(MemoryStore(), merges=(10, 20)))


@pytest.fixture(scope="session")
def comparison(analysis, write_recording):
    run = dy.open_run(write_recording(MemoryStore(), seed=1, steps=(0, 10, 20, 30), merges=(30,)))
    return dy.compare({"a": analysis, "b": dy.analyze(run, kinds=["weight"])})


@pytest.fixture(scope="session")
def adapter_analysis():
    """Adapters of rank 2, recorded without their weights."""
    store, rng = MemoryStore(), np.random.default_rng(0)
    writer = RecordingWriter(store, {})
    paths = [f"adapter/model.layers.{layer}.mlp.up_proj.weight/" for layer in (0, 1)]
    for step in (0, 5):
        factors = {}
        for path in paths:
            factors |= {f"{path}A": rng.standard_normal((2, 8))}
            factors |= {f"{path}B": rng.standard_normal((16, 2))}
        attrs = {"source_dtype": "float64", "scaling": 2.0, "transposed": False}
        writer.append(step, factors, attrs=dict.fromkeys(factors, attrs))
    return dy.analyze(dy.open_run(store))
