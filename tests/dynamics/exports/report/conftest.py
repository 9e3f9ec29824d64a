"""The example's report, results made by hand, and a browser that shows pages."""

import json
import shutil
from contextlib import contextmanager

import numpy as np
import pytest
import xarray as xr

import dynamics as dy
from dynamics import schema
from dynamics.schema import Status

CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser")
FLAGS = [
    "--no-sandbox",
    "--disable-gpu",
    "--disable-quic",
    "--no-first-run",
    "--disable-background-networking",
    "--disable-component-update",
    "--disable-sync",
]


@pytest.fixture(scope="session")
def example():
    """The comparison of twelve runs that comes with the package; do not change it."""
    return dy.load_example("relora_micro")


@pytest.fixture(scope="session")
def example_page(example, tmp_path_factory):
    """The file of its report."""
    return dy.report(example, tmp_path_factory.mktemp("report") / "example.html")


def made_by_hand(*, runs=("a",), steps=(0, 10), kinds=("weight", "displacement"), layers=2, k=4):
    """A result with random spectra: (run, kind, step, matrix, index)."""
    rng = np.random.default_rng(0)
    names = [f"model.layers.{i}.{m}.weight" for i in range(layers) for m in ("q_proj", "up_proj")]
    shape = (len(runs), len(kinds), len(steps), len(names))
    dims = (schema.RUN, schema.KIND, schema.STEP, schema.MATRIX)
    s = -np.sort(-rng.random((*shape, k)), axis=-1) + 0.5
    p = s / s.sum(-1, keepdims=True)
    values = {
        "effective_rank": np.exp(-(p * np.log(p)).sum(-1)),
        "numerical_rank": np.full(shape, float(k)),
        "rank_bound": np.full(shape, float(k)),
        schema.NOISE_FLOOR: np.full(shape, 1e-6),
    }
    return xr.Dataset(
        {name: (dims, each) for name, each in values.items()}
        | {
            schema.STATUS: (dims, np.full(shape, int(Status.MEASURED), dtype=np.int8)),
            schema.SINGULAR_VALUE: ((*dims, schema.INDEX), s),
        },
        coords={
            schema.RUN: list(runs),
            schema.KIND: list(kinds),
            schema.STEP: list(steps),
            schema.MATRIX: names,
            schema.INDEX: np.arange(k),
            "component": (schema.MATRIX, ["parameters"] * len(names)),
            "layer": (schema.MATRIX, [i for i in range(layers) for _ in range(2)]),
            "module": (schema.MATRIX, ["q_proj", "up_proj"] * layers),
            "rows": (schema.MATRIX, [k] * len(names)),
            "cols": (schema.MATRIX, [2 * k] * len(names)),
        },
        attrs={"events": json.dumps({run: [] for run in runs})},
    )


@pytest.fixture(scope="module")
def browser():
    """Chromium of this machine, without a window.

    Not for the whole session: while playwright runs, nothing else can run asyncio in this thread.
    """
    if CHROMIUM is None:
        pytest.skip("needs chromium (apt-get install chromium)")
    playwright = pytest.importorskip("playwright.sync_api", reason="needs playwright")
    with playwright.sync_playwright() as started:
        browser = started.chromium.launch(executable_path=CHROMIUM, args=FLAGS)
        yield browser
        browser.close()


@pytest.fixture
def show(browser):
    """show(file or URL, width=1280, dark=False): a page in the browser, drawn; watched.

    Whatever it asks the network for, and whatever its console says, fails the test.
    """
    complaints = []

    @contextmanager
    def shown(where, *, width=1280, height=900, dark=False, offline=True):
        context = browser.new_context(
            viewport={"width": width, "height": height},
            color_scheme="dark" if dark else "light",
            offline=offline,
            accept_downloads=True,
        )
        try:
            page = context.new_page()
            page.on("console", lambda message: complaints.append(message.text))
            page.on("pageerror", lambda error: complaints.append(str(error)))
            page.on("request", lambda request: requests.append(request.url))
            address = where if str(where).startswith("http") else where.as_uri()
            page.goto(address)
            page.wait_for_selector("html[data-drawn]")
            yield page
        finally:
            context.close()

    requests = []
    yield shown
    assert complaints == []
    fetched = [each for each in requests if not each.startswith(("file://", "http://127.0.0.1"))]
    assert [each for each in fetched if not each.startswith(("data:", "blob:"))] == []
