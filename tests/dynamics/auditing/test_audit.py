"""The audit on written recordings whose defects are known, and `dynamics audit`."""

import json
import sys
from dataclasses import replace

import numpy as np
import pytest

import dynamics as dy
from dynamics.auditing import Severity
from dynamics.auditing.merges import named_scale
from dynamics.auditing.report import Report, Verdict
from dynamics.auditing.rounding import product_error, rounded
from dynamics.cli import app
from dynamics.errors import MissingError
from dynamics.recordings import GRADIENT, WEIGHT, RecordingWriter, factor_path, matrix_path
from dynamics.runs.run import Event, Factored

NAMES = [f"model.layers.{layer}.mlp.up_proj.weight" for layer in range(3)]
OUT, IN, R, SCALING = 24, 16, 4, 2.0


def write(store, *, steps=range(0, 40, 5), merges=(10, 20, 30), events=True, seed=0, **spoil):
    """A ReLoRA run that never trained: each record adds a little to B, each merge is exact.

    spoil: merge(update) -> what the base gets; weight, gradient: (step, name, matrix) changes it.
    """
    rng = np.random.default_rng(seed)
    merge = spoil.get("merge", lambda update: update)
    writer = RecordingWriter(store, {})
    bases = {name: rng.normal(0, 0.05, (OUT, IN)).astype(np.float32) for name in NAMES}
    a = {name: rng.uniform(-0.25, 0.25, (R, IN)).astype(np.float32) for name in NAMES}
    b = {name: np.zeros((OUT, R), np.float32) for name in NAMES}
    happened = 0
    for step in steps:
        for at in [m for m in merges if happened <= m < step]:
            for name in NAMES:
                bases[name] += merge(np.float32(SCALING) * (b[name] @ a[name]))
                a[name] = rng.uniform(-0.25, 0.25, (R, IN)).astype(np.float32)
                b[name] = np.zeros((OUT, R), np.float32)
            if events:
                writer.event(Event(at, "merge", {}))
        happened = step
        matrices, attrs = {}, {}
        for name in NAMES:
            b[name] += rng.normal(0, 0.003, b[name].shape).astype(np.float32) * (step > 0)
            weight = bases[name] + np.float32(SCALING) * (b[name] @ a[name])
            gradient = rng.normal(0, 1, weight.shape).astype(np.float32)
            for kind, matrix in (("weight", weight), ("gradient", gradient)):
                if kind in spoil:
                    spoil[kind](step, name, matrix)
            matrices |= {
                matrix_path(WEIGHT, name): weight,
                matrix_path(GRADIENT, name): gradient,
                factor_path(name, "A"): a[name],
                factor_path(name, "B"): b[name],
            }
        for path in matrices:
            attrs[path] = {"source_dtype": "float32", "scaling": SCALING, "transposed": False}
        writer.append(step, matrices, attrs=attrs, scalars={"loss": 5 - step / 10})
    return store


def severities(report):
    return {each.check: each.severity for each in report.summaries}


def named(report):
    return {each.check for each in report.summaries if each.severity is Severity.FAIL}


@pytest.mark.parametrize("seed", range(10))
@pytest.mark.parametrize("events", [True, False])
def test_a_faithful_recording_passes_with_and_without_events(tmp_path, seed, events):
    report = dy.audit(write(tmp_path / "run.zarr", seed=seed, events=events))
    assert named(report) == set()
    assert severities(report)["merge_fidelity"] is Severity.PASS
    assert severities(report)["adapter_reset"] is Severity.PASS
    # What bounds the residual is near it: a threshold that is orders above would see nothing.
    for merge in report.of("merge_fidelity"):
        assert merge.measured < merge.threshold < 1e-4


@pytest.mark.parametrize("events", [True, False])
def test_a_merge_without_its_scale_is_seen_with_and_without_events(tmp_path, events):
    run = write(tmp_path / "run.zarr", events=events, merge=lambda update: update / SCALING)
    merges = dy.audit(run).of("merge_fidelity")
    assert len(merges) == 9
    assert all("forgot the scale s = 2" in each.meaning for each in merges)
    assert all(each.measured == pytest.approx(0.5, rel=1e-4) for each in merges)


