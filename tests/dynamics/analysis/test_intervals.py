"""Updates over equal intervals, however often a run was recorded; and what says so."""

import warnings

import numpy as np
import pytest
import torch
import xarray as xr
from torch import nn
from typer.testing import CliRunner

import dynamics as dy
from dynamics.cli.app import app
from dynamics.errors import DynamicsError, MissingError
from dynamics.recordings import RecordingWriter, factor_path, matrix_path
from dynamics.runs.run import Event
from dynamics.schema import Status
from probes import Recorder

NAME = "layers.0.weight"
SCHEDULES = {"often": 5, "seldom": 10, "odd": lambda step: step in (0, 7, 10, 17, 20)}
LAST = 20


def train(store, every, **options):
    """Step -> the weight of one and the same training, whatever is recorded of it."""
    torch.manual_seed(0)
    model = nn.ModuleDict({"layers": nn.ModuleList([nn.Linear(12, 9, bias=False)])})
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.02)
    weights = {0: model["layers"][0].weight.detach().double().numpy().copy()}
    with Recorder(model, optimizer, store, every=every, **options):
        for step in range(1, LAST + 1):
            optimizer.zero_grad()
            model["layers"][0](torch.randn(5, 12)).square().mean().backward()
            optimizer.step()
            weights[step] = model["layers"][0].weight.detach().double().numpy().copy()
    return weights


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    """(label -> path of a recording, step -> weight)."""
    folder = tmp_path_factory.mktemp("schedules")
    weights = [train(folder / label, every) for label, every in SCHEDULES.items()]
    for each in weights[1:]:
        np.testing.assert_equal(each, weights[0])
    return {label: folder / label for label in SCHEDULES}, weights[0]


@pytest.fixture(scope="module")
def compared(trained):
    with warnings.catch_warnings():
        warnings.simplefilter("error", dy.IntervalWarning)
        return dy.compare(trained[0], kinds=["weight", "update", "displacement"])


def effective_rank(matrix):
    s = np.linalg.svd(matrix, compute_uv=False)
    p = s / s.sum()
    return np.exp(-(p * np.log(p)).sum())


def of_update(dataset, step):
    return dataset["effective_rank"].sel(kind="update", step=step, matrix=NAME)


def starts(dataset, kind="update"):
    return dataset["reference_step"].sel(kind=kind).values.tolist()


def write(path, steps, seed=0):
    """A recording of random weights: step -> weight."""
    rng, writer, weights = np.random.default_rng(seed), RecordingWriter(path, {}), {}
    for step in range(steps[-1] + 1):
        weight = rng.standard_normal((6, 4)).astype(np.float32)
        if step in steps:
            weights[step] = weight
            attrs = {matrix_path("weight", NAME): {"source_dtype": "float32"}}
            writer.append(step, {matrix_path("weight", NAME): weight}, attrs=attrs)
    writer.close()
    return weights


# One run ----------------------------------------------------------------------------------------


def test_alone_the_update_depends_on_the_schedule_and_says_so(trained):
    paths, weights = trained
    for label, start in {"often": 15, "seldom": 10, "odd": 17}.items():
        found = dy.analyze(paths[label], kinds=["update"])
        assert starts(found)[-1] == start
        expected = effective_rank(weights[LAST] - weights[start])
        assert float(of_update(found, LAST)) == pytest.approx(expected, rel=1e-9)


def test_with_a_lag_every_schedule_gives_the_same_bits(trained):
    paths, weights = trained
    found = [dy.analyze(path, kinds=["update"], lag=10) for path in paths.values()]
    values = {float(of_update(each, LAST)) for each in found}
    assert len(values) == 1
    assert values.pop() == pytest.approx(effective_rank(weights[20] - weights[10]), rel=1e-9)
    assert starts(found[0]) == [-1, -1, 0, 5, 10]
    assert starts(found[2]) == [-1, -1, 0, 7, 10]
    status = found[0]["status"].sel(kind="update", matrix=NAME).values.tolist()
    assert status == [Status.UNDEFINED] * 2 + [Status.MEASURED] * 3
    assert [each.attrs["lag"] for each in found] == [10] * 3


