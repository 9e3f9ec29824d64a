"""Gradients of trained weights as the backward passes leave them, before clipping."""

from collections.abc import Callable, Sequence
from typing import Any

import torch

from probes.contexts import in_backward
from probes.model.parameters import Tracked
from probes.model.sharding import is_sharded, means_over_ranks

BEFORE_CLIPPING = (
    "parameter.grad as the last backward pass before the step left it: accumulated over the "
    "micro-batches and averaged over the data-parallel ranks, without the loss scale, and before "
    "clipping and whatever else changes gradients between backward() and step(); at the weights "
    "before the step"
)


class UnclippedGradients:
    """Copies the gradients of trained weights at the end of each backward pass of recorded steps.

    Between `arm` and `disarm`, a weight's gradient is copied whenever a backward pass has added
    to it; the next pass replaces the copy. So nothing needs to know which micro-batch is the last
    one. This costs a buffer of each weight's size on its device, and one copy per backward pass.

    Args:
        tracked: the weights; `arm` chooses the trained ones among them each time.
        process_group: the ranks to average over. Under DDP the hooks run before DDP averages;
            under FSDP2 they run after FSDP2 has averaged.
    """

    def __init__(self, tracked: Sequence[Tracked], process_group: Any = None):
        self._tracked = tracked
        self._process_group = process_group
        self._armed: set[str] = set()
        self._handles: list[Any] = []
        self._copies: dict[str, torch.Tensor] = {}

    def arm(self) -> None:
        """Copy gradients from now on, until `disarm`."""
        self.disarm()
        for each in self._tracked:
            if each.parameter.requires_grad:
                copier = self._copier(each.name)
                self._handles.append(each.parameter.register_post_accumulate_grad_hook(copier))
                self._armed.add(each.name)

    def take(self, stepped: Sequence[Tracked], loss_scale: float = 1.0) -> dict[str, torch.Tensor]:
        """Name -> the last copy since `arm`, divided by `loss_scale`, for the weights `stepped`.

        Weights whose gradient was dropped since (the training skipped a batch) are left out.
        """
        local, copies = {}, {}
        for each in stepped:
            if each.name in self._armed and not is_sharded(each.parameter):
                local[each.name] = each.parameter
            copy = self._copies.pop(each.name, None)
            if copy is None and each.name in self._armed and in_backward():
                # An optimizer that steps in a hook of its own comes before the hook of this class.
                copy = None if each.parameter.grad is None else _copy(each.parameter.grad)
            if copy is not None and each.parameter.grad is not None:
                copies[each.name] = copy
        if self._process_group is not None:
            mine = {name: copies[name] for name in local if name in copies}
            copies |= means_over_ranks(local, mine, self._process_group)
        return copies if loss_scale == 1 else {n: copy / loss_scale for n, copy in copies.items()}

    def disarm(self) -> None:
        """Remove the hooks and forget the copies. Safe to call twice."""
        for handle in self._handles:
            handle.remove()
        self._armed, self._handles, self._copies = set(), [], {}

    def _copier(self, name: str) -> Callable[[torch.Tensor], None]:
        def copy(parameter: torch.Tensor) -> None:
            if parameter.grad is not None:  # or else an optimizer has stepped in this pass
                self._copies[name] = _copy(parameter.grad)

        return copy


def _copy(gradient: torch.Tensor) -> torch.Tensor:
    gradient = gradient.detach()
    return gradient.to_dense() if gradient.is_sparse else gradient.clone()
