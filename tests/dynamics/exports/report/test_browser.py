"""The report in a real browser: it draws, is walked by keyboard, prints, and excludes nobody."""

import json

import numpy as np
import pytest
from scipy import stats

import dynamics as dy
from tests.dynamics.exports.report.conftest import made_by_hand
from tests.dynamics.exports.report.test_page import NASTY

pytestmark = pytest.mark.slow

LINES = """cells => cells.map(cell => {
  const range = document.createRange();
  range.selectNodeContents(cell);
  return range.getClientRects().length;
})"""


def draw_all(page):
    """Scroll through the page, so that every chart is drawn."""
    for figure in page.locator("figure").all():
        figure.scroll_into_view_if_needed()
    page.wait_for_selector(".plot:empty", state="detached")


def said(page, figure):
    return page.locator(f"#{figure} output").first.inner_text()


@pytest.mark.parametrize("width", [1280, 390])
@pytest.mark.parametrize("dark", [False, True], ids=["light", "dark"])
def test_nothing_serious_for_axe_and_nothing_wider_than_the_screen(show, example_page, width, dark):
    axe = pytest.importorskip("axe_playwright_python.sync_playwright", reason="needs axe")
    with show(example_page, width=width, dark=dark) as page:
        draw_all(page)
        if dark == (width == 390):  # twice is enough for what is folded
            page.evaluate("document.querySelectorAll('details').forEach(e => (e.open = true))")
        page.locator("#staircase .plot").focus()
        page.keyboard.press("ArrowLeft")  # with a tip
        tip = page.locator("#staircase [aria-label=tip] path").first
        assert tip.evaluate("e => getComputedStyle(e).fill") == page.evaluate(
            "getComputedStyle(document.body).backgroundColor"
        )
        found = axe.Axe().run(page, options={"resultTypes": ["violations"]}).response["violations"]
        assert [
            (e["id"], e["nodes"][0]["html"][:200])
            for e in found
            if e["impact"] in ("serious", "critical")
        ] == []
        assert page.evaluate("document.documentElement.scrollWidth") <= width
        background = page.evaluate("getComputedStyle(document.body).backgroundColor")
        assert (background == "rgb(255, 255, 255)") is not dark


def test_four_pictures_are_on_the_first_screen_and_the_rest_waits(show, example_page):
    with show(example_page) as page:
        assert page.locator(".sentences li").count() == 5
        assert page.locator("#charts figure svg").count() >= 2
        assert page.locator("#spectra-figure svg").count() == 0
        draw_all(page)
        assert page.locator("#charts figure").count() == 4
        assert page.locator("#spectra-figure svg").count() == 1
        assert "lora" in page.locator("#staircase svg").text_content()


def test_the_keyboard_reads_the_numbers_of_the_result(show, example, example_page):
    relora = example.effective_rank.sel(kind="weight").isel(run=slice(3, 6))
    inside = example.layer.values >= 0
    inside &= example.component.values == "parameters"
    last = relora.isel(matrix=inside).mean("matrix").mean("run").values.astype(float)
    with show(example_page) as page:
        page.locator("#trajectories-figure").scroll_into_view_if_needed()
        page.locator("#trajectories-figure svg").wait_for()
        page.locator("#trajectories-figure .plot").focus()
        page.keyboard.press("ArrowDown")  # the second line
        page.keyboard.press("End")
        text = said(page, "trajectories-figure")
        assert text.startswith(f"relora, step 560: {last[-1]:.4g}"), text
        page.keyboard.press("ArrowLeft")
        assert said(page, "trajectories-figure").startswith(f"relora, step 540: {last[-2]:.4g}")
        assert page.locator("#trajectories-figure svg [aria-label=tip] text").count() >= 1
        page.keyboard.press("Home")
        assert "step 0:" in said(page, "trajectories-figure")
        page.locator("#where .plot").focus()
        page.keyboard.press("ArrowDown")
        page.keyboard.press("End")
        assert "layer 1, step 560:" in said(page, "where")


def test_condition_numbers_have_geometric_means(show, example, example_page):
    inside = (example.layer.values >= 0) & (example.component.values == "parameters")
    values = example.condition_number.sel(kind="weight").isel(run=slice(0, 3), matrix=inside)
    logs = np.log(values.isel(step=-1).values.astype(float)).mean(-1)
    low, high = np.exp(stats.t.interval(0.95, 2, loc=logs.mean(), scale=stats.sem(logs)))
    with show(example_page) as page:
        page.locator("#trajectories-figure").scroll_into_view_if_needed()
        page.locator("#trajectories-figure svg").wait_for()
        select = page.locator("#trajectories-figure select[name=metric]")
        select.select_option("condition_number")
        page.locator("#trajectories-figure .plot").focus()
        page.keyboard.press("End")
        text = said(page, "trajectories-figure")
        assert "Geometric mean of 28" in page.locator("#trajectories-figure .caption").inner_text()
    found = [float(x.strip("()")) for x in text.partition(": ")[2].replace(" to ", " ").split()]
    np.testing.assert_allclose(found, [np.exp(logs.mean()), low, high], rtol=1e-3)


