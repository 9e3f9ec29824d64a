"""Ranks of differences: stairs with their bound, and the budget at one step."""

import numpy as np
import pytest

import dynamics as dy
from dynamics.errors import DynamicsError, MissingError
from dynamics.recordings import RecordingWriter
from dynamics.runs.run import Event
from tests.dynamics.conftest import SHAPES
from tests.dynamics.plots.drawn import labelled_lines, names_at_ends, points

RUNS = ("full_rank", "relora", "relora-as_published", "lora")
R, RESET_EVERY = 8, 80


def bound_of(ax, name):
    [line] = [each for each in ax.get_lines() if each.get_label() == f"_bound {name}"]
    return np.array(line.get_data(), dtype=float)


def at(line, x):
    """The height of stairs at x: that of the first point at or after x."""
    return line[1][np.searchsorted(line[0], x)]


def means_of(study, metric, run):
    values = study[metric].sel(kind="displacement").astype(np.float64)
    inside = values.sel(matrix=(values["layer"] >= 0) & (values["component"] == "parameters"))
    return inside.sel(run=[f"{run}-seed={seed}" for seed in (0, 1, 2)]).mean(("matrix", "run"))


def test_stairs_are_ranks_that_hold_for_the_interval_before_their_record(study):
    ax = dy.plot_staircase(study, over="seed")
    for run in RUNS:
        stairs = points(ax, run)
        expected = means_of(study, "numerical_rank", run).dropna("step")
        np.testing.assert_allclose(stairs[1][1:], expected, rtol=1e-12)
        assert stairs[0].tolist() == list(range(0, 561, 20))
        assert stairs[1][0] == stairs[1][1]  # from the step that displacements begin at
        [line] = [each for each in ax.get_lines() if each.get_label() == run]
        assert line.get_drawstyle() == "steps-pre"
        effective = points(ax, f"_effective {run}")
        np.testing.assert_allclose(
            effective[1], means_of(study, "effective_rank", run).dropna("step"), rtol=1e-12
        )
    assert ax.get_ylim()[0] == 0


