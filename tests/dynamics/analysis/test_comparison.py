import json

import numpy as np
import pytest
import xarray as xr
from zarr.storage import MemoryStore

import dynamics as dy
from dynamics.errors import DynamicsError, MissingError
from dynamics.recordings import RecordingWriter
from dynamics.schema import Status

QUERY_WEIGHT = "model.layers.0.self_attn.q_proj.weight"
WIDE = {
    QUERY_WEIGHT: (12, 10),
    "model.layers.2.mlp.up_proj.weight": (6, 10),
    "lm_head.weight": (4, 10),
}


@pytest.fixture(scope="module")
def a(write_recording):
    return dy.analyze(write_recording(MemoryStore(), steps=(0, 10, 20), merges=(10,)))


@pytest.fixture(scope="module")
def b(write_recording):
    """Other steps, shapes and matrices; NaN in one."""

    def spoil(step, name, weight):
        if step == 20 and name == "lm_head.weight":
            weight[0, 0] = np.nan

    run = write_recording(MemoryStore(), seed=1, steps=(0, 20, 30), shapes=WIDE, spoil=spoil)
    with pytest.warns(dy.UnmeasuredWarning):
        return dy.analyze(run, kinds=["weight", "displacement"])


@pytest.fixture(scope="module")
def both(a, b):
    return dy.compare({"a": a, "b": b})


def test_a_comparison_has_the_union_of_steps_kinds_and_matrices(both, a):
    assert both["run"].values.tolist() == ["a", "b"]
    assert both["step"].values.tolist() == [0, 10, 20, 30]
    assert both["kind"].values.tolist() == ["weight", "gradient", "update", "displacement"]
    matrices = both["matrix"].values.tolist()
    assert matrices[:5] == a["matrix"].values.tolist()
    assert set(matrices[5:]) == {"model.layers.2.mlp.up_proj.weight", "lm_head.weight"}
    assert both["index"].values.tolist() == list(range(10))
    assert both["effective_rank"].dims == ("run", "kind", "step", "matrix")


@pytest.mark.slow
def test_every_value_is_that_of_the_single_analysis(both, a, b):
    for label, single in (("a", a), ("b", b)):
        for name in single.data_vars:
            found = both[name].sel(run=label)
            found = found.sel({dim: single[dim] for dim in single[name].dims})
            np.testing.assert_array_equal(found.values, single[name].values, err_msg=str(name))
            assert found.attrs == single[name].attrs


def test_what_a_run_lacks_is_nan_and_not_recorded(both):
    for absent in (
        both.sel(run="b", step=10),
        both.sel(run="a", step=30),
        both.sel(run="b", kind="gradient"),
        both.sel(run="b", kind="update"),
        both.sel(run="a", matrix="lm_head.weight"),
        both.sel(run="b", matrix="model.embed_tokens.weight"),
    ):
        assert (absent["status"] == Status.NOT_RECORDED).all()
        assert absent["effective_rank"].isnull().all()
        assert absent["singular_value"].isnull().all()
        assert absent["noise_floor"].isnull().all()
    assert both["loss"].sel(run="a", step=30).isnull()
    assert both["loss"].sel(run="b", step=30) == 2.0


def test_the_status_of_each_run_is_kept(both):
    assert both["status"].dtype == np.int8
    status = both["status"].sel(run="b", kind="weight", matrix="lm_head.weight")
    assert status.values.tolist() == [
        Status.MEASURED, Status.NOT_RECORDED, Status.NON_FINITE, Status.MEASURED
    ]  # fmt: skip
    assert (both["status"].sel(run="a", kind="update", step=0).isin(
        [Status.UNDEFINED, Status.NOT_RECORDED]
    )).all()  # fmt: skip


def test_shapes_that_differ_are_given_by_run(both):
    assert both["rows"].dims == both["cols"].dims == ("run", "matrix")
    assert both["rows"].sel(matrix=QUERY_WEIGHT).values.tolist() == [8, 12]
    assert both["cols"].sel(matrix=QUERY_WEIGHT).values.tolist() == [8, 10]
    assert both["layer"].dims == both["module"].dims == ("matrix",)
    assert both["layer"].sel(matrix="model.layers.2.mlp.up_proj.weight") == 2
    assert both["module"].sel(matrix="lm_head.weight").item() == "lm_head"


def test_shapes_that_agree_have_no_run(a, write_recording):
    other = dy.analyze(write_recording(MemoryStore(), seed=2))
    same = dy.compare({"a": a, "other": other})
    assert same["rows"].dims == same["cols"].dims == ("matrix",)
    np.testing.assert_array_equal(same["rows"], a["rows"])


def test_scalars_get_the_dimension_run(both, a):
    assert both["loss"].dims == both["tokens"].dims == ("run", "step")
    np.testing.assert_array_equal(both["loss"].sel(run="a").values[:3], a["loss"].values)


def test_a_scalar_and_a_metric_that_one_run_has_are_nan_for_the_other(write_recording):
    stores = MemoryStore(), MemoryStore()
    for store, scalars in zip(stores, ({"loss": 1.0}, {"grad_norm": 2.0}), strict=True):
        RecordingWriter(store, {}).append(
            0, {"weight/w": np.eye(3)}, attrs={"weight/w": {"source_dtype": "float64"}},
            scalars=scalars,
        )  # fmt: skip
    first = dy.analyze(dy.open_run(stores[0]), metrics=["stable_rank"])
    second = dy.analyze(dy.open_run(stores[1]), metrics=["effective_rank"])
    both = dy.compare({"first": first, "second": second})
    assert both["loss"].isnull().values.tolist() == [[False], [True]]
    assert both["grad_norm"].isnull().values.tolist() == [[True], [False]]
    assert both["stable_rank"].sel(run="second").isnull().all()
    assert float(both["effective_rank"].sel(run="second", kind="weight").squeeze()) == (
        pytest.approx(3)
    )


