"""The file is whole, small, and holds names as text, whatever they are."""

import base64
import gzip
import json
import os
import re
from html.parser import HTMLParser

import numpy as np
import pytest

import dynamics as dy
from dynamics import schema
from dynamics.exports.report import data as report_data
from dynamics.exports.report import spectra
from dynamics.exports.report.data import chart_data
from dynamics.exports.report.numbers import listed
from dynamics.exports.report.sources import names_of
from tests.dynamics.exports.report.conftest import made_by_hand

NASTY = '</script><b title="x">\'&amp;<!--'


class Elements(HTMLParser):
    """The elements of a page, and its visible text."""

    def __init__(self, text):
        super().__init__()
        self.found, self.texts = [], []
        self.feed(text)

    def handle_starttag(self, tag, attrs):
        self.found.append((tag, dict(attrs)))

    def handle_data(self, data):
        self.texts.append(data)

    def of(self, tag):
        return [attrs for found, attrs in self.found if found == tag]


def document_of(path):
    """The data in a page, unpacked."""
    packed = re.search(r'id="data">([^<]+)<', path.read_text(encoding="utf-8")).group(1)
    return json.loads(gzip.decompress(base64.b64decode(packed)))


@pytest.mark.slow
def test_the_example_is_one_small_file_that_fetches_nothing(example_page):
    assert example_page.stat().st_size < 5e6
    elements = Elements(example_page.read_text(encoding="utf-8"))
    assert [each for each in elements.of("script") if "src" in each] == []
    assert elements.of("link") == elements.of("img") == elements.of("iframe") == []
    (policy,) = (each["content"] for each in elements.of("meta") if "http-equiv" in each)
    assert policy.startswith("default-src 'none'")
    text = "".join(elements.texts)
    assert "3 of 12 runs fail the audit" in text
    assert "How to read this" in text


def test_names_that_are_html_stay_text(tmp_path):
    result = made_by_hand(runs=(NASTY, "b"))
    names = result[schema.MATRIX].values.tolist()
    result = result.assign_coords(
        matrix=[NASTY, *names[1:]], module=("matrix", [NASTY] * 4), setting=("run", [NASTY, "x"])
    )
    audits = {NASTY: {NASTY: {"severity": "fail", "meaning": NASTY, "matrix": NASTY}}}
    account = {
        "measured": {NASTY: [2, 2]},
        "trained_numbers": 4,
        "left_out": [
            {"name": NASTY, "shape": [2], "reason": NASTY, "trains": True, "chosen": False}
        ],
    }
    result.attrs |= {
        "audits": json.dumps(audits),
        "problems": json.dumps({NASTY: [NASTY]}),
        "account": json.dumps({NASTY: account}),
        "passed_over": json.dumps({NASTY: {NASTY: NASTY}}),
        "sources": json.dumps({NASTY: {"source": NASTY, "command": NASTY}}),
        "command": NASTY,
        "versions": json.dumps({NASTY: NASTY}),
    }
    plain = made_by_hand(runs=("a", "b"))
    paths = [
        dy.report(each, tmp_path / f"{i}.html", title=title, command=title)
        for i, (each, title) in enumerate(((result, NASTY), (plain, "t")))
    ]
    nasty, clean = (Elements(path.read_text(encoding="utf-8")) for path in paths)
    assert nasty.of("b") == []
    assert len(nasty.of("script")) == len(clean.of("script"))
    assert NASTY in "".join(nasty.texts)
    runs = [each["name"] for each in document_of(paths[0])["runs"]]
    assert runs == [NASTY, "b"]


