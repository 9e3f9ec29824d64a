"""The documentation site is built without a warning, and it has everything that is public."""

import os
import re
import subprocess
import sys
from html.parser import HTMLParser
from importlib import import_module
from pathlib import Path
from urllib.parse import urlparse

import pytest
from typer.main import get_command

import dynamics
import dynamics.metrics
import probes
from dynamics.cli.app import app as dynamics_app

ROOT = Path(__file__).parents[2]


@pytest.fixture(scope="module")
def site(tmp_path_factory):
    """The folder of the site. Notebooks are not executed: tests/test_notebooks.py does this."""
    pytest.importorskip("sphinx", reason="needs the extra docs")
    pytest.importorskip("myst_nb", reason="needs the extra docs")
    folder = tmp_path_factory.mktemp("site")
    command = [
        sys.executable,
        "-m",
        "sphinx",
        "-W",
        "--keep-going",
        "-q",
        "-D",
        "nb_execution_mode=off",
    ]
    # A proxy that nobody answers: whatever wants a network fails.
    closed = dict.fromkeys(("http_proxy", "https_proxy", "HTTPS_PROXY"), "http://127.0.0.1:9")
    done = subprocess.run(
        [*command, "-d", str(folder / "doctrees"), str(ROOT / "docs"), str(folder / "html")],
        env=os.environ | closed, capture_output=True, text=True,
    )  # fmt: skip
    assert done.returncode == 0, done.stdout + done.stderr
    return folder / "html"


class Sources(HTMLParser):
    """What a page loads by itself."""

    def __init__(self):
        super().__init__()
        self.found = []

    def handle_starttag(self, tag, attrs):
        values = dict(attrs)
        if tag == "link" and values.get("rel") in ("stylesheet", "preload", "icon"):
            self.found.append(values["href"])
        elif tag in ("script", "img", "iframe") and values.get("src"):
            self.found.append(values["src"])


pytestmark = pytest.mark.slow


def test_every_public_name_and_command_is_there(site):
    relora_app = import_module("probes.relora.__main__").app
    api = (site / "generated/api.html").read_text("utf-8")
    anchors = set(re.findall(r'id="([\w.]+)"', api))
    for package in (dynamics, probes, import_module("probes.relora"), dynamics.metrics):
        missing = {f"{package.__name__}.{name}" for name in package.__all__} - anchors
        assert missing == set()
    page = (site / "generated/commands.html").read_text("utf-8")
    for app, program in ((dynamics_app, "dynamics"), (relora_app, "python-m-probes-relora")):
        for name in get_command(app).commands:
            assert f'id="{program}-{name}"' in page


def test_every_page_of_docs_is_in_a_toctree_and_in_the_search(site):
    pages = [
        page
        for page in (ROOT / "docs").rglob("*.md")
        if not {"_build", "generated"} & set(page.parts)
    ]
    index = (site / "searchindex.js").read_text("utf-8")
    for page in pages:
        name = str(page.relative_to(ROOT / "docs").with_suffix(""))
        assert (site / f"{name}.html").is_file()
        assert f'"{name}"' in index


def test_a_page_loads_nothing_from_a_network(site):
    for page in site.rglob("*.html"):
        parser = Sources()
        parser.feed(page.read_text("utf-8"))
        assert parser.found
        for source in parser.found:
            assert not urlparse(source).netloc, f"{page.name} loads {source}"
