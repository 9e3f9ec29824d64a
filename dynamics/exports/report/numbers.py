"""How numbers are written, for people and for charts: as many digits as mean something."""

import math
from typing import Any

import numpy as np

DIGITS = 6  # of metrics in charts, which subtract them from each other; singular values have four
_SIZES = ((1e12, "T"), (1e9, "G"), (1e6, "M"))


def number(value: float, digits: int = 4) -> str:
    """A number with so many digits, or fewer where the last ones are zeros; "−" is a minus sign.

    >>> number(109.714), number(-0.00012345), number(56.0), number(float("nan"))
    ('109.7', '−0.0001234', '56', 'none')
    >>> number(1234567.0), number(float("inf")), number(398123.0)
    ('1,235,000', '∞', '398,100')
    """
    if math.isnan(value):
        return "none"
    if math.isinf(value):
        return "∞" if value > 0 else "−∞"
    text = f"{value:.{digits}g}"
    if 1e4 <= abs(value) < 1e9:
        text = f"{float(text):,.0f}"
    return text.replace("-", "−", 1) if text.startswith("-") else text


def with_interval(mean: float, half: float | None) -> str:
    """A mean with the half width of its interval, both to the first digit of the latter.

    >>> with_interval(94.3249, 0.0812), with_interval(96.137, 0.41), with_interval(56.0, 0.0)
    ('94.32 ± 0.08', '96.1 ± 0.4', '56')
    >>> with_interval(78.62, 1.1), with_interval(56.25, None)
    ('79 ± 1', '56.25')
    """
    if half is None or not math.isfinite(half) or half <= 1e-6 * abs(mean):
        return number(mean)
    decimals = max(0, -math.floor(math.log10(half)))
    return f"{mean:.{decimals}f} ± {half:.{decimals}f}".replace("-", "−")


def amount(count: float) -> str:
    """A large number in three digits: 1.15 M; small ones as they are.

    >>> amount(1146880), amount(58254), amount(512)
    ('1.15 M', '58,254', '512')
    """
    for size, name in _SIZES:
        if count >= size:
            return f"{count / size:.3g} {name}"
    return f"{count:,.0f}"


def shortened(name: str, at_most: int = 24) -> str:
    """A name of at most so many letters: the middle is left out.

    >>> shortened("relora"), shortened("a/very/long/path/to/run.zarr", 16)
    ('relora', 'a/very/…run.zarr')
    """
    if len(name) <= at_most:
        return name
    end = at_most // 2
    return f"{name[: at_most - 1 - end]}…{name[-end:]}"


def cut(text: str, at_most: int) -> str:
    """A text of at most so many letters, cut after a word.

    >>> cut("the merge forgot the scale", 17)
    'the merge forgot…'
    """
    if len(text) <= at_most:
        return text
    kept = text[: at_most - 1]
    words = kept.rsplit(" ", 1)[0] if " " in kept and text[at_most - 1] != " " else kept
    return words.rstrip(" ,;:(") + "…"


def listed(values: np.ndarray, digits: int = DIGITS) -> list[Any]:
    """Numbers of so many digits; None for NaN; a text for what JSON does not have."""
    flat = _rounded(values.ravel(), digits)
    whole = flat == np.round(flat)
    found: list[Any] = flat.tolist()
    for position in np.flatnonzero(whole & (np.abs(flat) < 1e15)).tolist():
        found[position] = int(found[position])  # "64", not "64.0"
    for position in np.flatnonzero(~np.isfinite(flat)).tolist():
        value = found[position]
        found[position] = None if value != value else "inf" if value > 0 else "-inf"
    return found


def _rounded(values: np.ndarray, digits: int) -> np.ndarray:
    with np.errstate(divide="ignore", invalid="ignore", over="ignore"):
        exponents = np.floor(np.log10(np.abs(values)))
        exponents = np.where(np.isfinite(exponents), exponents, 0)
        places = digits - 1 - exponents
        # By a power of ten that is exact, so that the result prints in few letters.
        small = 10.0 ** np.abs(places)
        scaled = np.where(places >= 0, np.round(values * small) / small, 0)
        large = np.round(values / small) * small
        found = np.where(places >= 0, scaled, np.where(np.abs(values) < 1e15, values, large))
    return np.where(np.isfinite(found), found, values)
