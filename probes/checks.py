"""Live checks: what a merge did to the effective weights, what a reset left in the optimizer.

They measure at the moment when it can be told exactly, and give JSON-like facts: ReLoRA's
callback puts them into the attributes of its events, where `dynamics audit` reads them. What
fails is also a FailedCheckWarning at once.
"""

import math
import warnings
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import nn

from dynamics.auditing import events
from dynamics.auditing.report import Severity, Verdict
from dynamics.recordings import ADAPTER, SPECTRA, factor_path
from probes.model.optimizers import innermost_optimizer
from probes.model.parameters import Factors, Tracked, tracked_parameters


class FailedCheckWarning(UserWarning):
    """A live check failed: the training goes on, and goes wrong."""


def record_defects(matrices: Mapping[str, np.ndarray]) -> dict[str, str]:
    """What one record alone shows to be wrong: array path -> one line; empty for a sound one.

    NaN or Inf anywhere, and an adapter whose A and B are both zero: no gradient can reach either.

    Args:
        matrices: array path (`layout.matrix_path`, `layout.factor_path`) -> (m, n).
    """
    defects = {
        path: f"{path} holds NaN or Inf"
        for path, values in matrices.items()
        # Spectra are padded with NaN; what was wrong was seen when they were measured.
        if not path.startswith(f"{SPECTRA}/") and not np.isfinite(values).all()
    }
    for path, values in matrices.items():
        parameter = path.removeprefix(f"{ADAPTER}/").removesuffix("/A")
        other = matrices.get(factor_path(parameter, "B"))
        is_a = path == factor_path(parameter, "A")
        if is_a and other is not None and not (values.any() or other.any()):
            defects[path] = f"A and B of {parameter} are both zero: no gradient reaches either"
    return defects


@dataclass(frozen=True)
class WeightBeforeMerge:
    """One adapted weight just before a merge; copies on the CPU."""

    tracked: Tracked
    weight: torch.Tensor  # W_eff, in the dtype that the merge will store it in
    factors: Factors


def weights_before_merge(model: nn.Module) -> list[WeightBeforeMerge]:
    """Copies of every adapted weight and its factors, to be given to `merge_facts`."""
    kept = []
    for tracked in tracked_parameters(model):
        factors = tracked.factors()
        if factors is not None:
            a, b = (each.to("cpu", copy=True) for each in (factors.a, factors.b))
            weight = tracked.effective_weight().cpu()  # a new tensor, of W and the adapter
            kept.append(WeightBeforeMerge(tracked, weight, factors._replace(a=a, b=b)))
    return kept


@torch.no_grad()
def merge_facts(before: list[WeightBeforeMerge]) -> dict[str, Any]:
    """What a merge and the reset after it did, of the layer where W_eff changed most.

    With W the effective weight before, W' after, D = s·B·A merged, all in float64:

    relative_change   ‖W' - W‖ / ‖D‖ (of ‖W‖ where D is zero); 0 for a merge that keeps W_eff
    tolerance         the largest that rounding can make of it: W and W' rounded once each,
                      eps·‖W‖, and the product twice, (r + 2)·eps·s·‖B‖‖A‖
    scale             <Δbase, D> / ‖D‖², 1 for a faithful merge, 1/s for one without its scale
    worst_scaling, worst_layer   s and name of that layer

    Args:
        before: from `weights_before_merge`, taken before the merge.

    Returns:
        The facts, JSON-like; empty if nothing is adapted.
    """
    facts = [_facts_of(each) for each in before]
    return max(facts, key=lambda each: each[events.CHANGE] / each[events.TOLERANCE], default={})


