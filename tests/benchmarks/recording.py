"""What recording costs a training, as ratios: python -m tests.benchmarks.recording [--model small].

Each figure and what it is compared with are measured in turn, in one process, and the median of the
ratios is printed with its quartiles. The training has one thread, so that the recorder's has a
core. `small` is the reference experiment's model of 65 M parameters, `micro` one of 1.3 M, `1b` has
the shapes of a model of 1.1 G. With --device cuda, what a record step costs a training on a GPU.
"""

import argparse
import os
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterable
from dataclasses import replace
from pathlib import Path

import torch
from transformers import LlamaForCausalLM

from dynamics.recordings import COMPRESSIONS
from probes import Recorder
from probes.relora.model import build_model
from probes.relora.presets import micro, small
from tests.benchmarks.timing import peak_memory

_1B = {"hidden_size": 2048, "intermediate_size": 8192, "num_layers": 16, "num_heads": 32}
PRESETS = {
    "micro": micro,
    "small": small,
    "1b": lambda method: replace(small(method), **_1B, num_kv_heads=8),
}
# Of a step: (sequences, length).
TOKENS = {"micro": (4, 128), "small": (1, 256)}
TOKENS_ON_GPU = (8, 2048)


class Stepless(torch.optim.Optimizer):
    """Leaves the weights alone: what its steps take is the recorder's."""

    def step(self, closure=None):
        """Do nothing."""


def build(name: str, device: str = "cpu") -> LlamaForCausalLM:
    """The preset's full-rank model with the gradients of one backward pass."""
    torch.manual_seed(0)
    with torch.device(device):
        model = build_model(PRESETS[name]("full_rank"))
    backward(model, name)
    return model


def backward(model: LlamaForCausalLM, name: str) -> None:
    """One forward and backward pass over random tokens, in bfloat16 on a GPU."""
    on_gpu = model.device.type != "cpu"
    tokens = TOKENS_ON_GPU if on_gpu else TOKENS[name]
    ids = torch.randint(model.config.vocab_size, tokens, device=model.device)
    with torch.autocast(model.device.type, torch.bfloat16, enabled=on_gpu):
        loss = model(input_ids=ids, labels=ids).loss
    loss.backward()


def seconds(call, clock=time.perf_counter) -> float:
    """How long a call takes, to the end of what it does on a GPU."""
    _wait()
    begin = clock()
    call()
    _wait()
    return clock() - begin


def _wait() -> None:
    if torch.cuda.is_initialized():
        torch.cuda.synchronize()


def ratio(pairs: Iterable[tuple[float, float]]) -> str:
    """Median and quartiles of the first over the second."""
    low, middle, high = statistics.quantiles([one / other for one, other in pairs], n=4)
    return f"{middle:.3f} ({low:.3f}-{high:.3f})"


def row(what: str, found: str) -> None:
    """Print a row of the table."""
    print(f"| {what} | {found} |", flush=True)


def idle(name: str, model: LlamaForCausalLM, repeats: int) -> None:
    """Steps with an attached recorder that records nothing against steps without one.

    In the process's CPU time: others may be using the machine.
    """
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-4)

    def step():
        optimizer.zero_grad()
        backward(model, name)
        optimizer.step()

    def attached():
        return Recorder(model, optimizer, "unused", every=lambda step: False, write=False)

    step()
    pairs = []
    for repeat in range(repeats):
        times = {}
        for with_recorder in (repeat % 2 == 0, repeat % 2 == 1):
            if with_recorder:
                with attached():
                    times[True] = seconds(step, time.process_time)
            else:
                times[False] = seconds(step, time.process_time)
        pairs.append((times[True], times[False]))
    hooked = Stepless(model.parameters(), {})
    plain = [seconds(hooked.step) for _ in range(1000)]
    with Recorder(model, hooked, "unused", every=lambda step: False, write=False):
        own = statistics.median(seconds(hooked.step) for _ in range(1000))
    own -= statistics.median(plain)
    whole = statistics.median(plain for _, plain in pairs)
    row("step, recorder attached and idle / without", ratio(pairs))
    row(f"the recorder's own time / an idle step of {whole * 1e3:.0f} ms", f"{own / whole:.1e}")


def snapshot(model: LlamaForCausalLM, folder: Path, repeats: int) -> None:
    """How long a record step keeps the training thread against one copy of the same bytes."""
    tensors = matrices(model)
    on_gpu = model.device.type != "cpu"
    buffers = [torch.empty_like(each, device="cpu", pin_memory=on_gpu) for each in tensors]

    def copy():
        for buffer, each in zip(buffers, tensors, strict=True):
            buffer.copy_(each)

    copy()
    optimizer, pairs, busy = Stepless(model.parameters(), {}), [], []
    with Recorder(model, optimizer, folder / "blocked.zarr", every=1) as recorder:
        for _ in range(3):  # buffers that are used again come from the first records
            optimizer.step()
        for _ in range(repeats):
            recorder.flush()
            blocked = seconds(optimizer.step)  # the writer has nothing to do
            pairs.append((blocked, seconds(copy)))
            recorder.flush()
            optimizer.step()
            busy.append((seconds(optimizer.step), seconds(copy)))  # it writes the record before
    size = sum(each.nbytes for each in tensors)
    copied = statistics.median(copy for _, copy in pairs)
    row(f"one copy of the {size / 1e6:.1f} MB of a record", f"{copied * 1e3:.2f} ms")
    row("record step blocks the training / that copy", ratio(pairs))
    row("the same while the record before is written", ratio(busy))


