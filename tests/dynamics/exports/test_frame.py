"""Results as tidy tables."""

import json

import numpy as np
import pandas as pd
import pytest
import xarray as xr

import dynamics as dy
from dynamics.schema import Status


@pytest.fixture(scope="module")
def analysis(write_recording, tmp_path_factory):
    return dy.analyze(write_recording(tmp_path_factory.mktemp("run") / "run.zarr", merges=(10,)))


@pytest.fixture(scope="module")
def both(analysis, write_recording, tmp_path_factory):
    folder = tmp_path_factory.mktemp("other")
    shapes = {"model.layers.0.mlp.up_proj.weight": (6, 8), "model.norm_mixer.weight": (3, 3)}
    other = dy.analyze(write_recording(folder / "b.zarr", seed=1, shapes=shapes))
    return dy.compare({"a": analysis, "b": other}).assign_coords(lr=("run", [0.1, 0.2]))


def rows(dataset, names):
    """The same rows by looking at one cell after the other."""
    runs = dataset["run"].values.tolist() if "run" in dataset.dims else [None]
    for run in runs:
        of_run = dataset if run is None else dataset.sel(run=run)
        for kind in dataset["kind"].values.tolist():
            for step in dataset["step"].values.tolist():
                for matrix in dataset["matrix"].values.tolist():
                    cell = of_run.sel(kind=kind, step=step, matrix=matrix)
                    if cell["status"] == Status.MEASURED:
                        yield (run, kind, step, matrix, *(cell[name].item() for name in names))


@pytest.mark.parametrize("which", ["analysis", "both"])
def test_there_is_one_row_for_each_cell_that_was_measured(which, request):
    dataset = request.getfixturevalue(which)
    names = ["layer", "module", "rows", "cols", "loss", "reference_step", "stable_rank",
             "noise_floor", "storage_noise_floor", "singular_value_error"]  # fmt: skip
    frame = dy.to_frame(dataset)
    expected = pd.DataFrame(rows(dataset, names), columns=["run", "kind", "step", "matrix", *names])
    expected = expected.drop(columns=[] if which == "both" else "run")
    found = frame[expected.columns].copy()
    for name in ("layer", "reference_step"):
        found[name] = found[name].fillna(-1)
    found = found.astype(dict.fromkeys(found.select_dtypes("category"), object))
    pd.testing.assert_frame_equal(
        found.astype(object), expected.astype(object), check_exact=True, check_dtype=False
    )


def test_the_columns_are_in_the_order_that_people_read_and_have_types(both):
    frame = dy.to_frame(both)
    assert frame.columns.tolist()[:18] == [
        "run", "lr", "kind", "step", "tokens", "loss", "matrix", "component", "layer", "module",
        "stack", "attention", "head", "expert", "rows", "cols", "reference_step", "effective_rank",
    ]  # fmt: skip
    assert frame.columns.tolist()[-2:] == ["storage_noise_floor", "singular_value_error"]
    texts = ["run", "kind", "matrix", "component", "module", "stack", "attention"]
    assert frame.select_dtypes("category").columns.tolist() == texts
    assert frame["layer"].isna().sum() == (frame["matrix"].str.contains("embed|norm")).sum()
    assert frame.loc[frame["kind"] == "weight", "reference_step"].isna().all()
    assert frame.loc[frame["kind"] == "update", "reference_step"].tolist()[:1] == [0]
    # The shape of a matrix is that of its own run.
    shapes = frame[frame["matrix"] == "model.layers.0.mlp.up_proj.weight"].groupby("run")["rows"]
    assert shapes.unique().map(list).to_dict() == {"a": [16], "b": [6]}


def test_units_definitions_and_provenance_travel_and_are_json(analysis):
    attrs = json.loads(json.dumps(dy.to_frame(analysis).attrs))
    assert attrs["columns"]["frobenius_norm"]["units"] == "units of the matrix"
    assert "2007" in attrs["columns"]["effective_rank"]["reference"]
    assert attrs["columns"]["step"]["units"] == "optimizer steps"
    assert attrs["result"]["source"] == analysis.attrs["source"]
    assert "numpy" in json.loads(attrs["result"]["versions"])


def test_spectra_are_the_singular_values_of_each_row(analysis):
    frame = dy.to_frame(analysis, spectra=True)
    for row in (0, len(frame) // 2, len(frame) - 1):
        cell = frame.iloc[row]
        assert cell["singular_value"].size == min(cell["rows"], cell["cols"])
        assert cell["singular_value"].max() == cell["spectral_norm"]
    assert "singular_value" not in dy.to_frame(analysis)
    with pytest.raises(dy.DynamicsError, match="no singular values"):
        dy.to_frame(analysis.drop_vars("singular_value"), spectra=True)


def test_differences_statistics_and_single_runs_are_tables_too(both, analysis):
    less = dy.to_frame(dy.difference(both, baseline="a"))
    assert set(less["run"]) == {"b"}
    assert set(less["matrix"]) == {"model.layers.0.mlp.up_proj.weight"}
    pooled = dy.to_frame(dy.over(both.drop_vars(["rows", "cols"]), "lr"))
    assert pooled.columns.tolist()[:4] == ["run", "statistic", "kind", "step"]
    assert set(pooled["statistic"]) == {"mean", "lower", "upper", "count"}
    one = dy.to_frame(dy.select_run(both, "a"))
    assert "run" not in one or set(one["run"]) == {"a"}
    np.testing.assert_array_equal(one["stable_rank"], dy.to_frame(analysis)["stable_rank"])


def test_what_multiplies_in_to_dataframe_does_not_here(analysis):
    more = analysis.assign(curve=(("after", "restart"), np.zeros((500, 500))))
    assert dy.to_frame(more).shape == dy.to_frame(analysis).shape


def test_what_is_no_result_is_refused(analysis):
    for wrong in (analysis["stable_rank"], xr.Dataset(), "run.zarr", analysis[["status"]]):
        with pytest.raises(dy.DynamicsError, match="takes what analyze"):
            dy.to_frame(wrong)


def test_the_example_is_one_row_a_measured_matrix():
    micro = dy.load_example("relora_micro")
    frame = dy.to_frame(micro)
    assert len(frame) == int((micro["status"] == Status.MEASURED).sum())
    assert frame.columns.tolist()[:5] == [
        "run", "method", "seed", "tokens_per_step", "trainable_parameters"]  # fmt: skip
