"""The worked examples of docs/architecture.md, applied to a copy of the code word for word."""

import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
_BLOCK = re.compile(
    r"^```python\n# (?P<place>[^\n]+)\n(?P<code>.*?)^```$", re.MULTILINE | re.DOTALL
)
_AFTER = re.compile(r'(?P<file>\S+), after "(?P<line>.+)"')
_ROW = re.compile(r"(?P<file>\S+), a row of (?P<table>\w+)")


def apply(place: str, code: str, root: Path) -> Path:
    """Make one change that the page asks for; returns the file."""
    if match := _AFTER.fullmatch(place) or _ROW.fullmatch(place):
        file = root / match["file"]
        lines = file.read_text().splitlines(keepends=True)
        if match.re is _AFTER:
            (index,) = [i for i, line in enumerate(lines, 1) if line.rstrip("\n") == match["line"]]
        else:
            (table,) = [
                i for i, line in enumerate(lines) if re.match(rf"{match['table']}\b.*=", line)
            ]
            index = next(i for i in range(table, len(lines)) if lines[i] in ("}\n", ")\n"))
        file.write_text("".join([*lines[:index], code, *lines[index:]]))
    elif place.endswith(", at the end"):
        file = root / place.removesuffix(", at the end")
        file.write_text(file.read_text() + "\n\n" + code)
    else:
        file = root / place
        assert not file.exists()
        file.write_text(code)
    return file


@pytest.fixture(scope="module")
def changed(tmp_path_factory):
    """A copy of the code with all changes of the page, and the files that were touched."""
    root = tmp_path_factory.mktemp("copy")
    for folder in ("dynamics", "probes", "tests"):
        shutil.copytree(
            ROOT / folder, root / folder, ignore=shutil.ignore_patterns("__pycache__", "*.zip")
        )
    shutil.copy(ROOT / "pyproject.toml", root)
    text = (ROOT / "docs/architecture.md").read_text(encoding="utf-8")
    return root, [apply(block["place"], block["code"], root) for block in _BLOCK.finditer(text)]


@pytest.mark.slow
def test_the_changed_code_passes_the_tests_that_came_with_it(changed):
    root, files = changed
    tests = sorted({str(each.relative_to(root)) for each in files if "tests" in each.parts})
    assert len(tests) == 3, tests
    added = ("participation_ratio", "dot_weights", "begin_end")
    command = [sys.executable, "-m", "pytest", "-p", "no:cacheprovider", "-rp"]
    command += ["-k", " or ".join(added), *tests]
    done = subprocess.run(command, cwd=root, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-1000:]
    passed = [line for line in done.stdout.splitlines() if line.startswith("PASSED")]
    for each in added:
        assert any(each in line for line in passed), f"no test of {each} ran"


def test_the_additions_touch_few_files(changed):
    _, files = changed
    assert len({each for each in files if "metrics" in each.parts}) == 3
    assert len({each for each in files if "formats" in each.parts}) == 3
    assert len({each for each in files if "frameworks" in each.parts}) == 2


@pytest.mark.parametrize("tool", [["check", "--quiet"], ["format", "--check", "--quiet"]])
def test_the_additions_are_in_the_style_of_the_code(changed, tool):
    root, files = changed
    command = [sys.executable, "-m", "ruff", *tool, *map(str, files)]
    done = subprocess.run(command, cwd=root, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout
