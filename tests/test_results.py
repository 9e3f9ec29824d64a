"""The results page: its tables are what its script makes of the example."""

import importlib.util
from pathlib import Path

import pytest

import dynamics as dy

ROOT = Path(__file__).parents[1]
CURVES = ROOT.parent / "shared" / "paper" / "curves.csv"


@pytest.fixture(scope="module")
def results():
    spec = importlib.util.spec_from_file_location("results", ROOT / "docs" / "relora_results.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.mark.slow
def test_the_tables_of_the_page_come_from_the_example(results):
    data = dy.load_example("relora_micro")
    curves = results.published(CURVES) if CURVES.is_file() else None
    page = results.PAGE.read_text("utf-8")
    assert results.with_tables(page, results.tables(data, curves)) == page


def test_the_figures_of_the_page_are_there(results):
    for name in results.FIGURE_NAMES:
        assert f"relora_results/{name}.png" in results.PAGE.read_text("utf-8")
        assert (results.FIGURES / f"{name}.png").stat().st_size < 300_000
