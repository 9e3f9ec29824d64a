"""The sentences that belong under a figure."""

from collections.abc import Iterable
from typing import TYPE_CHECKING
from weakref import WeakKeyDictionary

from dynamics.errors import DynamicsError

if TYPE_CHECKING:
    import numpy as np
    from matplotlib.axes import Axes

# Axes -> what is shown, and what has to be known besides.
_SENTENCES: "WeakKeyDictionary[Axes, tuple[list[str], list[str]]]" = WeakKeyDictionary()


def describe(ax: "Axes", *sentences: str, last: bool = False) -> None:
    """Add sentences to the caption of `ax`; empty ones, and those that it has, are left out.

    Args:
        ax: where something was drawn.
        sentences: with or without full stop.
        last: whether they stand behind what is shown.
    """
    said = _SENTENCES.setdefault(ax, ([], []))
    for each in sentences:
        text = each.strip().rstrip(".")
        if text and (sentence := f"{text[0].upper()}{text[1:]}.") not in said[last]:
            said[last].append(sentence)


def caption(ax: "Axes | Iterable[Axes] | np.ndarray") -> str:
    """The text that belongs under a figure: what is shown, over what, floor and bound.

    Args:
        ax: Axes that a function of this package drew on; or all Axes of a figure. What all of them
            share is said once, and the rest with the title of its panel.

    Raises:
        DynamicsError: nothing was drawn on them by this package.

    Example:
        >>> import matplotlib
        >>> matplotlib.use("Agg")
        >>> analysis = dy.analyze("run.zarr", kinds=["weight"])
        >>> ax = dy.plot_trajectory(analysis, "stable_rank", by="layer")
        >>> print(dy.caption(ax))
        Stable rank of the weight along optimizer steps. Each line is a layer, the mean over its 7
        matrices. Dotted: the merge.
        >>> matplotlib.pyplot.close(ax.figure)
    """
    from matplotlib.axes import Axes

    several = [ax] if isinstance(ax, Axes) else list(getattr(ax, "flat", ax))
    found = {each: [*a, *b] for each in several for a, b in [_SENTENCES.get(each, ([], []))]}
    found = {each: sentences for each, sentences in found.items() if sentences}
    if not found:
        raise DynamicsError("These Axes have no caption: no plot_... function drew on them.")
    names = {
        each: each.get_title() or each.get_title("left") or f"panel {number}"
        for number, each in enumerate(found, 1)
    }
    whose: dict[str, list[str]] = {}
    for each, sentences in found.items():
        for sentence in sentences:
            whose.setdefault(sentence, []).append(names[each])
    parts = [sentence for sentence, panels in whose.items() if len(panels) == len(found)]
    own: dict[str, list[str]] = {}
    for sentence, panels in whose.items():
        if len(panels) < len(found):
            own.setdefault(listed(panels), []).append(sentence)
    return " ".join([*parts, *(f"({panels}) {' '.join(each)}" for panels, each in own.items())])


def counted(numbers: Iterable[int], one: str, many: str | None = None) -> str:
    """Text like "4 layers", "1 layer" or "1 to 4 layers".

    >>> counted([4, 4], "layer"), counted([1], "matrix", "matrices"), counted([1, 4], "seed")
    ('4 layers', '1 matrix', '1 to 4 seeds')
    """
    low, high = min(numbers := list(numbers)), max(numbers)
    words = one if high == 1 else many or f"{one}s"
    return f"{high} {words}" if low == high else f"{low} to {high} {words}"


def listed(names: Iterable[str]) -> str:
    """Text like "a, b and c".

    >>> listed(["a"]), listed(["a", "b", "c"])
    ('a', 'a, b and c')
    """
    *most, last = [*names] or [""]
    return f"{', '.join(most)} and {last}" if most else last
