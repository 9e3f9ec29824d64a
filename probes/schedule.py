"""When to record: functions of the number of optimizer steps done."""

import math
from collections.abc import Callable, Iterable

from dynamics.errors import DynamicsError

Schedule = Callable[[int], bool]


def every(n: int) -> Schedule:
    """Steps 0, n, 2n, ...

    Args:
        n: optimizer steps between records.

    Returns:
        A function: step -> whether to record it.

    Raises:
        DynamicsError: n is below 1.

    Example:
        >>> from probes import every
        >>> [step for step in range(30) if every(10)(step)]
        [0, 10, 20]
    """
    if n < 1:
        raise DynamicsError(f"every(n) takes a number of steps >= 1, found {n}.")
    return lambda step: step % n == 0


def log_spaced(per_decade: int = 10) -> Schedule:
    """Step 0 and the steps nearest to 10^(i/per_decade): dense early, when ranks change most.

    Args:
        per_decade: records between step 10^k and step 10^(k+1).

    Returns:
        A function: step -> whether to record it.

    Raises:
        DynamicsError: `per_decade` is below 1.

    Example:
        >>> from probes import log_spaced
        >>> [step for step in range(101) if log_spaced(3)(step)]
        [0, 1, 2, 5, 10, 22, 46, 100]
    """
    if per_decade < 1:
        raise DynamicsError(f"log_spaced takes >= 1 steps per decade, found {per_decade}.")

    def due(step: int) -> bool:
        if step < 1:
            return step == 0
        # Rounding to whole steps moves the exponent by less than one position either way.
        near = round(per_decade * math.log10(step))
        return any(round(10 ** (i / per_decade)) == step for i in (near - 1, near, near + 1))

    return due


def at_steps(steps: Iterable[int]) -> Schedule:
    """Exactly these steps.

    Args:
        steps: the optimizer steps to record; 0 stands for the initial weights.

    Returns:
        A function: step -> whether to record it.

    Example:
        >>> from probes import at_steps
        >>> [step for step in range(30) if at_steps([0, 7, 21])(step)]
        [0, 7, 21]
    """
    chosen = frozenset(steps)
    return lambda step: step in chosen
