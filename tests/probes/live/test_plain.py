"""Live values are those of `analyze`, in a plain loop; and training does not notice them."""

import threading
import warnings
from itertools import chain

import numpy as np
import pytest
import torch

import dynamics as dy
from dynamics.errors import DynamicsError, MissingError
from dynamics.metrics.modules import mean
from dynamics.runs.run import matrices_of
from probes import Live, Recorder
from probes.live.metrics import LiveSubsetWarning, NotShownWarning
from probes.live.turns import Turns
from tests.probes.adapted import adapted_model, tokens
from tests.probes.live.training import build, expected, loop, train

RANKS = ("effective_rank", "numerical_rank", "effective_rank_above_floor")


@pytest.fixture
def shown():
    return {}


@pytest.fixture
def to(shown):
    """A tracker that refuses to be told a step twice, and whatever is no plain number."""

    def show(values, step):
        assert type(step) is int
        assert step not in shown
        assert {type(value) for value in values.values()} == {float}
        shown[step] = values

    return show


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"storage_dtype": "bfloat16"},
        {"select": "*up_proj*"},
        {"record": ["weight"]},
        {"spectra_only": True, "record": ["weight", "gradient", "update"]},
        {"spectra_only": True},
    ],
    ids=str,
)
def test_values_are_those_of_analyze_to_the_last_bit(tmp_path, shown, to, options):
    train(tmp_path / "run.zarr", to, live={"metrics": RANKS}, **options)
    kinds = options.get("record", ["weight", "gradient"])
    if "spectra_only" not in options:
        kinds = [*kinds, "update"]
    assert list(shown) == [0, 2, 4, 6]
    assert shown == expected(tmp_path / "run.zarr", RANKS, kinds)


def test_updates_of_adapters_over_a_merge_are_those_of_analyze(tmp_path, shown, to):
    """Their rank bound, and the roundings that their noise is made of, come from events."""
    kinds = ("weight", "gradient", "update", "adapter")
    model = adapted_model()
    optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=1e-2)
    live = Live(to=to, kinds=kinds, metrics=RANKS, budget=None, bounds=True)
    with Recorder(model, optimizer, tmp_path / "run.zarr", every=1, live=live) as recorder:
        for step in range(1, 5):
            ids = tokens(step)
            model(input_ids=ids, labels=ids).loss.backward()
            optimizer.step()
            optimizer.zero_grad()
            if step == 2:
                recorder.event("merge")
    bounds = (*RANKS, "rank_bound")
    floors = {
        step: {key: values.pop(key) for key in list(values) if "/noise_floor/" in key}
        for step, values in shown.items()
    }
    assert shown == expected(tmp_path / "run.zarr", bounds, kinds)
    analysis = dy.analyze(tmp_path / "run.zarr").sel(kind="update", step=4)
    floor = analysis["noise_floor"][analysis["module"] == "q_proj"].values
    assert floors[4]["rank/update/noise_floor/q_proj"] == mean(floor) > 0
    assert shown[4]["rank/adapter/rank_bound/q_proj"] == 3


def test_parts_of_fused_matrices_are_those_of_analyze(tmp_path, shown, to):
    from transformers import GPT2Config, GPT2LMHeadModel

    torch.manual_seed(0)
    config = GPT2Config(n_layer=2, n_head=2, n_embd=16, vocab_size=32, n_positions=16)
    model = GPT2LMHeadModel(config)
    optimizer = torch.optim.SGD(model.parameters(), lr=1e-2)
    live = Live(to=to, budget=None)
    with Recorder(model, optimizer, tmp_path / "run.zarr", every=1, live=live):
        for step in (1, 2):
            ids = tokens(step)
            model(input_ids=ids, labels=ids).loss.backward()
            optimizer.step()
    assert "rank/update/effective_rank/k_proj" in shown[2]
    assert shown == expected(tmp_path / "run.zarr")


def test_a_resumed_run_goes_on_with_the_update_since_its_last_record(tmp_path, shown, to):
    model, optimizer = build()
    live = Live(to=to, budget=None)
    with Recorder(model, optimizer, tmp_path / "run.zarr", every=2, live=live):
        loop(model, optimizer, 5)
    again = {}
    live = Live(to=lambda values, step: again.update({step: values}), budget=None)
    with Recorder(model, optimizer, tmp_path / "run.zarr", every=2, live=live, resume_at=5):
        loop(model, optimizer, 8, start=5)
    assert list(again) == [6, 8]
    assert {**shown, **again} == expected(tmp_path / "run.zarr")


