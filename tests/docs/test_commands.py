"""The commands of README.md and of docs/ run, but for those that are named here with a reason."""

import re
import shlex
import shutil

import pytest
import torch
from safetensors.torch import load_file
from typer.testing import CliRunner

import dynamics as dy
from dynamics.cli.app import app
from tests.docs.test_pages import ROOT, all_pages

# A part of the command -> why it is not run here.
NOT_RUN = {
    "make ": "the targets of the Makefile: CI runs them, and test_demo.py what the demo does",
    "pip install": "installs packages; test_package.py installs the wheel",
    "python -m pytest": "these tests",
    "python -m venv": "an environment of its own",
    "python -m probes.relora": "trains for minutes; test_main.py runs every command",
    "python docs/": "takes the study's 27 runs; test_results.py makes the tables of the page",
    "torchrun": "trains for days; test_several_processes.py does it small",
    "s3://": "needs a bucket; test_s3.py has one",
    "hf://": "needs a network",
    "--follow": "runs until it is stopped; test_following.py",
    "--device cuda": "needs a GPU",
    "--scheduler": "needs a cluster; test_workers.py starts one",
    "--workers": "starts processes; test_workers.py",
    "--to wandb": "logs to the account of whoever runs it; test_trackers.py",
}
RUNS = ["run.zarr", "full", "relora", "checkpoints"]


def commands():
    """(page, command) of each line in a shell block, without comments."""
    for page in all_pages():
        text = page.read_text("utf-8")
        for block in re.findall(r"^ *```(?:sh|bash)\n(.*?)```", text, re.MULTILINE | re.DOTALL):
            if "#!/bin/bash" in block:  # a job for a cluster: test_workers.py runs it
                continue
            for line in block.splitlines():
                if command := line.partition(" #")[0].strip():
                    yield str(page.relative_to(ROOT)), command


def reason(command):
    return next((why for part, why in NOT_RUN.items() if part in command), None)


def pages_with_commands():
    return sorted({page for page, command in commands() if reason(command) is None})


@pytest.fixture(scope="module")
def runs(runs_of_examples, tmp_path_factory):
    """A folder with everything that the pages name."""
    folder = tmp_path_factory.mktemp("pages")
    for name in RUNS:
        shutil.copytree(runs_of_examples / name, folder / name)
    shutil.copytree(folder / "run.zarr", folder / "live.zarr")
    for method, name in {"full_rank": "full", "relora": "relora"}.items():
        shutil.copytree(folder / name, folder / "runs" / method)
    both = dy.compare({name: folder / name / "run.zarr" for name in ("full", "relora")})
    dy.save(both, folder / "comparison.zarr")
    (folder / "ckpts").mkdir()
    for checkpoint in (folder / "checkpoints").iterdir():
        step = checkpoint.name.removeprefix("checkpoint-")
        shutil.copytree(checkpoint, folder / f"run/global_step_{step}/actor")
        torch.save(load_file(checkpoint / "model.safetensors"), folder / f"ckpts/step_{step}.pt")
    return folder


@pytest.mark.slow
@pytest.mark.parametrize("page", pages_with_commands())
def test_the_commands_of_a_page_run(page, runs, tmp_path, monkeypatch):
    shutil.copytree(runs, tmp_path, dirs_exist_ok=True)
    monkeypatch.chdir(tmp_path)
    for where, command in commands():
        if where != page or reason(command) is not None:
            continue
        program, *arguments = shlex.split(command)
        assert program == "dynamics", f"{command}: not run, and without a reason in NOT_RUN"
        done = CliRunner().invoke(app, arguments)
        assert done.exit_code == 0, f"{command}: {done.output}"


def test_every_reason_is_needed():
    all_commands = [command for _, command in commands()]
    unused = [part for part in NOT_RUN if not any(part in command for command in all_commands)]
    assert unused == []
