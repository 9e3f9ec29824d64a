"""What live metrics cost a training: python -m tests.benchmarks.live [--model small].

Two trainings are timed in turn, in one process: both are recorded, and one of them has live metrics
at budget=0.02. The table has the median and the quartiles of the ratios of their step times, on the
clock and in CPU time of the whole process. The first record, which nothing is known before, is
not among the timed steps. The training has one thread.
"""

import argparse
import shutil
import tempfile
import time
import warnings
from pathlib import Path

import torch

from probes import Live, Recorder
from tests.benchmarks.recording import backward, build, ratio, row
from tests.benchmarks.timing import one_thread

BUDGET = 0.02
# Steps between records, records of a block, pairs of blocks.
SCHEDULE = {"micro": (25, 6, 10), "small": (10, 4, 4)}


def block(name: str, model: torch.nn.Module, folder: Path, live: Live | None) -> tuple[float, ...]:
    """Seconds of the steps of some records: on the clock, and of the processor."""
    every, records, _ = SCHEDULE[name]
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-4)
    store = folder / "run.zarr"
    with Recorder(model, optimizer, store, every=every, live=live) as recorder:
        recorder.flush()
        begun = time.perf_counter(), time.process_time()
        for _ in range(every * records):
            optimizer.zero_grad()
            backward(model, name)
            optimizer.step()
        took = time.perf_counter() - begun[0], time.process_time() - begun[1]
    shutil.rmtree(store)
    return took


def main() -> None:
    """Print the ratios."""
    parser = argparse.ArgumentParser()
    parser.add_argument("--model", choices=SCHEDULE, default="micro")
    name = parser.parse_args().model
    one_thread()
    warnings.simplefilter("ignore")
    model, shown = build(name), []
    live = Live(to=lambda values, step: shown.append(len(values)), budget=BUDGET)
    every, records, repeats = SCHEDULE[name]
    pairs = []
    with tempfile.TemporaryDirectory() as folder:
        block(name, model, Path(folder), None)
        for repeat in range(repeats):
            turns = [(repeat + turn) % 2 == 0 for turn in range(2)]
            times = {on: block(name, model, Path(folder), live if on else None) for on in turns}
            pairs.append((times[True], times[False]))
    print(f"| {name}, budget={BUDGET}, a record every {every} steps | |\n|---|---|")
    row("step time with live metrics / without", ratio((on[0], off[0]) for on, off in pairs))
    row("CPU time with live metrics / without", ratio((on[1], off[1]) for on, off in pairs))
    fastest = min(off[0] for _, off in pairs) / (every * records)
    row("step without live metrics", f"{fastest * 1e3:.1f} ms")
    row("values shown per block", f"{sum(shown) / repeats:.0f}")


if __name__ == "__main__":
    main()
