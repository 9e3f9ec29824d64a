"""When a step consumes its gradients, and when it is over."""

import functools
import sys
import warnings
from collections.abc import Callable, Sequence
from types import FrameType
from typing import Any

import torch

from probes.contexts import after_backward, in_backward
from probes.optimizers.nesting import innermost_optimizers, optimizer_layers
from probes.optimizers.outer_steps import CALL_OF_OUTER_STEP, Handle, watch_outer_step

# Frames of these codes are steps of torch's optimizers, and backward passes of Python functions.
_HOOKED_STEP = torch.optim.Optimizer.profile_hook_step(torch.optim.Optimizer.step).__code__
_BACKWARD_OF_A_FUNCTION = torch.autograd.function.BackwardCFunction.apply.__code__


class OptimizerSteps:
    """Watches the steps of one optimizer, or of several that make one step of the training.

    Gradients are complete when `optimizer.step()` begins. If the step is given a closure that
    computes them (LBFGS; Lightning gives every optimizer one), they are complete when the closure
    returns for the first time: the weights are then still those before the step.

    Steps that a gradient scaler skips because it found Inf or NaN do not count. A fused optimizer
    skips by itself, inside its step; the scaler does not call the step of other optimizers.

    A step of the training is over

    - after the step of the last optimizer that was given. Where it wraps another one, this is the
      outermost step: Lookahead changes weights after the optimizer inside has;
    - where optimizers step within the backward pass, one for each parameter, after that pass. Their
      order does not count.

    Args:
        given: what the user gave, in the order in which they step. Steps are counted by the last.
        optimizers: those inside of `given` that change weights of the model.
        look: called before anything of a step of the training can have changed a weight.
        begins: called when the first of them begins to step.
        consumes: called with the optimizer whose gradients are complete.
        done: called after each step of the training.
    """

    def __init__(
        self,
        given: Sequence[Any],
        optimizers: Sequence[torch.optim.Optimizer],
        look: Callable[[], None],
        begins: Callable[[], None],
        consumes: Callable[[torch.optim.Optimizer], None],
        done: Callable[[], None],
    ):
        self._optimizers = optimizers
        self._look, self._begins = look, begins
        self._consumes, self._done = consumes, done
        own = {id(each) for each in optimizers}
        self._last = own & {id(each) for each in innermost_optimizers(given[-1])}
        self._stepped: set[int] = set()
        self._within_backward = False
        self._awaited: int | None = None  # the backward pass whose end is awaited
        self._warned = False
        self._outer = [
            layer for each in given for layer in optimizer_layers(each) if id(layer) not in own
        ]
        self._handles: list[Handle] = [
            handle
            for optimizer in optimizers
            for handle in (
                optimizer.register_step_pre_hook(self._before),
                optimizer.register_step_post_hook(self._after),
            )
        ]
        for layer in self._outer:
            self._handles += watch_outer_step(layer, self._before_outer, self._after_outer)

    def remove(self) -> None:
        """Remove the hooks."""
        for handle in self._handles:
            handle.remove()
        self._handles = []

    def finish(self) -> None:
        """End a step within a backward pass of which nothing told that it is over."""
        if self._within_backward and self._stepped:
            self._complete()

    def _before(self, optimizer: Any, args: Any, kwargs: Any) -> tuple[Any, Any] | None:
        if _leaves_out(optimizer) or _is_within_step(optimizer, sys._getframe(1)):
            return None
        if id(optimizer) in self._stepped:
            self.finish()
        if not self._stepped:
            # SAM has changed weights by now; its first step is a method of another name.
            if not any(_has_called(outer, sys._getframe(1)) for outer in self._outer):
                self._look()
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
        caller = sys._getframe(1)
        if _leaves_out(optimizer) or _is_within_step(optimizer, caller):
            return
        self._stepped.add(id(optimizer))
        if not any(_is_running(outer, caller) for outer in self._outer):
            self._over(is_last=optimizer is self._optimizers[-1])

    def _before_outer(self, optimizer: Any) -> None:
        caller = sys._getframe(1)
        others = (outer for outer in self._outer if outer is not optimizer)
        if not self._stepped and not any(_has_called(outer, caller) for outer in others):
            self._look()

    def _after_outer(self, optimizer: Any) -> None:
        caller = sys._getframe(1)
        others = (outer for outer in self._outer if outer is not optimizer)
        own = {id(each) for each in innermost_optimizers(optimizer)}
        # Without a step inside, this is one of several micro-batches.
        if own & self._stepped and not any(_is_running(outer, caller) for outer in others):
            self._over(is_last=bool(own & self._last))

    def _over(self, *, is_last: bool) -> None:
        if in_backward():
            self._within_backward = True
            if not _is_nested_backward():
                task = torch._C._current_graph_task_id()
                if task != self._awaited:
                    self._awaited = task
                    after_backward(self.finish)
        elif is_last:
            self._complete()

    def _complete(self) -> None:
        stepped, self._stepped = self._stepped, set()
        within_backward, self._within_backward, self._awaited = self._within_backward, False, None
        without = len(self._optimizers) - len(stepped)
        if without and not self._warned and not within_backward:
            self._warned = True
            warnings.warn(
                f"{without} of {len(self._optimizers)} optimizers had not stepped when the last "
                "one of the list did: the record of that step lacks their gradients. Give the "
                "optimizers in the order in which they step. If a gradient scaler skipped a step, "
                "ignore this.",
                stacklevel=2,
            )
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


def _is_running(outer: Any, caller: FrameType) -> bool:
    """Whether a step of a wrapper has called this hook; `caller` is the frame of torch's hooks."""
    frame: FrameType | None = caller
    while frame is not None:
        if (
            frame.f_code in (caller.f_code, CALL_OF_OUTER_STEP, _HOOKED_STEP)
            and frame.f_locals.get("self") is outer
        ):
            return True
        frame = frame.f_back
    return False


def _has_called(outer: Any, caller: FrameType) -> bool:
    """Whether a method of a wrapper, of any name, has called this hook."""
    frame: FrameType | None = caller
    while frame is not None:
        if frame.f_locals.get("self") is outer:
            return True
        frame = frame.f_back
    return False


def _is_nested_backward() -> bool:
    """Whether a backward pass within another one runs: reentrant gradient checkpointing."""
    frame: FrameType | None = sys._getframe(1)
    while frame is not None:
        if frame.f_code is _BACKWARD_OF_A_FUNCTION:
            return True
        frame = frame.f_back
    return False
