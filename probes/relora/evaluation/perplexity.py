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
        text_perplexities: (n,) of each text, as the published tool computes it, see
            `text_perplexities`; NaN for a text of fewer than two tokens.
        cut: how many texts that tool cuts after their beginning.
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
        """Mean of the perplexities of the texts that have one; NaN without any."""
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
        DynamicsError: the config of the model does not state its context, or the tokenizer has no
            token to start from.
    """
    context = context_length(model)
    if context is None:
        raise DynamicsError(
            "The model's config has no max_position_embeddings, so texts cannot be cut into "
            "windows; set it to the context that the model was trained with."
        )
    by_domain = {}
    for domain, each in texts.items():
        tokens = token_ids(tokenizer, each)
        by_domain[domain] = Perplexity(
            tokens=sum(map(len, tokens)),
            log_likelihood=_log_likelihood(model, tokens, start_token(tokenizer), context),
            text_perplexities=text_perplexities(model, tokens, context),
            cut=sum(len(ids) > context for ids in tokens),
        )
    return by_domain


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
    """Windows of a text that together predict each token once: (sequence, tokens to score).

    A sequence begins with a token that is not predicted, so it has at most `context` + 1 tokens.
    The first one begins with the start token. Each window scores `context` tokens; the last one
    scores the rest, with as many tokens before it as the context holds. These are the windows of
    lm-evaluation-harness.
    """
    pieces = []
    whole = [start, *tokens]
    for done in range(0, len(tokens), context):
        end = min(done + context, len(tokens)) + 1  # in `whole`
        pieces.append((whole[max(0, end - context - 1) : end], end - 1 - done))
    return pieces


def text_perplexities(model: Any, tokens: Sequence[Sequence[int]], context: int) -> np.ndarray:
    """exp(mean NLL) of each text as the published tool computes it, (n,) float64.

    That tool is the `perplexity` metric of Hugging Face with add_start_token=False and
    max_length=context. It cuts a text after `context` tokens, does not predict the first token,
    and needs two tokens. The result is NaN for texts that the metric refuses.
    """
    perplexities = np.full(len(tokens), np.nan)
    long_enough = [index for index, ids in enumerate(tokens) if len(ids) > 1]
    sequences = [tokens[index][:context] for index in long_enough]
    scored = [len(each) - 1 for each in sequences]
    perplexities[long_enough] = np.exp(
        -log_likelihoods(model, sequences, scored) / np.array(scored)
    )
    return perplexities


def _log_likelihood(model: Any, tokens: Sequence[Sequence[int]], start: int, context: int) -> float:
    pieces = [piece for ids in tokens for piece in windows(ids, start, context)]
    return float(log_likelihoods(model, [s for s, _ in pieces], [n for _, n in pieces]).sum())
