"""Gradients of weights that a layer forms anew in each call, from its inputs and outputs."""

from collections.abc import Callable, Mapping
from functools import partial
from typing import Any

import torch
from torch import nn

DEFINITION = (
    "gradient with respect to W of a layer that computes y = W x with W = s·B·A + S, taken for the "
    "recording only, as Σ (dL/dy) xᵀ: summed over the micro-batches and averaged over the "
    "data-parallel ranks as a trained weight's, without the loss scale, and before clipping; the "
    "step consumes those of A, B and the values of S, which follow from it"
)


class LayerGradients:
    """Collects dL/dW of layers that compute y = W x, without a parameter W.

    Nothing of the model or of its graph changes: while it is armed, each layer has a forward hook
    that keeps the input until the gradient of the output is there. That costs one more matrix
    product per backward pass.

    Args:
        layers: name of the weight -> the layer.
        collect: called with a name and its gradient (out, in) in each backward pass.
    """

    def __init__(
        self, layers: Mapping[str, nn.Module], collect: Callable[[str, torch.Tensor], None]
    ):
        self._layers = layers
        self._collect = collect
        self._hooks: list[Any] = []
        self._armed = object()

    def arm(self) -> None:
        """Collect gradients of calls from now on, until `disarm`."""
        self.disarm()
        for name, layer in self._layers.items():
            hook = partial(self._watch, name)
            self._hooks.append(layer.register_forward_hook(hook, with_kwargs=True))

    def disarm(self) -> None:
        """Leave the layers alone, and drop what their earlier calls still give."""
        for hook in self._hooks:
            hook.remove()
        self._hooks, self._armed = [], object()

    def _watch(self, name: str, layer: nn.Module, args: Any, kwargs: Any, output: Any) -> None:
        if not isinstance(output, torch.Tensor) or not output.requires_grad:
            return
        x = next(each for each in (*args, *kwargs.values()) if isinstance(each, torch.Tensor))
        output.register_hook(partial(self._give, name, x.detach(), self._armed))

    @torch.no_grad()
    def _give(self, name: str, x: torch.Tensor, armed: object, gradient: torch.Tensor) -> None:
        if armed is self._armed:
            rows = gradient.reshape(-1, gradient.shape[-1])
            self._collect(name, rows.T @ x.reshape(-1, x.shape[-1]).to(rows.dtype))
