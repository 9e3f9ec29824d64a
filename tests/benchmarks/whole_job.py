"""A whole analysis against the usual ways: python tests/benchmarks/whole_job.py [--run DIR] ...

All weights, updates and displacements of a run, every metric; the usual ways compute singular
values only, of the same matrices read by the same code. One thread each, then all cores. With
--device cuda the ways go to the GPU, one matrix after the other, and so does `analyze`, in one
process and in several.
Without --run, a synthetic one is written: Gaussian weights that move by updates whose spectra decay
as a power law, as those of trained models do.

    svd twice       a full torch.linalg.svd for PER and another for the condition number
    svdvals f32     one torch.linalg.svdvals per matrix
    WeightWatcher   its `svd_vals` of each matrix (pip install 'learning-dynamics[bench]'); "fast",
                    its default, on a GPU
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


def usual_ways(device):
    """Name -> function of one matrix."""
    import numpy as np
    import torch

    def eigenvalues(values):
        tall = values if values.shape[0] >= values.shape[1] else values.T
        if device == "cpu":
            tall = tall.astype(np.float64)
            return np.linalg.eigvalsh(tall.T @ tall)
        there = torch.from_numpy(tall).to(device).double()
        return torch.linalg.eigvalsh(there.T @ there).cpu()

    def svdvals(values):
        return torch.linalg.svdvals(torch.from_numpy(values).to(device)).cpu()

    def svd_twice(values):
        for _ in range(2):
            svd = torch.linalg.svd(torch.from_numpy(values).to(device), full_matrices=False)
            svd[1].cpu()

    found = {"floor": eigenvalues, "svdvals f32": svdvals, "svd twice": svd_twice}
    try:
        from weightwatcher.RMT_Util import svd_vals

        method = "accurate" if device == "cpu" else "fast"
        found["WeightWatcher"] = lambda values: svd_vals(values.astype(float), method=method)
    except ImportError:
        print("WeightWatcher is not installed; without it.")
    return found


def timed(name, processor, function):
    """[name, processor, wall seconds, CPU seconds of this process]."""
    wall, cpu = time.perf_counter(), time.process_time()
    function()
    row = [name, processor, time.perf_counter() - wall, time.process_time() - cpu]
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
    parser.add_argument("--device", default="cpu", help="where the usual ways go: cpu or cuda")
    options = parser.parse_args()
    one_thread()
    import numpy as np
    import torch
    from threadpoolctl import threadpool_limits

    import dynamics as dy
    from dynamics.spectra.numpy_spectrum import EPS

    with tempfile.TemporaryDirectory() as folder:
        path = options.run or write_run(
            Path(folder, "run"), options.size, options.layers, options.checkpoints
        )
        run = dy.open_run(path)
        count = sum(1 for _ in matrices(run))  # and the files are in the page cache
        first = {"select": next(iter(run.matrices)), "steps": run.steps[:1]}
        dy.analyze(run, **first, device=options.device)  # imports; rates of a GPU
        ways = {
            name: way
            for name, way in usual_ways(options.device).items()
            if name in options.ways.split(",")
        }
        for way in ways.values():  # what a GPU's library loads
            way(np.ones((300, 300), np.float32))
        found = []

        def ours(workers, device):
            cache = Path(folder, f"cache {workers} {device}")
            call = partial(dy.analyze, run, cache=cache, workers=workers, device=device)
            found.append(timed("dynamics.analyze", _processor(workers, device), call))
            return call

        def theirs(threads):
            for name, way in ways.items():
                if name == "floor" and threads > 1:
                    continue  # it is what one core has to do
                torch.set_num_threads(threads)
                with threadpool_limits(threads):
                    usual = partial(deque, (way(each) for each in matrices(run)), maxlen=0)
                    found.append(timed(name, _processor(threads, options.device), usual))

        again = ours(1, "cpu")
        if options.device == "cpu":
            theirs(1)
        found.append(timed("again, all known", _processor(1, "cpu"), again))
        one = again()
        if options.cores > 1:
            ours(options.cores, "cpu")
            if options.device == "cpu":
                theirs(options.cores)
        if options.device != "cpu":
            ours(1, options.device)
            theirs(1)
            for workers in (2, 4, 8):
                if workers <= options.cores:
                    ours(workers, options.device)
        print(
            f"{path}: {len(run.matrices)} matrices, {len(run.steps)} checkpoints, {count} spectra"
        )
        of_ours = {row[1]: row[2] for row in found if row[0] == "dynamics.analyze"}
        table(
            ["way", "processor", "s", "CPU s of this process", "time / dynamics.analyze there"],
            [
                [name, processor, f"{wall:.1f}", f"{cpu:.1f}", f"{wall / of_ours[processor]:.2f}"]
                for name, processor, wall, cpu in found
            ],
        )
        alone = of_ours[_processor(1, "cpu")]
        for processor, wall in of_ours.items():
            print(f"{processor}: {alone / wall:.2f} x one core.")
        longest = np.maximum(one["rows"], one["cols"])
        ratio = one["singular_value_error"] / (longest * EPS * one["spectral_norm"])
        dense = abs(ratio - 1) < 1e-12
        shares = dense.sum(["step", "matrix"]) / (one["status"] == 1).sum(["step", "matrix"])
        told = (
            f"{kind} {share:.1%}"
            for kind, share in zip(shares["kind"].values, shares.values, strict=True)
        )
        print(f"Measured by an SVD: {', '.join(told)}.")


def _processor(workers, device):
    cores = "1 core" if workers == 1 else f"{workers} cores"
    return cores if device == "cpu" else f"{device}, {cores}"


if __name__ == "__main__":
    main()
