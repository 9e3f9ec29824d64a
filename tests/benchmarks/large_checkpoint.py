"""Peak memory of `dynamics analyze` over a checkpoint that is larger than memory need be.

Writes a synthetic sharded float32 checkpoint (default 8 GB: layers of 4096 × 1024 and an embedding
of 50304 × 1024), analyzes it in a process of its own, and prints sizes, times and that process's
peak resident memory. Exit code 1 if the peak exceeds the limit.
"""

import argparse
import json
import resource
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import numpy as np
from safetensors.numpy import save_file

HIDDEN, WIDE, VOCABULARY, PER_SHARD = 1024, 4096, 50304, 16


def write_checkpoint(directory: Path, size: int) -> int:
    """Shards and index of `size` bytes or a little more; the number of matrices."""
    directory.mkdir(parents=True)
    rng = np.random.default_rng(0)
    layers = max(1, round(size / (4 * HIDDEN * WIDE)))
    names = [f"model.layers.{i}.mlp.up_proj.weight" for i in range(layers)]
    shards = [["model.embed_tokens.weight"]]
    shards += [names[i : i + PER_SHARD] for i in range(0, layers, PER_SHARD)]
    weight_map = {}
    for number, members in enumerate(shards):
        rows = VOCABULARY if number == 0 else WIDE
        tensors = {
            name: rng.standard_normal((rows, HIDDEN), np.float32) * np.float32(0.02)
            for name in members
        }
        file = f"model-{number + 1:05}-of-{len(shards):05}.safetensors"
        save_file(tensors, directory / file)
        weight_map |= dict.fromkeys(members, file)
    index = {"metadata": {}, "weight_map": weight_map}
    (directory / "model.safetensors.index.json").write_text(json.dumps(index))
    return len(weight_map)


def main() -> None:
    """Write, analyze, report."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--gigabytes", type=float, default=8)
    parser.add_argument("--limit", type=float, default=1.5, help="GB of resident memory")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        checkpoint = Path(folder, "checkpoint-1")
        started = time.perf_counter()
        matrices = write_checkpoint(checkpoint, int(options.gigabytes * 1e9))
        size = sum(each.stat().st_size for each in checkpoint.iterdir())
        print(f"wrote {size / 1e9:.2f} GB in {time.perf_counter() - started:.0f} s", flush=True)
        started = time.perf_counter()
        analyze = [sys.executable, "-m", "dynamics.cli", "analyze", str(checkpoint)]
        output = ["-o", str(Path(folder, "out.zarr"))]
        subprocess.run([*analyze, *output], check=True, stdout=subprocess.DEVNULL)
        seconds = time.perf_counter() - started
    peak = resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss * 1024 / 1e9
    print(f"{matrices} matrices, {size / 1e9:.2f} GB: {seconds:.0f} s, peak memory {peak:.2f} GB")
    print("largest matrix: 0.21 GB; a process that only imports: about 0.3 GB")
    if peak > options.limit:
        sys.exit(f"peak memory {peak:.2f} GB exceeds {options.limit} GB")


if __name__ == "__main__":
    main()
