import math
from dataclasses import replace

import pytest
from hypothesis import given
from hypothesis import strategies as st

from probes.relora import TrainConfig, jagged_cosine, linear_warmup_decay
from probes.relora.training.schedule import schedule_of

JAGGED = {
    "max_steps": 110,
    "warmup_steps": 10,
    "restart_warmup_steps": 4,
    "reset_every": 20,
    "min_lr_ratio": 0.1,
}


def cosine(step: int) -> float:
    return 0.1 + 0.9 * math.cos(math.pi * (step - 10) / 200) ** 2  # the half-angle form


@pytest.mark.parametrize(
    ("step", "expected"),
    [(0, 0.0), (5, 0.5), (9, 0.9), (10, 1.0), (60, 0.5), (85, 0.25), (110, 0.0), (200, 0.0)],
)
def test_linear_warmup_decay_at_its_corners(step: int, expected: float) -> None:
    assert linear_warmup_decay(step, max_steps=110, warmup_steps=10) == pytest.approx(expected)


def test_linear_decay_ends_at_the_given_ratio() -> None:
    ends_at = linear_warmup_decay(110, max_steps=110, warmup_steps=10, min_lr_ratio=0.2)
    assert ends_at == pytest.approx(0.2)


@pytest.mark.parametrize("schedule", [linear_warmup_decay, jagged_cosine])
def test_without_warmup_the_first_step_has_the_full_rate(schedule: object) -> None:
    options = {"max_steps": 10, "warmup_steps": 0, "min_lr_ratio": 0.1}
    if schedule is jagged_cosine:
        options |= {"restart_warmup_steps": 0, "reset_every": 5}
    assert schedule(0, **options) == 1.0  # type: ignore[operator]


@pytest.mark.parametrize(
    ("step", "expected"),
    [
        (0, 0.0),
        (5, 0.5),
        (10, 1.0),
        (19, cosine(19)),  # the last step before the first merge
        (20, 0.0),  # the first after it
        (21, cosine(24) * 1 / 4),
        (22, cosine(24) * 2 / 4),
        (23, cosine(24) * 3 / 4),
        (24, cosine(24)),
        (25, cosine(25)),
        (40, 0.0),
        (42, cosine(44) / 2),
        (59, cosine(59)),
        (60, 0.0),
        (64, cosine(64)),
        (109, cosine(109)),
        (110, 0.1),
        (300 + 15, 0.1),
    ],
)
def test_jagged_cosine_at_its_corners(step: int, expected: float) -> None:
    assert jagged_cosine(step, **JAGGED) == pytest.approx(expected, abs=1e-15)


def test_the_cosine_is_half_way_down_in_the_middle() -> None:
    assert jagged_cosine(60, **{**JAGGED, "reset_every": 1000}) == pytest.approx(0.55)


def test_without_restart_warmup_the_cosine_has_no_teeth() -> None:
    assert jagged_cosine(40, **{**JAGGED, "restart_warmup_steps": 0}) == pytest.approx(cosine(40))


@given(
    step=st.integers(0, 500),
    warmup=st.integers(0, 30),
    reset=st.integers(31, 90),
    ramp=st.integers(0, 30),
    ratio=st.floats(0, 1),
)
def test_the_jagged_cosine_never_exceeds_its_envelope(
    step: int, warmup: int, reset: int, ramp: int, ratio: float
) -> None:
    options = {"max_steps": 400, "warmup_steps": warmup, "min_lr_ratio": ratio}
    jagged = jagged_cosine(step, restart_warmup_steps=ramp, reset_every=reset, **options)
    smooth = jagged_cosine(step, restart_warmup_steps=0, reset_every=reset, **options)
    assert 0.0 <= jagged <= smooth <= 1.0


def test_each_method_gets_its_published_schedule(config: TrainConfig) -> None:
    relora = schedule_of(config)
    full_rank = schedule_of(replace(config, method="full_rank"))
    lora = schedule_of(replace(config, method="lora"))
    assert [relora(step) for step in (2, 4, 16)] == pytest.approx([1.0, 0.0, 0.0])
    assert [full_rank(step) for step in (2, 9, 16)] == pytest.approx([1.0, 0.5, 0.0])
    assert [lora(step) for step in (2, 9, 16)] == pytest.approx([1.0, 0.55, 0.1])
