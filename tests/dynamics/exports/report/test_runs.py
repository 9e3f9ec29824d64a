"""Reports of runs: they are measured and audited; results remember where they are from."""

import json

import pytest

import dynamics as dy
from dynamics.exports.report.audits import audits_of
from dynamics.exports.report.sources import result_of
from tests.dynamics.exports.report.test_page import document_of


@pytest.fixture
def recording(write_recording, tmp_path):
    return write_recording(tmp_path / "run.zarr", merges=(10,))


@pytest.fixture
def other(write_recording, tmp_path):
    return write_recording(tmp_path / "other.zarr", seed=1)


def test_runs_are_measured_and_audited(recording, other, tmp_path):
    path = dy.report({"mine": recording, "theirs": other}, tmp_path / "both.html")
    assert [each["name"] for each in document_of(path)["runs"]] == ["mine", "theirs"]
    text = path.read_text(encoding="utf-8")
    assert "both runs pass the audit" in text
    assert str(recording) in text


def test_the_verdicts_are_those_of_an_audit(recording):
    result = result_of(recording)
    (checks,) = audits_of(result).values()
    assert {each.check: each.severity for each in checks} == {
        each.check: each.severity for each in dy.audit(recording).summaries
    }
    assert "audits" not in result_of(recording, audit=False).attrs


def test_a_saved_result_and_a_run_make_one_report(recording, other, tmp_path):
    saved = dy.save(dy.analyze(other), tmp_path / "other.analysis.zarr")
    result = result_of([recording, saved])
    assert result.run.values.tolist() == ["run", "other"]
    audits = audits_of(result)
    assert audits["run"]
    assert not audits["other"]


def test_a_comparison_remembers_its_sources_and_verdicts(recording, other, tmp_path):
    analysis = dy.analyze(recording).assign_attrs(
        command="dynamics analyze run.zarr", audits=json.dumps({"finite": ["pass", "All finite."]})
    )
    both = dy.compare({"a": analysis, "b": other})
    sources = json.loads(both.attrs["sources"])
    assert sources["a"]["source"] == str(recording)
    assert sources["a"]["command"] == "dynamics analyze run.zarr"
    assert sources["b"]["source"] == str(other)
    assert "command" not in sources["b"]
    assert json.loads(both.attrs["audits"])["a"]["finite"][0] == "pass"
    assert dy.select_run(both, "b").attrs["source"] == str(other)


@pytest.mark.slow
def test_a_recording_of_spectra_says_why_it_is_not_audited(tmp_path):
    torch = pytest.importorskip("torch")
    from probes import Recorder

    model = torch.nn.Linear(6, 6)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    with Recorder(model, optimizer, tmp_path / "run.zarr", every=1, spectra_only=True):
        for _ in range(2):
            model(torch.ones(1, 6)).sum().backward()
            optimizer.step()
    (checks,) = audits_of(result_of(tmp_path / "run.zarr")).values()
    assert [each.check for each in checks] == ["audit"]
    assert "singular values" in checks[0].meaning
    path = dy.report(tmp_path / "run.zarr", tmp_path / "report.html")
    assert "Nothing is broken" not in path.read_text(encoding="utf-8")
