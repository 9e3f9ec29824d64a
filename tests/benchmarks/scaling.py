"""Time against checkpoints and workers, memory against model size, time of imports.

python tests/benchmarks/scaling.py
"""

import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path

from timing import best, one_thread, peak_memory, table
from whole_job import write_run


def main():
    """Print the tables."""
    one_thread()
    import dynamics as dy

    with tempfile.TemporaryDirectory() as folder:
        write_run(Path(folder, "run"), "65m", 1, 16)
        run, rows = dy.open_run(Path(folder, "run")), []
        for checkpoints in (4, 8, 16):
            for workers in (1, 2):
                steps = run.steps[:checkpoints].tolist()
                started = time.perf_counter()
                found = dy.analyze(run, steps=steps, workers=workers)
                seconds = time.perf_counter() - started
                spectra = int((found["status"] == dy.Status.MEASURED).sum())
                rows.append(
                    [checkpoints, workers, spectra, f"{seconds:.1f}", f"{spectra / seconds:.1f}"]
                )
        table(["checkpoints", "workers", "spectra", "s", "spectra / s"], rows)

        rows = []
        for layers in (1, 16, 64, 128):
            path = write_run(Path(folder, f"{layers}"), "65m", layers, 2)
            size = sum(each.stat().st_size for each in path.glob("checkpoint-0/*")) / 2**20
            command = [sys.executable, __file__, "--memory", str(path)]
            peak = float(subprocess.run(command, check=True, capture_output=True, text=True).stdout)
            rows.append([f"{size:.0f}", f"{peak:.0f}"])
        table(["MB of a checkpoint", "MB of peak memory over imports"], rows)

    rows = []
    for what in (["-c", "pass"], ["-c", "import dynamics"], ["-m", "dynamics.cli", "--help"]):
        command = [sys.executable, *what]
        environment = {**os.environ, "PYTHONPATH": str(Path(__file__).parents[2])}
        run_it = lambda command=command, environment=environment: subprocess.run(  # noqa: E731
            command, check=True, capture_output=True, env=environment
        )
        rows.append([f"python {' '.join(what)}", f"{best(run_it, 3, clock=time.perf_counter):.2f}"])
    table(["command", "s"], rows)


if __name__ == "__main__":
    if sys.argv[1:2] == ["--memory"]:
        import dynamics

        opened = dynamics.open_run(sys.argv[2])
        dynamics.analyze(opened, select="*k_proj*")  # whatever is imported late
        before = peak_memory()
        dynamics.analyze(opened)
        print(peak_memory() - before)
    else:
        main()
