"""When a training step consumes its gradients, and when it is over: hooks on the optimizers."""

import functools
import sys
import warnings
from collections.abc import Callable, Sequence
from types import FrameType
from typing import Any

import torch


class OptimizerSteps:
    """Watches the steps of one optimizer, or of several that step in turn.

    The gradients of a step are there when `optimizer.step()` begins, or, if it is given a closure
    that computes them (LBFGS; Lightning gives every optimizer one), when the closure returns for
    the first time: the weights are still those before the step.

    A step that a fused optimizer leaves out by itself, because its gradient scaler found Inf or
    NaN, is none. Other optimizers are not even asked to step then.

    Args:
        optimizers: in the order in which they step; each step of the last one counts.
        begins: called when any of them begins to step.
        consumes: called with the optimizer whose gradients are there.
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
        """Leave the optimizers as they were found."""
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
                "one of the list did: the record of that step has none of their gradients. Give "
                "the optimizers in the order in which they step, unless a gradient scaler skips "
                "some of them.",
                stacklevel=2,
            )
        self._stepped.clear()
        self._done()


def _leaves_out(optimizer: Any) -> bool:
    # Set by GradScaler for optimizers that look themselves; the others do not get here. Asking
    # for its value waits for the device, as GradScaler does for all other optimizers.
    found_inf = getattr(optimizer, "found_inf", None)
    return found_inf is not None and float(found_inf) > 0


def _is_within_step(optimizer: Any, caller: FrameType) -> bool:
    """Whether a hook runs for a step that another step of the same optimizer called.

    torch wraps the `step` of each class: where a class calls `super().step()`, both run the hooks.
    Counting how deep we are would go wrong for ever after an exception in a step.
    """
    frame = caller.f_back
    while frame is not None:
        if frame.f_code is caller.f_code and frame.f_locals.get("self") is optimizer:
            return True
        frame = frame.f_back
    return False
