"""Live checks: what a merge did to the effective weights, what a reset left in the optimizer.

They measure right at the merge and the reset, when the answer is exact, and return JSON-like
facts. The callback of ReLoRA stores the facts as attributes of its events, where `dynamics audit`
reads them. A check that fails also gives a FailedCheckWarning at once.
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
from dynamics.recordings import ADAPTER, SPECTRA, decoded
from probes.model.weights import Factors, Weight, find_weights
from probes.optimizers.nesting import innermost_optimizer


class FailedCheckWarning(UserWarning):
    """A live check failed: training continues, but it no longer does what it should."""


def record_defects(matrices: Mapping[str, np.ndarray]) -> dict[str, str]:
    """Defects that a single record shows: NaN or Inf, and dead adapters.

    An adapter is dead if its A and B are both zero: no gradient can reach either of them.

    Args:
        matrices: array path (`dynamics.recordings.matrix_path`, `factor_path`) -> (m, n) array.

    Returns:
        Array path -> one line that says what is wrong; empty for a sound record.

    Example:
        >>> from probes.checks import record_defects
        >>> record_defects({"weight/q_proj": np.array([[1.0, np.nan]])})
        {'weight/q_proj': 'weight/q_proj holds NaN or Inf'}
    """
    defects = {
        path: f"{decoded(path)} holds NaN or Inf"
        for path, values in matrices.items()
        # Spectra are padded with NaN. Their defects are found when they are measured.
        if not path.startswith(f"{SPECTRA}/") and not np.isfinite(values).all()
    }
    for path, values in matrices.items():
        adapter = path.removesuffix("/A")
        other = matrices.get(f"{adapter}/B")
        is_a = path.startswith(f"{ADAPTER}/") and path != adapter
        if is_a and other is not None and not (values.any() or other.any()):
            name = decoded(adapter.removeprefix(f"{ADAPTER}/"))
            defects[path] = f"A and B of {name} are both zero: no gradient reaches either"
    return defects


@dataclass(frozen=True)
class WeightBeforeMerge:
    """One adapted weight just before a merge; its tensors are copies on the CPU."""

    adapted: Weight
    weight: torch.Tensor  # W_eff, in the dtype in which the merge will store it
    factors: Factors


def weights_before_merge(model: nn.Module) -> list[WeightBeforeMerge]:
    """Copies of every adapted weight and its factors, for `merge_facts`.

    Args:
        model: a model with LoRA layers of PEFT, just before a merge.

    Example:
        >>> from peft import LoraConfig, get_peft_model
        >>> from probes.checks import weights_before_merge
        >>> layers = torch.nn.Sequential(torch.nn.Linear(6, 4), torch.nn.Linear(4, 6))
        >>> model = get_peft_model(layers, LoraConfig(r=2, target_modules=["0"]))
        >>> [(copy.adapted.name, tuple(copy.weight.shape)) for copy in weights_before_merge(model)]
        [('0.weight', (4, 6))]
    """
    copies = []
    for adapted in find_weights(model)[0]:
        factors = adapted.factors()
        if factors is not None:
            a, b = (each.to("cpu", copy=True) for each in (factors.a, factors.b))
            weight = adapted.read().cpu()  # a new tensor, because of the adapter
            copies.append(WeightBeforeMerge(adapted, weight, factors._replace(a=a, b=b)))
    return copies


@torch.no_grad()
def merge_facts(before: list[WeightBeforeMerge]) -> dict[str, Any]:
    """What a merge, and the reset of the adapters after it, did to the effective weights.

    The facts are those of the layer where W_eff changed most. W is the effective weight before,
    W' the one after, and D = s·B·A the update that was merged; all in float64:

    - relative_change: ‖W' - W‖ / ‖D‖ (divided by ‖W‖ where D is zero); 0 if the merge keeps W_eff.
    - tolerance: the largest relative_change that rounding can cause: W and W' rounded once each,
      eps·‖W‖, and the product twice, (r + 2)·eps·s·‖B‖‖A‖.
    - scale: <Δbase, D> / ‖D‖²; 1 for a faithful merge, 1/s for a merge of B·A without s.
    - worst_scaling, worst_layer: s and name of that layer.

    Args:
        before: the result of `weights_before_merge`, taken before the merge.

    Returns:
        The facts, JSON-like; empty if no weight is adapted.

    Example:
        >>> from peft import LoraConfig, get_peft_model
        >>> from probes.checks import merge_facts, weights_before_merge
        >>> from probes.relora import merge_and_reset
        >>> layers = torch.nn.Sequential(torch.nn.Linear(6, 4))
        >>> config = LoraConfig(r=2, lora_alpha=4, target_modules=["0"], init_lora_weights=False)
        >>> model = get_peft_model(layers, config)
        >>> before = weights_before_merge(model)
        >>> merge_and_reset(model, seed=0, step=100, with_scaling=False)
        1
        >>> facts = merge_facts(before)
        >>> round(facts["relative_change"], 3), round(facts["scale"], 3), facts["worst_scaling"]
        (0.5, 0.5, 2.0)
    """
    facts = [_facts_of(each) for each in before]
    return max(facts, key=lambda each: each[events.CHANGE] / each[events.TOLERANCE], default={})


def _facts_of(before: WeightBeforeMerge) -> dict[str, Any]:
    adapted, weight = before.adapted, before.weight.double()
    a, b, scaling, transposed = before.factors
    update = scaling * (b.double() @ a.double())
    if transposed:
        update = update.mT
    update = update.reshape(weight.shape)  # a convolution's factors are flat
    after = adapted.read().cpu().double()
    base = adapted.base()
    assert base is not None, "what has LoRA factors has a base"
    base_error = base.cpu().double() - weight  # Δbase - D
    size = update.norm().item()
    products = abs(scaling) * (b.double().norm() * a.double().norm()).item()
    rounding = torch.finfo(adapted.dtype).eps * weight.norm().item()
    rounding += (a.shape[-2] + 2) * torch.finfo(a.dtype).eps * products
    relative_to = size or weight.norm().item() or 1.0
    scale = 1 + (base_error * update).sum().item() / size**2 if size > 0 else 1.0
    return {
        events.CHANGE: (after - weight).norm().item() / relative_to,
        # Never 0, because the worst layer is the one with the largest quotient change/tolerance.
        events.TOLERANCE: max(rounding / relative_to, torch.finfo(torch.float64).tiny),
        events.SCALE: scale,
        events.SCALING: scaling,
        events.WORST_LAYER: adapted.name,
    }


@torch.no_grad()
def optimizer_state_facts(
    optimizer: Any, parameters: Mapping[str, nn.Parameter]
) -> dict[str, float | int | str]:
    """What Adam still holds for these parameters; call it right after a reset.

    - zero_exp_avg, zero_exp_avg_sq: share of the entries of m and v that are zero or gone.
    - momentum_without_variance: share of the entries with v = 0 and |m| > ε. The next step there is
      lr·m̂/(√v̂ + ε), where v̂ holds little but the new gradient: it can be orders of magnitude larger
      than any earlier step.
    - worst_parameter: the parameter with the largest such share; if none has any, the one with the
      fullest state.
    - largest_step: Adam's step count; 0 where the state is gone.
    - parameters_with_state: how many of the parameters have any state.

    Args:
        optimizer: a torch optimizer, or a wrapper of one such as accelerate's.
        parameters: name -> parameter.

    Returns:
        The facts, JSON-like.

    Example:
        >>> from probes.checks import optimizer_state_facts
        >>> layer = torch.nn.Linear(6, 4)
        >>> adam = torch.optim.Adam(layer.parameters())
        >>> layer(torch.ones(3, 6)).sum().backward()
        >>> adam.step()
        >>> facts = optimizer_state_facts(adam, {"weight": layer.weight})
        >>> facts["largest_step"], facts["zero_exp_avg"], facts["parameters_with_state"]
        (1.0, 0.0, 1)
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
    """Give a FailedCheckWarning for each verdict that failed; other verdicts are ignored.

    Args:
        verdicts: e.g. of `dynamics.auditing.events.merge_verdict`.

    Example:
        >>> import warnings
        >>> from dynamics.auditing.report import Severity, Verdict
        >>> from probes.checks import warn_about
        >>> bad = Verdict(
        ...     check="moments", severity=Severity.FAIL, step=80, measured=0.5, threshold=0.0,
        ...     meaning="Prune both moments with one mask.",
        ... )
        >>> with warnings.catch_warnings(record=True) as caught:
        ...     warnings.simplefilter("always")
        ...     warn_about([bad])
        >>> print(caught[0].message)
        Step 80, moments: Prune both moments with one mask. Measured 0.5; at most 0 is sound.
    """
    for verdict in verdicts:
        if verdict.severity is Severity.FAIL:
            where = f" ({verdict.matrix})" if verdict.matrix else ""
            measured, threshold = verdict.measured, verdict.threshold
            assert measured is not None
            assert threshold is not None
            assert math.isfinite(threshold)
            warnings.warn(
                f"Step {verdict.step}, {verdict.check}{where}: {verdict.meaning} "
                f"Measured {measured:.3g}; at most {threshold:.3g} is sound.",
                FailedCheckWarning,
                stacklevel=3,
            )
