"""Weights whose gradient does not arrive."""

import warnings
from collections.abc import Set

_RECORDS = 3  # experts of a mixture may be missed by one batch


class AbsentGradientWarning(UserWarning):
    """The first records of a training lack the gradients of some recorded weights."""


class AbsentGradients:
    """Says once which weights had no gradient in any of the first records."""

    def __init__(self) -> None:
        self._records = 0
        self._absent: set[str] = set()

    def note(self, expected: Set[str], found: Set[str]) -> None:
        """Learn which gradients a recorded step should have had, and which it had."""
        if self._records < _RECORDS:
            self._absent = {*(self._absent if self._records else expected)} - {*found}
            self._records += 1
            if self._records == _RECORDS:
                self._warn()

    def close(self) -> None:
        """Say it now if there were fewer records."""
        if 0 < self._records < _RECORDS:
            self._records = _RECORDS
            self._warn()

    def _warn(self) -> None:
        if self._absent:
            names = sorted(self._absent)
            shown = ", ".join(names[:3]) + (", ..." if len(names) > 3 else "")
            warnings.warn(
                f"{len(names)} recorded weights had no gradient in the first records: {shown}. "
                "No backward pass reached them, or they are used outside of the modules that the "
                "recorder was given; leave them out with select= if this is meant.",
                AbsentGradientWarning,
                stacklevel=2,
            )
