"""One problem trained in every stack that the recorder supports, and its gradient in float64.

Two matrices, plain SGD, two rows of data per micro-batch, no random numbers: all stacks must
compute the same gradients from the same data, and W_t = W_{t-1} - lr·G_t must hold bit by bit.
"""

import itertools
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass

import accelerate
import lightning.pytorch as pl
import torch
from accelerate.state import AcceleratorState
from lightning.pytorch.plugins.precision import MixedPrecision
from torch import nn
from torch.distributed.fsdp import fully_shard
from torch.nn.parallel import DistributedDataParallel
from torch.utils.data.distributed import DistributedSampler
from transformers import Trainer, TrainingArguments

from probes import Recorder
from probes.frameworks import hf_trainer
from probes.frameworks import lightning as lightning_callback

STEPS, ROWS, LR, LARGEST = 3, 4, 0.5, 0.05
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}


@dataclass(frozen=True)
class Case:
    """What a training does between forward and step."""

    precision: str = "float32"  # of autocast; float16 with a gradient scaler
    accumulate: int = 1
    clip: bool = False
    dropout: float = 0.0
    record: tuple[str, ...] = ("weight", "gradient")

    def __str__(self):
        return f"{self.precision}-accumulate{self.accumulate}-{'clipped' if self.clip else 'free'}"

    @property
    def scaler(self):
        # A scale that makes whoever forgets to unscale wrong by orders of magnitude.
        return torch.amp.GradScaler("cpu", init_scale=1024.0)

    def autocast(self):
        if self.precision == "float32":
            return nullcontext()
        return torch.autocast("cpu", dtype=DTYPES[self.precision])


CASES = [
    Case(precision, accumulate, clip)
    for precision in DTYPES
    for accumulate in (1, 2)
    for clip in (False, True)
]


class Net(nn.Module):
    """tanh between two matrices; the loss is the model's own, as the Trainer wants it."""

    def __init__(self, dropout=0.0):
        super().__init__()
        generator = torch.Generator().manual_seed(0)
        self.up_proj = nn.Linear(6, 10, bias=False)
        self.down_proj = nn.Linear(10, 4, bias=False)
        self.drop = nn.Dropout(dropout)
        with torch.no_grad():
            for parameter in self.parameters():
                parameter.copy_(torch.randn(parameter.shape, generator=generator) / 2)

    def forward(self, x, labels):
        y = self.down_proj(self.drop(torch.tanh(self.up_proj(x))))
        return {"loss": (y.float() - labels).pow(2).mean()}


class Rows(torch.utils.data.Dataset):
    """Everything that `STEPS` steps of two micro-batches see."""

    def __init__(self):
        generator = torch.Generator().manual_seed(1)
        self.x = torch.randn(STEPS * 2 * ROWS, 6, generator=generator)
        self.labels = torch.randn(STEPS * 2 * ROWS, 4, generator=generator)

    def __len__(self):
        return len(self.x)

    def __getitem__(self, index):
        return {"x": self.x[index], "labels": self.labels[index]}