def test_events_and_problems_are_kept_by_run(both):
    events, problems = json.loads(both.attrs["events"]), json.loads(both.attrs["problems"])
    assert [event["kind"] for event in events["a"]] == ["merge"]
    assert events["b"] == problems["a"] == []
    assert "lm_head.weight (weight) at step 20" in problems["b"][0]


@pytest.mark.slow
def test_runs_and_paths_are_measured_with_the_options(write_recording, tmp_path):
    path = write_recording(tmp_path / "one.zarr")
    run = dy.open_run(write_recording(MemoryStore(), seed=1))
    both = dy.compare({"path": path, "run": run}, kinds=["update"], metrics=["stable_rank"])
    assert both["kind"].values.tolist() == ["update"]
    assert "effective_rank" not in both
    alone = dy.analyze(run, kinds=["update"], metrics=["stable_rank"])
    np.testing.assert_array_equal(both["stable_rank"].sel(run="run"), alone["stable_rank"])


def test_three_runs_keep_their_order(a, b):
    assert dy.compare({"z": a, "b": b, "c": a})["run"].values.tolist() == ["z", "b", "c"]


@pytest.mark.slow
def test_a_loaded_analysis_compares_like_the_one_in_memory(a, b, both, tmp_path):
    loaded = dy.load(dy.save(a, tmp_path / "a.zarr"))
    xr.testing.assert_identical(dy.compare({"a": loaded, "b": b}), both)


@pytest.mark.parametrize("labels", [[], ["a"]])
def test_fewer_than_two_runs_are_refused(a, labels):
    with pytest.raises(DynamicsError, match=f"two runs or more; found {len(labels)}"):
        dy.compare(dict.fromkeys(labels, a))


def test_a_comparison_of_comparisons_is_refused(both, a):
    with pytest.raises(DynamicsError, match="'both' compares runs already"):
        dy.compare({"a": a, "both": both})


def test_a_run_of_an_older_comparison_can_be_selected(both, a):
    """It has in common what is kept by run today."""
    older = both.assign_attrs(passed_over="{}", left_out="null")
    chosen = dy.select_run(older, "a")
    assert chosen.attrs["passed_over"] == "{}"
    np.testing.assert_array_equal(chosen["stable_rank"], both["stable_rank"].sel(run="a"))


def test_selecting_a_run_gives_its_values_and_events(both, a):
    chosen = dy.select_run(both, "a")
    assert "run" not in chosen.dims
    found = chosen.sel(step=a["step"], kind=a["kind"], matrix=a["matrix"])
    np.testing.assert_array_equal(found["effective_rank"], a["effective_rank"])
    assert chosen.attrs["events"] == a.attrs["events"]
    with pytest.raises(MissingError, match="No run 'c' in this result; it has a, b"):
        dy.select_run(both, "c")
    with pytest.raises(MissingError, match="one run without a name"):
        dy.select_run(a, "a")


# difference() -----------------------------------------------------------------------------------


def test_a_difference_is_the_subtraction_value_by_value(both):
    less = dy.difference(both, baseline="a")
    assert less["run"].values.tolist() == ["b"]
    for name in ("effective_rank", "singular_value", "loss", "tokens"):
        expected = both[name].sel(run="b").values - both[name].sel(run="a").values
        np.testing.assert_array_equal(less[name].sel(run="b").values, expected)
    measured = less["effective_rank"].sel(kind="weight", matrix=QUERY_WEIGHT, run="b")
    assert measured.notnull().values.tolist() == [True, False, True, False]


def test_a_difference_of_a_run_with_itself_is_zero(a):
    less = dy.difference(dy.compare({"a": a, "same": a}), baseline="a")
    values = less["effective_rank"].sel(run="same")
    assert float(np.abs(values).max()) == 0
    np.testing.assert_array_equal(values.notnull(), a["effective_rank"].notnull())


def test_what_describes_single_runs_is_left_out_of_a_difference(both):
    less = dy.difference(both, baseline="b")
    for name in ("status", "noise_floor", "singular_value_error"):
        assert name in both
        assert name not in less
    assert less.attrs["baseline"] == "b"
    assert less["effective_rank"].attrs == both["effective_rank"].attrs


def test_a_difference_knows_its_matrices(both, a):
    less = dy.difference(both, baseline="a")
    for name in ("component", "layer", "module"):
        np.testing.assert_array_equal(less[name].values, both[name].values)
    same = dy.difference(dy.compare({"a": a, "b": a, "c": a}), baseline="b")
    assert same["run"].values.tolist() == ["a", "c"]
    np.testing.assert_array_equal(same["rows"], a["rows"])


def test_an_unknown_baseline_lists_the_runs(both):
    with pytest.raises(MissingError, match="No run 'c' in this comparison; it has a, b"):
        dy.difference(both, baseline="c")


def test_a_difference_of_one_run_is_refused(a):
    with pytest.raises(DynamicsError, match="it has a dimension 'run'"):
        dy.difference(a, baseline="a")