def test_controls_work_by_keyboard_alone(show, example_page):
    with show(example_page) as page:
        draw_all(page)
        figure = page.locator("#trajectories-figure")
        page.locator("#trajectories-figure select[name=metric]").focus()
        page.keyboard.type("stable")
        assert "stable rank" in figure.locator("h3").inner_text().lower()
        page.keyboard.press("Tab")
        page.keyboard.type("upd")
        assert figure.locator("h3").inner_text() == "stable rank of the update"
        button = figure.locator(".toggles button", has_text="lora").last
        button.focus()
        lines = figure.locator("svg text", has_text="lora").count()
        page.keyboard.press("Space")
        pressed = page.evaluate("document.activeElement.getAttribute('aria-pressed')")
        assert pressed == "false"  # and the focus has stayed
        assert figure.locator("svg text", has_text="lora").count() < lines


def test_controls_work_by_mouse(show, example, example_page):
    with show(example_page) as page:
        draw_all(page)
        figure = page.locator("#trajectories-figure")
        figure.locator("select[name=lines]").select_option("layers")
        assert figure.locator("svg text", has_text="layer 3").count() == 1
        figure.locator("select[name=module]").select_option("q_proj")
        assert "Mean of 4 matrices" in figure.locator(".caption").inner_text()
        figure.get_by_label("log scale").check()
        figure.locator("select[name=metric]").select_option("logged:loss")
        assert figure.locator("h3").inner_text() == "loss"
        box = figure.locator("svg").bounding_box()
        page.mouse.move(box["x"] + box["width"] / 2, box["y"] + box["height"] / 2)
        for y in range(20, 300, 10):
            page.mouse.move(box["x"] + box["width"] / 2, box["y"] + y)
        assert "step" in said(page, "trajectories-figure")
        differences = page.locator("#differences-figure")
        differences.locator("select[name=baseline]").select_option(label="lora")
        assert differences.locator("h3").inner_text().endswith("less lora")


def test_differences_are_paired_and_their_intervals_are_those_of_the_library(
    show, example, example_page
):
    inside = (example.layer.values >= 0) & (example.component.values == "parameters")
    of_layers = example.isel(matrix=inside)[["effective_rank"]].sel(kind="weight").mean("matrix")
    paired = dy.difference(of_layers, baseline="full_rank-seed=0", pair="seed")
    last = dy.over(paired, "seed")["effective_rank"].isel(step=-1).sel(run="lora")
    mean, lower, upper = (float(last.sel(statistic=s)) for s in ("mean", "lower", "upper"))
    with show(example_page) as page:
        page.locator("#differences-figure").scroll_into_view_if_needed()
        page.locator("#differences-figure svg").wait_for()
        page.locator("#differences-figure .plot").focus()
        for _ in range(2):
            page.keyboard.press("ArrowDown")
        page.keyboard.press("End")
        text = said(page, "differences-figure").replace("−", "-")
    assert text.startswith("lora less full_rank, step 560: ")
    numbers = [float(x.strip("()")) for x in text.partition(": ")[2].replace(" to ", " ").split()]
    np.testing.assert_allclose(numbers, [mean, lower, upper], rtol=2e-3, atol=2e-3)


def test_tables_sort_and_copy_and_download(show, example_page):
    with show(example_page) as page:
        page.context.grant_permissions(["clipboard-read", "clipboard-write"])
        page.locator("#numbers-figure").scroll_into_view_if_needed()
        table = page.locator("#numbers-figure table")
        table.wait_for()
        head = table.locator("th", has_text="lora: change").last
        head.locator("button").press("Enter")
        assert head.get_attribute("aria-sort") == "ascending"
        column = head.evaluate("e => e.cellIndex")
        cells = table.locator(f"tbody tr td:nth-child({column + 1})")
        shown = [
            float(each) for each in cells.evaluate_all("c => c.map(e => e.dataset.value)") if each
        ]
        assert shown == sorted(shown)
        assert len(shown) > 20
        head.locator("button").click()
        assert head.get_attribute("aria-sort") == "descending"
        page.locator("#numbers-figure .tools button").first.press("Enter")
        page.wait_for_selector("#numbers-figure .tools output:not(:empty)")
        lines = page.evaluate("navigator.clipboard.readText()").splitlines()
        assert lines[0].split("\t")[:4] == ["matrix", "layer", "module", "shape"]
        assert len(lines) == len(shown) + 1
        assert float(lines[1].split("\t")[column]) == max(shown)
        with page.expect_download() as download:
            page.locator("#numbers-figure .tools button").last.click()
        text = download.value.path().read_text(encoding="utf-8")
        assert text.splitlines()[0].startswith("matrix,layer,module,shape")
        # Tables that are text, too.
        verdicts = page.locator("#verdicts .table").first
        verdicts.locator("th button").first.click()
        assert verdicts.locator("th").first.get_attribute("aria-sort") == "ascending"


