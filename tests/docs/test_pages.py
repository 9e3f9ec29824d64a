"""The code of README.md and of docs/ runs, and the numbers of the prose are those of the data."""

import csv
import re
import shutil
from pathlib import Path

import matplotlib
import matplotlib.pyplot as plt
import numpy as np
import pytest
import torch

import dynamics as dy
from tests import example_runs
from tests.docs import pages
from tests.docs.figures import FIGURES

ROOT = Path(__file__).parents[2]
CURVES = ROOT.parent / "shared" / "paper" / "curves.csv"
# These pages have tests of their own: tests/test_recipes.py, tests/test_where_to_add.py.
ELSEWHERE = {"docs/recipes.md", "docs/architecture.md"}
# They train, start processes or servers, or read large results.
SLOW = {
    "README.md",
    "docs/experiment.md",
    "docs/exports.md",
    "docs/tutorial.md",
    *(f"docs/guides/{name}.md" for name in ("clusters", "compare", "object_stores", "relora")),
}

matplotlib.use("Agg")


def all_pages():
    """README, CONTRIBUTING and docs/, without what the site generates."""
    found = [*ROOT.glob("*.md"), *(ROOT / "docs").rglob("*.md")]
    return sorted(page for page in found if not {"_build", "generated"} & set(page.parts))


def pages_with_python():
    for page in all_pages():
        name = str(page.relative_to(ROOT))
        if "```python" in page.read_text("utf-8") and name not in ELSEWHERE:
            yield pytest.param(page, id=name, marks=[pytest.mark.slow] if name in SLOW else [])


def given():
    """What a page takes for granted: a model, its optimizer, batches, and a Trainer for it."""
    model = example_runs.small_llama()
    ids = torch.randint(32, (8, 12))
    batches = [{"input_ids": each, "labels": each} for each in ids.split(2)]
    return {
        "model": model,
        "optimizer": torch.optim.AdamW(model.parameters(), lr=1e-3),
        "batches": batches,
        "published": published(),
    }


def published():
    """The paper's curves: (kind, metric, component, scale, model, step) -> value, if they are here.

    The paper's labels of full rank are kept, see docs/relora_results.md.
    """
    if not CURVES.is_file():
        return {}
    with CURVES.open(newline="") as file:
        names = ("kind", "metric", "component", "scale", "model")
        return {
            (*(row[name] for name in names), int(float(row["step"]))): float(row["value"])
            for row in csv.DictReader(file)
        }


def a_trainer(model, batches):
    from transformers import Trainer, TrainingArguments

    arguments = TrainingArguments(
        "trainer_output", max_steps=4, use_cpu=True, save_strategy="no", disable_tqdm=True
    )
    rows = [{name: batch[name][0] for name in ("input_ids", "labels")} for batch in batches]
    return Trainer(model, arguments, train_dataset=rows)


def prepare(page, folder, request):
    """Put into the folder what the page reads; returns what it takes for granted."""
    text = page.read_text("utf-8")
    names = given()
    if "trainer" in text:
        names["trainer"] = a_trainer(names["model"], names["batches"])
    if "full/run.zarr" in text:
        runs = request.getfixturevalue("runs_of_examples")
        shutil.copytree(runs / "full", folder / "full")
        shutil.copytree(runs / "relora", folder / "relora")
        if page.name != "README.md":  # which makes it itself, as the tutorial does
            shutil.copytree(runs / "run.zarr", folder / "run.zarr")
    for store in ("comparison.zarr", "ranks/comparison.zarr"):
        if f'"{store}"' in text:
            dy.save(dy.load_example("relora_micro").isel(step=[0, 28]), folder / store)
    if "s3://" in text and page.parent.name == "guides":
        request.getfixturevalue("s3")
    return names


@pytest.mark.parametrize("page", list(pages_with_python()))
def test_the_python_of_a_page_runs(page, tmp_path, monkeypatch, request):
    names = prepare(page, tmp_path, request)
    monkeypatch.chdir(tmp_path)
    torch.manual_seed(0)
    try:
        assert pages.run(page, **names) >= page.read_text("utf-8").count("```python")
    finally:
        plt.close("all")
    for name in re.findall(r"\]\(figures/(\S+)\)", page.read_text("utf-8")):
        shown, made = (plt.imread(folder / name) for folder in (FIGURES, tmp_path))
        assert shown.shape == made.shape, f"python -m tests.docs.figures draws {name} anew"
        assert np.abs(shown - made).mean() < 0.02, name


def test_a_number_of_the_prose_must_be_in_the_text_and_in_the_data(tmp_path):
    page = tmp_path / "page.md"
    block = "<!--- invisible-code-block: python\n{}\n--->\n"
    for text, code, error in [
        ("It is 1.25.", 'said("1.25", 1.2549)', None),
        ("It is 1,250.", 'said("1,250", 1250.4)', None),
        ("It is 1.25.", 'said("1.26", 1.26)', "does not say"),
        ("It is 1.256.", 'said("1.25", 1.25)', "does not say"),
        ("It is 1.25.", 'said("1.25", 1.2561)', "the data 1.2561"),
    ]:
        page.write_text(f"{text}\n\n{block.format(code)}")
        if error is None:
            assert pages.run(page) == 1
        else:
            with pytest.raises(AssertionError, match=error):
                pages.run(page)
