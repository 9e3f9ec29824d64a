"""The optimizer step that a checkpoint belongs to: from its name, or from a number in its file."""

import re
from collections.abc import Iterable
from pathlib import Path

from dynamics.errors import FormatError
from dynamics.formats.storage.files import children

# A larger number does not count steps (it is a date with a time, or a hash), and is no int64.
_LIMIT = 10**15
_NUMBERED = re.compile(r"(?:step|steps|iter|iteration|ckpt|checkpoint)[-_=.]*(\d+)", re.IGNORECASE)


def step_in_name(stem: str) -> int | None:
    """The number after step, iter, iteration, ckpt or checkpoint, else the last number of all.

    None where there is no number, or where it is too large to count steps.

    >>> step_in_name("step=300-loss=2.51"), step_in_name("model-000200"), step_in_name("best")
    (300, 200, None)
    """
    numbers = _NUMBERED.findall(stem) or re.findall(r"\d+", stem)
    return step_inside(int(numbers[-1])) if numbers else None


def step_inside(value: object) -> int | None:
    """A value that stands in a file, as a step; None where it cannot be one."""
    if isinstance(value, bool) or not isinstance(value, int) or not 0 <= value < _LIMIT:
        return None
    return value


def numbered_directories(path: Path, pattern: re.Pattern[str]) -> dict[int, Path]:
    """Step -> each directory below `path` that `pattern` matches, or `path` if it matches itself.

    Args:
        path: where to look.
        pattern: of a whole name; its first group is the step.

    Raises:
        FormatError: two of them have the same number.
    """
    if match := pattern.fullmatch(path.name):
        return {int(match[1]): path}
    steps: dict[int, Path] = {}
    for child in children(path):
        match = pattern.fullmatch(child.name)
        if match is None or not child.is_dir():
            continue
        step = int(match[1])
        if step in steps:
            raise FormatError(
                f"{path} holds both {steps[step].name} and {child.name}; remove one of the two."
            )
        steps[step] = child
    return dict(sorted(steps.items()))


def by_step(numbered: Iterable[tuple[int, Path]], where: Path) -> dict[int, Path]:
    """Step -> path, sorted.

    Raises:
        FormatError: two paths have the same step.
    """
    steps: dict[int, Path] = {}
    for step, path in numbered:
        if step in steps:
            first, second = sorted((steps[step].name, path.name))
            raise FormatError(
                f"{where} holds {first} and {second}, both of step {step}; remove one of the two."
            )
        steps[step] = path
    return dict(sorted(steps.items()))
