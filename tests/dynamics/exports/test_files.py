"""Files of results hold the numbers of the result, and say what they are."""

import json
import sys

import numpy as np
import pandas as pd
import pytest

import dynamics as dy
from dynamics.exports.export import FILES, TRACKERS, export


@pytest.fixture(scope="module")
def both(write_recording, tmp_path_factory):
    folder = tmp_path_factory.mktemp("runs")
    runs = {name: write_recording(folder / f"{name}.zarr", seed=i) for i, name in enumerate("ab")}
    both = dy.compare(runs, metrics=["effective_rank", "condition_number"])
    both["condition_number"][0, 0, 0, 0] = np.inf
    both["condition_number"][0, 0, 0, 1] = np.nan
    return both.assign_coords(method=("run", ["full, rank", '"quoted"']))


def plain(frame):
    """Without categories and nullable integers."""
    texts = dict.fromkeys(frame.select_dtypes("category"), object)
    return frame.astype(texts).astype(dict.fromkeys(frame.select_dtypes("Int64"), float))


def test_csv_has_every_digit(both, tmp_path):
    for name in ("ranks.csv", "ranks.csv.gz"):
        assert export(both, "csv", str(tmp_path / name)) == f"Saved to {tmp_path / name}"
        read = pd.read_csv(tmp_path / name)
        expected = plain(dy.to_frame(both)).replace("", np.nan)
        pd.testing.assert_frame_equal(read, expected, check_exact=True, check_dtype=False)
    assert (tmp_path / "ranks.csv.gz").read_bytes()[:2] == b"\x1f\x8b"


def test_json_has_every_digit_and_says_what_the_fields_are(both, tmp_path):
    export(both, "json", str(tmp_path / "ranks.json"), spectra=True)
    content = json.loads((tmp_path / "ranks.json").read_text(encoding="utf-8"))
    read, expected = pd.DataFrame(content["data"]), dy.to_frame(both, spectra=True)
    assert read.columns.tolist() == expected.columns.tolist()
    np.testing.assert_array_equal(read["effective_rank"], expected["effective_rank"])
    assert read["singular_value"].tolist() == [s.tolist() for s in expected["singular_value"]]
    assert np.isnan(read["condition_number"][0])  # JSON has no Inf
    assert read["layer"].isna().tolist() == expected["layer"].isna().tolist()
    fields = {each["name"]: each for each in content["schema"]["fields"]}
    assert fields["effective_rank"]["type"] == "number"
    assert "2007" in fields["effective_rank"]["reference"]
    assert fields["layer"]["type"] == "integer"
    assert fields["singular_value"]["unit"] == "units of the matrix"
    table = pd.read_json(tmp_path / "ranks.json", orient="table")
    assert table["layer"].isna().tolist() == expected["layer"].isna().tolist()
    assert content["result"]["events"] == both.attrs["events"]


@pytest.mark.parametrize("to", ["parquet", "arrow"])
def test_parquet_and_arrow_keep_bits_types_units_and_provenance(both, tmp_path, to):
    pytest.importorskip("pyarrow", reason="needs the extra exports")
    import pyarrow.feather
    import pyarrow.parquet

    export(both, to, str(tmp_path / "ranks"), spectra=True)
    read = {"parquet": pd.read_parquet, "arrow": pd.read_feather}[to](tmp_path / "ranks")
    expected = dy.to_frame(both, spectra=True)
    pd.testing.assert_frame_equal(read, expected, check_exact=True)
    assert read.attrs == expected.attrs
    table = {"parquet": pyarrow.parquet.read_table, "arrow": pyarrow.feather.read_table}[to](
        tmp_path / "ranks"
    )
    assert table.schema.field("singular_value").type == pyarrow.list_(pyarrow.float64())
    assert table.schema.field("effective_rank").metadata[b"units"] == b"1"
    provenance = json.loads(table.schema.metadata[b"learning-dynamics"])
    assert provenance["format"] == "learning-dynamics-analysis"


@pytest.mark.parametrize("to", FILES)
def test_a_file_that_exists_stays_and_no_half_file_is_left(both, tmp_path, to, monkeypatch):
    if to in ("parquet", "arrow"):
        pytest.importorskip("pyarrow", reason="needs the extra exports")
    path = tmp_path / "ranks"
    path.write_text("mine")
    with pytest.raises(dy.DynamicsError, match="ranks exists; choose another output"):
        export(both, to, str(path))
    assert path.read_text() == "mine"

    def full(frame, working):
        working.write_text("half")
        raise OSError("No space left on device")

    monkeypatch.setitem(FILES, to, full)
    with pytest.raises(dy.DynamicsError, match=r"Cannot write .*ranks: No space left"):
        export(both, to, str(path), overwrite=True)
    assert {each.name: each.read_text() for each in tmp_path.iterdir()} == {"ranks": "mine"}
    monkeypatch.undo()
    export(both, to, str(path), overwrite=True)
    assert path.stat().st_size > 1000
    with pytest.raises(dy.DynamicsError, match="is a directory"):
        export(both, to, str(tmp_path), overwrite=True)


@pytest.mark.parametrize(
    ("to", "package", "extra"),
    [
        ("parquet", "pyarrow", "exports"),
        ("arrow", "pyarrow", "exports"),
        ("tensorboard", "torch.utils.tensorboard", "tensorboard"),
        ("wandb", "wandb", "wandb"),
        ("trackio", "trackio", "trackio"),
        ("mlflow", "mlflow", "mlflow"),
    ],
)
def test_a_missing_package_names_its_extra(both, tmp_path, monkeypatch, to, package, extra):
    monkeypatch.setitem(sys.modules, package, None)  # what makes an import fail
    monkeypatch.chdir(tmp_path)
    with pytest.raises(dy.DynamicsError, match=rf"pip install 'learning-dynamics\[{extra}\]'"):
        export(both, to)
    assert list(tmp_path.iterdir()) == []


def test_metrics_and_kinds_are_chosen_and_what_is_not_there_is_refused(both, tmp_path):
    export(both, "csv", str(tmp_path / "x.csv"), metrics=["effective_rank"], kinds=["update"])
    read = pd.read_csv(tmp_path / "x.csv")
    assert set(read["kind"]) == {"update"}
    assert "condition_number" not in read
    for options, message in (
        ({"to": "xlsx"}, "No target 'xlsx'; known: csv"),
        ({"to": "csv", "metrics": ["er"]}, "No metric 'er' in this result; it has effective_rank"),
        ({"to": "csv", "kinds": ["base"]}, "No kind 'base' in this result; it has weight"),
        ({"to": "csv", "project": "x"}, "--project has no effect on --to csv"),
        *(({"to": to, "spectra": True}, "--spectra is for files") for to in TRACKERS),
    ):
        with pytest.raises(dy.DynamicsError, match=message):
            export(both, output=str(tmp_path / "y"), **options)
    assert not (tmp_path / "y").exists()