@pytest.mark.slow
def test_charts_hold_the_numbers_of_the_result(example, example_page):
    document = document_of(example_page)
    assert [each["name"] for each in document["runs"]] == example.run.values.tolist()
    assert [each["runs"] for each in document["groups"]] == [
        [0, 1, 2],
        [3, 4, 5],
        [6, 7, 8],
        [9, 10, 11],
    ]
    assert document["steps"] == example.step.values.tolist()
    names = [each["name"] for each in document["rows"]]
    for metric in ("effective_rank", "condition_number", "numerical_rank"):
        for kind in ("weight", "displacement", "adapter"):
            k = [each["name"] for each in document["kinds"]].index(kind)
            for r in (0, 5):
                values = example[metric].isel(run=r).sel(kind=kind, matrix=names)
                expected = values.transpose("step", "matrix").values.ravel()
                found = np.array(document["values"][metric][r][k], dtype=float)
                if np.isnan(expected).all():
                    assert found.size == 0
                else:
                    np.testing.assert_allclose(found, expected, rtol=6e-6)
    spectrum = document["spectra"][0]
    s = example.singular_value.isel(run=spectrum["run"], kind=spectrum["kind"])
    s = s.sel(matrix=spectrum["matrix"], step=spectrum["steps"][-1]).values
    np.testing.assert_allclose(
        np.array(spectrum["s"][-1], dtype=float), s[np.array(spectrum["index"]) - 1], rtol=5.1e-4
    )


def test_infinities_and_nan_survive():
    result = made_by_hand()
    result["effective_rank"][0, 0, 0, :3] = [np.inf, -np.inf, np.nan]
    values = chart_data(result).document["values"]["effective_rank"][0][0]
    assert values[:3] == ["inf", "-inf", None]
    json.dumps(values, allow_nan=False)


@pytest.mark.parametrize(
    ("value", "expected"),
    [
        (1.23456789e-9, 1.235e-9),
        (98765.4321, 98765.4321),
        (-109.7143, -109.7),
        (64.0, 64),
        (0.0, 0),
    ],
)
def test_numbers_have_the_digits_that_are_asked_for(value, expected):
    (found,) = listed(np.array([value]), 4)
    assert found == pytest.approx(expected, rel=1e-12)
    assert len(repr(found)) <= 10


def test_long_runs_show_fewer_records_and_say_so(monkeypatch):
    result = made_by_hand(steps=range(0, 500, 5))
    monkeypatch.setattr(report_data, "CELLS", 3 * 2 * 4 * 50)
    data = chart_data(result)
    assert len(data.document["steps"]) == 50
    assert data.document["steps"][0] == 0
    assert data.document["steps"][-1] == 495
    assert any("50 of 100 records" in each for each in data.omitted)
    assert all(len(of) == 50 * 4 for of in data.document["values"]["effective_rank"][0])


def test_the_spectrum_that_is_shown_first_is_of_a_matrix_that_most_runs_have(tmp_path):
    result = made_by_hand(runs=("a", "b", "c"), layers=3)
    common = result["matrix"].values[1]  # a and b have this one alone, and c has all
    kept = (result["run"] == "c") | (result["matrix"] == common)
    result["singular_value"] = result["singular_value"].where(kept)
    page = Elements(dy.report(result, tmp_path / "page.html").read_text())
    (figure,) = (each for each in page.of("figure") if each["id"] == "spectrum")
    assert json.loads(figure["data-options"])["matrix"] == common


def test_only_numbers_that_are_there_take_room(monkeypatch):
    result = made_by_hand(steps=range(0, 500, 5))
    alone = result["effective_rank"].where(result["kind"] == "weight")
    for number in range(20):  # as the metrics of gradients, or of a twin, are
        result[f"other_{number}"] = alone.where(False)
    monkeypatch.setattr(report_data, "CELLS", 3 * 2 * 4 * 100)
    assert len(chart_data(result).document["steps"]) == 100


def test_many_matrices_of_one_place_become_their_mean(monkeypatch):
    result = made_by_hand(layers=3)
    result = result.assign_coords(module=("matrix", ["experts"] * 6))
    monkeypatch.setattr(report_data, "CELLS", 10)
    data = chart_data(result)
    assert [each["name"] for each in data.document["rows"]] == [
        f"layer {layer} experts (2 matrices)" for layer in range(3)
    ]
    expected = result["effective_rank"].values[0, 0].reshape(2, 3, 2).mean(-1).ravel()
    found = data.document["values"]["effective_rank"][0][0]
    np.testing.assert_allclose(found, expected, rtol=5.1e-4)
    assert any("3 rows show the means of 6 matrices" in each for each in data.omitted)


