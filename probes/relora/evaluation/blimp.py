"""BLiMP: how often a model finds the acceptable sentence of a minimal pair more probable.

Warstadt et al. 2020, arXiv 1912.00582.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from dynamics.errors import DynamicsError
from probes.relora.evaluation.blimp_data import Paradigm
from probes.relora.evaluation.log_likelihood import (
    context_length,
    log_likelihoods,
    start_token,
    token_ids,
)


@dataclass(frozen=True)
class ParadigmScore:
    """How a model did on one paradigm.

    Attributes:
        name: the paradigm.
        phenomenon: see `Paradigm`.
        field: see `Paradigm`.
        pairs: how many pairs.
        correct: in how many of them the acceptable sentence is strictly more probable.
        tied: the positions of the pairs whose sentences are equally probable.
    """

    name: str
    phenomenon: str
    field: str
    pairs: int
    correct: int
    tied: tuple[int, ...]

    @property
    def accuracy(self) -> float:
        """Correct / pairs; a tie counts as wrong."""
        return self.correct / self.pairs


@dataclass(frozen=True)
class BlimpScore:
    """How a model did on all scored paradigms."""

    paradigms: tuple[ParadigmScore, ...]

    @property
    def accuracy(self) -> float:
        """Mean over the paradigms, as published."""
        return float(np.mean([each.accuracy for each in self.paradigms]))

    @property
    def ties(self) -> int:
        """Pairs whose sentences are equally probable."""
        return sum(len(each.tied) for each in self.paradigms)

    def by(self, grouping: str) -> dict[str, "BlimpScore"]:
        """The scores of each "phenomenon" or "field", in order of name."""
        groups: dict[str, list[ParadigmScore]] = {}
        for each in self.paradigms:
            groups.setdefault(getattr(each, grouping), []).append(each)
        return {name: BlimpScore(tuple(groups[name])) for name in sorted(groups)}


def evaluate_blimp(
    model: Any, tokenizer: Any, paradigms: Sequence[Paradigm], *, prefix: str = ""
) -> BlimpScore:
    """Accuracy on each paradigm: log p(good | start) > log p(bad | start), summed over tokens.

    Sums are not divided by length. Scores that are NaN count as wrong.

    Args:
        model: a transformers causal language model, left as it was.
        tokenizer: its transformers tokenizer.
        paradigms: what to score; see `read_blimp`.
        prefix: text before each sentence, scored with it. lm-evaluation-harness uses " ", which
            suits tokenizers that mark the beginning of a word by a space.

    Raises:
        DynamicsError: a sentence is longer than the model's context, or the tokenizer has no
            token to start from.
    """
    pairs = [pair for each in paradigms for pair in each.pairs]
    scores = pair_scores(model, tokenizer, pairs, prefix=prefix)
    scored, first = [], 0
    for each in paradigms:
        good, bad = scores[first : first + len(each.pairs)].T
        first += len(each.pairs)
        scored.append(
            ParadigmScore(
                each.name,
                each.phenomenon,
                each.field,
                pairs=len(each.pairs),
                correct=int((good > bad).sum()),
                tied=tuple(np.flatnonzero(good == bad).tolist()),
            )
        )
    return BlimpScore(tuple(scored))


def pair_scores(
    model: Any, tokenizer: Any, pairs: Sequence[tuple[str, str]], *, prefix: str = ""
) -> np.ndarray:
    """Summed log-probabilities of both sentences of each pair, (n, 2) float64.

    See `evaluate_blimp` for arguments and errors.
    """
    sentences = [prefix + sentence for pair in pairs for sentence in pair]
    tokens = token_ids(tokenizer, sentences)
    context = context_length(model)
    for sentence, ids in zip(sentences, tokens, strict=True):
        if context is not None and len(ids) > context:
            raise DynamicsError(
                f"{sentence!r} has {len(ids)} tokens and the model's context is {context}; "
                "use a model with a longer context, or a tokenizer with longer tokens."
            )
    start = start_token(tokenizer)
    scores = log_likelihoods(model, [[start, *ids] for ids in tokens], [len(t) for t in tokens])
    return scores.reshape(-1, 2)
