"""Hooks on optimizers: when a step consumes its gradients, and when it is over."""

import functools
import sys
import warnings
from collections.abc import Callable, Sequence
from types import FrameType
from typing import Any

import torch


class OptimizerSteps:
    """Watches the steps of one optimizer, or of several that step in turn.

    Gradients are complete when `optimizer.step()` begins. If the step is given a closure that
    computes them (LBFGS; Lightning gives every optimizer one), they are complete when the closure
    returns for the first time: the weights are then still those before the step.

    Steps that a gradient scaler skips because it found Inf or NaN do not count. A fused optimizer
    skips by itself, inside its step; the scaler does not call the step of other optimizers.

    Args:
        optimizers: in the order in which they step; steps are counted by the last one.
        begins: called when any of them begins to step.
        consumes: called with the optimizer whose gradients are complete.
        done: called after each step of the last one.
    """

    def __init__(
        self,
        optimizers: Sequence[torch.optim.Optimizer],
        begins: Callable[[], None],
        consumes: Callable[[torch.optim.Optimizer], None],
        done: Callable[[], None],
    ):
        self._optimizers = optimizers
        self._begins, self._consumes, self._done = begins, consumes, done
        self._stepped: set[int] = set()
        self._warned = False
        self._handles = [
            handle
            for optimizer in optimizers
            for handle in (
                optimizer.register_step_pre_hook(self._before),
                optimizer.register_step_post_hook(self._after),
            )
        ]

    def remove(self) -> None:
        """Remove the hooks."""
        for handle in self._handles:
            handle.remove()
        self._handles = []

    def _before(self, optimizer: Any, args: Any, kwargs: Any) -> tuple[Any, Any] | None:
        if _leaves_out(optimizer) or _is_within_step(optimizer, sys._getframe(1)):
            return None
        self._begins()
        if callable(kwargs.get("closure")):
            return args, {**kwargs, "closure": self._watched(optimizer, kwargs["closure"])}
        if len(args) > 1 and callable(args[1]):  # args[0] is the optimizer
            return (args[0], self._watched(optimizer, args[1]), *args[2:]), kwargs
        self._consumes(optimizer)
        return None

    def _watched(self, optimizer: Any, closure: Callable[..., Any]) -> Callable[..., Any]:
        first = True

        @functools.wraps(closure)
        def watched(*args: Any, **kwargs: Any) -> Any:
            nonlocal first
            result = closure(*args, **kwargs)
            if first:
                first = False
                with torch.no_grad():
                    self._consumes(optimizer)
            return result

        return watched

    def _after(self, optimizer: Any, *_: Any) -> None:
        if _leaves_out(optimizer) or _is_within_step(optimizer, sys._getframe(1)):
            return
        self._stepped.add(id(optimizer))
        if optimizer is not self._optimizers[-1]:
            return
        without = len(self._optimizers) - len(self._stepped)
        if without and not self._warned:
            self._warned = True
            warnings.warn(
                f"{without} of {len(self._optimizers)} optimizers had not stepped when the last "
                "one of the list did: the record of that step lacks their gradients. Give the "
                "optimizers in the order in which they step. If a gradient scaler skipped a step, "
                "ignore this.",
                stacklevel=2,
            )
        self._stepped.clear()
        self._done()


def _leaves_out(optimizer: Any) -> bool:
    # GradScaler sets this for optimizers that check by themselves; it does not step the others.
    # Reading the value waits for the device, as GradScaler itself does for the other optimizers.
    found_inf = getattr(optimizer, "found_inf", None)
    return found_inf is not None and float(found_inf) > 0


def _is_within_step(optimizer: Any, caller: FrameType) -> bool:
    """Whether this hook runs inside another step of the same optimizer.

    torch wraps the `step` of each class. Where a class calls `super().step()`, both run the hooks.
    A counter of the depth would stay wrong after an exception in a step; the call stack does not.
    """
    frame = caller.f_back
    while frame is not None:
        if frame.f_code is caller.f_code and frame.f_locals.get("self") is optimizer:
            return True
        frame = frame.f_back
    return False
