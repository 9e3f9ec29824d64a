"""Each planted defect is named by its check and by no other; healthy runs pass."""

import pytest

from dynamics.auditing import Severity
from tests.dynamics.auditing import defects
from tests.short_run import MERGES

pytestmark = pytest.mark.slow

ADAPTED = 14  # seven modules in each of two layers


def checks(report, severity=Severity.FAIL):
    """The checks whose worst verdict has this severity."""
    return {each.check for each in report.summaries if each.severity is severity}


@pytest.mark.parametrize("seed", range(3))
def test_a_healthy_run_passes(audited_run, seed):
    run = audited_run(f"healthy-{seed}", seed=seed)
    assert {each.severity for each in run.recording.summaries} == {Severity.PASS}
    assert len(run.recording.summaries) == 18
    assert {each.severity for each in run.checkpoints.summaries} == {
        Severity.PASS,
        Severity.NOT_CHECKED,
    }
    assert run.warned == []
    for report in (run.recording, run.checkpoints):
        for merge in report.of("merge_fidelity"):
            assert merge.severity is Severity.PASS
            assert merge.measured < merge.threshold / 4
        assert len(report.of("merge_fidelity")) == ADAPTED * len(MERGES)


def test_a_healthy_full_rank_run_passes(audited_run):
    run = audited_run("full-rank", method="full_rank")
    for report in (run.recording, run.checkpoints):
        assert checks(report) == checks(report, Severity.WARN) == set()
        assert report.severity is Severity.PASS
        assert {"finite", "readable", "frozen_layer"} <= checks(report, Severity.PASS)
    assert "zero_gradient" in checks(run.recording, Severity.PASS)
    (merges,) = run.recording.of("merge_fidelity")
    assert merges.meaning == "the run holds no adapters"


@pytest.mark.parametrize("mode", ["random_prune", "magnitude_prune"])
def test_a_reset_by_pruning_passes(audited_run, mode):
    run = audited_run(mode, optimizer_reset=mode, max_steps=9)
    assert run.recording.severity is Severity.PASS
    assert checks(run.recording, Severity.NOT_CHECKED) == {"ordered_history"}  # four records
    assert run.warned == []


def test_a_merge_without_its_scale_is_checks(audited_run):
    run = audited_run("without-scale", defects.merge_without_scale, max_steps=14)
    assert checks(run.recording) == {"merge_fidelity", "live_merge"}
    assert checks(run.checkpoints) == {"merge_fidelity"}
    for report in (run.recording, run.checkpoints):
        for merge in report.of("merge_fidelity"):
            assert merge.severity is Severity.FAIL
            assert merge.measured == pytest.approx(0.5, rel=1e-5)
            assert merge.threshold < 1e-4
            assert "base changed by 0.5 times s·B·A" in merge.meaning
            assert "the merge forgot the scale s = 2" in merge.meaning
    assert len(run.warned) == 2
    assert run.warned[0].startswith("Step 6, live_merge (model.layers.")
    assert "forgot the scale s = 2" in run.warned[0]


def test_an_update_that_was_thrown_away_is_checks(audited_run):
    run = audited_run("thrown-away", defects.merge_with_scale(0.0), max_steps=9)
    assert checks(run.recording) == {"merge_fidelity", "live_merge"}
    for check in ("merge_fidelity", "live_merge"):
        for merge in run.recording.of(check):
            assert "so the cycle's update was thrown away" in merge.meaning
            assert merge.measured == pytest.approx(1)


def test_adapters_that_start_at_zero_are_checks(audited_run):
    run = audited_run("zero-start", defects.zero_start, max_steps=14)
    for report in (run.recording, run.checkpoints):
        assert checks(report) == {"dead_adapter"}
        dead = report.of("dead_adapter")
        assert len(dead) == ADAPTED
        assert all(each.severity is Severity.FAIL for each in dead)
    assert "in 3 records (steps 0 to 6)" in run.recording.of("dead_adapter")[0].meaning


