"""The results pages: their tables are what their scripts make of the examples."""

import importlib.util
from pathlib import Path

import pytest

import dynamics as dy

ROOT = Path(__file__).parents[1]
CURVES = ROOT.parent / "shared" / "paper" / "curves.csv"
PAGES = {"results": "low_rank_micro", "relora_results": "relora_micro"}


def script(name):
    spec = importlib.util.spec_from_file_location(name, ROOT / "docs" / f"{name}.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.mark.slow
@pytest.mark.parametrize("name", PAGES)
def test_the_tables_of_the_page_come_from_the_example(name):
    results = script(name)
    given = [dy.load_example(PAGES[name])]
    if name == "relora_results":
        given.append(results.published(CURVES) if CURVES.is_file() else None)
    page = results.PAGE.read_text("utf-8")
    assert results.with_tables(page, results.tables(*given)) == page


@pytest.mark.parametrize("name", PAGES)
def test_the_figures_of_the_page_are_there(name):
    results = script(name)
    for figure in results.FIGURE_NAMES:
        assert f"{name}/{figure}.png" in results.PAGE.read_text("utf-8")
        assert (results.FIGURES / f"{figure}.png").stat().st_size < 300_000
