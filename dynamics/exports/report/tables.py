"""Tables of a report as HTML. Every text is escaped: names of runs and matrices hold anything."""

from collections.abc import Iterable, Sequence
from html import escape

Cell = str | tuple[str, str]  # a text; or a text and a class of report.css


def table(
    caption: str, columns: Sequence[str], rows: Iterable[Sequence[Cell]], *, wide: bool = False
) -> str:
    """A table that report.js makes sortable, with buttons that copy it.

    Args:
        caption: what is in it, for people who cannot see it.
        columns: the headings.
        rows: the cells of each.
        wide: whether texts may take all the width that they need.
    """
    heads = "".join(f'<th scope="col">{escape(each)}</th>' for each in columns)
    body = "".join(f"<tr>{''.join(map(_cell, row))}</tr>" for row in rows)
    css = "table wide" if wide else "table"
    return (
        f'<div class="{css}"><div class="scroll" tabindex="0" role="region" '
        f'aria-label="{escape(caption)}"><table><caption>{escape(caption)}</caption>'
        f"<thead><tr>{heads}</tr></thead><tbody>{body}</tbody></table></div></div>"
    )


def _cell(cell: Cell) -> str:
    text, css = (cell, "") if isinstance(cell, str) else cell
    return f'<td class="{escape(css)}">{escape(text)}</td>' if css else f"<td>{escape(text)}</td>"


def pairs(rows: Iterable[tuple[str, str]]) -> str:
    """A list of terms, each with its text."""
    listed = "".join(f"<dt>{escape(name)}</dt><dd>{escape(text)}</dd>" for name, text in rows)
    return f"<dl>{listed}</dl>"


def folded(summary: str, content: str) -> str:
    """HTML that is shown when one asks for it, under a line of text."""
    return f"<details><summary>{escape(summary)}</summary>{content}</details>"


def paragraph(text: str, css: str = "") -> str:
    """A paragraph of text."""
    return f'<p class="{escape(css)}">{escape(text)}</p>' if css else f"<p>{escape(text)}</p>"
