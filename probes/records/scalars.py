"""What can be logged: single real numbers, taken now and read when the record is written."""

import json
import math
import numbers
from collections.abc import Mapping
from decimal import Decimal
from typing import Any, SupportsFloat, SupportsInt

import numpy as np
import torch

from dynamics.errors import DynamicsError, one_line
from probes.contexts import outside_of_contexts
from probes.model.sharding import is_sharded

_MOST_TOKENS = 2**63


def scalar(name: str, value: object, wanted: bool = True) -> SupportsFloat:
    """The number of a value as it is now.

    That of a tensor on a GPU is on its way to the CPU, in the order of its stream. So the training
    thread does not wait for the device; `float` of the result does.

    Args:
        name: of the value, for the error.
        value: a bool, a number of Python or NumPy, or a tensor or array of one element, of any real
            dtype.
        wanted: whether the number is needed. If not, the value is only checked.

    Raises:
        DynamicsError: the name is empty, or the value is no real number: None, a text, a list, a
            complex number, several elements.
    """
    if not name:
        raise DynamicsError(f"log() got a value without a name (''), {_shown(value)}; name it.")
    number = real_number(value, wanted)
    if number is None:
        raise DynamicsError(
            f"log() takes single real numbers; found {name}={_shown(value)}. Leave out what was "
            "not measured, and log several values under a name each."
        )
    return number


@outside_of_contexts()
def real_number(value: object, wanted: bool = True) -> SupportsFloat | None:
    """The number of a value as `scalar` takes it; None where it is no real number.

    Args:
        value: anything.
        wanted: whether the number is needed. If not, a tensor on a GPU is not copied.
    """
    if isinstance(value, torch.Tensor):
        return _number_of_tensor(value, wanted)
    if isinstance(value, np.ndarray | np.generic):
        if value.size != 1 or value.dtype.kind not in "biuf":
            return None
        value = value.item()
    if not isinstance(value, numbers.Real | Decimal) and not _is_like_a_float(value):
        return None
    try:
        return float(value)  # type: ignore[arg-type]
    except (TypeError, ValueError, OverflowError):
        return None


def token_count(value: object) -> SupportsInt:
    """The number of tokens seen so far, as it is now; see `scalar`.

    Raises:
        DynamicsError: the value is no whole number from 0 on. Of a tensor on a GPU, only the dtype
            is looked at.
    """
    number = real_number(value)
    if isinstance(number, _OnItsWay) and not number.dtype.is_floating_point:
        return number
    count = None if number is None else float(number)
    if count is None or not (math.isfinite(count) and count >= 0 and count == int(count)):
        raise DynamicsError(f"log() takes tokens=N, tokens seen so far; found {_shown(value)}.")
    exact = int(value) if isinstance(value, (int, np.integer)) else int(count)
    if exact >= _MOST_TOKENS:
        raise DynamicsError(f"log() counts up to 2^63 tokens; found {_shown(value)}.")
    return exact


def event_facts(kind: object, attrs: Mapping[str, Any]) -> dict[str, Any]:
    """The facts of an event as JSON has them, taken now.

    Raises:
        DynamicsError: the kind is no text or empty, or a fact cannot be written as JSON.
    """
    if not isinstance(kind, str) or not kind:
        raise DynamicsError(f"event() takes a word as its kind; found {_shown(kind)}.")
    facts = {}
    for name, value in attrs.items():
        try:
            facts[name] = json.loads(json.dumps(value, default=_plain))
        except (TypeError, ValueError, RecursionError) as error:
            raise DynamicsError(
                f"event() takes facts that JSON can hold; found {name}={_shown(value)} "
                f"({one_line(error)})."
            ) from error
    return facts


class _OnItsWay:
    """The number of a tensor on a GPU, which is being copied to the CPU."""

    def __init__(self, tensor: torch.Tensor):
        self.dtype = tensor.dtype
        self._copy = torch.empty((), dtype=tensor.dtype, device="cpu", pin_memory=True)
        self._copy.copy_(tensor, non_blocking=True)
        self._copied = torch.cuda.Event()
        self._copied.record(torch.cuda.current_stream(tensor.device))

    def __float__(self) -> float:
        self._copied.synchronize()
        return float(self._copy.item())

    def __int__(self) -> int:
        self._copied.synchronize()
        return int(self._copy.item())


def _is_like_a_float(value: object) -> bool:
    """Scalars of other libraries: whatever turns into a float and is no text or complex number."""
    return hasattr(type(value), "__float__") and not isinstance(value, str | bytes | complex)


def _number_of_tensor(tensor: torch.Tensor, wanted: bool) -> SupportsFloat | None:
    tensor = tensor.detach()
    if is_sharded(tensor):
        if not all(each.is_replicate() for each in tensor.placements):  # type: ignore[attr-defined]
            return None  # adding up its parts would make this rank wait for the others
        tensor = tensor.to_local()  # type: ignore[attr-defined]
    readable = tensor.layout == torch.strided and not (tensor.is_meta or tensor.is_quantized)
    if tensor.numel() != 1 or tensor.is_complex() or not readable:
        return None
    tensor = tensor.reshape(())
    if tensor.is_cuda:
        return _OnItsWay(tensor) if wanted else math.nan
    return float(tensor.item())


def _plain(value: object) -> bool | int | float:
    number = real_number(value)
    if number is None:
        raise TypeError(f"a {type(value).__name__}")
    return int(number) if isinstance(value, (np.integer, numbers.Integral)) else float(number)  # type: ignore[call-overload]


def _shown(value: object) -> str:
    if isinstance(value, (torch.Tensor, np.ndarray)):
        return f"a {type(value).__name__} of shape {tuple(value.shape)} and dtype {value.dtype}"
    text = repr(value)
    return text if len(text) <= 80 else f"{text[:77]}..."
