"""The page: sentences, figures and sections as one HTML document that needs nothing else."""

import json
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass
from html import escape
from importlib.metadata import version
from importlib.resources import files
from typing import Any

import xarray as xr

from dynamics import schema
from dynamics.exports.report.data import ChartData, chart_data
from dynamics.exports.report.runs import by_run, groups_of
from dynamics.exports.report.sections import left_out, provenance, verdicts
from dynamics.exports.report.sentences import LEARNED, Sentence, sentences_of
from dynamics.exports.report.tables import folded

_SCRIPTS = ("model.js", "charts.js", "figures.js", "tables.js", "report.js")
_LIBRARIES = ("d3.min.js", "plot.umd.min.js")
# Nothing but what stands in the file; `fetch` asks the server that the page is from, if any.
_POLICY = (
    "default-src 'none'; script-src 'unsafe-inline'; style-src 'unsafe-inline'; "
    "img-src data: blob:; connect-src 'self'; base-uri 'none'; form-action 'none'"
)
_HOW = {
    "trajectories": (
        "A line is a mean: over the matrices of the layers, and over runs that differ in their "
        "seed alone. The effective rank counts directions by their weight (Roy & Vetterli "
        "2007): it is k where all k singular values are equal, and 1 where one outweighs all "
        "others. A random initialisation is below its maximum already, so compare with the "
        "first record, not with the maximum. Ranks of matrices of different shapes are "
        "comparable only divided by what is possible: choose PER, or PER over that of a random "
        "matrix."
    ),
    "staircase": (
        "The displacement is the weight now less the weight at the first record. Its numerical "
        "rank counts the directions in which training has moved the weight by more than "
        "rounding could. An adapter of rank r can add r directions between two merges, so "
        "ReLoRA climbs by r at each merge, LoRA stays at r, and full-rank training uses all "
        "directions at once. A line below its bound (broad and pale) wastes directions: an "
        "adapter that is dead, or a merge that did not happen."
    ),
    "weights": (
        "A falling effective rank means that a few directions carry more and more of the "
        "weights. Small changes are normal: weight decay and large early steps change it, too. "
        "Bands tell whether seeds differ as much as methods do; the matrices of one run are no "
        "repetitions."
    ),
    "spectra": (
        "Each line shows the singular values of one matrix, the largest first. The dashed line "
        "is its noise floor: the largest singular value that rounding of the stored numbers can "
        "cause. Values below it (thin, shaded) say nothing about training. A cliff that ends "
        "above the floor is a true rank; a smooth line that sinks into the floor has a "
        "numerical rank that depends on the precision."
    ),
    "maps": (
        "Rows are layers, columns are records. All panels share one colour scale, so equal "
        "colours are equal numbers, also between runs. Grey was not measured, or is not "
        "defined, such as a difference at the first record."
    ),
    "differences": (
        "Every line is one group less the baseline. Where runs have the same seeds, they are "
        "subtracted seed by seed, which takes away what the seed has in common. With three "
        "seeds t is 4.3: intervals are wide, and that is honest."
    ),
    "numbers": (
        "One row for each matrix: the value at the first and at the last record that has one, "
        "and the change. Click a heading to sort; what is copied has four digits."
    ),
}


_SHARES = {
    "per_over_random": "1 for a random matrix",
    "proportional_effective_rank": "as a share of what is possible",
}


@dataclass(frozen=True)
class Figure:
    """A figure of the page, before there is a chart in it.

    Attributes:
        name: its id.
        chart: which function of figures.js draws it.
        title: "" where the chart gives it.
        how: the key of the text on how to read it.
        options: what is chosen at first.
        fixed: whether the reader cannot choose anything else.
    """

    name: str
    chart: str
    title: str
    how: str
    options: dict[str, Any]
    fixed: bool = False


