"""Stand-ins of frozen weights: they require a gradient, so that the weights need not."""

import copy
import functools
import sys
import warnings
from collections.abc import Callable, Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import fields, is_dataclass
from types import FrameType
from typing import Any, NamedTuple

import torch
from torch import nn
from torch.nn.modules.module import register_module_forward_hook, register_module_forward_pre_hook

from probes.contexts import after_backward, in_backward
from probes.gradients.as_frozen import (
    AsFrozen,
    as_constant,
    is_called_by_compiled_code,
    is_probed,
)

# Their fast paths ask whether any tensor requires a gradient, and compute other bits if one does.
_FAST_PATHS = (nn.TransformerEncoderLayer, nn.MultiheadAttention)
_COMPILERS_WARNING = r"Using `torch\.compile\(module\)` when there are global hooks on modules"

_CALL = nn.Module._call_impl.__code__

Collect = Callable[[str, torch.Tensor], None]


def is_frozen(parameter: nn.Parameter) -> bool:
    """Whether a gradient of this weight can be taken, and is nobody else's.

    Quantised weights have none. A frozen weight that holds a gradient nevertheless belongs to the
    user, and sharded weights (FSDP2) have gradients only as their wrapper decides.
    """
    return (
        not parameter.requires_grad
        and parameter.grad is None
        and (parameter.is_floating_point() or parameter.is_complex())
        and type(parameter.data) is torch.Tensor
    )


class StandIns:
    """Lets the model compute with stand-ins in place of its frozen weights, and only then.

    A stand-in shares the memory of its weight, and requires a gradient. It takes the weight's place
    when a module of the model is called, and leaves it when that call returns; once more during the
    backward pass, where gradient checkpointing computes again. So between two calls nothing of
    this can be seen: a weight's own flag and gradient are never touched, and copies of the model,
    pickles and state dicts are those of the model alone.

    Whether a weight is frozen is asked at each call, so the user may freeze and unfreeze weights
    at any time. Autocast keeps no casts of stand-ins, as it keeps none of frozen weights.

    The hooks are those that torch calls for all modules, since hooks of single modules would be
    copied with them. `torch.compile` sees two variants of the model, with stand-ins and without.

    A weight that is used outside of every call of a module, such as in a loss that takes
    `model.lm_head.weight`, has no stand-in there.

    Args:
        collect: called with a weight's name and its gradient in each backward pass.
    """

    def __init__(self, collect: Collect):
        self._collect = collect
        self._modules: set[int] = set()
        self._fast: list[nn.Module] = []
        self._places: _Places | None = None
        self._outermost: nn.Module | None = None
        self._depth = 0
        self._as_frozen = AsFrozen(self._with_constants)
        before = register_module_forward_pre_hook(self._enter)
        after = register_module_forward_hook(self._leave, always_call=True)
        # Compiled models are guarded by the numbers of hooks, so each hook keeps its number.
        self._hooks = [
            (before.hooks_dict_ref(), before.id, self._enter),
            (after.hooks_dict_ref(), after.id, self._leave),
            (after.extra_dict_ref[0](), after.id, True),
        ]
        self._unhook()

    def arm(self, model: nn.Module, weights: Mapping[str, nn.Parameter]) -> None:
        """Use stand-ins from now on, where one of `weights` is frozen when `model` is called."""
        self.disarm()
        self._modules = {id(module) for module in model.modules()}
        self._fast = [module for module in model.modules() if isinstance(module, _FAST_PATHS)]
        self._places = _Places(model, weights, self._collect)
        for hooks, number, hook in self._hooks:
            hooks[number] = hook
        if "torch._dynamo" in sys.modules:
            _hide_from_compiler(StandIns._enter, StandIns._leave, is_called_by_compiled_code)

    def disarm(self) -> None:
        """Leave the model alone. Safe to call twice.

        A backward pass of an earlier call still finds the stand-ins of that call; their gradients
        are dropped.
        """
        self._unhook()
        self._as_frozen.stop()
        if self._places is not None:
            self._places.leave()
            self._places.collect = None
        self._places, self._outermost, self._depth = None, None, 0

    def _unhook(self) -> None:
        for hooks, number, _ in self._hooks:
            hooks.pop(number, None)

    def _enter(self, module: nn.Module, args: Any) -> None:
        if torch.compiler.is_compiling() or id(module) not in self._modules:
            return
        if self._places is None:
            return
        if is_called_by_compiled_code():
            torch.compiler.disable(self._entered)(module, compiled=True)
        else:
            self._entered(module)

    def _entered(self, module: nn.Module, compiled: bool = False) -> None:
        if in_backward():  # computing again is as it was the first time
            self._as_frozen.enter(module, compiled)
            return
        if module is self._outermost and not _is_called_within_itself(module):
            self._depth = 0  # the call before was interrupted
        if self._depth == 0:
            if not torch.is_grad_enabled() or self._would_leave_a_fast_path():
                return
            assert self._places is not None
            self._places.take()
            self._outermost = module
        self._as_frozen.enter(module, compiled)
        self._depth += 1

    def _leave(self, module: nn.Module, args: Any, output: Any) -> None:
        if torch.compiler.is_compiling() or id(module) not in self._modules:
            return
        if self._places is None:
            return
        if is_called_by_compiled_code():
            torch.compiler.disable(self._left)(module, output)
        else:
            self._left(module, output)

    def _left(self, module: nn.Module, output: Any) -> None:
        if in_backward() or self._depth == 0:
            self._as_frozen.leave(module)
            return
        self._depth -= 1
        if self._depth > 0:
            self._as_frozen.leave(module)
            return
        self._outermost = None
        self._as_frozen.stop()
        assert self._places is not None
        again = self._places.leave()
        for tensor in _tensors(output):
            if tensor.grad_fn is None:
                continue
            tensor.grad_fn.register_prehook(again)
            if is_probed(tensor):  # to the user it is a constant
                for method in ("numpy", "__array__", "__deepcopy__", "requires_grad_"):
                    setattr(tensor, method, as_constant(tensor, method))

    def _with_constants(self) -> AbstractContextManager[None]:
        return nullcontext() if self._places is None else self._places.with_constants()

    def _would_leave_a_fast_path(self) -> bool:
        return any(
            not module.training and not any(each.requires_grad for each in module.parameters())
            for module in self._fast
        )