def test_layers_of_two_stacks_are_told_apart():
    result = made_by_hand(layers=2)
    stacks = ["encoder", "encoder", "decoder", "decoder"]
    result = result.assign_coords(layer=("matrix", [0] * 4), stack=("matrix", stacks))
    rows = chart_data(result).document["rows"]
    assert [(each["stack"], each["layer"]) for each in rows] == [(stack, 0) for stack in stacks]
    assert {each["stack"] for each in chart_data(made_by_hand()).document["rows"]} == {""}


def test_spectra_make_room_for_each_other(monkeypatch):
    result = made_by_hand(runs=("a", "b"), steps=range(60), kinds=("weight", "update"))
    monkeypatch.setattr(spectra, "SPECTRA", 400)
    data = chart_data(result)
    shown = data.document["spectra"]
    assert sum(len(each["s"]) * len(each["index"]) for each in shown) <= 400
    assert {data.document["kinds"][each["kind"]]["name"] for each in shown} == {"weight"}
    assert all(each["steps"][0] == 0 and each["steps"][-1] == 59 for each in shown)
    assert any("Spectra are shown" in each for each in data.omitted)


def test_an_old_result_without_the_new_attributes_has_a_report(tmp_path):
    result = made_by_hand().drop_attrs()
    path = dy.report(result, tmp_path / "old.html")
    assert "not noted" in path.read_text(encoding="utf-8")


def test_what_was_left_out_is_listed_with_the_reason(tmp_path):
    account = {
        "measured": {"up.weight": [24, 8]},
        "trained_numbers": 192,
        "left_out": [
            {"name": "norm.w", "shape": [8], "reason": "vectors", "trains": True, "chosen": False}
        ],
    }
    result = made_by_hand(runs=("a", "b", "c")).assign_attrs(
        account=json.dumps({"a": account, "b": account, "c": None}),
        left_out=json.dumps({"c": {"bias.w": "a vector"}}),
        passed_over=json.dumps({"a": {"old.pt": "another run's"}}),
        problems=json.dumps({"b": ["step 3 cannot be read"]}),
    )
    text = dy.report(result, tmp_path / "left.html").read_text(encoding="utf-8")
    assert text.count("Of the model, 1 of 2 tensors") == 1  # once for both runs
    for said in ("norm.w", "bias.w", "a vector", "old.pt", "step 3 cannot be read"):
        assert f"<td>{said}</td>" in text


def test_a_single_run_needs_no_run_dimension(tmp_path):
    result = made_by_hand().isel(run=0, drop=True)
    result = result.assign_attrs(events="[]", source="runs/mine.zarr")
    path = dy.report(result, tmp_path / "one.html")
    assert document_of(path)["runs"] == [{"name": "mine", "seed": None, "merges": []}]
    assert 'id="differences"' not in path.read_text(encoding="utf-8")


def test_the_file_is_whole_and_replaces_nothing_unasked(tmp_path):
    path = dy.report(made_by_hand(), tmp_path / "new/a.html")
    before = path.read_bytes()
    with pytest.raises(dy.DynamicsError, match="--overwrite"):
        dy.report(made_by_hand(runs=("b",)), path)
    assert path.read_bytes() == before
    dy.report(made_by_hand(runs=("b",)), path, overwrite=True)
    assert path.read_bytes() != before
    assert os.listdir(path.parent) == ["a.html"]


@pytest.mark.parametrize(
    ("paths", "names"),
    [
        (["a/run.zarr", "b/run.zarr"], ["a", "b"]),
        (["x/a.zarr", "x/b.zarr"], ["a", "b"]),
        (["s3://bucket/a/run.zarr", "s3://bucket/b/run.zarr"], ["a", "b"]),
        (["a/run.zarr", "a/run.zarr"], ["run 1", "run 2"]),
        (["deep/one/x.zarr", "deep/two/y.zarr"], ["one/x", "two/y"]),
        (["mine/checkpoints/"], ["mine/checkpoints"]),
        (["mine/ranks.analysis.zarr"], ["ranks"]),
    ],
)
def test_runs_without_names_are_called_by_what_tells_them_apart(paths, names):
    assert names_of(paths) == names