def page(
    comparison: xr.Dataset,
    title: str,
    *,
    command: str | None = None,
    follow: str | None = None,
) -> str:
    """The whole HTML document.

    Args:
        comparison: a result with the dimension `run`, see `comparison_of`.
        title: the heading.
        command: the command line that makes the report, if any.
        follow: the version of the page, where a server shows newer ones.
    """
    data = chart_data(comparison)
    sentences = "".join(map(_sentence, sentences_of(comparison)))
    firsts = "".join(map(_figure, _first_figures(comparison, data)))
    sections = "".join(_sections(comparison, data, command))
    runs = comparison.sizes[schema.RUN]
    subtitle = (
        f"{runs} run{'s' if runs > 1 else ''}, made by learning-dynamics "
        f"{version('learning-dynamics')}. Everything is in this file; nothing is fetched."
    )
    live = '<p id="live" class="note" role="status">Follows the run; loads anew by itself.</p>'
    scripts = "".join(f"<script>{_static(each)}</script>" for each in (*_LIBRARIES, *_SCRIPTS))
    return f"""<!DOCTYPE html>
<html lang="en"{f' data-follow="{escape(follow)}"' if follow else ""}>
<head>
<meta charset="utf-8">
<meta http-equiv="Content-Security-Policy" content="{_POLICY}">
<meta name="viewport" content="width=device-width, initial-scale=1">
<meta name="color-scheme" content="light dark">
<title>{escape(title)}</title>
<style>{_static("report.css")}</style>
</head>
<body>
<header>
<a class="skip" href="#charts">Skip to the charts</a>
<h1>{escape(title)}</h1>
<p class="subtitle">{escape(subtitle)}</p>
{live if follow else ""}
</header>
<main>
<section aria-label="At a glance">
<h2 class="unseen">At a glance</h2>
<ul class="sentences">{sentences}</ul>
<noscript><p class="warning">Charts need JavaScript; sentences and verdicts do not.</p></noscript>
<div class="charts" id="charts">{firsts}</div>
</section>
<nav aria-label="Parts of the report">{"".join(_links(comparison))}</nav>
{sections}
<footer>Charts: Observable Plot and d3 (ISC licence, texts in the source of this page).</footer>
</main>
<script type="application/octet-stream" id="data">{data.encoded()}</script>
<!-- {_static("licences.txt").replace("--", "- -")} -->
{scripts}
</body>
</html>
"""


def _static(name: str) -> str:
    text = (files("dynamics.exports.report") / "static" / name).read_text(encoding="utf-8")
    # A script ends where this stands, even within a string.
    return text.replace("</script", "<\\/script") if name.endswith(".js") else text


def _sentence(sentence: Sentence) -> str:
    return (
        f'<li class="{sentence.tone}"><strong>{escape(sentence.question)}</strong> '
        f"{escape(sentence.text)}</li>"
    )


def _links(comparison: xr.Dataset) -> Iterator[str]:
    for name, (heading, _) in _parts(comparison).items():
        yield f'<a href="#{name}">{heading}</a>'


def _parts(comparison: xr.Dataset) -> dict[str, tuple[str, str]]:
    """Name -> heading and chart of the sections with figures; "" for those that are text."""
    parts = {
        "trajectories": ("Trajectories", "trajectories"),
        "differences": ("Differences between runs", "differences"),
        "maps": ("Layer by step", "maps"),
        "spectra": ("Spectra", "spectra"),
        "numbers": ("Numbers", "numbers"),
        "verdicts": ("Verdicts", ""),
        "left-out": ("What was left out", ""),
        "provenance": ("Where the numbers are from", ""),
    }
    if len(groups_of(comparison)) < 2:
        del parts["differences"]
    return parts


def _sections(comparison: xr.Dataset, data: ChartData, command: str | None) -> Iterator[str]:
    texts = {
        "verdicts": verdicts(comparison),
        "left-out": left_out(comparison, data.omitted),
        "provenance": provenance(comparison, command),
    }
    options = {
        "trajectories": {"metric": "effective_rank", "kind": schema.WEIGHT, "module": ""},
        "differences": {"metric": "effective_rank", "kind": schema.WEIGHT, "module": ""},
        "maps": {"metric": "effective_rank", "kind": schema.WEIGHT, "module": "", "run": "all"},
        "spectra": _spectrum(data),
        "numbers": {"metric": "effective_rank", "kind": schema.WEIGHT},
    }
    for name, (heading, chart) in _parts(comparison).items():
        if name == "spectra" and not data.document["spectra"]:
            continue
        inner = (
            texts[name]
            if not chart
            else _figure(Figure(f"{name}-figure", chart, "", name, options[name]))
        )
        yield f'<section id="{name}" aria-label="{heading}"><h2>{heading}</h2>{inner}</section>'


