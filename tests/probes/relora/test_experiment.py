"""Whole runs by the command line: killed and resumed, in two processes, as published."""

import json
import os
import shlex
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file
from typer.testing import CliRunner

import dynamics as dy
from dynamics.errors import DynamicsError
from probes.relora.__main__ import app
from tests.probes.relora.evaluation.scored_texts import PAIRS, SEQUENCE_LENGTH, write_pairs
from tests.short_run import TEXT

pytestmark = pytest.mark.slow

ROOT = Path(__file__).parents[3]
STEPS = 24
SETTINGS = {
    "num_layers": 2,
    "hidden_size": 32,
    "intermediate_size": 48,
    "vocab_size": 300,
    "sequence_length": 32,
    "batch_size": 4,
    "warmup_steps": 2,
    "restart_warmup_steps": 1,
    "reset_every": 6,
    "log_every": 3,
    "record_every": 3,
    "evaluate_every": 6,
    "save_every": 6,
    "validation_sequences": 8,
}


@pytest.fixture(scope="module")
def text(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("text")
    (folder / "numbers.txt").write_text(TEXT[:60_000])
    return folder


def arguments(method: str, output: Path, text: Path, *more: str, **changes: Any) -> list[str]:
    settings = [f"--set={name}={value}" for name, value in {**SETTINGS, **changes}.items()]
    given = ["train", "micro", "--method", method, "--output", str(output), "--text", str(text)]
    return [*given, "--steps", str(STEPS), *settings, *more]


def run(*words: str) -> str:
    result = CliRunner().invoke(app, list(words), catch_exceptions=False)
    assert result.exit_code == 0, result.output
    return result.output


def final_weights(output: Path) -> dict[str, torch.Tensor]:
    checkpoint = output / f"checkpoint-{STEPS}"
    files = sorted(checkpoint.rglob("*model.safetensors"))
    return {f"{path.name}:{n}": t for path in files for n, t in load_file(path).items()}


def losses(output: Path) -> list[dict[str, float]]:
    """What was logged about each step; not how fast."""
    state = json.loads((output / f"checkpoint-{STEPS}/trainer_state.json").read_text())
    names = ("step", "loss", "eval_loss", "grad_norm", "learning_rate", "num_input_tokens_seen")
    return [
        {name: entry[name] for name in names if name in entry} for entry in state["log_history"]
    ]


@pytest.fixture(scope="module")
def uninterrupted(text: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    output = tmp_path_factory.mktemp("whole") / "run"
    printed = run(*arguments("relora", output, text))
    assert "validation loss" in printed
    return output


def test_killed_and_resumed_the_run_goes_on_with_the_same_bits(
    uninterrupted: Path, text: Path, tmp_path: Path
) -> None:
    output = tmp_path / "run"
    words = arguments("relora", output, text)
    process = subprocess.Popen([sys.executable, "-m", "probes.relora", *words])
    # Between the first checkpoint and the last, wherever the signal finds it.
    while not (output / "checkpoint-6/base/model.safetensors").is_file():
        assert process.poll() is None
        time.sleep(0.001)
    process.send_signal(signal.SIGKILL)
    assert process.wait() == -signal.SIGKILL
    assert not (output / f"checkpoint-{STEPS}").exists()
    assert "Resuming after step" in run(*words, "--resume")
    expected = final_weights(uninterrupted)
    resumed = final_weights(output)
    assert expected.keys() == resumed.keys()
    assert all(torch.equal(resumed[name], expected[name]) for name in expected)
    assert losses(output) == losses(uninterrupted)
    one, other = (dy.open_run(each / "run.zarr") for each in (output, uninterrupted))
    assert one.steps.tolist() == other.steps.tolist() == list(range(0, STEPS + 1, 3))
    for name, values in other.scalars.items():
        np.testing.assert_array_equal(one.scalars[name], values)
    merges = [event.step for event in one.events if event.kind == "merge"]
    assert merges == [6, 12, 18]


def test_a_run_without_a_whole_checkpoint_starts_again_and_records_anew(
    uninterrupted: Path, text: Path, tmp_path: Path
) -> None:
    output = tmp_path / "run"
    shutil.copytree(uninterrupted, output)
    for checkpoint in output.glob("checkpoint-*"):
        if checkpoint.name == "checkpoint-6":  # killed while it was written
            (checkpoint / "base/model.safetensors").unlink()
        else:
            shutil.rmtree(checkpoint)
    assert "starting again" in run(*arguments("relora", output, text, "--resume"))
    expected = final_weights(uninterrupted)
    assert all(torch.equal(each, expected[name]) for name, each in final_weights(output).items())
    assert dy.open_run(output / "run.zarr").steps.tolist() == list(range(0, STEPS + 1, 3))


def test_what_was_never_started_or_was_another_run_is_not_resumed(
    uninterrupted: Path, text: Path, tmp_path: Path
) -> None:
    with pytest.raises(DynamicsError, match=r"No run in .* to resume; start it without --resume"):
        run(*arguments("relora", tmp_path, text, "--resume"))
    with pytest.raises(DynamicsError, match=r"trained to its end, step 24 of 24"):
        run(*arguments("relora", uninterrupted, text, "--resume"))
    with pytest.raises(DynamicsError, match=r"holds 4 checkpoints, the last of step 24; resume it"):
        run(*arguments("relora", uninterrupted, text))
    with pytest.raises(DynamicsError, match=r"trains on --text or on --data; give one of them"):
        run(*arguments("relora", tmp_path, text, "--data", "some/tokens"))


def test_a_run_evaluates_on_texts_and_on_blimp_as_it_trains(text: Path, tmp_path: Path) -> None:
    output, pairs = tmp_path / "run", write_pairs(tmp_path / "blimp")
    sentences = "".join(sentence for each in PAIRS.values() for pair in each for sentence in pair)
    (tmp_path / "texts").mkdir()
    (tmp_path / "texts/speech.txt").write_text(sentences)
    words = ["--blimp", str(pairs), "--perplexity", str(tmp_path / "texts"), "--limit", "2"]
    longer = {"sequence_length": SEQUENCE_LENGTH, "batch_size": 2}
    run(*arguments("full_rank", output, text, *words, **longer))
    recording = dy.open_run(output / "run.zarr")
    evaluated = [
        step for step in recording.steps if step and step % SETTINGS["evaluate_every"] == 0
    ]
    for name in ("blimp", "blimp_ties", "perplexity_speech", "eval_loss"):
        series = recording.scalars[name]
        assert recording.steps[np.isfinite(series)].tolist() == evaluated, name


def test_two_processes_train_the_run_of_one_and_the_first_records(
    text: Path, tmp_path: Path
) -> None:
    # Each process draws its own dropout, so without any they agree.
    alone, both = tmp_path / "alone", tmp_path / "both"
    run(*arguments("relora", alone, text, lora_dropout=0.0))
    torchrun = ["-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2"]
    words = arguments("relora", both, text, lora_dropout=0.0)
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    subprocess.run(
        [sys.executable, *torchrun, "-m", "probes.relora", *words],
        check=True,
        env=environment,
        capture_output=True,
    )
    expected = final_weights(alone)
    for name, each in final_weights(both).items():
        torch.testing.assert_close(each, expected[name], rtol=1e-3, atol=1e-5)
    one, other = (dy.open_run(each / "run.zarr") for each in (both, alone))
    assert one.steps.tolist() == other.steps.tolist()
    for name in ("loss", "eval_loss", "tokens"):
        np.testing.assert_allclose(one.scalars[name], other.scalars[name], rtol=1e-4)
    assert [event.kind for event in one.events] == [event.kind for event in other.events]


@pytest.mark.filterwarnings("ignore::probes.checks.FailedCheckWarning")
def test_the_audit_names_each_defect_of_the_published_code(text: Path, tmp_path: Path) -> None:
    output = tmp_path / "run"
    # Wide enough that 0.1 % of an adapter's moments is an entry or more.
    run(*arguments("relora", output, text, "--as-published", hidden_size=128, lora_alpha=16.0))
    report = dy.audit(output / "run.zarr")
    failed = {verdict.check: verdict for verdict in report.verdicts if verdict.severity == "fail"}
    assert {"merge_fidelity", "live_merge", "moments", "dead_adapter"} <= failed.keys()
    assert "the merge forgot the scale s = 2" in failed["merge_fidelity"].meaning
    assert failed["live_merge"].measured == pytest.approx(0.5, rel=1e-3)
    assert "both zero" in failed["dead_adapter"].meaning
    assert "one mask" in failed["moments"].meaning


@pytest.mark.filterwarnings("ignore::probes.checks.FailedCheckWarning")
def test_the_commands_of_the_docs_train(
    text: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    lines = (ROOT / "docs/experiment.md").read_text("utf-8").splitlines()
    start = "python -m probes.relora train "
    commands = [line.removeprefix(start) for line in lines if line.startswith(start)]
    for command in commands:
        words = shlex.split(command, comments=True)
        if not {"--resume", "--blimp"} & {*words}:
            small = [f"--set={name}={value}" for name, value in SETTINGS.items()]
            run("train", *words, "--text", str(text), "--steps", "9", *small)
    trained = {path.name: dy.open_run(path / "run.zarr") for path in Path("runs").iterdir()}
    assert trained.keys() == {"relora", "full_rank"}
    assert all(each.steps[-1] == 9 for each in trained.values())