def test_a_merge_error_is_seen_down_to_a_few_times_the_rounding(tmp_path):
    for factor, found in ((1 + 3e-4, True), (1 + 1e-7, False)):
        run = write(
            tmp_path / f"{factor}.zarr", merge=lambda update, f=factor: np.float32(f) * update
        )
        severity = severities(dy.audit(run))["merge_fidelity"]
        # Between float32 rounding and what TF32 products would explain, it is a warning.
        assert (severity in (Severity.WARN, Severity.FAIL)) is found


def test_merges_that_the_records_do_not_show_are_not_checked_and_say_why(tmp_path):
    report = dy.audit(write(tmp_path / "between.zarr", merges=(12,), steps=range(0, 20, 5)))
    verdicts = report.of("merge_fidelity")
    assert {each.severity for each in verdicts} == {Severity.NOT_CHECKED}
    assert "there is no record at the merge step 12" in verdicts[0].meaning
    report = dy.audit(write(tmp_path / "two.zarr", merges=(10, 12), steps=range(0, 20, 5)))
    assert "2 merges lie between the records 10 and 15" in report.of("merge_fidelity")[0].meaning
    assert named(report) == set()


def test_a_base_that_moves_between_merges_is_named(tmp_path):
    def drift(step, name, weight):
        if name == NAMES[1] and step >= 20:
            weight += np.float32(1e-3) * np.random.default_rng(1).normal(size=weight.shape).astype(
                np.float32
            )

    report = dy.audit(write(tmp_path / "run.zarr", weight=drift))
    failed = [each for each in report.of("frozen_base") if each.severity is Severity.FAIL]
    assert [(each.matrix, each.step) for each in failed] == [(NAMES[1], 20)]


def test_a_parameter_whose_gradient_is_always_zero_is_named(tmp_path):
    def dead(step, name, gradient):
        if name == NAMES[2]:
            gradient[:] = 0

    report = dy.audit(write(tmp_path / "run.zarr", gradient=dead))
    assert named(report) == {"zero_gradient"}
    assert [e.matrix for e in report.of("zero_gradient") if e.severity is Severity.FAIL] == [
        NAMES[2]
    ]


@pytest.mark.parametrize("value", [np.nan, np.inf])
@pytest.mark.parametrize("kind", ["weight", "gradient"])
def test_one_number_that_is_not_finite_is_named_with_its_place(tmp_path, kind, value):
    def spoil(step, name, matrix):
        if (step, name) == (15, NAMES[0]):
            matrix[2, 3] = value

    report = dy.audit(write(tmp_path / "run.zarr", **{kind: spoil}))
    assert named(report) == {"finite"}
    (failed,) = [each for each in report.of("finite") if each.severity is Severity.FAIL]
    assert (failed.matrix, failed.step) == (NAMES[0], 15)
    assert f"first in {kind} at step 15" in failed.meaning


def test_a_damaged_chunk_is_named_and_the_rest_is_audited(tmp_path):
    run = write(tmp_path / "run.zarr")
    chunk = run / "weight" / NAMES[0] / "c" / "3" / "0" / "0"
    chunk.write_bytes(chunk.read_bytes()[:20])
    report = dy.audit(run)
    assert named(report) == {"readable"}
    assert f"weight/{NAMES[0]} in record 3" in report.of("readable")[0].meaning


def test_a_damaged_checkpoint_is_named(llama_checkpoints, tmp_path):
    import shutil

    shutil.copytree(llama_checkpoints, tmp_path / "run")
    path = tmp_path / "run/checkpoint-4/model.safetensors"
    path.write_bytes(path.read_bytes()[:100])
    report = dy.audit(tmp_path / "run")
    assert named(report) == {"readable"}
    assert [each.step for each in report.of("readable")] == [4]


def test_a_run_without_records_is_refused(tmp_path):
    RecordingWriter(tmp_path / "empty.zarr", {})
    with pytest.raises(MissingError, match="has no records yet, so there is nothing to audit"):
        dy.audit(tmp_path / "empty.zarr")


@pytest.mark.parametrize(
    ("scale", "scaling", "meaning"),
    [
        (0.5, 2.0, "forgot the scale s = 2"),
        (0.0, 2.0, "thrown away"),
        (4.0, 4.0, "s = 4 was applied twice"),
        (2.0, 4.0, "merged twice"),
        (2.0, 2.0, "s = 2 was applied twice; merge s·B·A once - or the update was merged twice"),
        (-1.0, 2.0, "subtracted"),
        (0.8, 2.0, "the base got 0.8 times the update"),
        (1.0, 1.0, "something else was added"),
    ],
)
def test_scales_have_names(scale, scaling, meaning):
    assert meaning in named_scale(scale, scaling, 1e-3)


