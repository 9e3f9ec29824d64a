"""The package as it is given away: built, installed, cited; its extras can be installed."""

import ast
import os
import re
import subprocess
import sys
import tarfile
import tomllib
import zipfile
from pathlib import Path

import jsonschema
import pytest
import yaml
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

ROOT = Path(__file__).parents[1]
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text("utf-8"))["project"]
EXTRAS = PROJECT["optional-dependencies"]
PINNED = {
    canonicalize_name(name): version
    for name, version in re.findall(
        r"^([\w.-]+)==(\S+)$", (ROOT / "constraints.txt").read_text("utf-8"), re.MULTILINE
    )
}
# Not part of `dev`, so they have no pinned version: pyproject.toml says why.
UNPINNED = {"trackio", "mlflow"}

TEXT = {"type": "string", "minLength": 1}
PEOPLE = {
    "type": "array",
    "minItems": 1,
    "items": {
        "oneOf": [
            {"required": ["name"], "properties": {"name": TEXT}},
            {
                "required": ["family-names", "given-names"],
                "properties": {"family-names": TEXT, "given-names": TEXT},
            },
        ]
    },
}
# What version 1.2.0 of the Citation File Format demands, of the fields that are used here.
CITATION = {
    "type": "object",
    "required": ["cff-version", "message", "title", "authors", "version", "license"],
    "additionalProperties": False,
    "properties": {
        "cff-version": {"const": "1.2.0"},
        "message": TEXT,
        "title": TEXT,
        "abstract": TEXT,
        "type": {"enum": ["software", "dataset"]},
        "version": TEXT,
        "license": TEXT,
        "authors": PEOPLE,
        "keywords": {"type": "array", "items": TEXT, "uniqueItems": True},
        "references": {
            "type": "array",
            "items": {
                "required": ["type", "title", "authors", "year"],
                "additionalProperties": False,
                "properties": {
                    "type": {"enum": ["article", "conference-paper", "software"]},
                    "title": TEXT,
                    "authors": PEOPLE,
                    "year": {"type": "integer"},
                    "doi": {"type": "string", "pattern": r"^10\.\d{4,9}(\.\d+)?/[\w./:;()-]+$"},
                    "conference": {"type": "object", "required": ["name"]},
                },
            },
        },
    },
}


def requirements(extra: str) -> list[Requirement]:
    """The packages of an extra; of another extra within it, that one's."""
    found = []
    for each in map(Requirement, EXTRAS[extra]):
        if each.name == PROJECT["name"]:
            found += [r for inner in sorted(each.extras) for r in requirements(inner)]
        else:
            found.append(each)
    return found


def named_extras() -> dict[str, str]:
    """Each extra that an error or a page names -> one place that does."""
    found = {}
    for folder in ("dynamics", "probes"):
        for file in (ROOT / folder).rglob("*.py"):
            for node in ast.walk(ast.parse(file.read_text("utf-8"))):
                if (
                    not isinstance(node, ast.Call)
                    or getattr(node.func, "id", "") != "require_extra"
                ):
                    continue
                if isinstance(node.args[0], ast.Constant):
                    found[node.args[0].value] = f"{file.name}:{node.lineno}"
    texts = [*ROOT.glob("*.md"), *(ROOT / "docs").rglob("*.md"), *(ROOT / "notebooks").glob("*")]
    texts += [file for folder in ("dynamics", "probes") for file in (ROOT / folder).rglob("*.py")]
    for file in texts:
        if "generated" in file.parts:
            continue
        for names in re.findall(
            r"(?:learning-dynamics|pip install '?\.)\[([\w, -]+)\]", file.read_text("utf-8")
        ):
            found |= {name.strip(): file.name for name in names.split(",")}
    return found


def test_every_extra_that_is_named_exists():
    named = named_extras()
    assert {"relora", "remote", "lightning", "gguf"} <= named.keys()
    assert {name: place for name, place in named.items() if name not in EXTRAS} == {}