def test_only_kinds_that_are_differences_have_a_reference(compared):
    assert (compared["reference_step"].sel(kind="weight") == -1).all()
    assert compared["reference_step"].dtype == np.int64
    first_only = compared["reference_step"].sel(kind="displacement", run="seldom")
    assert first_only.values.tolist() == [-1, -1, -1, 0, -1, -1, 0]  # 0 5 7 10 15 17 20
    assert "subtracted" in compared["reference_step"].attrs["long_name"]


def test_lags_that_no_update_has_are_refused(trained):
    path = trained[0]["seldom"]
    with pytest.raises(MissingError, match=r"no two records that are lag=3 .*; it has 0, 10, 20"):
        dy.analyze(path, kinds=["update"], lag=3)
    with pytest.raises(DynamicsError, match="lag is 0"):
        dy.analyze(path, kinds=["update"], lag=0)
    with pytest.raises(MissingError, match=r"update is not among the kinds \(weight\)"):
        dy.analyze(path, kinds=["weight"], lag=10)


def test_cycles_and_optimizer_steps_name_their_first_step(tmp_path):
    rng, writer = np.random.default_rng(0), RecordingWriter(tmp_path / "run", {})
    for step in (0, 2, 4, 5, 8, 10):
        arrays = {
            matrix_path("weight", NAME): (6, 4),
            factor_path(NAME, "A"): (1, 4),
            factor_path(NAME, "B"): (6, 1),
            matrix_path("weight", "embed.weight"): (5, 4),
        }
        attrs = {"source_dtype": "float32", "scaling": 1.0, "transposed": False}
        made = {path: rng.standard_normal(shape).astype("f4") for path, shape in arrays.items()}
        writer.append(step, made, attrs=dict.fromkeys(made, attrs))
        if step in (4, 8):
            writer.event(Event(step, "merge", {}))
    writer.close()
    found = dy.analyze(tmp_path / "run", cache=tmp_path / "cache")
    assert starts(found, "cycle_update") == [-1, 0, 0, 4, 4, 8]
    assert starts(found, "optimizer_update") == [-1, -1, -1, 4, -1, -1]
    assert starts(found, "displacement") == [-1, 0, 0, 0, 0, 0]
    xr.testing.assert_identical(dy.analyze(tmp_path / "run", cache=tmp_path / "cache"), found)


# The cache, and saved results -------------------------------------------------------------------


def test_a_cache_never_takes_one_interval_for_another(trained, tmp_path):
    path = trained[0]["often"]
    for lag in (None, 10, 5, None, 10):
        with_cache = dy.analyze(path, kinds=["update"], lag=lag, cache=tmp_path / "cache")
        xr.testing.assert_identical(with_cache, dy.analyze(path, kinds=["update"], lag=lag))


def test_the_name_of_a_cell_is_that_of_before_where_nothing_else_is_asked_for(trained):
    from dynamics.analysis.selection import selection_of

    run = dy.open_run(trained[0]["often"])
    own, lagged = (selection_of(run, kinds=["update"], lag=lag).run for lag in (None, 10))
    cells = [("parameters", NAME, step, "update") for step in (5, 10, 15, 20)]
    for cell in cells:
        assert own.cell_key(*cell) != lagged.cell_key(*cell)
    of_five = selection_of(run, kinds=["update"], lag=5).run  # the intervals of the run itself
    assert [of_five.cell_key(*each) for each in cells] == [own.cell_key(*each) for each in cells]
    weight = ("parameters", NAME, 10, "weight")
    assert own.cell_key(*weight) == lagged.cell_key(*weight)


@pytest.mark.slow
def test_workers_and_one_process_measure_the_same_interval(trained):
    path = trained[0]["often"]
    xr.testing.assert_identical(
        dy.analyze(path, kinds=["update"], lag=15, workers=2),
        dy.analyze(path, kinds=["update"], lag=15),
    )


@pytest.mark.slow
def test_the_command_line_takes_a_lag_and_keeps_other_results(trained, tmp_path):
    command = ["analyze", str(trained[0]["often"]), "-o", str(tmp_path / "a.zarr")]
    command += ["--kinds", "update"]
    assert CliRunner().invoke(app, [*command, "--lag", "10"]).exit_code == 0
    saved = dy.load(tmp_path / "a.zarr")
    assert saved.attrs.pop("command")
    assert saved.attrs.pop("made")
    xr.testing.assert_identical(saved, dy.analyze(trained[0]["often"], kinds=["update"], lag=10))
    assert CliRunner().invoke(app, [*command, "--lag", "10"]).exit_code == 0
    refused = CliRunner().invoke(app, command)
    assert "has updates since 10 steps before" in str(refused.exception)
    np.testing.assert_array_equal(dy.load(tmp_path / "a.zarr")["stable_rank"], saved["stable_rank"])


