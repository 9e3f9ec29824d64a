"""Operations choose kernels as if weights were frozen, and still give gradients of stand-ins."""

import inspect
import sys
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from types import FrameType
from typing import Any, cast

import torch
import torch.nn.functional as F
from torch import nn
from torch.overrides import (
    TorchFunctionMode,
    _get_current_function_mode_stack,
    _pop_mode,
    _push_mode,
)
from torch.utils import checkpoint
from torch.utils._pytree import tree_flatten, tree_unflatten

# Of at least three dimensions times at most two: torch folds the larger operand into a matrix if
# the smaller one requires a gradient, else only where that takes no copy (`should_fold` of ATen).
_PRODUCTS = {
    torch.matmul,
    torch.Tensor.matmul,
    torch.Tensor.__matmul__,
    torch.linalg.matmul,
    F.linear,
    torch.ops.aten.matmul,
    torch.ops.aten.matmul.default,
    torch.ops.aten.linear,
    torch.ops.aten.linear.default,
}

# These multiply inside, or take another kernel where a mask of attention requires a gradient.
_OTHERS = {
    torch.Tensor.__rmatmul__,
    torch.lstm,
    torch.gru,
    torch.rnn_tanh,
    torch.rnn_relu,
    F.scaled_dot_product_attention,
    F.multi_head_attention_forward,
}

# What torch refuses of a tensor that is computed from one that requires a gradient.
_OF_CONSTANTS = {
    torch.Tensor.numpy,
    torch.Tensor.__array__,
    torch.Tensor.__deepcopy__,
    torch.Tensor.requires_grad_,
    torch.Tensor.requires_grad.__set__,  # type: ignore[attr-defined]
}
_REQUESTED = "a gradient was asked for"

# These leave their fast paths, which need that no gradient is computed, if any mode is on.
_ASK_FOR_MODES = (nn.TransformerEncoder, nn.TransformerEncoderLayer, nn.MultiheadAttention)


def is_called_by_compiled_code() -> bool:
    """Whether the compiler, if it is in use, looks at what runs now."""
    if "torch._dynamo" not in sys.modules:
        return False
    callback = getattr(torch._C._dynamo.eval_frame, "get_eval_frame_callback", None)
    return callback is not None and callback() is not None


class AsFrozen(TorchFunctionMode):
    """Operations choose their kernels as they would without stand-ins.

    Some operations of torch compute other bits where an operand requires a gradient. While this
    mode is on, each of them computes with the plain values of what requires a gradient only because
    of stand-ins, so that its output and the gradients of its other operands are those of a training
    without them. The same operation computes once more for the gradients of the stand-ins alone.

    The mode is on while a model computes with stand-ins, and where gradient checkpointing computes
    the same again. It is off in compiled modules, whose kernels the compiler chooses.

    Reentrant checkpointing gives no gradient to what trains inside, if nothing that trains leads to
    its inputs. Stand-ins that lead to them would change that, so it computes again with constants.

    Args:
        with_constants: within it, weights that train are constants.
    """

    def __init__(self, with_constants: Callable[[], AbstractContextManager[None]] = nullcontext):
        super().__init__()
        self._with_constants = with_constants
        self._paused: list[nn.Module] = []

    def enter(self, module: nn.Module, compiled: bool = False) -> None:
        """A module of the model is called: switch it on, or off for the time of this call."""
        if compiled or (isinstance(module, _ASK_FOR_MODES) and not torch.is_grad_enabled()):
            _switch_off()
            if not self._paused:
                self._paused.append(module)
        elif not self._paused:
            self.start()

    def leave(self, module: nn.Module) -> None:
        """That call is over: switch it on if it was switched off for it."""
        if self._paused and self._paused[0] is module:
            self._paused.pop()
            self.start()

    def start(self) -> None:
        """Switch it on in this thread, unless that of another recorder is on already."""
        if not any(map(_is_mode, _get_current_function_mode_stack())):
            _push_mode(self)

    def stop(self) -> None:
        """Switch it off when the model has returned. Safe to call twice."""
        self._paused.clear()
        _switch_off(lambda mode: mode is self)

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """Compute what was called."""
        kwargs = kwargs or {}
        if torch.compiler.is_compiling():
            return func(*args, **kwargs)
        if func in _OF_CONSTANTS and is_probed(args[0]):
            return as_constant(args[0], func.__name__)(*args[1:], **kwargs)
        if func not in _PRODUCTS and func not in _OTHERS:
            if not torch.is_grad_enabled():  # so does reentrant checkpointing compute
                self._start_where_it_is_computed_again()
            return func(*args, **kwargs)
        self._start_where_it_is_computed_again()
        if func in _PRODUCTS and not _may_fold(args, kwargs):
            return func(*args, **kwargs)
        return _as_frozen(func, args, kwargs)

    def _start_where_it_is_computed_again(self) -> None:
        """Each node of a backward pass has modes of its own, so that there is nothing to stop."""
        frame: FrameType | None = sys._getframe(2)
        while frame is not None:
            if frame.f_code.co_name == "checkpoint" and frame.f_globals is vars(checkpoint):
                generator = frame.f_locals.get("gen")  # None if reentrant
                if generator is not None:
                    self._start_within(generator.gi_frame.f_locals["new_frame"], "recompute_fn")
            elif frame.f_code.co_name == "forward" and "run_function" in frame.f_locals:
                self._start_within(frame.f_locals.get("ctx"), "run_function", frame)
            frame = frame.f_back

    def _start_within(self, holder: Any, name: str, reentrant: FrameType | None = None) -> None:
        function = getattr(holder, name, None)
        if function is None or isinstance(function, _Again):
            return
        gets_none = reentrant is not None and not any(map(_trains, _inputs(reentrant)))
        within = self._with_constants if gets_none else nullcontext
        setattr(holder, name, _Again(self, function, within))


