"""Evaluations of a model as scalars of its run: BLiMP, perplexity, validation loss."""

import hashlib
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

from probes.relora.data.sequences import TokenBlocks
from probes.relora.evaluation.blimp import evaluate_blimp
from probes.relora.evaluation.blimp_data import Paradigm
from probes.relora.evaluation.log_likelihood import log_likelihoods, start_token, token_ids
from probes.relora.evaluation.perplexity import evaluate_perplexity, overall


@dataclass(frozen=True)
class Result:
    """The result of an evaluation.

    Attributes:
        scalars: name -> value; scalars of the run.
        details: JSON-like; what the scalars were computed from.
    """

    scalars: dict[str, float]
    details: dict[str, Any]


class Evaluation(Protocol):
    """Something on which models are evaluated.

    `needs_tokenizer` says whether it holds text. `key` identifies everything except the model that
    decides the numbers: results with equal keys belong to one series.
    """

    needs_tokenizer: bool

    def key(self, tokenizer: Any) -> str:
        """SHA-256 of the scored tokens and their groups."""

    def __call__(self, model: Any, tokenizer: Any) -> Result:
        """Evaluate a model, and leave it as it was."""


@dataclass(frozen=True)
class BlimpEvaluation:
    """`blimp`, `blimp_ties`, and `blimp_NAME` of each phenomenon and field."""

    paradigms: Sequence[Paradigm]
    prefix: str = ""
    needs_tokenizer = True

    def key(self, tokenizer: Any) -> str:
        """See `Evaluation`."""
        return _digest(
            tokenizer,
            {
                f"{each.field} {each.phenomenon} {each.name}": [
                    self.prefix + sentence for pair in each.pairs for sentence in pair
                ]
                for each in self.paradigms
            },
        )

    def __call__(self, model: Any, tokenizer: Any) -> Result:
        """See `Evaluation`."""
        score = evaluate_blimp(model, tokenizer, self.paradigms, prefix=self.prefix)
        groups = {**score.by("field"), **score.by("phenomenon")}
        return Result(
            {
                "blimp": score.accuracy,
                "blimp_ties": score.ties,
                **{f"blimp_{name}": group.accuracy for name, group in groups.items()},
            },
            {
                "paradigms": {
                    each.name: {
                        "phenomenon": each.phenomenon,
                        "field": each.field,
                        "pairs": each.pairs,
                        "correct": each.correct,
                        "tied": each.tied,
                    }
                    for each in score.paradigms
                }
            },
        )


@dataclass(frozen=True)
class PerplexityEvaluation:
    """`perplexity` and `mean_text_perplexity`, and both with `_DOMAIN` of each domain."""

    texts: Mapping[str, Sequence[str]]
    needs_tokenizer = True

    def key(self, tokenizer: Any) -> str:
        """See `Evaluation`."""
        return _digest(tokenizer, self.texts)

    def __call__(self, model: Any, tokenizer: Any) -> Result:
        """See `Evaluation`."""
        domains = evaluate_perplexity(model, tokenizer, self.texts)
        scalars = {}
        named = {"": overall(domains), **{f"_{name}": each for name, each in domains.items()}}
        for suffix, perplexity in named.items():
            scalars[f"perplexity{suffix}"] = perplexity.per_token
            scalars[f"mean_text_perplexity{suffix}"] = perplexity.mean_over_texts
        return Result(
            scalars,
            {
                "domains": {
                    name: {
                        "texts": perplexity.texts,
                        "tokens": perplexity.tokens,
                        "cut": perplexity.cut,
                        "too_short": perplexity.too_short,
                    }
                    for name, perplexity in domains.items()
                }
            },
        )


@dataclass(frozen=True)
class ValidationLoss:
    """`validation_loss`: mean negative log-likelihood of a token of the held-out sequences."""

    blocks: TokenBlocks
    needs_tokenizer = False

    def key(self, tokenizer: Any) -> str:
        """See `Evaluation`."""
        return f"{self.blocks.digest()} {self.blocks.sequence_length}"

    def __call__(self, model: Any, tokenizer: Any) -> Result:
        """See `Evaluation`."""
        # A block may have one token more than the model reads: the target of its last position.
        sequences = self.blocks.blocks[:, : self.blocks.sequence_length + 1].tolist()
        scored = [len(each) - 1 for each in sequences]
        total = log_likelihoods(model, sequences, scored).sum()
        return Result(
            {"validation_loss": float(-total / sum(scored))},
            {"sequences": len(sequences), "tokens": sum(scored)},
        )


def _digest(tokenizer: Any, groups: Mapping[str, Sequence[str]]) -> str:
    seen = hashlib.sha256(str(start_token(tokenizer)).encode())
    for name, texts in groups.items():
        seen.update(json.dumps([name, token_ids(tokenizer, texts)]).encode())
    return seen.hexdigest()
