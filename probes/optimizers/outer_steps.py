"""When the step of a wrapping optimizer is over, whose class knows nothing of torch's hooks."""

import functools
import weakref
from collections.abc import Callable
from typing import Any, Protocol

import torch

Call = Callable[[Any], None]
Calls = tuple[Call, Call]


class Handle(Protocol):
    """What ends a watch."""

    def remove(self) -> None:
        """End it."""
        ...


def watch_outer_step(optimizer: Any, begins: Call, done: Call) -> list[Handle]:
    """Call begins(optimizer) and done(optimizer) before and after each of its steps.

    torch runs hooks around the steps of its own optimizers. Other wrappers have `step` replaced in
    their class, as torch does it, while one of their instances is watched; the instances stay as
    they are, for copies and pickles. A class that cannot be changed is not watched.
    """
    if hasattr(optimizer, "_optimizer_step_post_hooks") and getattr(
        type(optimizer).step, "hooked", False
    ):
        assert isinstance(optimizer, torch.optim.Optimizer)
        return [
            optimizer.register_step_pre_hook(lambda each, *_: begins(each)),
            optimizer.register_step_post_hook(lambda each, *_: done(each)),
        ]
    return [_Watch(optimizer, (begins, done))]


# Class -> what the steps of its instances call, by the id of the instance.
_of_classes: weakref.WeakKeyDictionary[type, dict[int, list[Calls]]] = weakref.WeakKeyDictionary()


class _Watch:
    def __init__(self, optimizer: Any, calls: Calls):
        self._optimizer, self._calls = optimizer, calls
        kind = type(optimizer)
        if not callable(getattr(kind, "step", None)):
            return
        watched = _of_classes.setdefault(kind, {})
        if not watched:
            try:
                _replace_step(kind, watched)
            except TypeError:  # a built-in class
                return
        watched.setdefault(id(optimizer), []).append(calls)

    def remove(self) -> None:
        """Call nothing any more; the class gets its own step back after the last one."""
        kind = type(self._optimizer)
        watched = _of_classes.get(kind, {})
        calls = watched.get(id(self._optimizer), [])
        if self._calls in calls:
            calls.remove(self._calls)
        if not calls:
            watched.pop(id(self._optimizer), None)
        if not watched:
            _give_step_back(kind)


def _replace_step(kind: type, watched: dict[int, list[Calls]]) -> None:
    kind.step = _watched_step(kind.step, watched)  # type: ignore[attr-defined]


def _give_step_back(kind: type) -> None:
    step = vars(kind).get("step")
    if getattr(step, "__code__", None) is not CALL_OF_OUTER_STEP:
        return  # somebody has replaced it in turn; without watchers it does nothing more
    kind.step = step.__wrapped__  # type: ignore[attr-defined, union-attr]


def _watched_step(original: Callable[..., Any], watched: dict[int, list[Calls]]) -> Any:
    @functools.wraps(original)
    def step(self: Any, *args: Any, **kwargs: Any) -> Any:
        calls = tuple(watched.get(id(self), ()))
        for begins, _ in calls:
            begins(self)
        result = original(self, *args, **kwargs)
        for _, done in calls:
            done(self)
        return result

    return step


# Frames of this code are steps that run.
CALL_OF_OUTER_STEP = _watched_step(len, {}).__code__
