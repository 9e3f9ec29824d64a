"""Names at the ends of lines, pushed apart where they would overlap."""

import re
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any
from weakref import WeakKeyDictionary

import numpy as np
from matplotlib.text import Text
from matplotlib.transforms import ScaledTranslation

from dynamics.plots.drawing.style import whole_figure

if TYPE_CHECKING:
    from matplotlib.axes import Axes

MOST = 16  # lines that are named at their ends
_BROAD = 20  # letters of a line of a label
NO_BREAK = "\u00a0"  # a space that stays inside of its line
_GAP = 4 / 72  # inches between the axes and the labels


class EndLabels:
    """The labels at the right side of Axes.

    Where they stand depends on the height of the axes, on the scale and on the fonts; so they are
    arranged whenever they are measured or drawn.
    """

    def __init__(self, ax: "Axes"):
        self.ax = ax
        self._labels: list[_EndLabel] = []

    def add(self, text: str, y: float | None, colour: Any) -> None:
        """A label beside the height y of the data; at the bottom for None."""
        label = _EndLabel(self, broken(text), y, colour)
        self.ax.add_artist(label)
        label.set_clip_on(False)
        self._labels.append(label)

    def arrange(self, renderer: Any) -> None:
        """Give each label its height, in fractions of the axes."""
        box = self.ax.bbox
        if not box.height:
            return
        labels = [each for each in self._labels if each.get_visible()]
        heights = [Text.get_window_extent(each, renderer).height * 1.08 for each in labels]
        wanted = [box.y0 if each.anchor is None else self._pixel(each.anchor) for each in labels]
        for label, pixel in zip(labels, apart(wanted, heights, box.y0, box.y1), strict=True):
            label.set_position((1.0, (pixel - box.y0) / box.height))

    def remove(self) -> None:
        """Take all labels away."""
        for each in self._labels:
            each.remove()
        self._labels.clear()

    def _pixel(self, y: float) -> float:
        box = self.ax.bbox
        pixel = self.ax.transData.transform((0 if self.ax.get_xscale() == "linear" else 1, y))[1]
        return float(np.clip(pixel, box.y0, box.y1)) if np.isfinite(pixel) else box.y0


class _EndLabel(Text):
    def __init__(self, group: EndLabels, text: str, anchor: float | None, colour: Any):
        import matplotlib

        super().__init__(
            1, 0, text, color=colour, va="center", fontsize=matplotlib.rcParams["legend.fontsize"]
        )
        self.anchor, self._group = anchor, group
        ax = group.ax
        gap = ScaledTranslation(_GAP, 0, whole_figure(ax).dpi_scale_trans)
        self.set_transform(ax.transAxes + gap)

    def get_window_extent(self, renderer: Any = None, dpi: float | None = None) -> Any:
        self._group.arrange(renderer)
        return super().get_window_extent(renderer, dpi)

    def draw(self, renderer: Any) -> None:
        self._group.arrange(renderer)
        super().draw(renderer)


_GROUPS: "WeakKeyDictionary[Axes, EndLabels]" = WeakKeyDictionary()


def label_end(ax: "Axes", text: str, y: float | None, colour: Any) -> None:
    """Write a name at the right side of the axes, at the height y; at the bottom for None."""
    if ax not in _GROUPS:
        _GROUPS[ax] = EndLabels(ax)
    _GROUPS[ax].add(text, y, colour)


def has_labels(ax: "Axes") -> bool:
    """Whether lines are named at the right side of the axes."""
    return ax in _GROUPS


def remove_labels(ax: "Axes") -> None:
    """Take away the labels of the axes."""
    if ax in _GROUPS:
        _GROUPS.pop(ax).remove()


def apart(
    wanted: Sequence[float], heights: Sequence[float], low: float, high: float
) -> list[float]:
    """Centres near the wanted ones for boxes that do not overlap, between low and high.

    Neighbours that would overlap become a block at the mean of what they want. Boxes that are
    higher than the room begin at `high` and go on below `low`.

    >>> apart([0.0, 0.5, 9.0], [2, 2, 2], low=-5, high=20)
    [-0.75, 1.25, 9.0]
    >>> apart([0.0, 0.0], [2, 2], low=0, high=20)  # not below the room
    [1.0, 3.0]
    """
    order = sorted(range(len(wanted)), key=lambda i: wanted[i])
    blocks: list[tuple[list[int], float]] = []  # members, lower end
    for i in order:
        members, start = [i], wanted[i] - heights[i] / 2
        start = min(max(start, low), high - heights[i])
        while blocks and blocks[-1][1] + sum(heights[j] for j in blocks[-1][0]) > start + 1e-9:
            members = blocks.pop()[0] + members
            start = _start(members, wanted, heights)
            start = min(max(start, low), high - sum(heights[j] for j in members))
        blocks.append((members, start))
    centres = [0.0] * len(wanted)
    for members, start in blocks:
        for j in members:
            centres[j] = start + heights[j] / 2
            start += heights[j]
    return centres


def _start(members: Sequence[int], wanted: Sequence[float], heights: Sequence[float]) -> float:
    """Where a block begins so that its members are as near as possible to what they want."""
    before, starts = 0.0, []
    for j in members:
        starts.append(wanted[j] - heights[j] / 2 - before)
        before += heights[j]
    return sum(starts) / len(starts)


def broken(text: str, letters: int = _BROAD) -> str:
    r"""A label in lines of at most so many letters, broken behind spaces, dots and dashes.

    >>> broken("ReLoRA as published, seed 0")
    'ReLoRA as published,\nseed 0'
    """
    lines = [""]
    for piece in re.findall(r"[^ ._=/-]*[ ._=/-]*", text):
        if lines[-1] and len((lines[-1] + piece).rstrip()) > letters:
            lines.append("")
        lines[-1] += piece
    return "\n".join(line.rstrip() for line in lines).replace(NO_BREAK, " ")


def short_names(names: Sequence[str]) -> list[str]:
    """Names of matrices without the parts that all of them share at their ends.

    >>> short_names(["model.layers.0.q_proj.weight", "model.layers.1.q_proj.weight"])
    ['0', '1']
    >>> short_names(["model.lm_head.weight"])
    ['model.lm_head']
    """
    parts = [name.removesuffix(".weight").split(".") for name in names]
    if len(set(names)) > 1:
        while len({each[0] for each in parts}) == 1 and min(map(len, parts)) > 1:
            parts = [each[1:] for each in parts]
        while len({each[-1] for each in parts}) == 1 and min(map(len, parts)) > 1:
            parts = [each[:-1] for each in parts]
    return [".".join(each) for each in parts]
