"""Runs FOLDER/*/script.py, each to the end of its interpreter: python -m ... FOLDER.

Each script runs in a fork of this process, which has imported what takes long. The fork ends as any
interpreter ends. Its exit code and stderr go to the files `code` and `printed` beside the script.
"""

import os
import sys
from pathlib import Path

import torch
import torch._dynamo  # which the first step of an optimizer imports

from probes import Recorder


def next_script(folder):
    """The script to run in this process, which is a fork; None in the process that forks."""
    for script in sorted(folder.glob("*/script.py")):
        if not (child := os.fork()):
            return script
        code = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
        (script.parent / "code").write_text(str(code))
    return None


if __name__ == "__main__":
    torch.set_num_threads(1)
    layer = torch.nn.Linear(2, 2)
    Recorder(layer, torch.optim.SGD(layer.parameters()), "never-attached.zarr")  # imports the rest
    if (script := next_script(Path(sys.argv[1]))) is not None:
        os.dup2(os.open(script.parent / "printed", os.O_WRONLY | os.O_CREAT), 2)
        sys.argv = [str(script), str(script.parent / "run.zarr")]
        exec(compile(script.read_text(), str(script), "exec"), {"__name__": "__main__"})
