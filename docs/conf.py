"""The documentation site: `make docs` writes docs/_build/html, without a network.

The pages are the Markdown files of this folder. What the code knows is written anew for each build,
into docs/generated: the public names, the commands, and copies of the notebooks, of the changelog
and of the guide for contributors.
"""

import re
import subprocess
import sys
import tomllib
from importlib import import_module
from pathlib import Path

DOCS = Path(__file__).parent
ROOT = DOCS.parent
GENERATED = DOCS / "generated"
sys.path.insert(0, str(ROOT))  # this code, whatever else is installed

PACKAGES = {
    "dynamics": "Reads, measures, compares, audits and draws runs.",
    "dynamics.metrics": "Metrics as functions of singular values.",
    "dynamics.spectra.random_matrices": "What a matrix of independent entries has.",
    "probes": "Records a training run.",
    "probes.frameworks.hf_trainer": "Records in the Trainer of Hugging Face.",
    "probes.frameworks.lightning": "Records in Lightning.",
    "probes.checks": "Measures what a merge or a reset did, while it happens.",
    "probes.relora": "ReLoRA, and the reference experiment.",
}
COMMANDS = {"dynamics": "dynamics.cli.app", "python -m probes.relora": "probes.relora.__main__"}

project = "learning-dynamics"
author = project
release = tomllib.loads((ROOT / "pyproject.toml").read_text("utf-8"))["project"]["version"]

extensions = ["myst_nb", "sphinx.ext.autodoc", "sphinx.ext.napoleon"]
exclude_patterns = ["_build"]
html_theme = "furo"
html_title = f"{project} {release}"

html_show_copyright = False
smartquotes = False  # -- begins an option

myst_heading_anchors = 4
default_role = "py:obj"  # `name` in a docstring is a link wherever there is such a name
autodoc_typehints = "description"
autodoc_typehints_description_target = "documented"
autodoc_member_order = "bysource"

nb_execution_mode = "cache"  # a notebook runs again only after it was changed
nb_execution_excludepatterns = ["*hub*"]  # it needs the network
nb_execution_timeout = 300
nb_execution_raise_on_error = True
nb_execution_cache_path = str(DOCS / "_build" / "notebooks")
nb_merge_streams = True


def public_names(package: object) -> list[str]:
    """The public names of a module, in its own order."""
    own = [
        name
        for name, value in vars(package).items()
        if not name.startswith("_") and getattr(value, "__module__", None) == package.__name__
    ]
    return getattr(package, "__all__", own)


def api_page() -> str:
    """Every public function and class, from its docstring."""
    lines = ["# Functions and classes", ""]
    for name, what in PACKAGES.items():
        lines += [f"## {name}", "", what, "", "```{eval-rst}"]
        package = import_module(name)
        for each in public_names(package):
            value = getattr(package, each)
            if isinstance(value, type):
                lines += [f".. autoclass:: {name}.{each}", "   :members:", ""]
            elif callable(value):
                lines += [f".. autofunction:: {name}.{each}", ""]
            else:
                keys = ", ".join(f"``{key}``" for key in value)
                lines += [f".. py:data:: {name}.{each}", "", f"   A dict: {keys}.", ""]
        lines += ["```", ""]
    return "\n".join(lines)


def commands_page() -> str:
    """Every command and its options, as its `--help` shows them."""
    parts = ["# Command line\n"]
    for name, module in COMMANDS.items():
        command = [sys.executable, "-m", "typer", module, "utils", "docs", "--name", name]
        done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True)
        text = done.stdout.replace("\n#", "\n##").replace("# `", "## `", 1)
        # The list of commands, with half sentences: they follow whole.
        text = re.sub(r"\*\*Commands\*\*:\n\n(\* .*\n)+", "", text)
        # Examples are one command in each paragraph.
        text = re.sub(
            r"^ *((?:dynamics|python -m) .+)$", r"```console\n$ \1\n```", text, flags=re.M
        )
        parts.append(text)
    return "\n".join(parts)


def write_generated(*_: object) -> None:
    """Write docs/generated; a file whose content stays the same is left alone."""
    pages = {
        "api.md": api_page(),
        "commands.md": commands_page(),
        "changelog.md": (ROOT / "CHANGELOG.md").read_text("utf-8"),
        "contributing.md": (ROOT / "CONTRIBUTING.md")
        .read_text("utf-8")
        .replace("](docs/", "](../"),
    }
    for notebook in sorted((ROOT / "notebooks").glob("*.ipynb")):
        pages[notebook.name] = notebook.read_text("utf-8")
    GENERATED.mkdir(exist_ok=True)
    for old in GENERATED.iterdir():
        if old.name not in pages:
            old.unlink()
    for name, text in pages.items():
        file = GENERATED / name
        if not file.exists() or file.read_text("utf-8") != text:
            file.write_text(text, "utf-8")


def as_prose(app: object, what: str, name: str, of: object, options: object, lines: list) -> None:
    """Docstrings are written as prose: stars and bars in them are no reStructuredText."""

    def escaped(match: re.Match[str]) -> str:
        code, after, sign = match.groups()
        if sign:
            return f"\\{sign}"
        return f"{code}\\ {after}" if after else code

    for number, line in enumerate(lines):
        if not line.lstrip().startswith((">>>", "...")):
            lines[number] = re.sub(r"(``?[^`]+``?)(\w)?|([*|])", escaped, line)


def with_titles(app: object, name: str, source: list[str]) -> None:
    """A link that shows the name of a file, as on GitHub, shows the title of the page here."""
    source[0] = re.sub(r"\[(?:[\w./-]+/)?\w+\.md\]\(", "[](", source[0])


def setup(app: object) -> None:
    """Called by Sphinx."""
    app.connect("config-inited", write_generated)
    app.connect("source-read", with_titles)
    app.connect("autodoc-process-docstring", as_prose, priority=400)  # before napoleon
