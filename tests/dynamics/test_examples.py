"""The examples that come with the package."""

import json
from importlib.resources import files

import numpy as np
import pytest

import dynamics as dy
from dynamics import schema
from dynamics.analysis.examples import EXAMPLES
from dynamics.errors import MissingError
from probes.relora.config import METHODS as TRAINED

METHODS = ["full_rank", "relora", "relora:as_published", "lora"]


@pytest.mark.slow
def test_the_micro_study_compares_four_methods_seed_by_seed() -> None:
    data = dy.load_example("relora_micro")
    runs = list(zip(data["method"].values.tolist(), data["seed"].values.tolist(), strict=True))
    assert runs == [(method, seed) for method in METHODS for seed in (0, 1, 2)]
    for name in ("loss", "eval_loss", "blimp", "perplexity"):
        assert data[name].sel(step=560).notnull().all(), name
    events = json.loads(data.attrs["events"])
    for run, method in zip(data["run"].values.tolist(), data["method"].values, strict=True):
        merges = [event["step"] for event in events[run] if event["kind"] == schema.MERGE]
        assert merges == ([80, 160, 240, 320, 400, 480] if "relora" in method else []), run


@pytest.mark.slow
def test_its_displacement_has_at_most_r_directions_a_cycle() -> None:
    data = dy.load_example("relora_micro")
    data = data.isel(matrix=np.flatnonzero(data["layer"].values >= 0))
    ranks = data["numerical_rank"].sel(kind=schema.DISPLACEMENT)
    cycles = np.ceil(ranks["step"] / 80)
    for method in ("relora", "relora:as_published"):
        of_method = ranks.isel(run=np.flatnonzero(data["method"].values == method))
        assert (of_method.fillna(0) <= 8 * cycles).all(), method
    without = ranks.isel(run=np.flatnonzero(data["method"].values == "lora"))
    assert (without.fillna(0) <= 8).all()


@pytest.mark.slow
def test_the_nine_methods_keep_what_their_construction_forces() -> None:
    data = dy.load_example("low_rank_micro")
    assert sorted(set(data["method"].values.tolist())) == sorted(TRAINED)
    assert data.sizes["run"] == 3 * len(TRAINED)
    assert data["eval_loss"].sel(step=560).notnull().all()
    audits = json.loads(data.attrs["audits"])
    assert {severity for each in audits.values() for severity, _ in each.values()} <= {
        "pass",
        "not checked",
    }
    inside = data.isel(matrix=np.flatnonzero(data["layer"].values >= 0))
    displaced = inside["numerical_rank"].sel(kind=schema.DISPLACEMENT)
    cycles = np.ceil(displaced["step"] / 80)
    for method, most, last in (
        ("relora", 8 * cycles, 56),
        ("galore", 8 * cycles, 56),
        ("lora", 8, 8),
    ):
        of_method = displaced.isel(run=np.flatnonzero(data["method"].values == method))
        at_end = of_method.sel(step=560)
        assert (at_end.where(at_end.notnull(), last) == last).all(), method
        assert at_end.notnull().sum() == 3 * 28, method
        assert not (of_method > most).any(), method
    bounded = data["rank_bound"] < np.minimum(data["rows"], data["cols"])
    for kind in (schema.ADAPTER, schema.UPDATE, schema.DISPLACEMENT):
        assert bounded.sel(kind=kind).sum() > 2000
    assert not (data["numerical_rank"] > data["rank_bound"]).any()
    products = inside["numerical_rank"].sel(kind=schema.ADAPTER)
    sparse = products.isel(run=np.flatnonzero(data["method"].values == "sltrain"))
    assert float(sparse.max()) == 8


@pytest.mark.slow
def test_an_example_works_with_the_library_s_functions() -> None:
    data = dy.load_example("relora_micro")
    one = dy.select_run(data, "relora-seed=0")
    assert dy.plot_trajectory(one, "effective_rank", kind="displacement").get_lines()
    others = data.sizes["run"] - 1
    assert dy.difference(data, baseline="full_rank-seed=0").sizes["run"] == others


@pytest.mark.slow
def test_examples_are_small_and_say_nothing_of_the_machine_that_made_them() -> None:
    archives = {
        each.name: each
        for each in files("dynamics.analysis.examples").iterdir()
        if each.name.endswith(".zip")
    }
    assert set(archives) == {f"{name}.zip" for name in EXAMPLES}
    assert sum(len(each.read_bytes()) for each in archives.values()) < 10_000_000
    for name in EXAMPLES:
        written = json.dumps(dy.load_example(name).attrs)
        assert "/home/" not in written
        assert "/tmp/" not in written


def test_an_unknown_example_is_refused() -> None:
    with pytest.raises(
        MissingError, match=r"No example 'pythia'; known: relora_micro, low_rank_micro\."
    ):
        dy.load_example("pythia")
