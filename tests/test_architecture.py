"""The structure of the code: imports point one way, folders stay small, the docs show it."""

import ast
import subprocess
import sys
from functools import cache
from graphlib import CycleError, TopologicalSorter
from pathlib import Path

import pytest

import dynamics
from tests.layers import LAYERS, picture

ROOT = Path(__file__).parents[1]
PACKAGES = ("dynamics", "probes")
FILES = sorted(path for package in PACKAGES for path in (ROOT / package).rglob("*.py"))
FLOORS = {name: -number for number, floor in enumerate(LAYERS) for name in floor}


def module_of(path: Path) -> str:
    parts = path.relative_to(ROOT).with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


MODULES = {module_of(path) for path in FILES}


@cache
def imports(path: Path) -> frozenset[str]:
    """The modules of ours that a file imports anywhere in it."""
    imported = set()
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            imported |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.module:
            members = {f"{node.module}.{alias.name}" for alias in node.names}
            imported |= {each if each in MODULES else node.module for each in members}
    return frozenset(each for each in imported if each.partition(".")[0] in PACKAGES)


def room_of(module: str) -> str:
    """The package of `LAYERS` that a module belongs to."""
    rooms = [name for name in FLOORS if module == name or module.startswith(name + ".")]
    assert rooms, f"{module} stands in no layer; give it one in tests/layers.py"
    return max(rooms, key=len)


@pytest.mark.parametrize("path", FILES, ids=lambda path: str(path.relative_to(ROOT)))
def test_a_module_imports_only_from_its_own_package_or_from_below(path):
    module = module_of(path)
    if module in PACKAGES:
        return  # the public names
    for imported in imports(path):
        if imported in PACKAGES:
            continue  # the experiment uses the public names, as any user does
        here, there = room_of(module), room_of(imported)
        assert here == there or FLOORS[there] < FLOORS[here], f"{module} imports {imported}"


def test_no_module_imports_itself_by_way_of_others():
    graph = {module_of(path): imports(path) - {module_of(path)} for path in FILES}
    try:
        TopologicalSorter(graph).prepare()
    except CycleError as error:
        pytest.fail(" -> ".join(error.args[1]))


def test_the_documentation_shows_the_layers():
    text = (ROOT / "docs/architecture.md").read_text(encoding="utf-8")
    assert picture() in text, "run python -m tests.layers and copy the picture"


def test_folders_stay_small():
    tracked = subprocess.run(
        ["git", "ls-files", *PACKAGES], cwd=ROOT, capture_output=True, text=True, check=True
    ).stdout.split()
    entries: dict[str, set[str]] = {}
    for path in tracked:
        for parent in Path(path).parents:
            inside = Path(path).relative_to(parent).parts
            files = entries.setdefault(str(parent), set())
            files.add(inside[0] if str(parent) == "dynamics" or len(inside) == 1 else "")
    assert len(entries["dynamics"]) <= 16
    crowded = {folder: len(files - {""}) for folder, files in entries.items()}
    for folder, number in crowded.items():
        assert number <= 14 or folder in ("dynamics", "dynamics/formats"), (folder, number)


def test_importing_and_asking_for_help_load_neither_torch_nor_pyplot():
    code = (
        "import sys, dynamics, dynamics.cli.app;"
        "print([m for m in ('torch', 'matplotlib', 'xarray', 'zarr') if m in sys.modules])"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"


def test_no_module_hides_a_public_name():
    # Importing dynamics.audit would put the module in the place of the function dynamics.audit.
    modules = {path.stem for path in (ROOT / "dynamics").iterdir()}
    assert not modules & {name.lower() for name in dynamics.__all__ if name.islower()}
