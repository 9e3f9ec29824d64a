"""Starts a module of the tests in two processes, as torchrun does."""

import os
import subprocess
import sys
from pathlib import Path


def run_two_ranks(module, folder):
    """Run `python -m module folder` in two processes of one CPU thread each, and wait for both."""
    launcher = ["torch.distributed.run", "--standalone", "--nproc_per_node", "2"]
    done = subprocess.run(
        [sys.executable, "-m", *launcher, "-m", module.__name__, str(folder)],
        cwd=Path(__file__).parents[2],
        env={**os.environ, "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert done.returncode == 0, done.stderr[-6000:]
