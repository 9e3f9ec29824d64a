"""Gradients of frozen weights, taken at recorded steps only.

A layer with an adapter computes y = W_base x + s·B·A·x. Its base weight does not train. But the
gradient that reaches it through its own path, dL/dW_base = Σ (dL/dy) xᵀ, equals dL/dW_eff: the
gradient that full-rank training would get at the same weights. With dropout on the input of the
adapter, the base path still sees all of x, as a full-rank layer would.
"""

from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch
from torch import nn

from dynamics.errors import DynamicsError
from probes.gradients.of_layers import LayerGradients
from probes.gradients.stand_ins import StandIns, is_frozen
from probes.model.parameters import Tracked
from probes.model.sharding import is_sharded, means_over_ranks

DEFINITION = (
    "gradient of a weight that does not train, taken for the recording only: summed over the "
    "micro-batches and averaged over the data-parallel ranks as a trained weight's, without the "
    "loss scale, and before clipping, which never saw it; at the weights before the step"
)


class ProbedGradients:
    """Collects dL/dW of weights that no optimizer holds, without changing the training.

    Between `arm` and `take`, for single optimizer steps, the model computes with stand-ins of its
    frozen weights, see `StandIns`: clipping, gradient scalers, optimizers, DDP and the user see the
    same gradients and the same flags as without it. Weights that a layer forms of several
    parameters have hooks instead, see `LayerGradients`. In between, each weight costs one more
    matrix product per backward pass, and a buffer of its size on its device. At other steps it
    costs nothing.

    Two kinds of weights are skipped: those that cannot have a gradient (quantised ones), and frozen
    ones that already hold a gradient, because it belongs to the user.

    Args:
        model: the model that is trained.
        tracked: the weights; those that are frozen when the model is called are probed.
        formed: the weights that their layers form.
        trained: gives the parameters that the optimizers step, whenever gradients arrive.
        process_group: the ranks to average over; each must arm and take at the same steps.
    """

    def __init__(
        self,
        model: nn.Module,
        tracked: Sequence[Tracked],
        formed: Sequence[Tracked],
        trained: Callable[[], Iterator[nn.Parameter]],
        process_group: Any = None,
    ):
        self._model = model
        self._parameters = {each.name: each.parameter for each in tracked}
        self._trained = trained
        self._process_group = process_group
        self._stand_ins = StandIns(self._collect)
        self._formed = {each.name: each.weight for each in formed}
        layers = {name: weight.module for name, weight in self._formed.items()}
        self._layers = LayerGradients(layers, self._collect)
        self._sums: dict[str, torch.Tensor] = {}
        self._last_seen = 0

    def arm(self) -> None:
        """Collect gradients from now on, until `take` or `disarm`."""
        self.disarm()
        self._stand_ins.arm(self._model, self._parameters)
        self._layers.arm()

    def take(self, loss_scale: float = 1.0) -> dict[str, torch.Tensor]:
        """Name -> gradient since `arm`, divided by `loss_scale`, where the weight is frozen now.

        A weight that no backward pass reached on any rank is left out.
        """
        frozen = {name: each for name, each in self._parameters.items() if is_frozen(each)}
        probed = {*frozen, *self._formed}
        sums = {name: each for name, each in self._sums.items() if name in probed}
        self.disarm()
        if self._process_group is not None and probed:
            like = frozen | {name: weight.base() for name, weight in self._formed.items()}
            sums = means_over_ranks(like, sums, self._process_group)
        return sums if loss_scale == 1 else {name: each / loss_scale for name, each in sums.items()}

    def disarm(self) -> None:
        """Leave the model alone and forget the collected gradients. Safe to call twice."""
        self._stand_ins.disarm()
        self._layers.disarm()
        self._sums, self._last_seen = {}, 0

    def stepped(self) -> None:
        """Learn that an optimizer steps within the backward pass, and may free its gradients."""
        self._last_seen = 0

    def _collect(self, name: str, gradient: torch.Tensor) -> None:
        if self._started_over():
            self._sums.clear()
        # As autograd does: keep the first one, in its dtype, and add the next ones to it.
        gradient = gradient.to_dense() if gradient.is_sparse else gradient.detach()
        if name in self._sums:
            self._sums[name] += gradient
        else:
            self._sums[name] = gradient

    def _started_over(self) -> bool:
        """Whether gradients of the trained parameters were dropped since the last call.

        This is `zero_grad` without a step: a gradient scaler found Inf, or the training loop
        skips a bad batch. Within one accumulation, the number of parameters that have a gradient
        never falls.
        """
        seen = sum(parameter.grad is not None for parameter in self._trained())
        before, self._last_seen = self._last_seen, seen
        return seen < before


def frozen_weights(tracked: Sequence[Tracked]) -> list[Tracked]:
    """The tracked weights that do not train now.

    Raises:
        DynamicsError: some of them are sharded. FSDP2 decides only once which gradients it reduces.
    """
    frozen = [each for each in tracked if not each.parameter.requires_grad]
    sharded = [each.name for each in frozen if is_sharded(each.parameter)]
    if sharded:
        raise DynamicsError(
            f"Gradients of frozen weights cannot be probed where they are sharded (FSDP2); "
            f"{len(sharded)} are, such as {sharded[0]}: give the recorder record=['weight', "
            "'gradient', 'adapter'], or select= without these weights."
        )
    return frozen
