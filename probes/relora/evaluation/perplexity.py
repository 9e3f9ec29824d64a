"""Perplexity on texts of several domains, in the two forms that papers report."""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from dynamics.errors import DynamicsError
from probes.relora.evaluation.log_likelihood import (
    context_length,
    log_likelihoods,
    start_token,
    token_ids,
)


@dataclass(frozen=True)
class Perplexity:
    """Perplexity on some texts.

    Attributes:
        tokens: all tokens of all texts, each predicted once.
        log_likelihood: their summed log-probability.
        text_perplexities: (n,) of each text in the published tool's form, see
            `text_perplexities`; NaN for a text of fewer than two tokens.
        cut: texts of which that form sees the beginning only.
    """

    tokens: int
    log_likelihood: float
    text_perplexities: np.ndarray
    cut: int

    @property
    def per_token(self) -> float:
        """exp(-log_likelihood / tokens); NaN without tokens."""
        return math.exp(-self.log_likelihood / self.tokens) if self.tokens else math.nan

    @property
    def mean_over_texts(self) -> float:
        """Mean of the texts' perplexities, those that have none left out; NaN without any."""
        defined = self.text_perplexities[~np.isnan(self.text_perplexities)]
        return float(defined.mean()) if len(defined) else math.nan

    @property
    def texts(self) -> int:
        """How many texts."""
        return len(self.text_perplexities)

    @property
    def too_short(self) -> int:
        """Texts of fewer than two tokens."""
        return int(np.isnan(self.text_perplexities).sum())


def evaluate_perplexity(
    model: Any, tokenizer: Any, texts: Mapping[str, Sequence[str]]
) -> dict[str, Perplexity]:
    """The perplexity on each domain; see `overall` for all together.

    Args:
        model: a transformers causal language model, left as it was.
        tokenizer: its transformers tokenizer.
        texts: domain -> texts.

    Raises:
        DynamicsError: the model does not tell its context, or the tokenizer has no token to start
            from.
    """
    context = context_length(model)
    if context is None:
        raise DynamicsError(
            "The model's config has no max_position_embeddings, so that texts cannot be cut into "
            "windows; set it to the context that the model was trained with."
        )
    found = {}
    for domain, each in texts.items():
        tokens = token_ids(tokenizer, each)
        found[domain] = Perplexity(
            tokens=sum(map(len, tokens)),
            log_likelihood=_log_likelihood(model, tokens, start_token(tokenizer), context),
            text_perplexities=text_perplexities(model, tokens, context),
            cut=sum(len(ids) > context for ids in tokens),
        )
    return found


def overall(domains: Mapping[str, Perplexity]) -> Perplexity:
    """All domains as one: every token counts the same, and so does every text."""
    parts = list(domains.values())
    return Perplexity(
        tokens=sum(part.tokens for part in parts),
        log_likelihood=sum(part.log_likelihood for part in parts),
        text_perplexities=np.concatenate([part.text_perplexities for part in parts]),
        cut=sum(part.cut for part in parts),
    )


def windows(tokens: Sequence[int], start: int, context: int) -> list[tuple[list[int], int]]:
    """Pieces of a text in which each of its tokens is predicted once: (sequence, tokens to score).

    A sequence has one token before those that the model predicts, so `context` + 1 at most. The
    first begins with the start token; the next ones score `context` tokens each, and the last one
    scores what is left with as much before it as the context holds (the windows of
    lm-evaluation-harness).
    """
    pieces = []
    whole = [start, *tokens]
    for done in range(0, len(tokens), context):
        end = min(done + context, len(tokens)) + 1  # in `whole`
        pieces.append((whole[max(0, end - context - 1) : end], end - 1 - done))
    return pieces


def text_perplexities(model: Any, tokens: Sequence[Sequence[int]], context: int) -> np.ndarray:
    """exp(mean NLL) of each text as the published tool takes it, (n,) float64.

    That is Hugging Face's `perplexity` metric with add_start_token=False and max_length=context:
    a text is cut after `context` tokens, its first token is given and not predicted, and a text
    needs two tokens; it is NaN here where the metric refuses it.
    """
    found = np.full(len(tokens), np.nan)
    long_enough = [index for index, ids in enumerate(tokens) if len(ids) > 1]
    sequences = [tokens[index][:context] for index in long_enough]
    scored = [len(each) - 1 for each in sequences]
    found[long_enough] = np.exp(-log_likelihoods(model, sequences, scored) / np.array(scored))
    return found


def _log_likelihood(model: Any, tokens: Sequence[Sequence[int]], start: int, context: int) -> float:
    pieces = [piece for ids in tokens for piece in windows(ids, start, context)]
    return float(log_likelihoods(model, [s for s, _ in pieces], [n for _, n in pieces]).sum())