def test_following_waits_for_two_records_that_are_so_far_apart(tmp_path):
    write(tmp_path / "run", (0, 5))
    waited = []
    looks = iter([False] * 3 + [True] * 9)
    results = list(
        dy.follow(
            tmp_path / "run", stopped=lambda: next(looks), interval=0, lag=10, waiting=waited.append
        )
    )
    assert results == []
    assert "no two records that are lag=10 steps apart yet" in waited[0]


# Several runs -----------------------------------------------------------------------------------


def test_compared_runs_have_the_same_bits_over_the_same_interval(compared, trained):
    weights = trained[1]
    for step, start in {10: 0, 20: 10}.items():
        values = of_update(compared, step).values
        assert len(set(values.tolist())) == 1
        assert values[0] == pytest.approx(effective_rank(weights[step] - weights[start]), rel=1e-9)
        assert set(compared["reference_step"].sel(kind="update", step=step).values) == {start}


def test_a_step_that_one_run_has_is_measured_from_its_own_previous_record(compared, trained):
    for run, step, start in (("often", 15, 10), ("odd", 7, 0), ("odd", 17, 10)):
        expected = effective_rank(trained[1][step] - trained[1][start])
        assert float(of_update(compared, step).sel(run=run)) == pytest.approx(expected, rel=1e-9)


def test_what_two_of_three_runs_have_is_compared_too(tmp_path):
    steps = {"a": range(0, 101, 10), "b": range(0, 101, 20), "c": (0, 50, 100)}
    for label, each in steps.items():
        write(tmp_path / label, list(each))
    found = dy.compare({label: tmp_path / label for label in steps}, kinds=["update"])
    by_step = dict(
        zip(found["step"].values.tolist(), zip(*starts(found), strict=True), strict=True)
    )
    by_step = dict(
        zip(found["step"].values.tolist(), np.array(starts(found)).T.tolist(), strict=True)
    )
    assert by_step[20] == [0, 0, -1]
    assert by_step[30] == [20, -1, -1]
    assert by_step[50] == [0, -1, 0]
    assert by_step[100] == [0, 0, 0]


def test_a_run_that_begins_later_or_has_one_record_has_no_say(tmp_path):
    for label, steps in {
        "a": (0, 5, 10, 15),
        "b": (0, 5, 10, 15),
        "late": (10, 15),
        "one": (15,),
    }.items():
        write(tmp_path / label, steps)
    with pytest.warns(dy.IntervalWarning, match="displacement"):
        found = dy.compare({each: tmp_path / each for each in ("a", "b", "late", "one")})
    assert found["reference_step"].sel(kind="update").values.tolist() == [
        [-1, 0, 5, 10],
        [-1, 0, 5, 10],
        [-1, -1, -1, 10],
        [-1, -1, -1, -1],
    ]


def test_runs_without_a_common_record_before_keep_their_intervals_with_a_warning(tmp_path):
    weights = {"a": write(tmp_path / "a", (0, 10, 20)), "b": write(tmp_path / "b", (5, 10, 20), 1)}
    paths = {label: tmp_path / label for label in weights}
    with pytest.warns(dy.IntervalWarning) as caught:
        found = dy.compare(paths, kinds=["update"], metrics=["frobenius_norm"])
    assert [str(each.message).partition(";")[0] for each in caught] == [
        "The update of these runs is over different intervals: 'a' from step 0 to 10, "
        "'b' from step 5 to 10"
    ]
    norms = found["frobenius_norm"].sel(kind="update", step=10, matrix=NAME).values
    pairs = (weights["a"][10], weights["a"][0]), (weights["b"][10], weights["b"][5])
    expected = [np.linalg.norm(now.astype(float) - before) for now, before in pairs]
    np.testing.assert_allclose(norms, expected, rtol=1e-12)
    assert starts(found) == [[-1, -1, 0, 10], [-1, -1, 5, 10]]


