"""Log-likelihoods of token sequences under a causal language model."""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from itertools import groupby
from typing import Any

import numpy as np
import torch
from torch.nn.functional import cross_entropy

from dynamics.errors import DynamicsError

# Entries of the logits of one batch, float32. On a CPU, larger batches are slower; on a GPU,
# smaller ones are. The log-softmax takes the same memory once more.
_LOGITS_ON_CPU, _LOGITS = 2**23, 2**26


def log_likelihoods(
    model: Any, sequences: Sequence[Sequence[int]], scored: Sequence[int]
) -> np.ndarray:
    """Sum of the log-probabilities of the last `scored[i]` tokens of each sequence, natural log.

    log p(x_{n-k+1}, ..., x_n | x_1, ..., x_{n-k}) with k = scored[i]. Log-probabilities are
    float32 and their sums float64. Sequences are sorted by length and run in batches as large as
    the memory for their logits allows. They are padded on the right, where a causal model does not
    look, so a result depends on its batch only by the rounding of matrix products.

    The model is left as it was, see `evaluating`.

    Args:
        model: a transformers model, or one with adapters; called as model(input_ids=...).logits.
        sequences: n sequences of at least two token ids. Without its last token, which is not an
            input, a sequence must fit into the context of the model.
        scored: (n,) how many of the last tokens count; less than the length.

    Returns:
        (n,) float64.
    """
    sums = np.empty(len(sequences))
    device = next(model.parameters()).device
    entries = _LOGITS_ON_CPU if device.type == "cpu" else _LOGITS
    lengths = [len(each) - 1 for each in sequences]
    with evaluating(model):
        for batch in _batches(lengths, entries // model.config.vocab_size):
            width = max(len(sequences[index]) for index in batch)
            tokens = torch.zeros((len(batch), width), dtype=torch.int64)  # (B, T + 1)
            counts = torch.zeros((len(batch), width - 1), dtype=torch.bool)  # (B, T)
            for row, index in enumerate(batch):
                length = len(sequences[index])
                tokens[row, :length] = torch.as_tensor(sequences[index])
                counts[row, length - 1 - scored[index] : length - 1] = True
            tokens = tokens.to(device)
            logits = model(input_ids=tokens[:, :-1], use_cache=False).logits  # (B, T, V)
            losses = cross_entropy(
                logits.float().flatten(0, 1), tokens[:, 1:].flatten(), reduction="none"
            )
            losses = losses.double().view(len(batch), -1) * counts.to(device)
            sums[batch] = -losses.sum(1).cpu().numpy()
    return sums


@contextmanager
def evaluating(model: torch.nn.Module) -> Iterator[None]:
    """A block without dropout and gradients; afterwards every module is in its old mode."""
    modes = [(module, module.training) for module in model.modules()]
    model.eval()
    try:
        with torch.no_grad():
            yield
    finally:
        for module, mode in modes:
            module.training = mode


def start_token(tokenizer: Any) -> int:
    """The token before the first token of a text: beginning of sequence, or else end of text.

    Raises:
        DynamicsError: the tokenizer has neither.
    """
    for token in (tokenizer.bos_token_id, tokenizer.eos_token_id):
        if token is not None:
            return int(token)
    raise DynamicsError(
        "The tokenizer has no beginning-of-sequence and no end-of-text token; set its bos_token."
    )


def token_ids(tokenizer: Any, texts: Sequence[str]) -> list[list[int]]:
    """The tokens of each text, without special tokens; long texts are not cut."""
    if not texts:
        return []
    return tokenizer(list(texts), add_special_tokens=False, verbose=False)["input_ids"]


def context_length(model: Any) -> int | None:
    """How many tokens the model takes at once; None if its config does not say."""
    return getattr(model.config, "max_position_embeddings", None)


def _batches(lengths: Sequence[int], tokens: int) -> Iterator[list[int]]:
    """Batches of indices, longest sequences first, each of at most so many padded tokens.

    A single sequence may be longer.
    """
    batch: list[int] = []
    width = 0
    order = sorted(range(len(lengths)), key=lambda index: -lengths[index])
    for length, same in groupby(order, key=lambda index: lengths[index]):
        # Padding one token in eight costs less than a batch of its own.
        if batch and length < 0.875 * width:
            yield batch
            batch = []
        for index in same:
            if batch and (len(batch) + 1) * width > tokens:
                yield batch
                batch = []
            width = width if batch else length
            batch.append(index)
    if batch:
        yield batch
