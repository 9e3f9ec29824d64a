"""A whole analysis against the usual ways: python tests/benchmarks/whole_job.py [--run DIR] ...

All weights, updates and displacements of a run, every metric; the usual ways compute singular
values only, of the same matrices read by the same code. One thread each, but for the last rows.
Without --run, a synthetic one is written: Gaussian weights that move by updates whose spectra decay
as a power law, as those of trained models do.

    svd twice       a full torch.linalg.svd for PER and another for the condition number
    svdvals f32     one torch.linalg.svdvals per matrix
    WeightWatcher   its `svd_vals` of each matrix (pip install 'learning-dynamics[bench]')
    floor           reading, and the bare float64 Gram products and eigenvalues
"""

import argparse
import os
import sys
import tempfile
import time
from collections import deque
from functools import partial
from pathlib import Path

from timing import one_thread, table

SIZES = {  # hidden, intermediate, key-value, vocabulary
    "65m": (384, 1536, 128, 50304),
    "1b": (2048, 8192, 512, 0),
}


def write_run(folder, size, layers, checkpoints):
    """A run in Hugging Face's layout."""
    import numpy as np
    from safetensors.numpy import save_file

    hidden, wide, kv, vocabulary = SIZES[size]
    shapes = {}
    for layer in range(layers):
        attention = {"q": hidden, "k": kv, "v": kv, "o": hidden}
        for each, rows in attention.items():
            shapes[f"model.layers.{layer}.self_attn.{each}_proj.weight"] = (rows, hidden)
        for each in ("gate", "up"):
            shapes[f"model.layers.{layer}.mlp.{each}_proj.weight"] = (wide, hidden)
        shapes[f"model.layers.{layer}.mlp.down_proj.weight"] = (hidden, wide)
    if vocabulary:
        shapes |= dict.fromkeys(
            ("model.embed_tokens.weight", "lm_head.weight"), (vocabulary, hidden)
        )
    rng = np.random.default_rng(0)
    weights = {n: 0.02 * rng.standard_normal(s, np.float32) for n, s in shapes.items()}
    for step in range(checkpoints):
        directory = Path(folder, f"checkpoint-{10 * step}")
        directory.mkdir(parents=True)
        save_file(weights, directory / "model.safetensors")
        for name, (m, n) in shapes.items():
            decay = np.arange(1, 65, dtype=np.float32) ** -1.0
            update = (rng.standard_normal((m, 64), np.float32) * decay) @ rng.standard_normal(
                (64, n), np.float32
            )
            update += 0.1 * rng.standard_normal((m, n), np.float32)
            weights[name] = weights[name] + np.float32(1e-4) * update
    return folder


def matrices(run):
    """(W, W - W_previous, W - W_first) as float32 arrays, matrix by matrix, step by step."""
    for name in run.matrices:
        first = before = None
        for step in run.steps.tolist():
            now = run.read(name, step, "weight").values
            yield now
            if before is None:
                first = now
            else:
                yield now - before
                yield now - first
            before = now


def usual_ways():
    """Name -> function of one matrix."""
    import numpy as np
    import torch

    def eigenvalues(values):
        tall = values if values.shape[0] >= values.shape[1] else values.T
        tall = tall.astype(np.float64)
        return np.linalg.eigvalsh(tall.T @ tall)

    def svd_twice(values):
        for _ in range(2):
            torch.linalg.svd(torch.from_numpy(values), full_matrices=False)

    found = {
        "floor": eigenvalues,
        "svdvals f32": lambda values: torch.linalg.svdvals(torch.from_numpy(values)),
        "svd twice": svd_twice,
    }
    try:
        from weightwatcher.RMT_Util import svd_vals

        found["WeightWatcher"] = lambda values: svd_vals(values.astype(float))
    except ImportError:
        print("WeightWatcher is not installed; without it.")
    return found


def timed(name, threads, function):
    """[name, threads, wall seconds, CPU seconds of this process]."""
    wall, cpu = time.perf_counter(), time.process_time()
    function()
    row = [name, threads, time.perf_counter() - wall, time.process_time() - cpu]
    print(row, file=sys.stderr, flush=True)
    return row


def main():
    """Print the table."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--run", help="measure this run's checkpoints instead of synthetic ones")
    parser.add_argument("--size", choices=SIZES, default="65m")
    parser.add_argument("--layers", type=int, default=12)
    parser.add_argument("--checkpoints", type=int, default=3)
    parser.add_argument("--ways", default="floor,svdvals f32,svd twice,WeightWatcher")
    parser.add_argument("--cores", default=len(os.sched_getaffinity(0)), type=int)
    options = parser.parse_args()
    one_thread()
    import numpy as np
    import torch
    from threadpoolctl import threadpool_limits

    import dynamics as dy
    from dynamics.spectra import EPS

    with tempfile.TemporaryDirectory() as folder:
        path = options.run or write_run(
            Path(folder, "run"), options.size, options.layers, options.checkpoints
        )
        run = dy.open_run(path)
        count = sum(1 for _ in matrices(run))  # and the files are in the page cache
        dy.analyze(run, select=next(iter(run.matrices)), steps=run.steps[:1])  # imports
        ways = {n: way for n, way in usual_ways().items() if n in options.ways.split(",")}
        found = []
        for threads in dict.fromkeys((1, options.cores)):
            torch.set_num_threads(threads)
            cache = Path(folder, f"cache{threads}")
            ours = partial(dy.analyze, run, cache=cache, workers=threads)
            found.append(timed("dynamics.analyze", threads, ours))
            for name, way in ways.items():
                if name == "floor" and threads > 1:
                    continue  # it is what one core has to do
                with threadpool_limits(threads):
                    usual = partial(deque, (way(each) for each in matrices(run)), maxlen=0)
                    found.append(timed(name, threads, usual))
            if threads == 1:
                found.append(timed("again, all known", 1, ours))
                one = ours()
        print(
            f"{path}: {len(run.matrices)} matrices, {len(run.steps)} checkpoints, {count} spectra"
        )
        of_ours = {row[1]: row[2] for row in found if row[0] == "dynamics.analyze"}
        table(
            ["way", "threads", "s", "CPU s of this process", "time / dynamics.analyze"],
            [
                [name, threads, f"{wall:.1f}", f"{cpu:.1f}", f"{wall / of_ours[threads]:.2f}"]
                for name, threads, wall, cpu in found
            ],
        )
        if len(of_ours) > 1:
            print(f"{options.cores} workers: {of_ours[1] / of_ours[options.cores]:.2f} x one.")
        longest = np.maximum(one["rows"], one["cols"])
        ratio = one["singular_value_error"] / (longest * EPS * one["spectral_norm"])
        dense = abs(ratio - 1) < 1e-12
        shares = dense.sum(["step", "matrix"]) / (one["status"] == 1).sum(["step", "matrix"])
        told = (
            f"{kind} {share:.1%}"
            for kind, share in zip(shares["kind"].values, shares.values, strict=True)
        )
        print(f"Measured by an SVD: {', '.join(told)}.")


if __name__ == "__main__":
    main()