def test_the_bound_is_r_for_each_cycle_and_rises_at_merges(study):
    ax = dy.plot_staircase(study, over="seed")
    for step in range(1, 561):
        # A merge at step m comes after step m: the step after it is the first of a new cycle.
        cycles = -(-step // RESET_EVERY)
        assert at(bound_of(ax, "relora"), step) == cycles * R
        assert at(bound_of(ax, "lora"), step) == R
    sizes = study.isel(
        matrix=np.flatnonzero((study["layer"] >= 0) & (study["component"] == "parameters"))
    )
    smallest = float(np.minimum(sizes["rows"], sizes["cols"]).mean())
    np.testing.assert_allclose(bound_of(ax, "full_rank")[1], smallest, rtol=1e-12)


def test_the_bound_of_projectors_rises_where_one_is_taken(write_recording, tmp_path):
    path = write_recording(tmp_path / "run.zarr", steps=(0, 10, 20, 30))
    writer = RecordingWriter(path, {}, resume=True)
    for step, bounded in ((0, True), (15, True), (25, False)):
        facts = {"rank": 3, "bounded": bounded, "matrices": list(SHAPES)}
        writer.event(Event(step, "projection", facts))
    writer.close()
    ax = dy.plot_staircase(dy.analyze(path, kinds=["displacement"]))
    bound = bound_of(ax, "numerical rank")
    assert bound[0].tolist() == [0, 0, 0, 10, 15, 15, 20, 20, 20, 30]
    assert bound[1].tolist() == [3, 3, 3, 3, 3, 6, 6, 6, 6, 6]
    assert "r for each projector, and at most" in dy.caption(ax)


def test_the_bound_rises_at_a_merge_between_two_records(study):
    """Records at 60 and 100, a merge at 80."""
    thinned = study.sel(step=[0, 60, 100, 140, 180, 220])
    bound = bound_of(dy.plot_staircase(thinned, over="seed"), "relora")
    assert [at(bound, step) for step in (80, 81, 160, 161)] == [8, 16, 16, 24]
    cycles = study.sel(step=[0, 80, 160, 240])  # an interval that begins and ends with a merge
    bound = bound_of(dy.plot_staircase(cycles, over="seed"), "relora")
    assert [at(bound, step) for step in (80, 81, 160, 161, 240)] == [8, 16, 16, 24, 24]


def test_no_rank_lies_above_its_bound(study):
    ax = dy.plot_staircase(study, over="seed")
    for run in RUNS:
        for x, y in points(ax, run).T:
            assert y <= at(bound_of(ax, run), x) + 1e-9


def test_stairs_of_one_run_and_of_one_module(relora):
    ax = dy.plot_staircase(relora, module="q_proj", x="tokens")
    values = relora["numerical_rank"].sel(kind="displacement", matrix=relora["module"] == "q_proj")
    expected = values.mean("matrix").dropna("step")
    np.testing.assert_allclose(points(ax, "numerical rank")[1][1:], expected)
    assert points(ax, "numerical rank")[0][-1] == 560 * 2048
    assert names_at_ends(ax)[0] == "numerical rank: 56"
    assert at(bound_of(ax, "numerical rank"), 81 * 2048) == 16


def test_ticks_of_ranks_are_multiples_of_r(relora, study):
    for data, over in ((relora, None), (study, "seed")):
        ticks = dy.plot_staircase(data, over=over).get_yticks()
        assert set(ticks % R) == {0}


def test_stairs_refuse_what_they_cannot_use(study, relora, cycles):
    with pytest.raises(DynamicsError, match=r"over .* is for several runs"):
        dy.plot_staircase(relora, over="seed")
    with pytest.raises(DynamicsError, match="effective rank of 12 lines"):
        dy.plot_staircase(study, effective=True)
    assert not [n for n in labelled_lines(dy.plot_staircase(study)) if "effective" in n]
    assert "effective" not in dy.caption(dy.plot_staircase(study))
    assert "Dashed" not in dy.caption(dy.plot_staircase(relora, effective=False))
    with pytest.raises(MissingError, match="No metric 'rank_bound'"):
        dy.plot_staircase(cycles.drop_vars("rank_bound"))
    with pytest.raises(MissingError, match="No displacement of a module 'x'"):
        dy.plot_staircase(cycles, module="x")


def test_a_run_without_the_kind_has_no_stairs_and_is_named(study):
    ax = dy.plot_staircase(study, kind="adapter", over="seed")
    assert "full_rank (no adapter)" in names_at_ends(ax)


# The budget --------------------------------------------------------------------------------------


def bars_of(ax):
    """Name -> bound, numerical and effective rank."""
    names = [label.get_text().replace("\n", "") for label in ax.get_yticklabels()]
    found = {name: {} for name in names}
    for bar in ax.containers:
        [patch] = bar.patches
        name = names[round(patch.get_y() + patch.get_height() / 2)]
        found[name][bar.get_label()] = patch.get_width()
    return found


@pytest.mark.parametrize("kind", ["displacement", "adapter", "weight"])
def test_the_budget_of_modules_is_the_mean_over_their_layers(relora, kind):
    found = bars_of(drawn := dy.plot_rank_budget(relora, kind=kind))
    assert ("q_proj" in found, "lm_head" in found) == (True, kind != "adapter")
    for name, bars in found.items():
        of_module = relora.sel(kind=kind, step=560, matrix=relora["module"] == name)
        assert bars == {
            "_bound": pytest.approx(float(of_module["rank_bound"].mean())),
            "_numerical": pytest.approx(float(of_module["numerical_rank"].mean())),
            "_effective": pytest.approx(float(of_module["effective_rank"].mean()), rel=1e-6),
        }
        assert bars["_effective"] <= bars["_numerical"] + 1e-6 <= bars["_bound"] + 1e-5
    assert "at step 560" in dy.caption(drawn)


def test_the_budget_of_runs_layers_and_matrices(study, relora):
    found = bars_of(dy.plot_rank_budget(study))
    assert list(found) == study["run"].values.tolist()
    assert found["lora-seed=1"]["_bound"] == 8
    assert found["relora-as_published-seed=0"]["_numerical"] == 48
    assert list(bars_of(dy.plot_rank_budget(relora, by="layer"))) == [
        f"layer {n}" for n in range(4)
    ]
    few = relora.isel(matrix=slice(2, 6))
    assert list(bars_of(dy.plot_rank_budget(few, by="matrix"))) == few["matrix"].values.tolist()
    early = bars_of(dy.plot_rank_budget(relora, step=100))
    assert early["q_proj"]["_bound"] == 16


def test_budgets_refuse_what_they_cannot_use(study, relora):
    with pytest.raises(DynamicsError, match="does not fit a result of several runs"):
        dy.plot_rank_budget(study, by="module")
    with pytest.raises(DynamicsError, match="does not fit a result of one run"):
        dy.plot_rank_budget(relora, by="run")
    with pytest.raises(MissingError, match=r"No grouping 'modul' \(did you mean 'module'\?\)"):
        dy.plot_rank_budget(relora, by="modul")
    with pytest.raises(MissingError, match="No displacement was measured at step 0; steps: 20,"):
        dy.plot_rank_budget(relora, step=0)
    many = relora.isel(matrix=np.tile(np.arange(2, 30), 2))
    many = many.assign_coords(matrix=[f"m{n}" for n in range(56)])
    with pytest.raises(DynamicsError, match="56 bars are too many"):
        dy.plot_rank_budget(many, by="matrix")


def test_the_budget_of_runs_is_at_a_step_that_all_of_them_have(comparison):
    found = bars_of(ax := dy.plot_rank_budget(comparison, kind="weight"))
    assert list(found) == ["a", "b"]  # b has a record at 30, too
    assert "at step 20" in dy.caption(ax)
    later = dy.plot_rank_budget(comparison, kind="weight", step=30)
    assert list(bars_of(later)) == ["b"]
    assert "Without weight at this step: a." in dy.caption(later)
