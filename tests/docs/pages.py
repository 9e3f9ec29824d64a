"""Runs the Python blocks of a page, in the order and in the names of a reader's session.

A page may hide blocks from its readers in comments:

    <!--- invisible-code-block: python
    said("94.3", weights["effective_rank"].mean())
    --->

`said` checks a number of the prose. It stands beside this hidden block, with no other hidden block
in between, and it is the value, rounded to as many digits as the prose has.
"""

import re
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

from sybil import Sybil
from sybil.parsers.markdown import PythonCodeBlockParser

HIDDEN = re.compile(r"<!---? invisible-code-block: python\n.*?--->", re.DOTALL)


def run(page: Path, **given: Any) -> int:
    """Evaluate all blocks; returns how many there were. An error shows the line of the page."""
    document = Sybil(parsers=[PythonCodeBlockParser()], encoding="utf-8").parse(page)
    document.namespace.update(given, __name__="__main__")
    examples = list(document.examples())
    for example in examples:
        document.namespace["said"] = said(document.text, example.region.start)
        example.evaluate()
    return len(examples)


def said(text: str, position: int) -> Callable[[str, Any], None]:
    """The function that checks numbers of the prose around the hidden block at a position."""
    spans = [match.span() for match in HIDDEN.finditer(text)]
    since = max((end for start, end in spans if start < position - 20), default=0)
    until = min((start for start, _ in spans if start > position + 20), default=len(text))
    return partial(_check, HIDDEN.sub("", text[since:until]))


def _check(text: str, number: str, value: Any) -> None:
    if not re.search(rf"(?<![\d.,]){re.escape(number)}(?!\d|[.,]\d)", text):
        raise AssertionError(f"The text does not say {number}.")
    written = number.replace(",", "")
    if f"{float(value):.{len(written.partition('.')[2])}f}" != written:
        raise AssertionError(f"The text says {number}, the data {float(value):.8g}.")