def _facts_of(before: WeightBeforeMerge) -> dict[str, Any]:
    tracked, weight = before.tracked, before.weight.double()
    a, b, scaling, transposed = before.factors
    update = scaling * (b.double() @ a.double())
    if transposed:
        update = update.T
    after = tracked.effective_weight().cpu().double()
    base_error = tracked.parameter.detach().cpu().double() - weight  # Δbase - D
    size = update.norm().item()
    products = abs(scaling) * (b.double().norm() * a.double().norm()).item()
    rounding = torch.finfo(tracked.parameter.dtype).eps * weight.norm().item()
    rounding += (a.shape[0] + 2) * torch.finfo(a.dtype).eps * products
    relative_to = size or weight.norm().item() or 1.0
    scale = 1 + (base_error * update).sum().item() / size**2 if size > 0 else 1.0
    return {
        events.CHANGE: (after - weight).norm().item() / relative_to,
        # Not 0 where everything is: the worst layer is found by a quotient.
        events.TOLERANCE: max(rounding / relative_to, torch.finfo(torch.float64).tiny),
        events.SCALE: scale,
        events.SCALING: scaling,
        events.WORST_LAYER: tracked.name,
    }


@torch.no_grad()
def optimizer_state_facts(
    optimizer: Any, parameters: Mapping[str, nn.Parameter]
) -> dict[str, float | int | str]:
    """What is left in an Adam's state of these parameters; measured right after a reset.

    zero_exp_avg, zero_exp_avg_sq   share of the entries of m and v that are zero or gone
    momentum_without_variance       share with v = 0 and |m| > ε: the next step there is
                                    lr·m̂/(√v̂ + ε) with little but the new gradient in v̂, and
                                    can exceed any trained step by orders of magnitude
    worst_parameter                 where that share is largest, or the state fullest
    largest_step                    Adam's step count, 0 where the state is gone
    parameters_with_state           how many of the parameters have any

    Args:
        optimizer: a torch optimizer, or a wrapper of one such as accelerate's.
        parameters: name -> parameter.
    """
    optimizer = innermost_optimizer(optimizer)
    epsilons = {
        parameter: group.get("eps", 0.0)
        for group in optimizer.param_groups
        for parameter in group["params"]
    }
    total = zero_first = zero_second = unbalanced = with_state = 0
    largest_step = 0.0
    worst, worst_key = "", (-1.0, -1.0)
    for name, parameter in parameters.items():
        state = optimizer.state.get(parameter, {})
        with_state += bool(state)
        first, second = state.get("exp_avg"), state.get("exp_avg_sq")
        size = parameter.numel()
        empty_first, empty_second, bad = size, size, 0
        if first is not None and second is not None:
            without_variance = (second == 0) & (first.abs() > epsilons.get(parameter, 0.0))
            empty_first, empty_second = int((first == 0).sum()), int((second == 0).sum())
            bad = int(without_variance.sum())
        total, unbalanced = total + size, unbalanced + bad
        zero_first, zero_second = zero_first + empty_first, zero_second + empty_second
        largest_step = max(largest_step, float(state.get("step", 0)))
        key = (bad / size, 1 - min(empty_first, empty_second) / size)
        if key > worst_key:
            worst, worst_key = name, key
    total = max(total, 1)
    return {
        events.ZERO_FIRST: zero_first / total,
        events.ZERO_SECOND: zero_second / total,
        events.UNBALANCED: unbalanced / total,
        events.WORST_PARAMETER: worst,
        "largest_step": largest_step,
        "parameters_with_state": with_state,
    }


def warn_about(verdicts: list[Verdict]) -> None:
    """A FailedCheckWarning for each verdict that failed."""
    for verdict in verdicts:
        if verdict.severity is Severity.FAIL:
            where = f" ({verdict.matrix})" if verdict.matrix else ""
            measured, threshold = verdict.measured, verdict.threshold
            assert measured is not None
            assert threshold is not None
            assert math.isfinite(threshold)
            warnings.warn(
                f"Step {verdict.step}, {verdict.check}{where}: {verdict.meaning} "
                f"Measured {measured:.3g}, at most {threshold:.3g} is sound.",
                FailedCheckWarning,
                stacklevel=3,
            )
