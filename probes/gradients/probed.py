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
from probes.model.parameters import Tracked
from probes.model.sharding import is_sharded, means_over_ranks

DEFINITION = (
    "gradient of a weight that does not train, taken for the recording only: summed over the "
    "micro-batches and averaged over the data-parallel ranks as a trained weight's, without the "
    "loss scale, and before clipping, which never saw it; at the weights before the step"
)


class ProbedGradients:
    """Collects dL/dW of frozen weights for single optimizer steps, without changing the training.

    `arm` makes the frozen weights require a gradient. A hook moves each gradient into a buffer of
    this class before anything can see it in `parameter.grad`. So clipping, gradient scalers,
    optimizers and DDP see the same gradients as without it. `take` and `disarm` freeze the weights
    again. In between, each weight costs one more matrix product per backward pass, and a buffer of
    its size on its device. At other steps it costs nothing.

    Two kinds of weights are skipped: those that cannot have a gradient (quantised ones), and frozen
    ones that already hold a gradient, because it belongs to the user.

    Args:
        tracked: the weights; `arm` chooses the frozen ones among them each time.
        trained: gives the parameters that the optimizers step, whenever gradients arrive.
        process_group: the ranks to average over; each must arm and take at the same steps.
    """

    def __init__(
        self,
        tracked: Sequence[Tracked],
        trained: Callable[[], Iterator[nn.Parameter]],
        process_group: Any = None,
    ):
        self._tracked = tracked
        self._trained = trained
        self._process_group = process_group
        self._armed: list[Tracked] = []
        self._handles: list[Any] = []
        self._sums: dict[str, torch.Tensor] = {}
        self._last_seen = 0

    def arm(self) -> None:
        """Collect gradients from now on, until `take` or `disarm`."""
        self.disarm()
        for each in self._tracked:
            parameter = each.parameter
            if (
                not parameter.requires_grad
                and parameter.grad is None
                and (parameter.is_floating_point() or parameter.is_complex())
            ):
                parameter.requires_grad_(True)
                self._armed.append(each)
                self._handles.append(
                    parameter.register_post_accumulate_grad_hook(self._collector(each.name))
                )

    def take(self, loss_scale: float = 1.0) -> dict[str, torch.Tensor]:
        """Name -> gradient since `arm`, divided by `loss_scale`; freezes the weights again.

        A weight that no backward pass reached on any rank is left out.
        """
        names, sums = [each.name for each in self._armed], self._sums
        parameters = {each.name: each.parameter for each in self._armed}
        self.disarm()
        if self._process_group is not None and names:
            sums = means_over_ranks(parameters, sums, self._process_group)
        return {
            name: sums[name] if loss_scale == 1 else sums[name] / loss_scale
            for name in names
            if name in sums
        }

    def disarm(self) -> None:
        """Freeze the weights again and forget the collected gradients. Safe to call twice."""
        for handle in self._handles:
            handle.remove()
        for each in self._armed:
            each.parameter.requires_grad_(False)
        self._armed, self._handles, self._sums, self._last_seen = [], [], {}, 0

    def _collector(self, name: str) -> Callable[[torch.Tensor], None]:
        def collect(parameter: torch.Tensor) -> None:
            gradient, parameter.grad = parameter.grad, None
            assert gradient is not None
            if self._started_over():
                self._sums.clear()
            # As autograd does: keep the first one, in its dtype, and add the next ones to it.
            gradient = gradient.to_dense() if gradient.is_sparse else gradient.detach()
            if name in self._sums:
                self._sums[name] += gradient
            else:
                self._sums[name] = gradient

        return collect

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
