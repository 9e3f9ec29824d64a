"""Terminal tables of evaluated checkpoints."""

import math
from collections.abc import Sequence
from typing import Any

from rich import box
from rich.markup import escape
from rich.table import Table

from probes.relora.evaluation.evaluate import Evaluated

_PARADIGMS, _DOMAINS = "paradigms", "domains"


def evaluation_tables(evaluated: Sequence[Evaluated]) -> list[Table]:
    """The totals of every checkpoint; then BLiMP by phenomenon and perplexity by domain."""
    tables = [_totals(evaluated)]
    for name, draw in ((_PARADIGMS, _phenomena), (_DOMAINS, _domains)):
        if chosen := [each for each in evaluated if name in each.details]:
            tables.append(draw(chosen[0], chosen[-1]))
    return tables


def _totals(evaluated: Sequence[Evaluated]) -> Table:
    by_step: dict[int, dict[str, float]] = {}
    for each in evaluated:
        by_step.setdefault(each.step, {}).update(each.scalars)
    known = ("validation_loss", "perplexity", "mean_text_perplexity", "blimp", "blimp_ties")
    names = [name for name in known if any(name in scalars for scalars in by_step.values())]
    table = Table(title="Evaluated checkpoints", box=box.SIMPLE_HEAD, title_justify="left")
    for name in ("step", *names):
        table.add_column(name.replace("_", " "), justify="right")
    for step, scalars in sorted(by_step.items()):
        table.add_row(str(step), *(_number(scalars.get(name)) for name in names))
    return table


def _phenomena(first: Evaluated, last: Evaluated) -> Table:
    """First → last accuracy of each phenomenon and field; pairs and ties of the last."""
    paradigms = last.details[_PARADIGMS]
    table = Table(
        title=f"BLiMP, {len(paradigms)} paradigms, step {_span(first, last)}",
        box=box.SIMPLE_HEAD,
        title_justify="left",
    )
    table.add_column("field, phenomenon")
    for name in ("accuracy", "pairs", "ties"):
        table.add_column(name, justify="right")
    for grouping in ("field", "phenomenon"):
        for group in sorted({each[grouping] for each in paradigms.values()}):
            members = [each for each in paradigms.values() if each[grouping] == group]
            table.add_row(escape(group), *_row(first, last, f"blimp_{group}", members))
        table.add_section()
    table.add_row("mean over paradigms", *_row(first, last, "blimp", list(paradigms.values())))
    return table


def _row(
    first: Evaluated, last: Evaluated, name: str, members: list[dict[str, Any]]
) -> tuple[str, ...]:
    pairs = sum(each["pairs"] for each in members)
    ties = sum(len(each["tied"]) for each in members)
    return _change(first, last, name), str(pairs), str(ties)


def _domains(first: Evaluated, last: Evaluated) -> Table:
    table = Table(
        title=f"Perplexity, step {_span(first, last)}", box=box.SIMPLE_HEAD, title_justify="left"
    )
    table.add_column("domain")
    for name in ("per token", "mean over texts", "texts", "tokens", "cut", "too short"):
        table.add_column(name, justify="right")
    domains = last.details[_DOMAINS]
    for name, counts in domains.items():
        table.add_row(
            escape(name),
            _change(first, last, f"perplexity_{name}"),
            _change(first, last, f"mean_text_perplexity_{name}"),
            *(str(counts[key]) for key in ("texts", "tokens", "cut", "too_short")),
        )
    if len(domains) > 1:
        table.add_section()
        table.add_row(
            "all",
            _change(first, last, "perplexity"),
            _change(first, last, "mean_text_perplexity"),
            *(
                str(sum(counts[key] for counts in domains.values()))
                for key in ("texts", "tokens", "cut", "too_short")
            ),
        )
    return table


def _span(first: Evaluated, last: Evaluated) -> str:
    return str(last.step) if first.step == last.step else f"{first.step} → {last.step}"


def _change(first: Evaluated, last: Evaluated, name: str) -> str:
    values = [_number(each.scalars.get(name)) for each in (first, last)]
    return values[1] if first.step == last.step else " → ".join(values)


def _number(value: float | None) -> str:
    if value is None or math.isnan(value):
        return "-"
    return str(value) if isinstance(value, int) else f"{value:.4g}"
