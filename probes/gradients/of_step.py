"""The gradients of one optimizer step: which are recorded, and how they are had."""

from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch
from torch import nn

from dynamics.errors import DynamicsError
from dynamics.recordings import GRADIENT
from probes.gradients.probed import DEFINITION, ProbedGradients, frozen_weights
from probes.gradients.unclipped import BEFORE_CLIPPING, UnclippedGradients
from probes.model.optimizers import optimizer_parameters
from probes.model.parameters import Tracked
from probes.model.sharding import data_parallel_group, is_sharded, needed_ranks, whole

PROBED_GRADIENT = "probed_gradient"
GRADIENT_BEFORE_CLIPPING = "gradient_before_clipping"

CONSUMED = (
    "parameter.grad as optimizer.step() found it, or as the first call of its closure left it: "
    "after accumulation over micro-batches, averaging over ranks, unscaling and clipping, at the "
    "weights before the step; a record's weights are those after the step, and a step that a "
    "gradient scaler skipped has no gradient"
)

# name -> (what is kept of it, attributes of its array)
Gradients = dict[str, tuple[Any, dict[str, Any]]]


class StepGradients:
    """Takes the gradients that a step consumes: whole and unscaled.

    Args:
        model: what is trained.
        tracked: the recorded weights.
        optimizers: in the order in which they step.
        record: words of `Recorder`.
        process_group: the user's word, see `data_parallel_group`.
        grad_scaler: what scales the loss, or None.
        writes: whether this process writes; the others help to gather and to average.
        keep: what a record has of a gradient: keep(gradient, owned=...), see `records`.

    Attributes:
        definition: what the recorded gradients are, in one sentence each.
        needed_ranks: the processes that must take part; empty for this one alone.
    """

    def __init__(
        self,
        model: nn.Module,
        tracked: Sequence[Tracked],
        optimizers: Sequence[torch.optim.Optimizer],
        record: frozenset[str],
        *,
        process_group: Any,
        grad_scaler: Any,
        writes: bool,
        keep: Callable[..., Any],
    ):
        self._model = model
        self._tracked = tracked
        self._optimizers = optimizers
        self._consumed = GRADIENT in record
        self._grad_scaler = grad_scaler
        self._writes = writes
        self._keep = keep
        self._found: Gradients = {}
        self._probed: ProbedGradients | None = None
        self._unclipped: UnclippedGradients | None = None
        probed, unclipped = PROBED_GRADIENT in record, GRADIENT_BEFORE_CLIPPING in record
        averaged = frozen_weights(tracked) if probed else []
        if unclipped:
            averaged = averaged + [
                each
                for each in tracked
                if each.parameter.requires_grad and not is_sharded(each.parameter)
            ]
        group = data_parallel_group(model, averaged, process_group) if probed or unclipped else None
        if probed:
            self._probed = ProbedGradients(tracked, self._trained, group)
        if unclipped:
            self._unclipped = UnclippedGradients(tracked, group)
        self.needed_ranks = needed_ranks(tracked, group if averaged else None)
        trained = BEFORE_CLIPPING if unclipped else CONSUMED
        self.definition = f"{trained}. An array with the attribute 'probed' holds the {DEFINITION}"

    def arm(self) -> None:
        """Watch the backward passes from now on: the next step is recorded."""
        for collector in (self._probed, self._unclipped):
            if collector is not None:
                collector.arm()

    def disarm(self) -> None:
        """Leave the model as it was found."""
        for collector in (self._probed, self._unclipped):
            if collector is not None:
                collector.disarm()

    def take(self, optimizer: torch.optim.Optimizer) -> None:
        """Keep what a step of this optimizer is about to consume."""
        self._refuse_replaced()
        stepped, last = self._stepped_by(optimizer), optimizer is self._optimizers[-1]
        if self._consumed:
            # Set where a fused optimizer unscales by itself, inside its step.
            scale = getattr(optimizer, "grad_scale", None)
            for each in stepped:
                if each.parameter.grad is not None:
                    gradient = whole(each.parameter.grad, keep=self._writes)
                    if gradient is not None:
                        if scale is not None:
                            gradient = gradient / scale.to(gradient.device)
                        kept = self._keep(gradient, owned=scale is not None)
                        self._found[each.name] = (kept, {})
        if self._unclipped is not None:
            unclipped = self._unclipped.take(stepped, self._loss_scale(optimizer))
            self._add(unclipped, {"clipped": False, "definition": BEFORE_CLIPPING})
        if self._probed is not None and last:
            probed = self._probed.take(self._loss_scale(optimizer))
            self._add(probed, {"probed": True, "definition": DEFINITION})
        if last:
            self.disarm()

    def _add(self, gradients: dict[str, torch.Tensor], attrs: dict[str, Any]) -> None:
        for name, gradient in gradients.items():
            found = whole(gradient, keep=self._writes)
            if found is not None:
                self._found[name] = (self._keep(found, owned=True), attrs)

    def taken(self) -> Gradients:
        """Name -> (gradient, attributes of its array) of the step just done; forgets them."""
        found, self._found = self._found, {}
        return found

    def _stepped_by(self, optimizer: torch.optim.Optimizer) -> list[Tracked]:
        """The tracked weights of one optimizer; the last one has those of none, too."""
        own = {id(parameter) for parameter in optimizer_parameters(optimizer)}
        others = {id(parameter) for parameter in self._trained()} - own
        last = optimizer is self._optimizers[-1]
        return [
            each
            for each in self._tracked
            if id(each.parameter) in own or (last and id(each.parameter) not in others)
        ]

    def _trained(self) -> Iterator[nn.Parameter]:
        for optimizer in self._optimizers:
            yield from optimizer_parameters(optimizer)

    def _refuse_replaced(self) -> None:
        """Sharding replaces parameters: those that were found must be those that train."""
        present = {id(parameter) for parameter in self._model.parameters()}
        gone = [each.name for each in self._tracked if id(each.parameter) not in present]
        if gone:
            raise DynamicsError(
                f"{len(gone)} recorded weights, such as {gone[0]}, are no longer parameters of "
                "the model: attach the recorder after fully_shard(), accelerator.prepare() and the "
                "like, to the model and the optimizer that they made."
            )

    def _loss_scale(self, optimizer: torch.optim.Optimizer) -> float:
        if self._grad_scaler is not None:
            return float(self._grad_scaler.get_scale())
        scale = getattr(optimizer, "grad_scale", None)
        return 1.0 if scale is None else float(scale)
