"""Peak memory of `dynamics analyze` over a checkpoint that is larger than memory need be.

Writes a synthetic sharded checkpoint (default 8 GB in float32: layers of 4096 × 1024 and an
embedding of 50304 × 1024; the same numbers quantised with --stored fp8 or nf4), analyzes it in a
process of its own, and prints sizes, times and that process's peak resident memory. Exit code 1 if
the peak exceeds the limit.
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
import torch
from safetensors.torch import save_file

HIDDEN, WIDE, VOCABULARY, PER_SHARD = 1024, 4096, 50304, 16
BLOCK = 128  # of FP8
# The NormalFloat codes of bitsandbytes.
NF4 = [-1.0, -0.6961928, -0.52507305, -0.3949175, -0.28444138, -0.18477343, -0.09105004, 0.0]
NF4 += [0.0795803, 0.1609302, 0.2461123, 0.33791524, 0.44070983, 0.562617, 0.72295684, 1.0]
CONFIGS = {
    "float32": {},
    "fp8": {"quantization_config": {"quant_method": "fp8", "weight_block_size": [BLOCK, BLOCK]}},
    "nf4": {"quantization_config": {"quant_method": "bitsandbytes", "load_in_4bit": True}},
}


def stored_as(kind: str, name: str, weight: torch.Tensor) -> dict[str, torch.Tensor]:
    """The tensors that a checkpoint has of a weight."""
    if kind == "float32":
        return {name: weight}
    rows, cols = weight.shape
    if kind == "fp8":
        blocks = weight.reshape(rows // BLOCK, BLOCK, cols // BLOCK, BLOCK)
        scale = blocks.abs().amax((1, 3)) / 448
        codes = (blocks / scale[:, None, :, None]).to(torch.float8_e4m3fn).reshape(rows, cols)
        return {name: codes, f"{name}_scale_inv": scale}
    groups, book = weight.reshape(-1, 64), torch.tensor(NF4)
    absmax = groups.abs().amax(1)
    codes = torch.bucketize(groups / absmax[:, None], (book[1:] + book[:-1]) / 2).to(torch.uint8)
    pairs = codes.reshape(-1, 2)
    state = {"blocksize": 64, "dtype": "bfloat16", "shape": [rows, cols], "quant_type": "nf4"}
    return {
        name: pairs[:, :1] * 16 + pairs[:, 1:],
        f"{name}.absmax": absmax,
        f"{name}.quant_map": book,
        f"{name}.quant_state.bitsandbytes__nf4": torch.tensor(
            list(json.dumps(state).encode()), dtype=torch.uint8
        ),
    }


def write_checkpoint(directory: Path, size: int, kind: str) -> int:
    """Shards and index of `size` bytes of float32 or a little more; the number of matrices."""
    directory.mkdir(parents=True)
    rng = np.random.default_rng(0)
    layers = max(1, round(size / (4 * HIDDEN * WIDE)))
    names = [f"model.layers.{i}.mlp.up_proj.weight" for i in range(layers)]
    shards = [["model.embed_tokens.weight"]]
    shards += [names[i : i + PER_SHARD] for i in range(0, layers, PER_SHARD)]
    weight_map = {}
    for number, members in enumerate(shards):
        rows = VOCABULARY if number == 0 else WIDE
        tensors: dict[str, torch.Tensor] = {}
        for name in members:
            weight = rng.standard_normal((rows, HIDDEN), np.float32) * np.float32(0.02)
            tensors |= stored_as(kind, name, torch.from_numpy(weight))
        file = f"model-{number + 1:05}-of-{len(shards):05}.safetensors"
        save_file(tensors, directory / file)
        weight_map |= dict.fromkeys(tensors, file)
    index = {"metadata": {}, "weight_map": weight_map}
    (directory / "model.safetensors.index.json").write_text(json.dumps(index))
    (directory / "config.json").write_text(json.dumps(CONFIGS[kind]))
    return layers + 1


def main() -> None:
    """Write, analyze, report."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--gigabytes", type=float, default=8)
    parser.add_argument("--limit", type=float, default=1.5, help="GB of resident memory")
    parser.add_argument("--stored", choices=CONFIGS, default="float32")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        checkpoint = Path(folder, "checkpoint-1")
        started = time.perf_counter()
        matrices = write_checkpoint(checkpoint, int(options.gigabytes * 1e9), options.stored)
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
