"""Runs whose first record is no beginning, and records that are one."""

import numpy as np
import pytest

from dynamics.auditing import Severity, audit
from dynamics.auditing.history import beyond_chance
from tests.dynamics.auditing.test_order import SHAPE, STEPS, saved, trained


def found(tmp_path, weights):
    return audit(saved(tmp_path, weights)).of("step_zero")


def beside(weight, seed=5):
    """A step near by: nearer than the records, and not equal to one."""
    noise = np.random.default_rng(seed).standard_normal(SHAPE)
    return (weight + 0.02 * noise).astype(np.float32)


def short():
    """Four records, too few for `ordered_history`, of the first part of a training."""
    return {step: each for step, each in trained(range(0, 800, 100)).items() if step < 400}


def drawn(seed=7, shape=SHAPE):
    return np.random.default_rng(seed).standard_normal(shape).astype(np.float32)


@pytest.mark.parametrize("seed", range(4))
@pytest.mark.parametrize("steps", [STEPS, [0, 1000, 2000], [0, *(2**i for i in range(11))]])
def test_a_training_begins_where_it_begins(tmp_path, seed, steps):
    (verdict,) = found(tmp_path, trained(list(steps), seed=seed))
    assert verdict.severity is Severity.PASS
    assert verdict.measured < 1


@pytest.mark.parametrize("steps", [STEPS, [0, *(2**i for i in range(11))]])
def test_a_first_record_that_is_trained_is_named(tmp_path, steps):
    weights = trained(list(steps))
    steps = list(weights)
    weights[0] = beside(weights[steps[-3]])
    (verdict,) = found(tmp_path, weights)
    assert (verdict.severity, verdict.step) == (Severity.FAIL, 0)
    assert "step 0 may be of a later step" in verdict.meaning
    (first, second, last) = (weights[step].astype(float) for step in (0, steps[1], steps[-3]))
    expected = np.linalg.norm(second - first) / np.linalg.norm(last - first)
    assert verdict.measured == pytest.approx(expected, rel=1e-4)


def test_a_record_that_is_of_the_beginning_is_named_beside_it(tmp_path):
    weights = short()
    weights[200] = beside(weights[0])
    (verdict,) = found(tmp_path, weights)
    assert verdict.severity is Severity.FAIL
    assert "step 0 may be of a later step, or step 200 of an earlier one" in verdict.meaning


@pytest.mark.parametrize("step", [0, 200, 300])
def test_a_record_of_another_seed_is_named(tmp_path, step):
    weights = short()
    weights[step] = drawn()
    (verdict,) = found(tmp_path, weights)
    assert (verdict.severity, verdict.step) == (Severity.FAIL, step)
    assert verdict.threshold == pytest.approx(4 / (2 * 40 * 30) ** 0.5)


def test_what_another_check_has_named_is_not_named_again(tmp_path):
    weights = trained(list(STEPS))
    weights[900] = drawn()
    report = audit(saved(tmp_path, weights))
    (ordered,), (beginning,) = report.of("ordered_history"), report.of("step_zero")
    assert (ordered.severity, ordered.step) == (Severity.FAIL, 900)
    assert beginning.severity is Severity.PASS


@pytest.mark.parametrize(
    ("moved", "severity"), [(0.1, Severity.PASS), (2.0, Severity.WARN)], ids=["little", "far"]
)
def test_a_trained_start_is_odd_only_where_the_run_leads_far_away(tmp_path, moved, severity):
    """Fine-tuning begins with a trained model, and stays near it."""
    start = drawn(1, (40, 4)) @ drawn(2, (4, 30)) + drawn(3)
    change = moved * np.linalg.norm(start) / 35
    weights = {step: start + change * step / 200 * drawn(4) for step in (0, 100, 200)}
    weights = {step: each.astype(np.float32) - step / 1e5 for step, each in weights.items()}
    (verdict,) = found(tmp_path, weights)
    assert verdict.severity is severity
    assert ("Step 0 is trained" in verdict.meaning) == (severity is Severity.WARN)


def test_two_records_are_not_checked(tmp_path):
    (verdict,) = found(tmp_path, trained([0, 100]))
    assert verdict.severity is Severity.NOT_CHECKED


@pytest.mark.parametrize("shape", [(16, 64), (300, 32), (200, 200)])
@pytest.mark.parametrize("law", ["normal", "uniform"])
def test_independent_entries_stay_below_chance(shape, law):
    rng = np.random.default_rng(0)
    draw = rng.standard_normal if law == "normal" else lambda s: rng.uniform(-1, 1, s)
    values = [beyond_chance(draw(shape)) for _ in range(20)]
    assert 0.85 < np.median(values) < max(values) < 1.01
    matrix = draw(shape)
    matrix[:, 0] *= 5
    direct = np.linalg.norm(matrix, 2) / np.linalg.norm(draw(shape), 2)
    assert beyond_chance(matrix) > 1.2
    assert direct > 1.2


def test_no_spectrum_of_few_directions_or_of_zero():
    assert beyond_chance(np.ones((4, 1000))) is None
    assert beyond_chance(np.zeros((40, 40))) is None
    rng = np.random.default_rng(0)
    sparse = rng.uniform(-1, 1, (128, 384)) * (rng.random((128, 384)) < 0.03)
    assert beyond_chance(sparse) is None