@pytest.mark.parametrize(
    ("which", "live"), [("AB", {"live_merge"}), ("A", set())], ids=["both", "A-only"]
)
def test_a_reset_that_did_not_take_is_checks(audited_run, which, live):
    run = audited_run(f"kept-{which}", defects.reset_undone(which), max_steps=14)
    assert checks(run.recording) == {"adapter_reset"} | live
    assert checks(run.checkpoints) == {"adapter_reset"}
    for restart in run.recording.of("adapter_reset"):
        assert restart.severity is Severity.FAIL
        assert restart.measured > 0.98
        assert "28 of 28 components point in the old direction" in restart.meaning
    if live:
        assert "the update counts twice" in run.warned[0]


def test_moments_pruned_with_two_masks_are_checks(audited_run):
    run = audited_run(
        "apart",
        defects.moments_pruned_apart,
        optimizer_reset="random_prune",
        prune_ratio=0.9,
        max_steps=14,
    )
    assert checks(run.recording) == {"moments"}
    for reset in run.recording.of("moments"):
        assert reset.measured == pytest.approx(0.9 * 0.1, abs=0.015)
        assert "keep the first moment although the second was set to zero" in reset.meaning
    assert len(run.warned) == 2
    assert checks(run.checkpoints) == set()  # they do not hold it
    assert "moments" in checks(run.checkpoints, Severity.NOT_CHECKED)


def test_an_optimizer_that_kept_its_state_is_checks(audited_run):
    run = audited_run("state-kept", defects.optimizer_not_reset, max_steps=14)
    assert checks(run.recording) == {"optimizer_reset"}
    assert all(each.measured == 1 for each in run.recording.of("optimizer_reset"))
    assert "clear the optimizer's state of exactly these parameters" in run.warned[0]


def test_updates_lost_to_the_rounding_of_a_bfloat16_base_are_checks(audited_run):
    run = audited_run("bfloat16", defects.bfloat16_base, learning_rate=2e-4, max_steps=14)
    for report in (run.recording, run.checkpoints):
        assert checks(report) == {"rounding_loss"}
        assert checks(report, Severity.WARN) == set()
        for loss in report.of("rounding_loss"):
            assert 0.1 < loss.measured < 0.8
            assert "bfloat16" in loss.meaning
            assert "keep the base weights in float32" in loss.meaning


@pytest.mark.parametrize(
    ("frozen", "fails", "warns"),
    [
        # One matrix, and a module that was frozen in all layers on purpose.
        (("layers.1.self_attn.q_proj", "up_proj"), {"model.layers.1.self_attn.q_proj.weight"}, 0),
        (("layers.1.",), 7, 0),
        (("layers.0.",), set(), 7),  # from the first layer up: fine-tuning does that on purpose
    ],
    ids=["one-matrix", "one-layer", "lowest-layer"],
)
def test_a_frozen_layer_is_distinguished_from_a_module_that_was_frozen_on_purpose(
    audited_run, frozen, fails, warns
):
    run = audited_run("frozen-" + "-".join(frozen), defects.frozen(*frozen), max_steps=14)
    for report in (run.recording, run.checkpoints):
        failed = [each for each in report.verdicts if each.severity is Severity.FAIL]
        assert {each.check for each in failed} == ({"frozen_layer"} if fails else set())
        matrices = {each.matrix for each in failed}
        assert fails in (matrices, len(matrices))
        warned = [each for each in report.of("frozen_layer") if each.severity is Severity.WARN]
        assert len(warned) == warns


def test_a_base_that_trains_beside_its_adapter_is_checks(audited_run):
    run = audited_run("base-trained", defects.trained_base, max_steps=14)
    # W_eff changes between a merge and the next record, too, and by more than rank allows.
    assert checks(run.recording) == {"frozen_base", "merge_fidelity", "rank_bound"}
    assert checks(run.checkpoints) == {"merge_fidelity"}
    for report in (run.recording, run.checkpoints):
        failed = {each.matrix for each in report.verdicts if each.severity is Severity.FAIL}
        assert failed == {"model.layers.1.mlp.up_proj.weight"}


def test_a_learning_rate_that_does_not_restart_is_a_warning(audited_run):
    run = audited_run("no-restart", restart_warmup_steps=0)
    assert checks(run.recording) == set()
    assert checks(run.recording, Severity.WARN) == {"learning_rate"}
    assert all(each.measured > 0.7 for each in run.recording.of("learning_rate"))