class _Again:
    """A function that gradient checkpointing calls again, in the mode in which it was called."""

    def __init__(
        self,
        mode: AsFrozen,
        function: Callable[..., Any],
        within: Callable[[], AbstractContextManager[None]],
    ):
        self._mode, self._function, self._within = mode, function, within

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        self._mode.start()
        with self._within():
            return self._function(*args, **kwargs)


def _inputs(frame: FrameType) -> list[torch.Tensor]:
    """The tensors that a function was given, as autograd counts them: none inside of a tuple."""
    values = inspect.getargvalues(frame)
    given = [values.locals[each] for each in values.args]
    if values.varargs is not None:
        given += values.locals[values.varargs]
    return [each for each in given if isinstance(each, torch.Tensor)]


def _trains(tensor: torch.Tensor) -> bool:
    return tensor.requires_grad and not is_probed(tensor)


def _is_mode(mode: Any) -> bool:
    return isinstance(mode, AsFrozen)


def _switch_off(which: Callable[[Any], bool] = _is_mode) -> None:
    """Wherever it stands among the modes of this thread."""
    modes = _get_current_function_mode_stack()
    if any(map(which, modes)):
        for _ in modes:
            _pop_mode()
        for each in modes:
            if not which(each):
                _push_mode(each)


def _may_fold(args: Any, kwargs: Any) -> bool:
    """Whether a product folds its larger operand if the smaller one requires a gradient only."""
    tensors = [each for each in (*args, *kwargs.values()) if isinstance(each, torch.Tensor)]
    if len(tensors) < 2:
        return False
    one, other = tensors[:2]
    if min(one.ndim, other.ndim) > 2 or max(one.ndim, other.ndim) < 3:
        return False
    adjacent = (
        one.stride(each) == one.stride(each + 1) * one.shape[each + 1]
        for each in range(one.ndim - 2)
    )
    return one.ndim < other.ndim or not all(adjacent)  # else it folds in any case


def _as_frozen(func: Callable[..., Any], args: Any, kwargs: Any) -> Any:
    operands, structure = tree_flatten((args, kwargs))
    tensors = {id(each): each for each in operands if isinstance(each, torch.Tensor)}
    # Operands that are one tensor stay one: attention asks whether its query is its key.
    plain = {
        number: each.detach()
        for number, each in tensors.items()
        if type(each) in (torch.Tensor, torch.nn.Parameter) and is_probed(each)
    }
    if not plain or torch._C._are_functorch_transforms_active():
        return func(*args, **kwargs)

    def compute(replaced: dict[int, torch.Tensor]) -> Any:
        given = [replaced.get(id(each), each) for each in operands]
        args, kwargs = tree_unflatten(given, structure)
        return func(*args, **kwargs)

    if not torch.is_grad_enabled() or kwargs.get("out") is not None:
        return compute(plain)
    others = {number: each.detach() for number, each in tensors.items() if number not in plain}
    devices = {each.device for each in tensors.values() if each.device.type != "cpu"}
    with torch.random.fork_rng(  # both draw the same numbers, for dropout
        [each.index for each in devices],
        enabled=func in _OTHERS,
        device_type=next(iter(devices)).type if devices else "cuda",
    ):
        probed = compute(others)
    outputs, structure_of_output = tree_flatten(compute(plain))
    joined = [
        _Joined.apply(each, other)
        if isinstance(each, torch.Tensor) and other.requires_grad
        else each
        for each, other in zip(outputs, tree_flatten(probed)[0], strict=True)
    ]
    return tree_unflatten(joined, structure_of_output)


class _Joined(torch.autograd.Function):
    """The first of two tensors; its gradient goes to both."""

    @staticmethod
    def forward(ctx: Any, output: torch.Tensor, probed: torch.Tensor) -> torch.Tensor:
        return output.detach()  # not itself, which could not be changed in place

    @staticmethod
    def backward(ctx: Any, gradient: torch.Tensor) -> Any:
        return gradient, gradient


def as_constant(tensor: torch.Tensor, method: str) -> Callable[..., Any]:
    """A method of a tensor that would not require a gradient without stand-ins."""
    if hasattr(tensor, "stands_for") and method == "__set__":
        return cast(Callable[..., Any], tensor.requires_grad_)  # the weight's own flag is meant

    def request(requires_grad: bool = True) -> torch.Tensor:
        if requires_grad and tensor.grad_fn is not None:
            node: Any = tensor.grad_fn
            node.metadata[_REQUESTED] = True  # so it trains from here on
        return tensor

    is_request = method in ("requires_grad_", "__set__")
    return request if is_request else getattr(tensor.detach(), method)


def is_probed(tensor: torch.Tensor) -> bool:
    """Whether a tensor requires a gradient, and would not without stand-ins."""
    if not tensor.requires_grad:
        return False
    if tensor.grad_fn is None:
        return hasattr(tensor, "stands_for")
    seen, waiting = set(), [tensor.grad_fn]
    while waiting:
        node: Any = waiting.pop()
        if node is not None and _REQUESTED in node.metadata:
            return False
        if node is None or node in seen or _Joined in node.metadata:
            continue
        seen.add(node)
        leaf = getattr(node, "variable", None)
        if leaf is not None and not hasattr(leaf, "stands_for"):
            return False
        waiting.extend(before for before, _ in node.next_functions)
    for node in seen:
        node.metadata[_Joined] = True  # known from now on: below it there are stand-ins only
    return True
