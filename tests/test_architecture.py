"""Imports point one way: probes -> dynamics, and down the layers of dynamics."""

import ast
import subprocess
import sys
from pathlib import Path

import pytest

import dynamics

ROOT = Path(__file__).parents[1]

# A module may import what stands in its own or an earlier row.
LAYERS = [
    {"dynamics.errors", "dynamics.schema"},
    {"dynamics.runs"},
    {"dynamics.recordings", "dynamics.spectra"},
    {"dynamics.formats", "dynamics.components", "dynamics.metrics"},
    {"dynamics.directions", "dynamics.auditing", "dynamics.analysis", "dynamics.plots"},
    {"dynamics.examples"},
    {"dynamics.cli"},
    {"dynamics"},  # re-exports
    {"probes.schedule", "probes.model"},
    {"probes.checks", "probes.gradients"},
    {"probes.records"},
    {"probes.recorder"},
    {"probes.frameworks"},
    {"probes.relora"},
    {"probes"},  # re-exports
]


def _layer(module: str) -> int:
    matching = [
        (len(name), index)
        for index, names in enumerate(LAYERS)
        for name in names
        if module == name or (module.startswith(name + ".") and name not in ("dynamics", "probes"))
    ]
    assert matching, f"{module} stands in no layer; give it one."
    return max(matching)[1]


def _imports(path: Path) -> list[str]:
    found = []
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            found += [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom) and node.module:
            package = node.module in ("dynamics", "probes")
            found += [f"{node.module}.{a.name}" for a in node.names] if package else [node.module]
    return [name for name in found if name.split(".")[0] in ("dynamics", "probes")]


FILES = sorted([*ROOT.glob("dynamics/**/*.py"), *ROOT.glob("probes/**/*.py")])


@pytest.mark.parametrize("path", FILES, ids=lambda path: str(path.relative_to(ROOT)))
def test_a_module_imports_only_from_its_own_layer_or_below(path):
    parts = path.relative_to(ROOT).with_suffix("").parts
    module = ".".join(parts[:-1] if parts[-1] == "__init__" else parts)
    for imported in _imports(path):
        if imported in ("probes.Recorder", "probes.log_spaced", "probes.every"):
            continue  # the public names, which relora uses as any user does
        assert _layer(imported) <= _layer(module), f"{module} imports {imported}"


def test_importing_and_asking_for_help_load_neither_torch_nor_pyplot():
    code = (
        "import sys, dynamics, dynamics.cli;"
        "print([m for m in ('torch', 'matplotlib', 'xarray', 'zarr') if m in sys.modules])"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"


def test_no_module_hides_a_public_name():
    # Importing dynamics.audit would put the module in the place of the function dynamics.audit.
    modules = {path.stem for path in (ROOT / "dynamics").iterdir()}
    assert not modules & {name.lower() for name in dynamics.__all__ if name.islower()}
