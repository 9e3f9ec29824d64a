"""Analyses to draw."""

import matplotlib.pyplot as plt
import numpy as np
import pytest
from zarr.storage import MemoryStore

import dynamics as dy
from dynamics.recordings import RecordingWriter
from dynamics.runs.run import Event


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


@pytest.fixture(scope="session")
def study():
    """Twelve runs: four methods × three seeds."""
    return dy.load_example("relora_micro")


@pytest.fixture(scope="session")
def relora(study):
    return dy.select_run(study, "relora-seed=0")


@pytest.fixture(scope="session")
def cycles():
    """Two layers whose weights move by two more directions in each of three cycles."""
    store, rng = MemoryStore(), np.random.default_rng(0)
    writer = RecordingWriter(store, {})
    names = [f"model.layers.{layer}.mlp.up_proj.weight" for layer in (0, 1)]
    first = {name: rng.standard_normal((16, 12), np.float32) for name in names}
    added = {
        name: [rng.standard_normal((16, 2)) @ rng.standard_normal((2, 12)) for _ in range(3)]
        for name in names
    }
    attrs = {f"weight/{name}": {"source_dtype": "float32"} for name in names}
    for step in range(7):
        whole, part = divmod(step, 2)
        weights = {}
        for name in names:
            moved = sum(added[name][:whole], np.zeros((16, 12)))
            if part:
                moved = moved + 0.5 * added[name][whole]
            weights[f"weight/{name}"] = (first[name] + moved).astype(np.float32)
        writer.append(step, weights, attrs=attrs, scalars={"loss": 3.0 / (step + 1)}, tokens=step)
        if step in (2, 4):
            writer.event(Event(step, "merge", {}))
    writer.close()
    return dy.analyze(dy.open_run(store), kinds=["weight", "displacement"])
