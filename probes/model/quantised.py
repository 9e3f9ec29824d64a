"""Weights that are kept as packed codes, and parameters that hold no real numbers."""

import math
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn
from torch.nn.parameter import UninitializedParameter

from probes.model.weight import Factors, NotRead, Weight, not_read, plain_weight

# Parameters and buffers that stand beside codes and scale them.
_SCALES = ("_scale_inv", "_scale")
_FLOAT8 = tuple(
    getattr(torch, name) for name in dir(torch) if name.startswith("float8_") and "e8m0" not in name
)


@dataclass(frozen=True)
class UnpackedSource:
    """A packed weight, unpacked by the library that packed it."""

    unpack: Callable[[], torch.Tensor]

    @torch.no_grad()
    def read(self) -> torch.Tensor:
        """The weight, a new tensor in the dtype that the library gives."""
        return self.unpack().detach()

    def base(self) -> torch.Tensor:
        """The weight: no adapter adds to it."""
        return self.read()

    def factors(self) -> Factors | None:
        """None: no adapter adds to it."""
        return None


class PackedSource:
    """A packed weight that nothing here can unpack."""

    def read(self) -> torch.Tensor:
        """Raises: the weight cannot be told.

        Raises:
            TypeError: always.
        """
        raise TypeError("a packed weight cannot be read where its library cannot unpack it")

    base = read

    def factors(self) -> Factors | None:
        """None: no adapter adds to it."""
        return None


def weight_of_parameter(
    module: nn.Module, name: str, parameter: nn.Parameter, path: str
) -> Weight | NotRead | None:
    """The weight behind a parameter that is no plain tensor of real numbers; None for plain ones.

    What a library packed is unpacked by that library (bitsandbytes, torchao and other tensor
    classes with a `dequantize`); float8 codes are multiplied by the scales beside them. Without
    scales they are numbers.

    Args:
        module: the module that owns the parameter.
        name: its name there.
        parameter: the parameter.
        path: the name of the module, with a dot at the end unless it is the model itself.
    """
    full = path + name
    if isinstance(parameter, UninitializedParameter):
        return not_read(full, parameter, "parameters that are not initialised yet")
    if parameter.is_meta:
        return not_read(full, parameter, "parameters on the meta device")
    if parameter.numel() == 0:
        return not_read(full, parameter, "parameters without numbers")
    codes = _codes(module, name)
    if codes is not None:
        return not_read(full, parameter, "scales of packed weights", recorded_elsewhere=True)
    if _is_packed(parameter) or (parameter.dtype in _FLOAT8 and _scales(module, name) is not None):
        reason = f"packed weights ({type(parameter).__name__}, {_name(parameter.dtype)})"
        return _unpacked(full, parameter, module, _unpacker(module, name, parameter), reason)
    if not parameter.is_floating_point():
        return not_read(
            full, parameter, f"parameters without real numbers ({_name(parameter.dtype)})"
        )
    return None


def weights_of_packed_module(module: nn.Module, path: str) -> Iterator[Weight | NotRead]:
    """The weight of a layer that keeps it as codes, see `is_packed_module`.

    HQQ and torch's own quantised layers are unpacked by their library. The layers of GPTQ, AWQ,
    AQLM, EETQ and others have nothing that unpacks them on each device.

    Args:
        module: the layer.
        path: its name, with a dot at the end unless it is the model itself.
    """
    layer: Any = module
    unpack: Callable[[], torch.Tensor] | None = None
    if hasattr(layer, "W_q"):
        unpack = layer.dequantize
    elif _is_torch_quantised(module):
        unpack = lambda: layer.weight().dequantize()  # noqa: E731
    reason = f"packed weights ({type(module).__name__})"
    weight = _unpacked(f"{path}weight", None, module, unpack, reason)
    yield weight
    for name, parameter in module._parameters.items():
        if parameter is None:
            continue
        if name == "bias":
            yield plain_weight(path + name, parameter, module)
        else:
            is_read = isinstance(weight, Weight)
            yield not_read(path + name, parameter, "codes and scales of packed weights", is_read)