def test_saved_analyses_over_other_intervals_are_compared_with_one_warning(trained):
    analyses = {label: dy.analyze(path, kinds=["update"]) for label, path in trained[0].items()}
    with pytest.warns(dy.IntervalWarning) as caught:
        found = dy.compare(analyses)
    assert len(caught) == 1
    text = str(caught[0].message)
    assert "(and at 1 more steps): 'often' from step 5 to 10, 'seldom' from step 0 to 10" in text
    assert "\n" not in text
    assert starts(found)[1] == [-1, -1, -1, 0, -1, -1, 10]


def test_a_run_takes_the_interval_of_a_saved_analysis(trained):
    saved = dy.analyze(trained[0]["often"], kinds=["update"], lag=15, steps=[20])
    with warnings.catch_warnings():
        warnings.simplefilter("error", dy.IntervalWarning)
        found = dy.compare({"saved": saved, "run": trained[0]["often"]}, kinds=["update"])
    assert len(set(of_update(found, 20).values.tolist())) == 1
    assert found["reference_step"].sel(kind="update", step=20).values.tolist() == [5, 5]


def test_an_analysis_of_an_earlier_release_says_nothing_of_intervals(trained):
    earlier = dy.analyze(trained[0]["often"], kinds=["update"]).drop_vars("reference_step")
    found = dy.compare({"earlier": earlier, "run": trained[0]["seldom"]}, kinds=["update"])
    assert found["reference_step"].dtype == np.int64
    assert starts(found)[0] == [-1] * 5


def test_a_difference_of_other_intervals_has_no_reference(trained):
    analyses = {label: dy.analyze(path, kinds=["update"]) for label, path in trained[0].items()}
    with pytest.warns(dy.IntervalWarning):
        found = dy.compare(analyses)
    less = dy.difference(found, baseline="often")
    assert (less["reference_step"] == -1).all()
    same = dy.compare(trained[0], kinds=["update"])
    less = dy.difference(same, baseline="often")
    assert less["reference_step"].sel(kind="update", step=20).values.tolist() == [10, 10]
    assert less["reference_step"].dtype == np.int64


# Spectra in place of matrices -------------------------------------------------------------------


def test_recorded_spectra_of_updates_are_never_those_of_another_interval(trained, tmp_path):
    record = ["weight", "update", "displacement"]
    train(tmp_path / "spectra", 5, spectra_only=True, record=record)
    alone = dy.analyze(tmp_path / "spectra")
    assert starts(alone) == [-1, 0, 5, 10, 15]
    with pytest.warns(dy.IntervalWarning) as caught:
        found = dy.compare(
            {"spectra": tmp_path / "spectra", "seldom": trained[0]["seldom"]}, kinds=["update"]
        )
    assert [str(each.message) for each in caught] == [
        "'spectra' holds the singular values of its update from step 5 to 10 (and at 1 more "
        "steps), and not of from step 0 to 10: not recorded."
    ]
    status = found["status"].sel(kind="update", matrix=NAME)
    assert status.sel(run="spectra").values.tolist() == [2, 1, 0, 1, 0]
    assert status.sel(run="seldom").values.tolist() == [2, 0, 1, 0, 1]
    lagged = dy.analyze(tmp_path / "spectra", kinds=["update"], lag=5)
    np.testing.assert_array_equal(
        lagged["singular_value"], alone["singular_value"].sel(kind=["update"])
    )
    with pytest.raises(MissingError, match="none is over lag=10"):
        dy.analyze(tmp_path / "spectra", kinds=["update"], lag=10)


# Tables and the command line --------------------------------------------------------------------


@pytest.mark.slow
def test_the_command_line_prints_the_steps_and_one_warning(tmp_path):
    write(tmp_path / "a", (0, 10, 20))
    write(tmp_path / "b", (5, 10, 30))
    names = [f"{label}={tmp_path / label}" for label in "ab"]
    result = CliRunner().invoke(app, ["compare", *names, "-o", str(tmp_path / "both.zarr")])
    assert result.exit_code == 0
    printed = " ".join(result.output.split())
    assert "First → last measured step: 0 → 30, mean over" in printed
    assert (
        "weight of a: 0 → 20; weight of b: 5 → 30; update of a, displacement of a: 10 → 20"
        in printed
    )
    assert "warning: The update of these runs is over different intervals: 'a' from step" in printed
    assert "IntervalWarning" not in printed