class _Place(NamedTuple):
    container: Any  # the dict of a module's parameters, or a list of them
    key: Any
    name: str
    parameter: nn.Parameter


class _Places:
    """Where a model keeps some of its weights, and what stands there instead."""

    def __init__(self, model: nn.Module, weights: Mapping[str, nn.Parameter], collect: Collect):
        self.collect: Collect | None = collect
        self._places = list(_places(model, weights))
        self._all = list(_places(model, dict(model.named_parameters())))
        self._made: dict[str, torch.Tensor] = {}
        self._taken: list[tuple[_Place, Any]] = []

    def take(self) -> None:
        """Put stand-ins where weights are that are frozen now."""
        self.leave()
        frozen = [
            (each, self._stand_in(each.name, each.parameter))
            for each in self._places
            if is_frozen(each.parameter)
        ]
        self._put(frozen)

    def _put(self, places: list[tuple[_Place, Any]]) -> None:
        for place, stand_in in places:
            found = _at(place)
            if found is place.parameter:
                place.container[place.key] = stand_in
                self._taken.append((place, stand_in))
            elif getattr(found, "stands_for", None) is place.parameter:  # of another recorder
                found.collectors[id(self)] = stand_in.collectors[id(self)]
            # What somebody else has put there, such as functional_call, stays.

    @contextmanager
    def with_constants(self) -> Iterator[None]:
        """Within it, the model computes with constants in place of the weights that train."""
        put = []
        for place in self._all:
            if place.parameter.requires_grad and _at(place) is place.parameter:
                constant: Any = place.parameter.detach()
                constant._is_param = True
                place.container[place.key] = constant
                put.append((place, constant))
        try:
            yield
        finally:
            for place, constant in put:
                if _at(place) is constant:
                    place.container[place.key] = place.parameter

    def leave(self) -> Callable[[Any], None]:
        """Put the weights back; returns what does the same again for one backward pass."""
        taken, self._taken = self._taken, []
        for place, stand_in in taken:
            if _at(place) is stand_in:
                place.container[place.key] = place.parameter

        def again(gradients: Any) -> None:
            if taken and not self._taken:
                self._put(taken)
                after_backward(self._leave)

        return again

    def _leave(self) -> None:
        self.leave()

    def _stand_in(self, name: str, parameter: nn.Parameter) -> Any:
        stand_in: Any = self._made.get(name)
        if stand_in is None or not _same_memory(stand_in, parameter):
            with torch.inference_mode(False), torch.no_grad():
                # A view: autocast keeps the casts of other leaves that require a gradient.
                stand_in = self._made[name] = parameter.detach()[...].requires_grad_()
            stand_in.register_post_accumulate_grad_hook(_collected)
            stand_in.collectors = {id(self): functools.partial(self._collected, name)}
            stand_in.stands_for = parameter
            # As torch asks whether a tensor is a parameter. What moves parameters within a forward
            # pass, such as a parametrisation that is added there, puts it back as one.
            stand_in._is_param = True
            # Whoever copies, freezes or unfreezes a weight within a call means the weight itself.
            stand_in.__deepcopy__ = functools.partial(copy.deepcopy, parameter)
            stand_in.requires_grad_ = functools.partial(self._hand_over, parameter)
        return stand_in

    def _collected(self, name: str, gradient: torch.Tensor) -> None:
        if self.collect is not None:
            self.collect(name, gradient)

    def _hand_over(self, parameter: nn.Parameter, requires_grad: bool = True) -> torch.Tensor:
        for place, stand_in in self._taken:
            if place.parameter is parameter and _at(place) is stand_in:
                place.container[place.key] = parameter
        return parameter.requires_grad_(requires_grad)