def test_it_prints_dark_text_on_white_from_a_dark_screen(show, example_page, tmp_path):
    with show(example_page, dark=True) as page:
        page.emulate_media(media="print", color_scheme="dark")
        colours = page.evaluate(
            "['color', 'backgroundColor'].map(c => getComputedStyle(document.body)[c])"
        )
        assert colours == ["rgb(0, 0, 0)", "rgb(255, 255, 255)"]
        # What had not been in sight is drawn for the paper, as wide as that is.
        assert page.locator("#spectra-figure svg").count() == 0
        page.evaluate("dispatchEvent(new Event('beforeprint'))")
        drawn = page.locator("#spectra-figure svg")
        assert drawn.get_attribute("viewBox").split()[2] == "640"
        assert page.locator("#verdicts details").first.get_attribute("open") is not None
        page.set_viewport_size({"width": 700, "height": 990})  # A4 without its margins
        assert page.evaluate("document.documentElement.scrollWidth") <= 700
        table = page.locator("#numbers-figure table")
        assert table.evaluate("e => e.scrollWidth <= e.closest('figure').clientWidth")
        assert max(table.locator("td.number").evaluate_all(LINES)) == 1  # no number is broken
        page.set_viewport_size({"width": 1280, "height": 900})
        page.emulate_media(media="screen", color_scheme="dark")
        page.evaluate("dispatchEvent(new Event('afterprint'))")
        assert page.locator("#verdicts details").first.get_attribute("open") is None
        assert int(drawn.get_attribute("viewBox").split()[2]) > 1000
        printed = page.pdf(path=tmp_path / "report.pdf", format="A4")
        assert printed.startswith(b"%PDF")
        assert len(printed) > 100_000


def test_names_that_are_html_are_shown_as_text(show, tmp_path):
    result = made_by_hand(runs=(NASTY, "<img src=x onerror=alert(1)>"))
    names = result["matrix"].values.tolist()
    result = result.assign_coords(matrix=[NASTY, *names[1:]], module=("matrix", [NASTY] * 4))
    with show(dy.report(result, tmp_path / "nasty.html", title=NASTY)) as page:
        draw_all(page)
        assert page.locator("b").count() == 0
        assert page.locator("img").count() == 0
        assert page.locator("h1").inner_text() == NASTY
        assert NASTY in page.locator("#trajectories-figure .toggles").inner_text()


def test_a_thousand_steps_of_many_matrices_open(show, tmp_path):
    kinds = ("weight", "gradient", "update", "displacement")
    result = made_by_hand(steps=range(0, 10_000, 10), kinds=kinds, layers=43, k=24)
    for number in range(10):  # as many metrics as `analyze` has
        result[f"metric_{number}"] = result["effective_rank"] * np.random.default_rng(
            number
        ).random(result["effective_rank"].shape)
    assert result.sizes["matrix"] == 86
    path = dy.report(result, tmp_path / "large.html")
    assert path.stat().st_size < 5e6
    with show(path) as page:
        draw_all(page)
        assert "of 1,000 records" in page.locator("#left-out").inner_text()
        caption = page.locator("#spectra-figure .caption")
        assert "at step 9990" in caption.inner_text()
        page.locator("#spectra-figure input[type=range]").press("Home")
        assert "at step 0," in caption.inner_text()


@pytest.mark.parametrize("kinds", [("weight",), ("gradient",), ("adapter", "weight")])
def test_results_with_little_in_them_open(show, tmp_path, kinds):
    result = made_by_hand(kinds=kinds, steps=(7,))
    if kinds == ("weight",):
        result = result.drop_vars("singular_value")
    with show(dy.report(result, tmp_path / "little.html"), width=390) as page:
        draw_all(page)
        assert page.evaluate("document.documentElement.scrollWidth") <= 390


def test_a_report_that_follows_loads_anew_and_keeps_the_choices(show, tmp_path):
    from dynamics.exports.report.following import LivePage, serving
    from dynamics.exports.report.report import write_report

    live = LivePage()
    with serving(live, 0) as address:

        def make(steps):
            result = made_by_hand(steps=steps)
            live.show(write_report(result, tmp_path / "live.html", follow=live.next_version))

        make((0, 10))
        with show(address, offline=False) as page:
            page.locator("#trajectories-figure").scroll_into_view_if_needed()
            page.locator("#trajectories-figure select[name=lines]").select_option("layers")
            make((0, 10, 20))
            page.get_by_text("from step 0 to 20").wait_for(timeout=10_000)
            page.locator("#trajectories-figure").scroll_into_view_if_needed()
            page.locator("#trajectories-figure svg").wait_for()
            chosen = page.locator("#trajectories-figure select[name=lines]").input_value()
            assert chosen == "layers"
            assert json.loads(page.evaluate("sessionStorage.getItem('trajectories-figure')"))