def test_smallest_and_largest_and_other_groups_stand_beside_the_mean(tmp_path, shown, to):
    train(tmp_path / "run.zarr", to, live={"extremes": True, "kinds": ["weight"]})
    low, mean, high = (
        shown[2][f"rank/weight/effective_rank/up_proj{end}"] for end in ("/min", "", "/max")
    )
    assert low < mean < high


@pytest.mark.parametrize("by", ["layer", "matrix"])
def test_curves_of_layers_and_of_matrices(tmp_path, shown, to, by):
    train(tmp_path / "run.zarr", to, live={"by": by, "kinds": ["weight"]})
    keys = [key.removeprefix("rank/weight/effective_rank/") for key in shown[0]]
    assert keys[0] == {"layer": "layer_0", "matrix": "layers.0.down_proj.weight"}[by]
    assert len(keys) == {"layer": 3, "matrix": 6}[by]


def test_some_records_only(tmp_path, shown, to):
    train(tmp_path / "run.zarr", to, steps=8, live={"every": 4})
    assert list(shown) == [0, 4, 8]
    all_of_them = expected(tmp_path / "run.zarr")
    assert shown == {step: all_of_them[step] for step in shown}  # update: since step 2, step 6


@pytest.mark.parametrize("budget", [None, 0.02])
def test_training_computes_the_same_bits(tmp_path, budget):
    live = {"budget": budget, "metrics": RANKS}
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", LiveSubsetWarning)
        ends = train(tmp_path / "run.zarr", lambda values, step: None, every=1, live=live)
    model, optimizer = build()
    loop(model, optimizer, 6)
    assert all(torch.equal(a, b) for a, b in zip(ends, model.parameters(), strict=True))


def test_a_tracker_that_fails_ends_nothing_and_is_told_of_once(tmp_path):
    calls = []

    def broken(values, step):
        calls.append(step)
        raise ConnectionError("no network")

    with pytest.warns(NotShownWarning, match=r"step 0 \(no network\); training and re") as told:
        train(tmp_path / "run.zarr", broken)
    assert sum(each.category is NotShownWarning for each in told) == 1
    assert calls == [0, 2, 4, 6]
    assert list(expected(tmp_path / "run.zarr")) == [0, 2, 4, 6]


def test_the_tracker_is_called_by_the_training_thread_and_at_most_once_a_step(tmp_path):
    """MLflow keeps the active run of a thread; W&B counts rows."""
    calls, threads = [], set()

    def show(values, step):
        threads.add(threading.current_thread())
        calls.append("record")

    train(tmp_path / "run.zarr", show, every=1, after_step=lambda *_: calls.append("step"))
    assert threads == {threading.main_thread()}
    last = len(calls) - calls[::-1].index("step")
    assert "record record" not in " ".join(calls[:last])
    assert calls.count("record") == 7


def test_steps_come_late_but_are_right_beside_other_values(tmp_path, shown, to):
    seen = []
    train(tmp_path / "run.zarr", to, after_step=lambda step, loss: seen.append((step, *shown)))
    assert max(step for step, *live in seen if 2 not in live) >= 2  # it was not there at once
    assert list(shown) == [0, 2, 4, 6]


def test_flush_shows_everything_so_far(tmp_path, shown, to):
    model, optimizer = build()
    live = Live(to=to, budget=None)
    with Recorder(model, optimizer, tmp_path / "run.zarr", every=1, live=live) as recorder:
        loop(model, optimizer, 3)
        recorder.flush()
        assert list(shown) == [0, 1, 2, 3]


def test_matrices_with_nan_are_no_part_of_a_mean(tmp_path, shown, to):
    model, optimizer = build()
    with torch.no_grad():
        model.layers[0].up_proj.weight[0, 0] = float("nan")
    live = Live(to=to, kinds=["weight"], budget=None)
    with (
        pytest.warns(UserWarning, match="NaN"),
        Recorder(model, optimizer, tmp_path / "run.zarr", live=live),
    ):
        pass
    assert shown == expected(tmp_path / "run.zarr", kinds=["weight"])


