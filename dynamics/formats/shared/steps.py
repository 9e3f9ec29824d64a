"""The optimizer step that a checkpoint belongs to: from its name, or from a number in its file."""

import re
from collections.abc import Iterable
from pathlib import Path

from dynamics.errors import FormatError

# Beyond, a number is no count of steps (a date with a time, a hash), nor an int64.
_MOST = 10**15
_NUMBERED = re.compile(r"(?:step|steps|iter|iteration|ckpt|checkpoint)[-_=.]*(\d+)", re.IGNORECASE)


def step_in_name(stem: str) -> int | None:
    """The number after step, iter, iteration, ckpt or checkpoint, else the last number of all.

    None where there is no number, or one that is too large to count steps.

    >>> step_in_name("step=300-loss=2.51"), step_in_name("model-000200"), step_in_name("best")
    (300, 200, None)
    """
    numbers = _NUMBERED.findall(stem) or re.findall(r"\d+", stem)
    return _counted(int(numbers[-1])) if numbers else None


def step_inside(value: object) -> int | None:
    """A number of a file as a step; None where it cannot be one."""
    if isinstance(value, bool) or not isinstance(value, int) or value < 0:
        return None
    return _counted(value)


def by_step(found: Iterable[tuple[int, Path]], where: Path) -> dict[int, Path]:
    """Step -> path, sorted.

    Raises:
        FormatError: two paths have the same step.
    """
    steps: dict[int, Path] = {}
    for step, path in found:
        if step in steps:
            first, second = sorted((steps[step].name, path.name))
            raise FormatError(
                f"{where} holds {first} and {second}, both of step {step}; remove one of the two."
            )
        steps[step] = path
    return dict(sorted(steps.items()))


def _counted(number: int) -> int | None:
    return number if number < _MOST else None
