"""Histories that are none, as they were found on the hub, and odd ones that are fine."""

import numpy as np
import pytest

import dynamics as dy
from dynamics.auditing import Severity

SHAPE = (40, 30)


def trained(steps, noise=0.3, seed=0):
    """Weights of a training: a way to a minimum, with steps that are random in part."""
    rng = np.random.default_rng(seed)
    start, end = rng.standard_normal((2, *SHAPE))
    weights, wander = {}, np.zeros(SHAPE)
    for step in steps:
        wander = wander + noise * rng.standard_normal(SHAPE) / len(steps) ** 0.5
        share = step / max(steps)
        weights[step] = ((1 - share) * start + share * end + wander).astype(np.float32)
    return weights


def saved(tmp_path, weights, dtype=np.float32):
    folder = tmp_path / "run"
    folder.mkdir()
    for step, weight in weights.items():
        tensors = {
            f"layers.{i}.up_proj.weight": (weight * (1 - 2 * i)).astype(dtype) for i in range(2)
        }
        tensors["layers.0.frozen.weight"] = np.ones(SHAPE, dtype)
        tensors["layers.0.small.weight"] = np.full((3, 3), step % 2, dtype)  # returns
        np.savez(folder / f"step_{step}.npz", **tensors)
    return folder


def verdicts(folder):
    report = dy.audit(folder)
    return report.of("distinct_checkpoints"), report.of("ordered_history")


STEPS = range(0, 2000, 100)


@pytest.mark.parametrize("seed", range(4))
@pytest.mark.parametrize("steps", [STEPS, [0, *(2**i for i in range(11))]])
@pytest.mark.parametrize("dtype", [np.float32, np.float16])
def test_a_training_passes(tmp_path, seed, steps, dtype):
    distinct, ordered = verdicts(saved(tmp_path, trained(list(steps), seed=seed), dtype))
    assert [each.severity for each in (*distinct, *ordered)] == [Severity.PASS] * 2
    assert ordered[0].measured < 1.2


def test_branches_that_hold_the_last_weights_are_named(tmp_path):
    weights = trained(list(STEPS))
    for step in (300, 700, 1100):
        weights[step] = weights[1900]
    distinct, _ = verdicts(saved(tmp_path, weights))
    (found,) = distinct
    assert found.severity is Severity.FAIL
    assert found.measured == 4
    assert (
        "The steps 300, 700, 1100, 1900 hold the same numbers in 2 of 2 matrices" in found.meaning
    )


def test_one_wrong_shard_is_named_by_its_matrix(tmp_path):
    folder = saved(tmp_path, trained(list(STEPS)))
    last, wrong = (dict(np.load(folder / f"step_{step}.npz")) for step in (1900, 500))
    name = "layers.1.up_proj.weight"
    np.savez(folder / "step_500.npz", **{**wrong, name: last[name]})
    distinct, _ = verdicts(folder)
    assert [(each.matrix, each.step) for each in distinct] == [(name, 500)]


def test_a_zero_with_another_sign_is_the_same_number(tmp_path):
    weights = trained(list(STEPS))
    weights[100][0, 0] = 0.0
    weights[900] = weights[100].copy()
    weights[900][0, 0] = -0.0
    distinct, _ = verdicts(saved(tmp_path, weights))
    assert distinct[0].severity is Severity.FAIL


@pytest.mark.parametrize(
    ("before", "now", "severity"),
    [(0, 1, "pass"), (1, 2, "pass"), (256, 512, "fail"), (16, 32, "warn")],
)
def test_a_rest_is_harmless_at_the_first_steps_only(tmp_path, before, now, severity):
    weights = trained([0, *(2**i for i in range(12))])
    weights[now] = weights[before]
    distinct, _ = verdicts(saved(tmp_path, weights))
    assert [each.severity.value for each in distinct] == [severity]
    assert f"The steps {before} and {now} hold the same weights" in distinct[0].meaning


@pytest.mark.parametrize("place", [400, 900, 1300])
def test_a_checkpoint_of_another_step_or_run_lies_far_off(tmp_path, place):
    weights = trained(list(STEPS))
    weights[place] = trained(list(STEPS), seed=9)[place]
    _, ordered = verdicts(saved(tmp_path, weights))
    assert [(each.step, each.severity) for each in ordered] == [(place, Severity.FAIL)]


@pytest.mark.parametrize("place", [300, 900, 1500])
def test_two_neighbours_that_are_exchanged_are_named(tmp_path, place):
    weights = trained(list(STEPS))
    weights[place], weights[place + 100] = weights[place + 100], weights[place]
    _, ordered = verdicts(saved(tmp_path, weights))
    assert [(each.step, each.severity) for each in ordered] == [(place, Severity.FAIL)]
    assert f"{place} and {place + 100} exchanged" in ordered[0].meaning
    a, b, c, d = (weights[place + each].astype(float) for each in (-100, 0, 100, 200))
    way = [np.linalg.norm(x - y) for x, y in ((a, b), (b, c), (c, d), (a, c), (b, d))]
    expected = sum(way[:3]) / (way[3] + way[1] + way[4])
    assert ordered[0].measured == pytest.approx(expected, rel=1e-5)
    assert ordered[0].threshold == 1.05


def test_steps_that_alternate_are_no_disorder(tmp_path):
    """Full batches at the edge of stability: each step goes back along the last one."""
    weights = trained(list(range(0, 60, 3)))
    across = 0.2 * np.random.default_rng(3).standard_normal(SHAPE)
    for step in weights:
        weights[step] = (weights[step] + across * (-1) ** step).astype(np.float32)
    distinct, ordered = verdicts(saved(tmp_path, weights))
    assert [each.severity for each in (*distinct, *ordered)] == [Severity.PASS] * 2


def test_a_short_history_is_not_checked(tmp_path):
    _, ordered = verdicts(saved(tmp_path, trained([0, 100, 200, 300])))
    assert ordered[0].severity is Severity.NOT_CHECKED


def test_hashes_are_stated_on_the_hub_only(tmp_path):
    with pytest.raises(dy.DynamicsError, match="--hashes"):
        dy.audit(saved(tmp_path, trained([0, 1])), hashes_only=True)