def spectra_only(model: LlamaForCausalLM, name: str, folder: Path) -> None:
    """A record step that measures instead of copying, in seconds."""
    optimizer = Stepless(model.parameters(), {})
    with Recorder(model, optimizer, folder / "s.zarr", every=1, spectra_only=True):
        taken = min(seconds(optimizer.step) for _ in range(2))
    count = len(matrices(model))
    where = "on the GPU" if model.device.type != "cpu" else "on one CPU thread"
    row(f"record step of spectra_only, {count} spectra {where}", f"{taken:.2f} s")
    passes = min(seconds(lambda: backward(model, name)) for _ in range(3))
    row("one forward and backward pass", f"{passes:.2f} s")


def matrices(model: LlamaForCausalLM) -> list[torch.Tensor]:
    """What a record holds: weights and gradients of two dimensions."""
    weights = [each for each in model.parameters() if each.ndim == 2]
    return [each.detach() for each in weights] + [each.grad for each in weights]


def sustained(model: LlamaForCausalLM, folder: Path, records: int, repeats: int) -> None:
    """Speed of records without a pause against one sequential write of the same bytes.

    The write ends in the page cache, or on the disk ("synced"); the recorder's in the page cache.
    Its file stays while recordings are written, so that they do not get its warm pages.
    """
    tensors = matrices(model)
    size = records * sum(each.nbytes for each in tensors)

    def raw(sync: bool) -> float:
        shutil.rmtree(folder / "raw", ignore_errors=True)
        (folder / "raw").mkdir()
        begin = time.perf_counter()
        for record in range(records):
            with (folder / "raw" / str(record)).open("wb", buffering=0) as file:
                for each in tensors:
                    file.write(each.numpy().data)
                if sync:
                    os.fsync(file.fileno())
        return time.perf_counter() - begin

    def recorded(compression: str) -> tuple[float, float]:
        store, optimizer = folder / "run.zarr", Stepless(model.parameters(), {})
        with Recorder(model, optimizer, store, every=1, compression=compression) as recorder:
            optimizer.step()
            recorder.flush()  # the arrays are made
            before = bytes_of(store)
            begin = time.perf_counter()
            for _ in range(records):
                optimizer.step()
            recorder.flush()
            taken = time.perf_counter() - begin
        share = (bytes_of(store) - before) / size
        shutil.rmtree(store)
        return taken, share

    raws: dict[bool, list[float]] = {False: [], True: []}
    times: dict[str, list[float]] = {compression: [] for compression in COMPRESSIONS}
    shares = {}
    for _ in range(repeats):
        for sync in raws:
            raws[sync].append(raw(sync))
        for compression in COMPRESSIONS:
            taken, shares[compression] = recorded(compression)
            times[compression].append(taken)
    for sync, each in raws.items():
        speed = size / 1e6 / statistics.median(each)
        row(f"raw sequential write{', synced' * sync}", f"{speed:.0f} MB/s")
    for compression, each in times.items():
        row(f"recording with {compression!r}, stored / bytes", f"{shares[compression]:.2f}")
        row(
            f"recording with {compression!r}, speed / raw",
            ratio(zip(raws[False], each, strict=True)),
        )
        row(
            f"recording with {compression!r}, speed / raw, synced",
            ratio(zip(raws[True], each, strict=True)),
        )


def bytes_of(store: Path) -> int:
    """Size of all files."""
    return sum(each.stat().st_size for each in store.rglob("*") if each.is_file())


def peak(name: str, recording: bool) -> None:
    """Print the peak memory in MB of a training of five steps; in a process of its own."""
    model = build(name)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-4)
    with tempfile.TemporaryDirectory() as folder:
        every = 1 if recording else (lambda step: False)
        with Recorder(model, optimizer, Path(folder, "run.zarr"), every=every):
            for _ in range(5):
                optimizer.zero_grad()
                backward(model, name)
                optimizer.step()
    print(peak_memory())


def memory(name: str, size: float) -> None:
    """Peak memory of recording every step, in records."""
    peaks = [
        float(
            subprocess.run(
                [sys.executable, "-m", __spec__.name, "--model", name, "--peak", word],
                check=True, capture_output=True, text=True,
            ).stdout.split()[-1]
        )
        for word in ("recording", "idle")
    ]  # fmt: skip
    more = (peaks[0] - peaks[1]) * 2**20
    row("peak memory, every step recorded / none", f"{peaks[0]:.0f} / {peaks[1]:.0f} MB")
    row("the difference, in records (queue_size=2)", f"{more / size:.1f}")


def main() -> None:
    """Print the table of one model."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", choices=PRESETS, default="micro")
    parser.add_argument("--repeats", type=int, default=10)
    parser.add_argument("--records", type=int, default=4)
    parser.add_argument("--peak", choices=("recording", "idle"))
    parser.add_argument("--device", default="cpu", help="cpu or cuda: where the model is")
    options = parser.parse_args()
    torch.set_num_threads(1)
    if options.peak:
        peak(options.model, options.peak == "recording")
        return
    model = build(options.model, options.device)
    count = sum(each.numel() for each in model.parameters())
    print(f"| {options.model}, {count / 1e6:.1f} M parameters | |\n|---|---|", flush=True)
    with tempfile.TemporaryDirectory() as folder:
        if options.device != "cpu":
            if count < 5e8:  # or the disk is full
                snapshot(model, Path(folder), options.repeats)
            spectra_only(model, options.model, Path(folder))
            return
        idle(options.model, model, options.repeats)
        snapshot(model, Path(folder), options.repeats)
        sustained(model, Path(folder), options.records, max(3, options.repeats // 3))
        spectra_only(model, options.model, Path(folder))
    memory(options.model, sum(each.nbytes for each in matrices(model)))


if __name__ == "__main__":
    main()
