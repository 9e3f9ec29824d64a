"""What histories on the hub cost: requests, bytes and seconds, with 50 ms for each request.

python -m tests.benchmarks.hub [SHAPE ...]    # prints the rows of the table in docs/hub.md
"""

import json
import os
import sys
import tempfile
import time
from pathlib import Path
from unittest import mock

import torch
from safetensors.torch import save_file

from tests.dynamics.formats.hub_server import serving

STEPS, LAYERS, WIDTH = range(0, 2000, 100), 16, 253
LATENCY = 0.05
SHAPES = ("safetensors", "bin", "stages", "commits", "folders", "PEFT")


def weights(step: int) -> dict[str, torch.Tensor]:
    """16 matrices, 3.9 MiB."""
    generator = torch.Generator().manual_seed(step)
    names = [f"model.layers.{i}.self_attn.o_proj.weight" for i in range(LAYERS)]
    return {name: torch.randn(WIDTH, WIDTH, generator=generator) for name in names}


def adapter(step: int) -> dict[str, torch.Tensor]:
    """The factors of the same matrices, of rank 64: 2 MiB."""
    generator = torch.Generator().manual_seed(step)
    found = {}
    for name in weights(0):
        stem = f"base_model.model.{name.removesuffix('.weight')}"
        found[f"{stem}.lora_A.weight"] = torch.randn(64, WIDTH, generator=generator)
        found[f"{stem}.lora_B.weight"] = torch.randn(WIDTH, 64, generator=generator)
    return found


def write(folder: Path, shape: str, step: int) -> Path:
    """A checkpoint of a shape."""
    folder.mkdir(parents=True)
    if shape == "PEFT":
        save_file(adapter(step), folder / "adapter_model.safetensors")
        config = {"peft_type": "LORA", "r": 64, "lora_alpha": 64, "target_modules": ["o_proj"]}
        config["base_model_name_or_path"] = "org/base"
        (folder / "adapter_config.json").write_text(json.dumps(config))
        return folder
    if shape == "bin":
        torch.save(weights(step), folder / "pytorch_model.bin")
    else:
        save_file(weights(step), folder / "model.safetensors")
    (folder / "config.json").write_text('{"model_type": "llama"}')
    return folder


def push(hub, folder: Path, shape: str) -> str:
    """A history on the hub; returns its address."""
    repo = hub.repo(f"org/{shape}")
    if shape == "PEFT":
        hub.repo("org/base").push(write(folder / "base", "base", 0))
    for step in STEPS:
        local = write(folder / shape / f"step{step}", shape, step)
        if shape == "commits":
            repo.push(local, title=f"Saving HF Model -- Step {step}")
        elif shape == "folders":
            repo.push(local, inside=f"checkpoints/step_{step}/")
        else:
            repo.push(local, f"stage1-step{step}-tokens1B" if shape == "stages" else f"step{step}")
    return f"hf://org/{shape}"


def measured(hub, address: str) -> str:
    """A row: what opening, three matrices and all of them cost; of the first time each."""
    import dynamics as dy

    def opened():
        with (
            tempfile.TemporaryDirectory() as kept,
            mock.patch.dict(os.environ, {"XDG_CACHE_HOME": kept}),
        ):
            hub.clear()
            began = time.perf_counter()
            return dy.open_run(address), time.perf_counter() - began

    hub.latency = LATENCY
    run, seconds = opened()
    cells = [f"{len(hub.requests)} requests, {hub.fetched / 2**20:.1f} MiB", f"{seconds:.1f}"]
    kind = "adapter" if "adapter" in run.stored_kinds else "weight"
    each = (adapter if kind == "adapter" else weights)(0)
    for count in (3, LAYERS):
        run, _ = opened()
        hub.clear()
        began = time.perf_counter()
        dy.analyze(run, select=list(run.matrices)[:count], kinds=[kind], metrics=["stable_rank"])
        seconds = time.perf_counter() - began
        selected = len(STEPS) * count / LAYERS * sum(tensor.nbytes for tensor in each.values())
        cells += [f"{len(hub.requests)} requests, {hub.fetched / selected:.2f}", f"{seconds:.1f}"]
    hub.latency = 0
    return " | ".join(cells)


def main() -> None:
    """Print the table."""
    with tempfile.TemporaryDirectory() as folder, serving() as hub:
        settings = {"HF_ENDPOINT": hub.url, "HF_HOME": f"{folder}/hf"}
        with mock.patch.dict(os.environ, settings):  # before huggingface_hub is imported
            for shape in sys.argv[1:] or SHAPES:
                print(f"| {shape} | {measured(hub, push(hub, Path(folder), shape))} |", flush=True)


if __name__ == "__main__":
    main()