def _collected(stand_in: Any) -> None:
    gradient, stand_in.grad = stand_in.grad, None
    if gradient is None:  # an autograd function of the user gives none to what is frozen
        return
    for number, collect in enumerate(stand_in.collectors.values()):
        collect(gradient if number == 0 else gradient.clone())  # each adds to its own in place


def _places(model: nn.Module, weights: Mapping[str, nn.Parameter]) -> Iterator[_Place]:
    names = {id(parameter): name for name, parameter in weights.items()}
    for module in model.modules():
        for key, parameter in module._parameters.items():
            if id(parameter) in names and parameter is not None:
                yield _Place(module._parameters, key, names[id(parameter)], parameter)
        for value in vars(module).values():
            if type(value) is list:  # an LSTM computes with such a list
                for index, each in enumerate(value):
                    if id(each) in names:
                        yield _Place(value, index, names[id(each)], each)


def _at(place: _Place) -> Any:
    try:
        return place.container[place.key]
    except LookupError:  # the user has removed it
        return None


def _same_memory(stand_in: torch.Tensor, parameter: nn.Parameter) -> bool:
    return (
        stand_in.data_ptr() == parameter.data_ptr()
        and stand_in.shape == parameter.shape
        and stand_in.stride() == parameter.stride()
        and stand_in.dtype == parameter.dtype
        and stand_in.device == parameter.device
    )


def _is_called_within_itself(module: nn.Module) -> bool:
    calls = 0
    frame: FrameType | None = sys._getframe(1)
    while frame is not None:
        if frame.f_code is _CALL and frame.f_locals.get("self") is module:
            calls += 1
        frame = frame.f_back
    return calls > 1


def _tensors(output: Any) -> Iterator[torch.Tensor]:
    if isinstance(output, torch.Tensor):
        yield output
    elif isinstance(output, Mapping):
        for each in output.values():
            yield from _tensors(each)
    elif isinstance(output, list | tuple):
        for each in output:
            yield from _tensors(each)
    elif is_dataclass(output) and not isinstance(output, type):
        for field in fields(output):
            yield from _tensors(getattr(output, field.name, None))


def _hide_from_compiler(*hooks: Callable[..., Any]) -> None:
    """Run hooks as they are where a compiled model is called; within it they do nothing."""
    from torch._dynamo.eval_frame import skip_code

    for hook in hooks:
        skip_code(hook.__code__)
    # It says that hooks are called twice: for the compiled model, which is no module of ours.
    known = [each[1] for each in warnings.filters if each[1] is not None]
    if not any(getattr(each, "pattern", each) == _COMPILERS_WARNING for each in known):
        warnings.filterwarnings("ignore", message=_COMPILERS_WARNING)
