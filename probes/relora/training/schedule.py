"""Learning-rate multipliers as functions of the number of optimizer steps done."""

import math
from collections.abc import Callable
from functools import partial

from probes.relora.config import TrainConfig


def linear_warmup_decay(
    step: int, *, max_steps: int, warmup_steps: int, min_lr_ratio: float = 0.0
) -> float:
    """Multiplier of a linear warm-up from 0 to 1 and a linear decay from 1 to `min_lr_ratio`.

    m(t) = t / w for t < w, then 1 - (1 - m_min)·(t - w)/(T - w), with w = `warmup_steps` and
    T = `max_steps`; m_min from T on. This is the schedule of the full-rank baseline.

    Args:
        step: optimizer steps done, t.
        max_steps: T.
        warmup_steps: w.
        min_lr_ratio: m_min.

    Example:
        >>> from probes.relora import linear_warmup_decay
        >>> [linear_warmup_decay(t, max_steps=100, warmup_steps=20) for t in (0, 10, 20, 60, 100)]
        [0.0, 0.5, 1.0, 0.5, 0.0]
    """
    if step < warmup_steps:
        return step / warmup_steps
    return 1.0 - (1.0 - min_lr_ratio) * _progress(step, max_steps, warmup_steps)


def jagged_cosine(
    step: int,
    *,
    max_steps: int,
    warmup_steps: int,
    restart_warmup_steps: int,
    reset_every: int,
    min_lr_ratio: float,
) -> float:
    """Multiplier of ReLoRA's jagged cosine.

    m(t) = t / w                                              for t < w (the first warm-up)
    m(t) = (t - kR) / ρ · c(kR + ρ)                           for kR <= t < kR + ρ, k >= 1
    m(t) = c(t) = m_min + (1 - m_min)·(1 + cos(π·(t - w)/(T - w))) / 2               otherwise

    with w = `warmup_steps`, R = `reset_every`, ρ = `restart_warmup_steps`, T = `max_steps`.
    Each merge empties the optimizer state of the adapters. So the first Adam steps after it are
    badly estimated; the ramp from 0 keeps them short. It ends on the cosine. The step that directly
    follows a merge therefore has learning rate 0.

    Source: Lialin et al. 2023, arXiv 2307.05695, section 3 ("jagged cosine scheduler").

    Args:
        step: optimizer steps done, t.
        max_steps: T.
        warmup_steps: w.
        restart_warmup_steps: ρ; 0 gives the cosine without ramps.
        reset_every: R.
        min_lr_ratio: m_min.

    Example:
        >>> from probes.relora import jagged_cosine
        >>> options = {"max_steps": 100, "warmup_steps": 20, "restart_warmup_steps": 4}
        >>> options |= {"reset_every": 20, "min_lr_ratio": 0.1}
        >>> [round(jagged_cosine(t, **options), 3) for t in (0, 10, 20, 22, 24, 40, 100)]
        [0.0, 0.5, 0.0, 0.497, 0.994, 0.0, 0.0]
    """
    if step < warmup_steps:
        return step / warmup_steps
    since_merge = step % reset_every
    if step >= reset_every and since_merge < restart_warmup_steps:
        end_of_ramp = step - since_merge + restart_warmup_steps
        return (
            since_merge
            / restart_warmup_steps
            * _cosine(_progress(end_of_ramp, max_steps, warmup_steps), min_lr_ratio)
        )
    return _cosine(_progress(step, max_steps, warmup_steps), min_lr_ratio)


def schedule_of(config: TrainConfig) -> Callable[[int], float]:
    """The published schedule of the method of a config: a function step -> multiplier.

    LoRA without merges has the cosine of ReLoRA without its ramps: there is nothing to restart.
    """
    if not config.adapted:
        return partial(
            linear_warmup_decay, max_steps=config.max_steps, warmup_steps=config.warmup_steps
        )
    restarts = config.method == "relora"
    return partial(
        jagged_cosine,
        max_steps=config.max_steps,
        warmup_steps=config.warmup_steps,
        restart_warmup_steps=config.restart_warmup_steps if restarts else 0,
        reset_every=config.reset_every,
        min_lr_ratio=config.min_lr_ratio,
    )


def _progress(step: int, max_steps: int, warmup_steps: int) -> float:
    # At most 1, because a cosine would rise again. max(1, ...) if the warm-up lasts to the end.
    return min(1.0, (step - warmup_steps) / max(1, max_steps - warmup_steps))


def _cosine(progress: float, min_lr_ratio: float) -> float:
    return min_lr_ratio + (1.0 - min_lr_ratio) * 0.5 * (1.0 + math.cos(math.pi * progress))
