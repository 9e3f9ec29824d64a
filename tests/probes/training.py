"""A small deterministic training loop that the recorder's tests share, also in another process."""

import multiprocessing
from contextlib import suppress

import torch
from torch import nn

from probes import Recorder


class Net(nn.Module):
    """Two matrices, a bias, a norm and dropout: what recorders meet."""

    def __init__(self):
        super().__init__()
        self.up_proj = nn.Linear(12, 24)
        self.norm = nn.LayerNorm(24)
        self.drop = nn.Dropout(0.1)
        self.down_proj = nn.Linear(24, 12, bias=False)

    def forward(self, x):
        return self.down_proj(self.drop(self.norm(self.up_proj(x)).relu()))


def build(seed=0, **adam):
    torch.manual_seed(seed)
    model = Net()
    return model, torch.optim.AdamW(model.parameters(), lr=1e-2, **adam)


def batch(step, micro=0):
    generator = torch.Generator().manual_seed(1000 * step + micro)
    return torch.randn(16, 12, generator=generator)


def train(
    model, optimizer, steps, *, start=0, accumulate=1, clip=None, after_backward=None, log=None
):
    """Steps start+1 ... steps; `after_backward(step)` sees the gradients the optimizer will see."""
    for step in range(start + 1, steps + 1):
        optimizer.zero_grad()
        for micro in range(accumulate):
            x = batch(step, micro)
            loss = (model(x) - x.flip(1)).pow(2).mean() / accumulate
            loss.backward()
        if clip is not None:
            nn.utils.clip_grad_norm_(model.parameters(), clip)
        if after_backward is not None:
            after_backward(step)
        if log is not None:
            log(loss=loss)
        optimizer.step()


def start(store, steps, resume_at=None):
    """(a process that trains and records every step, the numbers of the steps it is at).

    It is forked from a process that has imported everything, which takes longer than the training.
    """
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload([__name__])
    here, there = context.Pipe(duplex=False)
    arguments = (there, store, steps, resume_at)
    process = context.Process(target=_train_and_record, args=arguments, daemon=True)
    process.start()
    there.close()  # so that the pipe ends with the process
    return process, _received(here)


def _received(pipe):
    with pipe, suppress(EOFError):
        while True:
            yield pipe.recv()


def _train_and_record(pipe, store, steps, resume_at):
    torch.set_num_threads(1)
    model, optimizer = build()
    if resume_at is not None:  # the state that a checkpoint would hold: train there again
        train(model, optimizer, resume_at)
    with Recorder(model, optimizer, store, every=1, resume_at=resume_at) as recorder:

        def report(step):
            pipe.send(step)
            if step % 10 == 1:
                recorder.event("merge", layers=2)

        train(model, optimizer, steps, start=resume_at or 0, after_backward=report)
