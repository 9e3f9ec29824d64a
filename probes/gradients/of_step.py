"""The recorded gradients of one optimizer step: which they are, and how they are taken."""

from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch
from torch import nn

from dynamics.errors import DynamicsError
from dynamics.recordings import GRADIENT
from probes.contexts import in_backward
from probes.gradients.absent import AbsentGradients
from probes.gradients.of_layers import DEFINITION as OF_LAYERS
from probes.gradients.probed import DEFINITION, ProbedGradients, frozen_weights
from probes.gradients.stand_ins import is_frozen
from probes.gradients.unclipped import BEFORE_CLIPPING, UnclippedGradients
from probes.model.parameters import Tracked
from probes.model.sharding import data_parallel_group, gather, is_sharded, needed_ranks
from probes.optimizers.nesting import optimizer_parameters

PROBED_GRADIENT = "probed_gradient"
GRADIENT_BEFORE_CLIPPING = "gradient_before_clipping"

CONSUMED = (
    "parameter.grad as optimizer.step() found it, or as the first call of its closure left it: "
    "after accumulation over micro-batches, averaging over ranks, unscaling and clipping, at the "
    "weights before the step; a record's weights are those after the step, and a step that a "
    "gradient scaler skipped has no gradient"
)

# name -> (what the record keeps of it, attributes of its array)
Gradients = dict[str, tuple[Any, dict[str, Any]]]


