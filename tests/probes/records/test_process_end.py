"""However a process ends, every record is written, and nothing of ours is printed."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

from dynamics.recordings import Recording, verify
from tests.probes.records import ending_scripts

pytestmark = pytest.mark.slow

# Every script trains five steps of a small model; `recorder` is attached and never closed.
BEGIN = """
import os, signal, sys, threading, time, warnings
import torch
from torch import nn
from probes import Recorder

torch.set_num_threads(1)
torch.manual_seed(0)
model = nn.Linear(64, 64)
optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
store = sys.argv[1]

def train(steps, model=model, optimizer=optimizer):
    for _ in range(steps):
        optimizer.zero_grad()
        model(torch.ones(4, 64)).square().mean().backward()
        optimizer.step()

def attached(model=model, optimizer=optimizer, store=store, **options):
    return Recorder(model, optimizer, store, every=1, **options).attach()
"""
ENDS = {
    "the script ends": "recorder = attached(); train(5)",
    "nobody keeps the recorder": "attached(); train(5)",
    "within a function": """
def main():
    model = nn.Linear(64, 64)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    recorder = attached(model, optimizer)
    train(5, model, optimizer)
main()
""",
    "sys.exit": "recorder = attached(); train(5); sys.exit(0)",
    "sys.exit in a with": """
with Recorder(model, optimizer, store, every=1):
    train(5)
    sys.exit(0)
""",
    "the model is deleted": "recorder = attached(); train(5); del model, optimizer, recorder",
    "a thread trains on": """
def main():
    attached()
    begun.set()
    time.sleep(0.5)  # the main thread is at its end by now
    train(5)
begun = threading.Event()
threading.Thread(target=main).start()
begun.wait()
""",
    "a daemon trained": """
def main():
    attached()
    train(5)
thread = threading.Thread(target=main, daemon=True)
thread.start()
thread.join()
""",
    "a pool trained": """
from concurrent.futures import ThreadPoolExecutor
def main():
    attached()
    train(5)
ThreadPoolExecutor(1).submit(main).result()
""",
    "the queue is full": """
recorder = attached(queue_size=50)
train(5)
""",
    "SIGTERM with a handler": """
signal.signal(signal.SIGTERM, lambda *_: sys.exit(0))
recorder = attached()
train(5)
os.kill(os.getpid(), signal.SIGTERM)
time.sleep(60)
""",
    "a forked process": """
import multiprocessing
def main():
    attached()
    train(5)
process = multiprocessing.get_context("fork").Process(target=main)
process.start()
process.join()
sys.exit(process.exitcode)
""",
    "it forks, and the child ends first": """
recorder = attached()
train(3)
if not (child := os.fork()):
    train(2)
    sys.exit(0)
os.waitpid(child, 0)
train(2)
""",
    "a child closes the recorder": """
with Recorder(model, optimizer, store, every=1) as recorder:
    train(3)
    if not (child := os.fork()):
        train(1)
        recorder.close()
        os._exit(0)
    os.waitpid(child, 0)
    train(2)
""",
    "a fork trains on": """
with Recorder(model, optimizer, store, every=1) as recorder:
    train(5)
    if not (child := os.fork()):
        train(20)
        os._exit(1 if recorder._records.attached else 0)
    assert os.waitpid(child, 0)[1] == 0
""",
    "workers load the data": """
from torch.utils.data import DataLoader
recorder = attached()
for batch in DataLoader(torch.ones(20, 64), batch_size=4, num_workers=2):
    optimizer.zero_grad()
    model(batch).square().mean().backward()
    optimizer.step()
""",
    "warnings are errors": """
with torch.no_grad():
    model.weight[0, 0] = 1e6
recorder = attached(storage_dtype="float16")
warnings.simplefilter("error")
train(5)
""",
    "the training runs in an event loop": """
import asyncio
async def main():
    attached()
    train(5)
asyncio.run(main())
""",
}
FAILS = {
    "an exception": (
        "recorder = attached(); train(5); raise ValueError('mine')",
        "ValueError: mine",
    ),
    "an exception in a with": (
        """
with Recorder(model, optimizer, store, every=1):
    train(5)
    raise ValueError('mine')
