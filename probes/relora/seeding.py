"""Random numbers of this package, drawn without changing the random state of anything else."""

from collections.abc import Iterator
from contextlib import contextmanager

import numpy as np
import torch
from torch import nn

# Purposes of random numbers: one seed gives an independent stream for each.
MODEL_WEIGHTS = 0
ADAPTERS = 1
BLOCK_ORDER = 2
OPTIMIZER_RESET = 3
HELD_OUT = 4
DROPOUT = 5
PROJECTION = 6


def stream_seed(seed: int, *key: int) -> int:
    """A 63-bit seed from the seed of a run and a key (purpose, step, ...).

    Different pairs give independent streams, because SeedSequence of NumPy mixes them. A sum
    seed + step would give run 0 at step 1 the numbers of run 1 at step 0.
    """
    return int(np.random.SeedSequence((seed, *key)).generate_state(1, np.uint64)[0] >> 1)


@contextmanager
def own_random_stream(seed: int, *key: int, module: nn.Module | None = None) -> Iterator[None]:
    """A block in which torch draws from the stream of (seed, key); then its old state is restored.

    Args:
        seed: the seed of the run.
        key: the purpose, and further numbers such as the step.
        module: the module of the drawn tensors; its CUDA devices are seeded and restored too.
    """
    tensors = () if module is None else module.parameters()
    devices = sorted({tensor.get_device() for tensor in tensors if tensor.is_cuda})
    with torch.random.fork_rng(devices=devices):
        # torch.manual_seed would also seed devices that are not restored.
        value = stream_seed(seed, *key)
        torch.default_generator.manual_seed(value)
        for device in devices:
            torch.cuda.default_generators[device].manual_seed(value)
        yield