def _first_figures(comparison: xr.Dataset, data: ChartData) -> Iterator[Figure]:
    """The four pictures of the first screen, as far as the result has them."""
    mean = {"lines": "runs"} if comparison.sizes[schema.RUN] == 1 else {}
    learned = next((k for k in LEARNED if _has(data, "numerical_rank", k)), None)
    if learned:
        yield Figure(
            "staircase", "trajectories", f"{LEARNED[learned]}: its directions", "staircase",
            {"metric": "numerical_rank", "kind": learned, "module": "", **mean}, fixed=True,
        )  # fmt: skip
    weights = next(
        (k for k in (schema.WEIGHT, schema.BASE) if _has(data, "effective_rank", k)), None
    )
    if weights:
        metric, title = "effective_rank", "Effective rank of the weights"
        if mean:  # the modules of one run have different sizes: as shares, they share an axis
            shares = ("per_over_random", "proportional_effective_rank", metric)
            metric = next(each for each in shares if _has(data, each, weights))
            title += f", {_SHARES[metric]}" if metric in _SHARES else ""
        yield Figure(
            "weights", "trajectories", title, "weights",
            {"metric": metric, "kind": weights, "module": ""}, fixed=True,
        )  # fmt: skip
    if data.document["spectra"]:
        yield Figure(
            "spectrum", "spectra", "One spectrum, and what is rounding", "spectra",
            _spectrum(data), fixed=True,
        )  # fmt: skip
    kind = next((k for k in (learned, weights) if k and _has(data, "effective_rank", k)), None)
    if kind:
        yield Figure(
            "where", "maps", f"Where: effective rank of the {kind}, layer by step", "maps",
            {"metric": "effective_rank", "kind": kind, "module": "",
             "run": _typical_run(comparison, data, kind)}, fixed=True,
        )  # fmt: skip


def _has(data: ChartData, metric: str, kind: str) -> bool:
    kinds = [each["name"] for each in data.document["kinds"]]
    if metric not in data.document["values"] or kind not in kinds:
        return False
    return any(of_run[kinds.index(kind)] for of_run in data.document["values"][metric])


def _typical_run(comparison: xr.Dataset, data: ChartData, kind: str) -> str:
    """The position of the first run with merges, or of the first run that has the kind."""
    k = [each["name"] for each in data.document["kinds"]].index(kind)
    having = [r for r, each in enumerate(data.document["values"]["effective_rank"]) if each[k]]
    events = list(by_run(comparison, "events").values())
    merged = [r for r in having if any(e["kind"] == schema.MERGE for e in events[r] or ())]
    return str((merged or having)[0])


def _spectrum(data: ChartData) -> dict[str, Any]:
    """The kind and matrix whose spectrum is shown first: what training changed in most runs."""
    kinds = [each["name"] for each in data.document["kinds"]]
    offered = data.document["spectra"]
    if not offered:
        return {}
    order = [*(each for each in LEARNED if each in kinds), *kinds]
    kind = next(k for k in order if any(kinds[each["kind"]] == k for each in offered))
    of_kind = [each["matrix"] for each in offered if kinds[each["kind"]] == kind]
    inside = {each["name"] for each in data.document["rows"] if each["inside"]}
    runs = Counter(each for each in of_kind if each in inside) or Counter(of_kind)
    names = [name for name, count in runs.items() if count == max(runs.values())]
    return {"kind": kind, "matrix": names[len(names) // 2]}


def _figure(figure: Figure) -> str:
    title = f"<h3>{escape(figure.title)}</h3>" if figure.title else "<h3 data-title>&nbsp;</h3>"
    if figure.chart == "numbers":
        title = ""
    plot = (
        '<div class="numbers"></div>'
        if figure.chart == "numbers"
        else '<div class="plot" tabindex="0" role="application" aria-roledescription="chart" '
        'aria-label="Chart"></div><output aria-live="polite"></output><p class="caption"></p>'
    )
    how = folded("How to read this", f"<p>{escape(_HOW[figure.how])}</p>")
    fixed = " data-fixed" if figure.fixed else ""
    return (
        f'<figure id="{figure.name}" data-chart="{figure.chart}" '
        f'data-options="{escape(json.dumps(figure.options))}"{fixed}>'
        f'{title}<div class="controls"></div>{plot}{how}</figure>'
    )