""",
        "ValueError: mine",
    ),
    "Ctrl-C": (
        "recorder = attached(); train(5); os.kill(os.getpid(), signal.SIGINT); time.sleep(60)",
        "KeyboardInterrupt",
    ),
    "Ctrl-C twice": (
        """
class Impatient:
    def __exit__(self, *_):
        threading.Timer(0.05, os.kill, (os.getpid(), signal.SIGINT)).start()
        recorder._records.session._writer._jobs.put((lambda: time.sleep(0.5), False))
    def __enter__(self):
        return self
with Recorder(model, optimizer, store, every=1) as recorder, Impatient():
    train(5)
    raise KeyboardInterrupt
""",
        "KeyboardInterrupt",
    ),
    "sys.exit with a text": ("recorder = attached(); train(5); sys.exit('mine')", "mine"),
}


HERE = Path(__file__)


@pytest.fixture(scope="module")
def ended(tmp_path_factory):
    """Runs all scripts, each to the end of a process of its own; name -> its folder."""
    folder = tmp_path_factory.mktemp("ends")
    scripts = {**ENDS, **{name: script for name, (script, _) in FAILS.items()}}
    folders = {name: folder / str(number) for number, name in enumerate(scripts)}
    for name, script in scripts.items():
        folders[name].mkdir()
        (folders[name] / "script.py").write_text(BEGIN + script)
    command = [sys.executable, "-m", ending_scripts.__name__, str(folder)]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    subprocess.run(command, check=True, timeout=300, cwd=HERE.parents[3], env=environment)
    return folders


def code_and_errors(folder):
    """The exit code, and what was printed besides the line that says what is recorded."""
    printed = (folder / "printed").read_text().splitlines(keepends=True)
    lines = [line for line in printed if not line.startswith("Recorder: records")]
    return int((folder / "code").read_text()), "".join(lines)


def check_recording(folder):
    recording = Recording(folder / "run.zarr")
    assert recording.steps.tolist() == [0, 1, 2, 3, 4, 5]
    assert verify(recording).damaged == ()
    assert not list((folder / "run.zarr").glob("writer/*"))


@pytest.mark.parametrize("name", ENDS)
def test_every_record_is_written(ended, name):
    check_recording(ended[name])
    code, printed = code_and_errors(ended[name])
    assert (code, printed) == (0, printed if name == "warnings are errors" else "")
    assert "Traceback" not in printed
    assert "Exception" not in printed


@pytest.mark.parametrize("name", FAILS)
def test_what_is_printed_is_the_error_of_the_training(ended, name):
    check_recording(ended[name])
    code, printed = code_and_errors(ended[name])
    assert code != 0
    assert FAILS[name][1] in printed.strip().splitlines()[-1]
    if name != "Ctrl-C twice":  # who interrupts the closing sees where
        assert "recorder.py" not in printed
        assert "probes.Recorder" not in printed


def run(tmp_path, script):
    """Run a script in a new interpreter."""
    (tmp_path / "script.py").write_text(BEGIN + script)
    with (tmp_path / "printed").open("w") as printed:
        done = subprocess.run(
            [sys.executable, str(tmp_path / "script.py"), str(tmp_path / "run.zarr")],
            stderr=printed,
            timeout=100,
            env={**os.environ, "PYTHONPATH": str(HERE.parents[3]), "OMP_NUM_THREADS": "1"},
        )
    (tmp_path / "code").write_text(str(done.returncode))


def test_a_process_that_multiprocessing_spawned_writes_every_record(tmp_path):
    run(
        tmp_path,
        """
import multiprocessing
def main():
    attached()
    train(5)
if __name__ == "__main__":
    process = multiprocessing.get_context("spawn").Process(target=main)
    process.start()
    process.join()
    sys.exit(process.exitcode)
""",
    )
    check_recording(tmp_path)
    assert code_and_errors(tmp_path) == (0, "")


def test_a_writer_that_failed_is_told_in_one_line(tmp_path):
    run(
        tmp_path,
        """
import shutil
recorder = attached()
train(2)
recorder.flush()
shutil.rmtree(store)
train(1)
""",
    )
    code, printed = code_and_errors(tmp_path)
    (line,) = printed.splitlines()
    assert line.startswith("probes.Recorder, when the process ended: The recorder could not write")
    assert "was deleted or moved" in line
    assert code == 0
    assert not (tmp_path / "run.zarr").exists()