@pytest.mark.parametrize("extra", sorted(EXTRAS))
def test_the_pinned_versions_are_within_the_ranges_of_an_extra(extra):
    for each in requirements(extra):
        version = PINNED.get(canonicalize_name(each.name))
        if version is None:
            assert extra in UNPINNED, f"constraints.txt has no {each.name}"
        else:
            assert each.specifier.contains(version, prereleases=True), f"{each}: {version}"
            assert list(each.specifier), f"{each.name}: no range"


def test_the_pinned_versions_are_within_the_ranges_of_the_dependencies():
    for each in map(Requirement, PROJECT["dependencies"]):
        if each.name != "torch":  # the one of the machine, see CONTRIBUTING.md
            assert each.specifier.contains(PINNED[canonicalize_name(each.name)]), str(each)


def test_the_citation_is_valid_and_that_of_this_version():
    citation = yaml.safe_load((ROOT / "CITATION.cff").read_text("utf-8"))
    jsonschema.validate(citation, CITATION)
    assert citation["title"] == PROJECT["name"]
    assert citation["version"] == PROJECT["version"]
    assert citation["license"] == PROJECT["license"]
    assert citation["keywords"] == PROJECT["keywords"]


def test_the_changelog_begins_with_this_version():
    headings = re.findall(r"^## (\S+)", (ROOT / "CHANGELOG.md").read_text("utf-8"), re.MULTILINE)
    assert headings[0] == PROJECT["version"]


@pytest.fixture(scope="module")
def built(tmp_path_factory):
    """The folder of a source archive and of the wheel that was built from it."""
    pytest.importorskip("build", reason="needs build, of the extra dev")
    pytest.importorskip("hatchling", reason="needs hatchling, of the extra dev")
    folder = tmp_path_factory.mktemp("dist")
    command = [sys.executable, "-m", "build", "--no-isolation", "--outdir", str(folder), str(ROOT)]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    return folder


@pytest.mark.slow
def test_the_source_archive_is_whole(built):
    (archive,) = built.glob("*.tar.gz")
    with tarfile.open(archive) as file:
        names = {name.partition("/")[2] for name in file.getnames()}
    tracked = subprocess.run(
        ["git", "ls-files"], cwd=ROOT, capture_output=True, text=True, check=True
    ).stdout.split()
    assert {name for name in tracked if not name.startswith(".")} <= names


@pytest.mark.slow
def test_the_wheel_works_where_nothing_else_of_the_project_is(built, tmp_path):
    (wheel,) = built.glob("*.whl")
    with zipfile.ZipFile(wheel) as file:
        names = set(file.namelist())
    assert {name.partition("/")[0] for name in names if ".dist-info/" not in name} == {
        "dynamics",
        "probes",
    }
    python = tmp_path / "venv/bin/python"
    subprocess.run([sys.executable, "-m", "venv", "--without-pip", tmp_path / "venv"], check=True)
    install = ["--python", python, "install", "--no-deps", "--no-index", "--quiet", wheel]
    subprocess.run([sys.executable, "-m", "pip", *install], check=True)
    # The dependencies of this environment, but not its editable installation of the project.
    purelib = [path for path in sys.path if path.endswith("site-packages")]
    (site,) = (tmp_path / "venv").glob("lib/*/site-packages")
    (site / "of_others.pth").write_text("\n".join(purelib))
    environment = {key: value for key, value in os.environ.items() if key != "PYTHONPATH"}

    def output(*command):
        done = subprocess.run(
            command, cwd=tmp_path, env=environment, capture_output=True, text=True
        )
        assert done.returncode == 0, done.stderr
        return done.stdout

    code = (
        "import dynamics, probes; print(dynamics.__file__); print(probes.__file__);"
        "print(dynamics.load_example('relora_micro').sizes['run'])"
    )
    *files, runs = output(python, "-c", code).split()
    assert all(file.startswith(str(site)) for file in files)
    assert runs == "12"
    dynamics = tmp_path / "venv/bin/dynamics"
    assert output(dynamics, "--version").strip() == f"dynamics {PROJECT['version']}"
    assert "effective_rank" in output(dynamics, "list", "metrics")
