"""The account of a model: which of its tensors are measured, and why the others are not."""

from collections.abc import Mapping
from dataclasses import dataclass
from math import prod
from typing import Any, Self

_TOLERATED = 0.01  # of the numbers in matrices, left out by no choice of the user
VECTORS = "vectors"  # how the reason begins for what holds vectors and no matrix
INTEGERS = "integers (indices, masks)"  # the reason for what is computed with, and is no weight


@dataclass(frozen=True)
class LeftOut:
    """A tensor of a model that is not measured.

    Attributes:
        name: its clean name.
        shape: of the tensor.
        reason: what it is, in a few words that others of its kind share.
        trains: whether it trained when the account was made; False for checkpoints.
        chosen: whether the user left it out (`select`).
    """

    name: str
    shape: tuple[int, ...]
    reason: str
    trains: bool = False
    chosen: bool = False

    @property
    def numbers(self) -> int:
        """How many numbers it holds."""
        return prod(self.shape)

    @property
    def is_vector(self) -> bool:
        """Whether it holds vectors, be it a stack of them, or indices, and no matrix."""
        no_matrix = self.reason.startswith((VECTORS, INTEGERS))
        return sum(size > 1 for size in self.shape) < 2 or no_matrix


@dataclass(frozen=True)
class Account:
    """Every tensor of a model: measured, or left out for a reason.

    Attributes:
        measured: name -> shape of the tensors that are measured.
        trained_numbers: how many of their numbers train.
        left_out: the other tensors.

    Example:
        >>> from dynamics.runs.account import Account, LeftOut
        >>> norm = LeftOut("norm.weight", (8,), "vectors (norms, biases)")
        >>> print(Account({"up.weight": (24, 8)}, left_out=(norm,)).line())
        1 of 2 tensors, 96.0 % of 200 numbers; left out: 1 vectors (norms, biases)
    """

    measured: Mapping[str, tuple[int, ...]]
    trained_numbers: int = 0
    left_out: tuple[LeftOut, ...] = ()

    @property
    def numbers(self) -> int:
        """How many numbers are measured."""
        return sum(map(prod, self.measured.values()))

    @property
    def share(self) -> float:
        """Measured numbers among all numbers of the model, 0 to 1."""
        return _share(self.numbers, sum(each.numbers for each in self.left_out))

    @property
    def trained_share(self) -> float | None:
        """Measured numbers among those that train, 0 to 1; None where none trains."""
        others = sum(each.numbers for each in self.left_out if each.trains)
        if not self.trained_numbers + others:
            return None
        return _share(self.trained_numbers, others)

    def unchosen_share(self) -> float:
        """Numbers in matrices and stacks of them that are left out by no choice, 0 to 1.

        The share is that of the numbers that train, or of all numbers where none trains. Vectors
        do not count, nor what the user left out.
        """
        of_trained = self.trained_share is not None
        measured = self.trained_numbers if of_trained else self.numbers
        large = [
            each for each in self.left_out if not each.is_vector and (each.trains or not of_trained)
        ]
        lost = sum(each.numbers for each in large if not each.chosen)
        return 1 - _share(measured + sum(each.numbers for each in large if each.chosen), lost)

    def warning(self) -> str | None:
        """What to warn of: more than 1 % of the numbers in matrices are left out by no choice."""
        lost = self.unchosen_share()
        if lost <= _TOLERATED:
            return None
        of = "numbers that train" if self.trained_share is not None else "numbers"
        return (
            f"{100 * lost:.1f} % of the {of} in matrices and stacks of matrices are left out, by "
            f"no choice of yours: {self.line(names=3)}."
        )

    def by_reason(self) -> dict[str, list[LeftOut]]:
        """Reason -> the tensors that are left out for it, the most numbers first."""
        groups: dict[str, list[LeftOut]] = {}
        for each in self.left_out:
            groups.setdefault(each.reason, []).append(each)
        return dict(sorted(groups.items(), key=lambda item: -sum(each.numbers for each in item[1])))

    def line(self, *, names: int = 0) -> str:
        """One line for people: how much is measured, and what is not.

        Args:
            names: how many names of each reason are shown; vectors are never named.
        """
        total = self.numbers + sum(each.numbers for each in self.left_out)
        trained = self.trained_share
        if trained is None or trained == self.share:
            share = f"{_percent(self.share)} of {_count(total)} numbers"
        else:
            share = (
                f"{_percent(trained)} of the numbers that train, {_percent(self.share)} of all "
                f"{_count(total)}"
            )
        stacks = [name for name, shape in self.measured.items() if len(shape) > 2]
        line = f"{len(self.measured)} of {len(self.measured) + len(self.left_out)} tensors, {share}"
        if names and stacks:
            line += f"; {len(stacks)} as matrices ({_abridged(stacks, names)})"
        if not self.left_out:
            return line
        reasons = [
            f"{len(group)} {reason}{_named(group, names)}"
            for reason, group in self.by_reason().items()
        ]
        return f"{line}; left out: {'; '.join(reasons)}"

    def to_json(self) -> dict[str, Any]:
        """JSON-like values that `from_json` takes."""
        return {
            "measured": {name: list(shape) for name, shape in self.measured.items()},
            "trained_numbers": self.trained_numbers,
            "left_out": [
                {
                    "name": each.name,
                    "shape": list(each.shape),
                    "reason": each.reason,
                    "trains": each.trains,
                    "chosen": each.chosen,
                }
                for each in self.left_out
            ],
        }

    @classmethod
    def from_json(cls, values: Any) -> Self | None:
        """The account that `to_json` described; None for what is no account."""
        try:
            left_out = tuple(
                LeftOut(
                    str(each["name"]),
                    tuple(int(size) for size in each["shape"]),
                    str(each["reason"]),
                    bool(each["trains"]),
                    bool(each["chosen"]),
                )
                for each in values["left_out"]
            )
            measured = {
                str(name): tuple(int(size) for size in shape)
                for name, shape in values["measured"].items()
            }
            return cls(measured, int(values["trained_numbers"]), left_out)
        except (AttributeError, KeyError, TypeError, ValueError):
            return None


def _share(part: int, rest: int) -> float:
    return part / (part + rest) if part + rest else 1.0


def _percent(share: float) -> str:
    # Not "100.0 %" of what is incomplete.
    return f"{min(share * 100, 99.9) if share < 1 else 100:.1f} %"


def _count(numbers: int) -> str:
    for size, name in ((10**9, "G"), (10**6, "M"), (10**4, "k")):
        if numbers >= size:
            return f"{numbers / (size if name != 'k' else 1000):.3g} {name}"
    return str(numbers)


def _named(group: list[LeftOut], names: int) -> str:
    if not names or all(each.is_vector for each in group):
        return ""
    return f" ({_abridged([each.name for each in group], names)})"


def _abridged(names: list[str], at_most: int) -> str:
    more = [f"{len(names) - at_most} more"] if len(names) > at_most else []
    return ", ".join(names[:at_most] + more)