def test_a_small_budget_measures_matrices_in_turn_and_says_so_once(tmp_path, monkeypatch):
    """One unit of time per matrix and two per record: 2 of 6 matrices at a time."""
    clock = iter(range(100_000))
    turns = Turns(1.0, clock=lambda: next(clock))
    names = [f"layers.{layer}.{each}" for layer in range(3) for each in ("q_proj", "k_proj")]
    matrices = matrices_of({f"{name}.weight": (4, 4) for name in names})
    groups = {name: info.module for name, info in matrices.items()}
    turns.trained(0)
    turns.spend(0.1 - 2)
    measured = []
    for record in range(1, 7):
        measured.append(list(turns.of_record(matrices, groups, 1)))
        turns.trained(2 * record)
    for each in measured:  # one of each module
        assert sorted(name.split(".")[2] for name in each) == ["k_proj", "q_proj"]
    first, second = (sorted(chain(*turn)) for turn in (measured[:3], measured[3:]))
    assert first == second == sorted(matrices)


def test_a_matrix_that_costs_much_waits_for_its_turn_and_the_others_go_on():
    now = 0.0
    turns = Turns(1.0, clock=lambda: now)
    shapes = {"embed_tokens.weight": (4000, 10)}
    shapes |= {f"layers.{each}.q_proj.weight": (4, 4) for each in range(4)}
    matrices = matrices_of(shapes)
    groups = {name: info.module for name, info in matrices.items()}
    large = next(name for name in matrices if name.startswith("embed"))
    turns.trained(0)
    measured, spent = [], 0.0
    for record in range(60):
        turn = []
        for name in turns.of_record(matrices, groups, 1):
            turn.append(name)
            took = 10.0 if name == large else 0.25
            now, spent = now + took, spent + took
        measured.append(turn)
        turns.trained(record + 1)  # measuring goes on beside the training
        assert spent <= 10.1 + record  # what was earned, and one matrix before its cost was known
    again = [number for number, turn in enumerate(measured) if large in turn][1:]
    assert again
    assert again[0] > 10
    assert np.diff(again).max(initial=0) <= 21  # half of all is saved for it
    others = sum(len(turn) for turn in measured[again[0] + 1 :])
    assert others >= 2 * len(measured[again[0] + 1 :]) - 2


def test_means_over_a_subset_are_said_to_be(tmp_path, shown, to):
    with pytest.warns(LiveSubsetWarning, match=r"of 6 matrices .* budget=1e-09") as told:
        train(tmp_path / "run.zarr", to, steps=40, every=1, live={"budget": 1e-9})
    assert sum(each.category is LiveSubsetWarning for each in told) == 1
    assert len(shown) < 41


@pytest.mark.parametrize(
    ("wrong", "match"),
    [
        ({"metrics": "stable_rank"}, "metrics as a list"),
        ({"metrics": []}, "one metric or more"),
        ({"kinds": ["base"]}, "takes kinds of weight, gradient, update"),
        ({"kinds": []}, "takes kinds"),
        ({"by": "head"}, "takes by of module, layer, matrix"),
        ({"budget": 0}, "budget as a share"),
        ({"budget": True}, "budget as a share"),
        ({"to": "wandb"}, "takes a function"),
        ({"every": 1.5}, "whole number of steps"),
    ],
    ids=str,
)
def test_what_cannot_be_meant_is_refused(wrong, match):
    with pytest.raises(DynamicsError, match=match):
        Live(**wrong)


def test_what_is_not_recorded_is_refused_by_name(tmp_path):
    with pytest.raises(MissingError, match="No metric 'rank'"):
        Live(metrics=["rank"])
    model, optimizer = build()
    store = tmp_path / "run.zarr"

    def recorder(live, **options):
        return Recorder(model, optimizer, store, live=live, **options)

    with pytest.raises(DynamicsError, match=r"live=Live\(to=wandb.log\)"):
        recorder(True)
    with pytest.raises(DynamicsError, match=r"live takes True or probes.Live"):
        recorder(print)
    with pytest.raises(DynamicsError, match="cannot measure update: the recorder records gradient"):
        recorder(Live(kinds=["update"], to=print), record=["gradient"])
    with pytest.raises(DynamicsError, match="cannot measure displacement"):
        recorder(Live(kinds=["displacement"], to=print))
    assert recorder(False) is not None


def test_no_memory_is_held_but_the_weights_of_one_record(tmp_path):
    """The buffers of each record come back, those of its weights one record later."""
    model, optimizer = build()
    live = Live(to=lambda values, step: None, budget=None)
    with Recorder(model, optimizer, tmp_path / "run.zarr", every=1, live=live) as recorder:
        loop(model, optimizer, 8)
        recorder.flush()
        buffers = recorder._contents.buffers
        assert len(buffers._in_use) == 6  # the weights of step 8
    assert np.isfinite(len(buffers))
