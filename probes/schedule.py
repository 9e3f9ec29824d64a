"""When to record: functions of the number of optimizer steps done."""

import math
import operator
from collections.abc import Callable, Iterable

import numpy as np

from dynamics.errors import DynamicsError

Schedule = Callable[[int], bool]


def every(n: int) -> Schedule:
    """Steps 0, n, 2n, ...

    Args:
        n: optimizer steps between records.

    Returns:
        A function: step -> whether to record it.

    Raises:
        DynamicsError: n is no whole number, or below 1.

    Example:
        >>> from probes import every
        >>> [step for step in range(30) if every(10)(step)]
        [0, 10, 20]
    """
    whole = whole_number(n)
    if whole is None or whole < 1:
        raise DynamicsError(
            f"every takes a whole number of steps >= 1, or a function of the step; found {n!r}."
        )
    return lambda step: step % whole == 0


def log_spaced(per_decade: int = 10) -> Schedule:
    """Step 0 and the steps nearest to 10^(i/per_decade): dense early, when ranks change most.

    Args:
        per_decade: records between step 10^k and step 10^(k+1).

    Returns:
        A function: step -> whether to record it.

    Raises:
        DynamicsError: `per_decade` is no whole number, or below 1.

    Example:
        >>> from probes import log_spaced
        >>> [step for step in range(101) if log_spaced(3)(step)]
        [0, 1, 2, 5, 10, 22, 46, 100]
    """
    count = whole_number(per_decade)
    if count is None or count < 1:
        raise DynamicsError(
            f"log_spaced takes a whole number of steps per decade >= 1; found {per_decade!r}."
        )

    def due(step: int) -> bool:
        if step < 1:
            return step == 0
        # Rounding to whole steps moves the exponent by less than one position either way.
        near = round(count * math.log10(step))
        return any(round(10 ** (i / count)) == step for i in (near - 1, near, near + 1))

    return due


def at_steps(steps: Iterable[int]) -> Schedule:
    """Exactly these steps.

    Args:
        steps: the optimizer steps to record; 0 stands for the initial weights.

    Returns:
        A function: step -> whether to record it.

    Raises:
        DynamicsError: `steps` is no list of whole numbers >= 0.

    Example:
        >>> from probes import at_steps
        >>> [step for step in range(30) if at_steps([0, 7, 21])(step)]
        [0, 7, 21]
    """
    try:
        given = list(steps)
    except TypeError:
        raise DynamicsError(f"at_steps takes a list of steps; found {steps!r}.") from None
    chosen = set()
    for each in given:
        step = whole_number(each)
        if isinstance(each, float) and int(each) == each:  # as np.linspace gives them
            step = int(each)
        if step is None or step < 0:
            raise DynamicsError(f"at_steps takes whole numbers of steps >= 0; found {each!r}.")
        chosen.add(step)
    return lambda step: step in chosen


def whole_number(value: object) -> int | None:
    """The value as an int: of Python, NumPy, or a tensor; None for all else, bools too.

    >>> whole_number(3), whole_number(3.0), whole_number(True), whole_number("3")
    (3, None, None, None)
    """
    if isinstance(value, bool | np.bool_) or str(getattr(value, "dtype", "")) == "torch.bool":
        return None
    try:
        return operator.index(value)  # type: ignore[arg-type]
    except TypeError:
        return None
