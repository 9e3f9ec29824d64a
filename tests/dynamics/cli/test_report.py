"""`dynamics report` and `dynamics report --follow`."""

import signal
import subprocess
import sys
import time
from urllib.error import HTTPError
from urllib.request import Request, urlopen

import numpy as np
import pytest

import dynamics as dy
from dynamics.recordings import RecordingWriter, matrix_path
from tests.dynamics.exports.report.test_page import document_of


@pytest.fixture
def runs(write_recording, tmp_path):
    return [
        write_recording(tmp_path / f"{name}/run.zarr", seed=seed)
        for seed, name in enumerate(("full", "lora"))
    ]


def names(path):
    return [each["name"] for each in document_of(path)["runs"]]


def test_a_run_becomes_one_file(command, here, runs):
    code, out, err = command("report", runs[0])
    assert (code, err) == (0, "")
    assert out.startswith("Saved to report.html (")
    text = (here / "report.html").read_text(encoding="utf-8")
    assert names(here / "report.html") == ["full/run"]
    assert "the run passes the audit" in text
    assert f"dynamics report {runs[0]}" in text
    assert (here / "report.cache").exists()


def test_runs_are_named_by_the_user_or_by_their_paths(command, here, runs):
    assert command("report", *runs, "-o", "a.html", "--no-audit")[0] == 0
    assert names(here / "a.html") == ["full", "lora"]
    assert "No verdicts are in this result" in (here / "a.html").read_text(encoding="utf-8")
    code, _, err = command("report", f"x={runs[0]}", f"y={runs[1]}", "-o", "b.html")
    assert code == 0, err
    assert names(here / "b.html") == ["x", "y"]


def test_a_path_may_have_an_equals_sign(command, here, write_recording, tmp_path):
    run = write_recording(tmp_path / "lr=1/run.zarr")
    code, _, err = command("report", run)
    assert code == 0, err
    assert names(here / "report.html") == ["lr=1/run"]


def test_what_cannot_be_measured_is_printed_and_the_rest_is_shown(
    command, here, write_recording, tmp_path
):
    def spoil(step, name, weight):
        if step == 10:
            weight[0, 0] = np.nan

    run = write_recording(tmp_path / "nan.zarr", spoil=spoil)
    code, out, err = command("report", run)
    assert code == 1
    assert "at step 10 holds NaN or Inf" in err
    assert out.startswith("Saved to report.html")
    text = (here / "report.html").read_text(encoding="utf-8")
    assert "matrices hold NaN or Inf" in text
    assert '<li class="bad"><strong>Broken?' in text


def test_saved_results_are_shown_with_the_command_that_made_them(command, here, runs):
    assert command("compare", f"x={runs[0]}", f"y={runs[1]}")[0] == 0
    code, _, err = command("report", "comparison.zarr", "--title", "Mine")
    assert code == 0, err
    text = (here / "report.html").read_text(encoding="utf-8")
    assert "<h1>Mine</h1>" in text
    assert f"dynamics compare x={runs[0]} y={runs[1]}" in text
    assert dy.load("comparison.zarr").attrs["made"][:10] in text


def test_what_cannot_be_done_is_refused_before_the_work(refused, here, runs, command):
    command("analyze", runs[0], "-o", "saved.zarr")
    assert "--port has no effect without --follow" in refused("report", runs[0], "--port", "0")
    assert "one run in progress" in refused("report", *runs, "--follow")
    assert "no saved result" in refused("report", "saved.zarr", "--follow")
    assert "--kinds has no effect" in refused("report", "saved.zarr", "--kinds", "weight")
    assert "Two runs have the same name" in refused("report", f"full/run={runs[1]}", runs[0])
    assert "does not exist" in refused("report", here / "nothing")
    (here / "report.html").write_text("mine")
    assert "--overwrite" in refused("report", runs[0])
    assert (here / "report.html").read_text() == "mine"


@pytest.mark.slow
def test_follow_serves_the_newest_report_until_ctrl_c(write_recording, tmp_path):
    store = write_recording(tmp_path / "run.zarr", steps=(0, 10))
    arguments = ["report", str(store), "--follow", "--port", "0", "--interval", "0.2"]
    process = subprocess.Popen(
        [sys.executable, "-m", "dynamics.cli", *arguments, "-o", str(tmp_path / "live.html")],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )
    try:
        address = process.stdout.readline().split()[1]
        assert address.startswith("http://127.0.0.1:")
        wait_for(address, "1")
        assert "2 records from step 0 to 10" in read(address)
        with pytest.raises(HTTPError, match="403"):
            read(Request(address, headers={"Host": "example.org"}))
        with pytest.raises(HTTPError, match="404"):
            read(address + "../../etc/passwd")
        writer = RecordingWriter(store, {"config": {"hidden_size": 8}}, resume=True)
        weights = {
            matrix_path("weight", name): np.eye(info.rows, info.cols, dtype=np.float32)
            for name, info in dy.open_run(store).matrices.items()
        }
        writer.append(20, weights)
        writer.close()
        wait_for(address, "2")
        assert "3 records from step 0 to 20" in read(address)
        process.send_signal(signal.SIGINT)
        out, err = process.communicate(timeout=30)
        assert process.returncode == 0, err
        assert "step 20" in out
        assert names(tmp_path / "live.html") == [f"{tmp_path.name}/run"]
    finally:
        process.kill()
        process.wait()


def read(address):
    return urlopen(address, timeout=10).read().decode()


def wait_for(address, version):
    end = time.monotonic() + 30
    while read(address + "version") != version:
        assert time.monotonic() < end
        time.sleep(0.1)


@pytest.mark.slow
def test_a_port_that_is_taken_is_named(command, runs):
    from dynamics.exports.report.following import LivePage, serving

    with serving(LivePage(), 0) as address:
        port = address.rstrip("/").rpartition(":")[2]
        code, _, err = command("report", runs[0], "--follow", "--port", port)
        assert code == 2
        assert f"Cannot serve at port {port}" in err