class StepGradients:
    """Takes the gradients that an optimizer step consumes: gathered and unscaled.

    Args:
        model: the model that is trained.
        tracked: the recorded weights.
        optimizers: in the order in which they step.
        record: the words that `Recorder` was given as `record`.
        process_group: the group that the user gave, see `data_parallel_group`.
        grad_scaler: the scaler of the loss, or None.
        writes: whether this process writes. Other processes only help to gather and to average.
        keep: called as keep(gradient, owned=...); see `Contents.keep`.

    Attributes:
        definition: what the recorded gradients are, in one sentence each.
        needed_ranks: the ranks that must take part; empty if this process can do it alone.
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
        # Weights that no parameter holds, but whose layers form them in each call.
        self._formed = [each for each in tracked if each.weight.base_trains]
        tracked = [each for each in tracked if each.has_gradient]
        self._tracked = tracked
        self._optimizers = optimizers
        self._consumed = GRADIENT in record
        self._grad_scaler = grad_scaler
        self._writes = writes
        self._keep = keep
        self._gradients: Gradients = {}
        self._found: set[str] = set()
        self._absent = AbsentGradients()
        self._armed = False
        self._scales: tuple[float, Any] | None = None  # when the last optimizer stepped
        self._probed: ProbedGradients | None = None
        self._unclipped: UnclippedGradients | None = None
        probed, unclipped = PROBED_GRADIENT in record, GRADIENT_BEFORE_CLIPPING in record
        averaged = frozen_weights(tracked) + self._formed if probed else []
        if unclipped:
            averaged = averaged + [
                each
                for each in tracked
                if each.parameter.requires_grad and not is_sharded(each.parameter)
            ]
        group = data_parallel_group(model, averaged, process_group) if probed or unclipped else None
        if probed:
            self._probed = ProbedGradients(model, tracked, self._formed, self._trained, group)
        if unclipped:
            self._unclipped = UnclippedGradients(tracked, group)
        self.needed_ranks = needed_ranks(tracked, group if averaged else None)
        trained = BEFORE_CLIPPING if unclipped else CONSUMED
        self.definition = f"{trained}. An array with the attribute 'probed' holds the {DEFINITION}"

    def arm(self) -> None:
        """Watch the backward passes from now on, because the next step is recorded."""
        self.disarm()
        self._armed = True
        for collector in (self._unclipped, self._probed):
            if collector is not None:
                collector.arm()

    def disarm(self) -> None:
        """Stop watching, and leave the model as it was."""
        self._armed, self._scales = False, None
        for collector in (self._probed, self._unclipped):
            if collector is not None:
                collector.disarm()

    def take(self, optimizer: torch.optim.Optimizer) -> None:
        """Keep the gradients that a step of this optimizer is about to consume."""
        # A fused optimizer that unscales inside its step has this attribute.
        self._scales = self._loss_scale(optimizer), getattr(optimizer, "grad_scale", None)
        self._take({id(parameter) for parameter in optimizer_parameters(optimizer)}, *self._scales)
        if in_backward():
            if self._probed is not None:
                self._probed.stepped()
        elif optimizer is self._optimizers[-1]:
            self._refuse_replaced()
            self.finish()

    def finish(self) -> None:
        """Keep what is left when all gradients of a step are there. Safe to call twice.

        These are the gradients of weights that no optimizer steps, frozen ones among them.
        """
        if not self._armed or self._scales is None:
            return
        stepped = {id(parameter) for parameter in self._trained()}
        self._take({id(each.parameter) for each in self._tracked} - stepped, *self._scales)
        if self._probed is not None:
            probed = self._probed.take(self._scales[0])
            self._add(self._tracked, probed, {"probed": True, "definition": DEFINITION})
            self._add(self._formed, probed, {"probed": True, "definition": OF_LAYERS})
        self.disarm()
        self._absent.note(self._expected(), self._found)

    def _take(self, stepped: set[int], loss_scale: float, scale: Any) -> None:
        taken = [each for each in self._tracked if id(each.parameter) in stepped]
        for each in taken if self._consumed else ():
            if each.parameter.grad is not None:
                self._found.add(each.name)
                gradient = gather(each.parameter.grad, keep=self._writes)
                if gradient is not None:
                    if scale is not None:
                        gradient = gradient / scale.to(gradient.device)
                    self._keep_parts(each, gradient, {}, owned=scale is not None)
        if self._unclipped is not None:
            unclipped = self._unclipped.take(taken, loss_scale)
            self._add(taken, unclipped, {"clipped": False, "definition": BEFORE_CLIPPING})

    def _expected(self) -> set[str]:
        trained = self._consumed or self._unclipped is not None
        return {
            each.name
            for each in self._tracked
            if (trained and each.parameter.requires_grad)
            or (self._probed is not None and is_frozen(each.parameter))
        } | {each.name for each in self._formed if self._probed is not None}

    def _add(
        self,
        tracked: Sequence[Tracked],
        gradients: dict[str, torch.Tensor],
        attrs: dict[str, Any],
    ) -> None:
        for each in tracked:
            if each.name in gradients:
                self._found.add(each.name)
                values = gather(gradients[each.name], keep=self._writes)
                if values is not None:
                    self._keep_parts(each, values, attrs, owned=True)

    def _keep_parts(
        self, each: Tracked, gradient: torch.Tensor, attrs: dict[str, Any], *, owned: bool
    ) -> None:
        for part, matrix in each.matrices(gradient):
            kept = self._keep(matrix, owned=owned)
            self._gradients[part.name] = (kept, {**part.attrs, **attrs})

    def pop(self) -> Gradients:
        """The gradients of the step just done; forgets them."""
        gradients, self._gradients, self._found = self._gradients, {}, set()
        return gradients

    def close(self) -> None:
        """Stop watching; say which gradients never arrived."""
        self.disarm()
        self._absent.close()

    def _trained(self) -> Iterator[nn.Parameter]:
        for optimizer in self._optimizers:
            yield from optimizer_parameters(optimizer)

    def _refuse_replaced(self) -> None:
        """Sharding replaces parameters: the tracked ones must still be those of the model."""
        present = {id(parameter) for parameter in self._model.parameters()}
        gone = [each.name for each in self._tracked if id(each.parameter) not in present]
        if gone:
            raise DynamicsError(
                f"{len(gone)} recorded weights, such as {gone[0]}, are no longer parameters of "
                "the model: attach the recorder to the model and the optimizer that fully_shard() "
                "or accelerator.prepare() made, after calling it."
            )

    def _loss_scale(self, optimizer: torch.optim.Optimizer) -> float:
        if self._grad_scaler is not None:
            return float(self._grad_scaler.get_scale())
        scale = getattr(optimizer, "grad_scale", None)
        return 1.0 if scale is None else float(scale)
