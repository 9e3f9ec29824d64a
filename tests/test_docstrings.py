"""The examples in docstrings hold, and every public function has one.

Examples may use `dy` (dynamics), `np` and `torch`. They run in a folder of their own that holds the
runs of `tests/example_runs.py`.
"""

import doctest
import shutil
from importlib import import_module
from pathlib import Path

import matplotlib
import matplotlib.pyplot as plt
import numpy as np
import pytest
import torch

import dynamics as dy
from dynamics.errors import DynamicsError

ROOT = Path(__file__).parents[1]

matplotlib.use("Agg")


def modules_with_examples():
    """Found in the text, so that collecting imports none of them."""
    files = [file for package in ("dynamics", "probes") for file in (ROOT / package).rglob("*.py")]
    names = {file.relative_to(ROOT).with_suffix("") for file in files if ">>> " in file.read_text()}
    return sorted(".".join(name.parts).removesuffix(".__init__") for name in names)


def _imported(name):
    try:
        return import_module(name)
    except DynamicsError as error:  # what `require_extra` says
        if not isinstance(error.__cause__, ModuleNotFoundError):
            raise
        pytest.skip(str(error))
    except ModuleNotFoundError as error:
        if error.name is None or error.name.split(".")[0] in ("dynamics", "probes"):
            raise
        pytest.skip(f"needs {error.name}")


@pytest.mark.parametrize("name", modules_with_examples())
def test_the_examples_of_a_module_hold(name, request, tmp_path, monkeypatch):
    monkeypatch.setattr(plt, "show", lambda: None)
    module = _imported(name)
    given = {"dy": dy, "np": np, "torch": torch}
    found = doctest.DocTestFinder().find(module, extraglobs=given)
    tests = [each for each in found if each.examples]
    assert tests, f"{name}: no example that doctest finds"
    code = "".join(example.source for each in tests for example in each.examples)
    if any(run in code for run in ("run.zarr", "checkpoints")):
        runs = request.getfixturevalue("runs_of_examples")
        shutil.copytree(runs, tmp_path, dirs_exist_ok=True)
    monkeypatch.chdir(tmp_path)
    failures = []
    for each in tests:
        torch.manual_seed(0)
        runner = doctest.DocTestRunner(optionflags=doctest.NORMALIZE_WHITESPACE, verbose=False)
        runner.run(each, out=failures.append)
    plt.close("all")
    assert not failures, "\n" + "".join(failures)


@pytest.mark.parametrize("name", ["dynamics", "dynamics.metrics", "probes"])
def test_everything_public_has_an_example(name):
    package = import_module(name)
    public = {each: getattr(package, each) for each in package.__all__}
    without = [
        each
        for each, value in public.items()
        if callable(value) and ">>> " not in (value.__doc__ or "")
    ]
    assert without == [], f"{', '.join(without)}: no example (>>>) in the docstring"
