"""`dy.audit` and the command `dynamics audit`."""

import json
import sys

import pytest

import dynamics as dy
from dynamics.cli import app
from dynamics.errors import DynamicsError, MissingError
from dynamics.recordings import RecordingWriter
from tests.dynamics.auditing.written_runs import SCALING, write_relora_run


@pytest.mark.slow
@pytest.mark.parametrize("opened", [str, lambda path: path, dy.open_run])
def test_an_audit_takes_a_path_or_a_run(tmp_path, opened):
    path = write_relora_run(tmp_path / "run.zarr")
    report = dy.audit(opened(path))
    assert report == dy.audit(path)
    assert report.run == str(path)
    assert len(report.summaries) == 18


def test_a_path_without_a_run_is_an_error(tmp_path):
    with pytest.raises(DynamicsError, match="nothing"):
        dy.audit(tmp_path / "nothing")


def test_a_run_without_records_cannot_be_audited(tmp_path):
    RecordingWriter(tmp_path / "empty.zarr", {})
    with pytest.raises(MissingError, match="has no records yet, so there is nothing to audit"):
        dy.audit(tmp_path / "empty.zarr")


@pytest.fixture
def run_command(monkeypatch, capfd):
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


@pytest.mark.slow
def test_the_command_passes_a_sound_run(run_command, tmp_path):
    code, out, err = run_command("audit", write_relora_run(tmp_path / "run.zarr"))
    assert (code, err) == (0, "")
    assert "merge_fidelity" in out
    assert out.splitlines()[-1].startswith("pass: ")


@pytest.mark.slow
def test_the_command_fails_a_run_and_says_where(run_command, tmp_path):
    run = write_relora_run(tmp_path / "run.zarr", merged=lambda update: update / SCALING)
    code, out, _ = run_command("audit", run)
    assert code == 1
    assert "forgot the scale s = 2" in " ".join(out.split())
    assert out.splitlines()[-1].startswith("fail: merge_fidelity failed, ")


@pytest.mark.slow
def test_json_holds_every_verdict_and_nothing_else(run_command, tmp_path):
    run = write_relora_run(tmp_path / "run.zarr", merged=lambda update: update / SCALING)
    code, out, err = run_command("audit", run, "--json")
    document = json.loads(out)
    assert (code, err, document["severity"]) == (1, "", "fail")
    assert len(document["verdicts"]) == len(dy.audit(run).verdicts)
    (check,) = [each for each in document["checks"] if each["check"] == "merge_fidelity"]
    assert check["counts"] == {"fail": 9, "warn": 0, "pass": 0, "not checked": 0}
    assert check["worst"]["measured"] == pytest.approx(0.5, rel=1e-4)


def test_a_path_without_a_run_is_one_line_and_exit_code_2(run_command, tmp_path):
    code, out, err = run_command("audit", tmp_path / "nothing")
    assert (code, out) == (2, "")
    assert err.startswith("error: ")
    assert len(err.splitlines()) == 1