@pytest.mark.parametrize("dtype", ["float32", "float16", "bfloat16"])
def test_rounded_is_what_torch_stores(dtype):
    torch = pytest.importorskip("torch")
    values = np.random.default_rng(0).standard_normal(2000) * np.logspace(-6, 3, 2000)
    values[:3] = 0.0, 1.0, -1.5
    stored = torch.from_numpy(values).to(getattr(torch, dtype)).double().numpy()
    np.testing.assert_array_equal(rounded(values, dtype), stored)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_no_computed_product_is_further_from_the_exact_one_than_its_bound(dtype):
    torch = pytest.importorskip("torch")
    generator = torch.Generator().manual_seed(0)
    for r in (1, 8, 64):
        left = torch.randn(40, r, generator=generator).to(getattr(torch, dtype))
        right = torch.randn(r, 30, generator=generator).to(getattr(torch, dtype))
        computed = (0.3 * (left @ right)).double().numpy()
        exact = Factored(left.float().numpy(), right.float().numpy(), 0.3, dtype)
        error = np.abs(computed - exact.product())
        bound = product_error(exact)
        assert (error <= bound).all()
        assert error.max() > bound[error == error.max()].min() / (40 + 40 * r)


def test_the_worst_of_a_report_is_its_verdict():
    def verdict(severity, measured):
        return Verdict(check="c", severity=severity, meaning="m", measured=measured, threshold=1.0)

    report = Report("run", (verdict(Severity.PASS, 0.5), verdict(Severity.NOT_CHECKED, None)))
    assert (report.severity, report.failed) == (Severity.PASS, False)
    report = Report("run", tuple(verdict(Severity.FAIL, x) for x in (2.0, 8.0, float("inf"))))
    assert report.failed
    assert report.summaries[0].counts == {"fail": 3, "warn": 0, "pass": 0, "not checked": 0}
    assert json.loads(report.to_json())["verdicts"][2]["measured"] is None
    assert replace(report, verdicts=()).severity is Severity.NOT_CHECKED


@pytest.fixture
def command(monkeypatch, capfd):
    monkeypatch.setenv("COLUMNS", "160")

    def call(*arguments):
        monkeypatch.setattr(sys, "argv", ["dynamics", *map(str, arguments)])
        code = 0
        try:
            app.main()
        except SystemExit as ended:
            code = 0 if ended.code is None else ended.code
        return code, *capfd.readouterr()

    return call


def test_the_command_passes_a_sound_run(command, tmp_path):
    code, out, err = command("audit", write(tmp_path / "run.zarr"))
    assert (code, err) == (0, "")
    assert "merge_fidelity" in out
    assert out.splitlines()[-1].startswith("pass: ")


def test_the_command_fails_a_run_and_says_where(command, tmp_path):
    run = write(tmp_path / "run.zarr", merge=lambda update: update / SCALING)
    code, out, _ = command("audit", run)
    assert code == 1
    assert "forgot the scale s = 2" in " ".join(out.split())
    assert out.splitlines()[-1].startswith("fail: merge_fidelity failed, ")


def test_json_holds_every_verdict_and_nothing_else(command, tmp_path):
    run = write(tmp_path / "run.zarr", merge=lambda update: update / SCALING)
    code, out, err = command("audit", run, "--json")
    document = json.loads(out)
    assert (code, err, document["severity"]) == (1, "", "fail")
    assert len(document["verdicts"]) == len(dy.audit(run).verdicts)
    (check,) = [each for each in document["checks"] if each["check"] == "merge_fidelity"]
    assert check["counts"] == {"fail": 9, "warn": 0, "pass": 0, "not checked": 0}
    assert check["worst"]["measured"] == pytest.approx(0.5, rel=1e-4)


def test_a_path_that_is_no_run_is_one_line_and_exit_code_2(command, tmp_path):
    code, out, err = command("audit", tmp_path / "nothing")
    assert (code, out) == (2, "")
    assert err.startswith("error: ")
    assert len(err.splitlines()) == 1