def is_packed_module(module: nn.Module) -> bool:
    """Whether the layer keeps its weight as codes, and has no parameter `weight`."""
    if module._parameters.get("weight") is not None:
        return False
    if (hasattr(module, "W_q") and hasattr(module, "dequantize")) or _is_torch_quantised(module):
        return True
    tensors = (*module._parameters.values(), *module._buffers.values())
    has_codes = any(
        each is not None and each.ndim >= 2 and _is_code(each.dtype) for each in tensors
    )
    return has_codes and _features(module) is not None


def _unpacked(
    name: str,
    parameter: nn.Parameter | None,
    module: nn.Module,
    unpack: Callable[[], torch.Tensor] | None,
    reason: str,
) -> Weight | NotRead:
    try:
        if unpack is None:
            raise NotImplementedError
        source = UnpackedSource(unpack)
        weight = source.read()
    except Exception:  # of any library: what it cannot unpack is left out by name
        shape = _features(module) if parameter is None else tuple(parameter.shape)
        shape = _features(module) or shape or ()
        numbers = math.prod(shape)
        trains = parameter is not None and parameter.requires_grad
        return NotRead(name, shape, numbers, trains, reason, parameter=parameter)
    parts = () if parameter is None else (parameter,)
    return Weight(name, None, tuple(weight.shape), weight.dtype, module, source, parts)


def _unpacker(module: nn.Module, name: str, parameter: Any) -> Callable[[], torch.Tensor] | None:
    kind = type(parameter).__name__
    if kind == "Params4bit":
        functional = sys.modules["bitsandbytes"].functional
        return lambda: functional.dequantize_4bit(parameter.data, parameter.quant_state)
    if kind == "Int8Params":
        functional = sys.modules["bitsandbytes"].functional
        state: Any = getattr(module, "state", None)  # has the scales after the first forward pass

        def unpack() -> torch.Tensor:
            scales = parameter.SCB if parameter.SCB is not None else state.SCB
            return functional.int8_vectorwise_dequant(parameter.data, scales)

        return unpack
    if _dequantises(parameter):
        return parameter.dequantize
    scales = _scales(module, name)
    if parameter.dtype in _FLOAT8 and scales is not None:
        return lambda: _scaled(parameter, scales, getattr(module, "block_size", None))
    return None


def _is_packed(parameter: Any) -> bool:
    kind = type(parameter).__name__
    if kind == "Params4bit":
        return parameter.quant_state is not None
    if kind == "Int8Params":
        return parameter.dtype == torch.int8
    return _dequantises(parameter)


def _dequantises(parameter: Any) -> bool:
    return parameter.is_quantized or type(parameter).dequantize is not torch.Tensor.dequantize


def _scaled(codes: torch.Tensor, scales: torch.Tensor, blocks: Any) -> torch.Tensor:
    """float8 codes times their scales, in float32."""
    values = codes.detach().float()
    factors = scales.detach().float()
    if blocks is not None:
        for axis, size in zip((-2, -1), blocks, strict=True):
            factors = factors.repeat_interleave(size, dim=axis)
            factors = factors.narrow(axis, 0, values.shape[axis])  # the last block may be partial
    return values * factors


def _scales(module: nn.Module, name: str) -> torch.Tensor | None:
    for suffix in _SCALES:
        for tensors in (module._parameters, module._buffers):
            found = tensors.get(f"{name}{suffix}")
            if found is not None:
                return found
    return None


def _codes(module: nn.Module, name: str) -> torch.Tensor | None:
    """The float8 or integer codes that a parameter of this name scales."""
    for suffix in _SCALES:
        codes = module._parameters.get(name.removesuffix(suffix)) if name.endswith(suffix) else None
        if codes is not None and (_is_code(codes.dtype) or codes.dtype in _FLOAT8):
            return codes
    return None


def _is_code(dtype: torch.dtype) -> bool:
    return not (dtype.is_floating_point or dtype.is_complex or dtype == torch.bool)


def _is_torch_quantised(module: nn.Module) -> bool:
    place = type(module).__module__
    is_quantised = place.startswith("torch.ao.nn.") and ".quantized" in place
    return is_quantised and callable(getattr(module, "weight", None))


def _features(module: Any) -> tuple[int, int] | None:
    for out, into in (("out_features", "in_features"), ("outfeatures", "infeatures")):
        rows, cols = getattr(module, out, None), getattr(module, into, None)
        if isinstance(rows, int) and isinstance(cols, int):
            return rows, cols
    return None


def _name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")