def micro_batches(case, step, rank=0, ranks=1):
    """The micro-batches of step 1, 2, ... that one of several ranks sees."""
    rows = Rows()
    for micro in range(case.accumulate):
        start = ((step - 1) * case.accumulate + micro) * ROWS
        yield rows[slice(start + rank * ROWS // ranks, start + (rank + 1) * ROWS // ranks)]


def reference(case, weights, step, *, clipped=None):
    """Name -> gradient of step `step` at `weights`, in float64, as its definition says."""
    model = Net().double()
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            parameter.copy_(torch.as_tensor(weights[name]))
    losses = [
        model(batch["x"].double(), batch["labels"].double())["loss"]
        for batch in micro_batches(case, step)
    ]
    gradients = torch.autograd.grad(sum(losses) / len(losses), list(model.parameters()))
    norm = torch.stack([gradient.pow(2).sum() for gradient in gradients]).sum().sqrt()
    clipped = case.clip if clipped is None else clipped
    factor = min(1.0, LARGEST / (float(norm) + 1e-6)) if clipped else 1.0
    names = [name for name, _ in model.named_parameters()]
    return {name: factor * each for name, each in zip(names, gradients, strict=True)}


@contextmanager
def recorded(store, model, optimizer, case, **options):
    if store is None:
        yield
    else:
        with Recorder(model, optimizer, store, every=1, record=case.record, **options):
            yield


def loop(model, optimizer, case, scaler, *, rank=0, ranks=1):
    """The loop that people write in plain PyTorch."""
    for step in range(1, STEPS + 1):
        optimizer.zero_grad()
        for batch in micro_batches(case, step, rank, ranks):
            with case.autocast():
                loss = model(**batch)["loss"] / case.accumulate
            scaler.scale(loss).backward()
        if case.clip:
            scaler.unscale_(optimizer)
            nn.utils.clip_grad_norm_(model.parameters(), LARGEST)
        scaler.step(optimizer)
        scaler.update()


def scaler_of(case):
    if case.precision == "float16":
        return case.scaler
    return torch.amp.GradScaler("cpu", enabled=False)


def plain(case, store, folder):
    model, scaler = Net(case.dropout), scaler_of(case)
    optimizer = torch.optim.SGD(model.parameters(), lr=LR)
    with recorded(store, model, optimizer, case, grad_scaler=scaler):
        loop(model, optimizer, case, scaler)
    return model


def compiled(case, store, folder):
    model, scaler = Net(case.dropout), scaler_of(case)
    optimizer = torch.optim.SGD(model.parameters(), lr=LR)
    fast = torch.compile(model, backend="aot_eager")
    with recorded(store, fast, optimizer, case, grad_scaler=scaler):
        loop(fast, optimizer, case, scaler)
    return model


def trainer(case, store, folder, callbacks=(), **options):
    arguments = TrainingArguments(
        output_dir=str(folder / "trainer"),
        max_steps=STEPS,
        per_device_train_batch_size=ROWS,
        gradient_accumulation_steps=case.accumulate,
        max_grad_norm=LARGEST if case.clip else 0.0,
        learning_rate=LR,
        lr_scheduler_type="constant",
        bf16=case.precision == "bfloat16",
        save_strategy="no",
        report_to="none",
        disable_tqdm=True,
        use_cpu=True,
        train_sampling_strategy="sequential",
        **options,
    )
    callbacks = list(callbacks)
    if store is not None:
        callbacks.append(hf_trainer.RecorderCallback(store, every=1, record=case.record))
    model = Net(case.dropout)
    optimizer = torch.optim.SGD(model.parameters(), lr=LR)
    made = Trainer(
        model,
        arguments,
        train_dataset=Rows(),
        callbacks=callbacks,
        optimizers=(optimizer, None),
    )
    scale_losses(made.accelerator, case)
    made.train()
    return model


def scale_losses(accelerator, case):
    """What `mixed_precision="fp16"` sets up; accelerate refuses to on a CPU, where it works too."""
    if case.precision == "float16":
        accelerator.scaler = case.scaler
        accelerator.native_amp = True
        accelerator.state._mixed_precision = "fp16"


class Module(pl.LightningModule):
    """The same model, as Lightning wants it."""

    def __init__(self, dropout):
        super().__init__()
        self.net = Net(dropout)

    def training_step(self, batch, index):
        return self.net(**batch)["loss"]

    def configure_optimizers(self):
        return torch.optim.SGD(self.parameters(), lr=LR)


def lightning(case, store, folder, callbacks=(), **options):
    callbacks = list(callbacks)
    if store is not None:
        callback = lightning_callback.RecorderCallback(store, every=1, record=case.record)
        callbacks.append(callback)
    plugins = []
    if case.precision == "float16":
        plugins = [MixedPrecision("16-mixed", "cpu", scaler=case.scaler)]
    module = Module(case.dropout)
    fit = pl.Trainer(
        default_root_dir=folder,
        accelerator="cpu",
        max_steps=STEPS,
        accumulate_grad_batches=case.accumulate,
        gradient_clip_val=LARGEST if case.clip else None,
        precision="bf16-mixed" if case.precision == "bfloat16" else None,
        plugins=plugins,
        callbacks=callbacks,
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        use_distributed_sampler=False,
        **{"devices": 1, **options},
    )
    rows, ranks = Rows(), fit.world_size
    # Lightning's own sampler would shuffle.
    sampler = DistributedSampler(rows, ranks, fit.global_rank, shuffle=False)
    fit.fit(module, torch.utils.data.DataLoader(rows, ROWS // ranks, sampler=sampler))
    return module.net


def with_accelerate(case, store, folder, rank=0, ranks=1):
    AcceleratorState._reset_state(reset_partial_state=ranks == 1)  # of the training before
    accelerator = accelerate.Accelerator(
        cpu=True,
        gradient_accumulation_steps=case.accumulate,
        mixed_precision="bf16" if case.precision == "bfloat16" else "no",
    )
    scale_losses(accelerator, case)
    model = Net(case.dropout)
    optimizer = torch.optim.SGD(model.parameters(), lr=LR)
    prepared, optimizer = accelerator.prepare(model, optimizer)
    steps = [micro_batches(case, step + 1, rank, ranks) for step in range(STEPS)]
    with recorded(store, prepared, optimizer, case):
        for batch in itertools.chain.from_iterable(steps):
            with accelerator.accumulate(prepared):
                accelerator.backward(prepared(**batch)["loss"])
                if case.clip and accelerator.sync_gradients:
                    accelerator.clip_grad_norm_(prepared.parameters(), LARGEST)
                optimizer.step()
                optimizer.zero_grad()
    return model


def ddp(case, store, folder, rank=0, ranks=1):
    model, scaler = Net(case.dropout), scaler_of(case)
    parallel = DistributedDataParallel(model)
    optimizer = torch.optim.SGD(model.parameters(), lr=LR)
    with recorded(store, parallel, optimizer, case, grad_scaler=scaler):
        loop(parallel, optimizer, case, scaler, rank=rank, ranks=ranks)
    return model


def fsdp2(case, store, folder, rank=0, ranks=1):
    model, scaler = Net(case.dropout), scaler_of(case)
    for layer in (model.up_proj, model.down_proj):
        fully_shard(layer)
    fully_shard(model)
    optimizer = torch.optim.SGD(model.parameters(), lr=LR)
    with recorded(store, model, optimizer, case, grad_scaler=scaler):
        loop(model, optimizer, case, scaler, rank=rank, ranks=ranks)
    return model


ONE_PROCESS = {
    "plain": plain,
    "compiled": compiled,
    "trainer": trainer,
    "lightning": lightning,
    "accelerate": with_accelerate,
}
TWO_PROCESSES = {"ddp": ddp, "fsdp2": fsdp2, "accelerate": with_accelerate}
