"""Starts a module of the tests in several processes, as torchrun does."""

import os
import subprocess
import sys
from pathlib import Path


def run_two_ranks(module, folder):
    """Run `python -m module folder` in two processes, see `run_ranks`."""
    run_ranks(module, folder, ranks=2)


def run_ranks(module, folder, *, ranks):
    """Run `python -m module folder` in processes of one CPU thread each, and wait for all."""
    launcher = ["torch.distributed.run", "--standalone", "--nproc_per_node", str(ranks)]
    done = subprocess.run(
        [sys.executable, "-m", *launcher, "-m", module.__name__, str(folder)],
        cwd=Path(__file__).parents[2],
        env={**os.environ, "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert done.returncode == 0, done.stderr[-6000:]
