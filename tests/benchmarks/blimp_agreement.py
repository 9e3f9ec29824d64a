"""BLiMP by probes.relora and by lm-evaluation-harness on one trained model, paradigm by paradigm.

    python -m tests.benchmarks.blimp_agreement RUN BLIMP [PAIRS]

RUN is a run's folder, whose newest checkpoint is evaluated; BLIMP holds the official files; PAIRS
is 100 by default. With the harness's space before each sentence and without it.
"""

import sys
import tempfile
from pathlib import Path

import numpy as np

from probes.relora import newest_checkpoint
from probes.relora.evaluation.blimp import evaluate_blimp, pair_scores
from probes.relora.evaluation.blimp_data import PARADIGMS, read_blimp
from probes.relora.evaluation.trained_models import load_model, load_tokenizer
from tests.probes.relora.evaluation.harness import harness_blimp


def main(run: Path, folder: Path, pairs: int) -> None:
    """Print each paradigm's accuracies and ties, and exit with 1 where they differ otherwise."""
    model = load_model(newest_checkpoint(run))
    model = model.merge_and_unload() if hasattr(model, "merge_and_unload") else model
    tokenizer = load_tokenizer(run)
    paradigms = read_blimp(folder, limit=pairs, only=PARADIGMS)
    differ = 0
    for delimiter in ("", " "):
        with tempfile.TemporaryDirectory() as cache:
            theirs = harness_blimp(
                model,
                tokenizer,
                folder,
                PARADIGMS,
                delimiter=delimiter,
                limit=pairs,
                cache=Path(cache),
            )
        score = evaluate_blimp(model, tokenizer, paradigms, prefix=delimiter)
        furthest = 0.0
        for paradigm, found in zip(paradigms, score.paradigms, strict=True):
            accuracy, sums = theirs[found.name]
            scores = pair_scores(model, tokenizer, paradigm.pairs, prefix=delimiter)
            furthest = max(furthest, float(np.abs(scores / sums - 1).max()))
            equal = abs(accuracy - (found.correct + len(found.tied)) / found.pairs) < 1e-12
            differ += not equal
            print(
                f"{delimiter!r:4} {found.name:55} {found.accuracy:.3f} {accuracy:.3f} "
                f"ties {list(found.tied)}{'' if equal else ' DIFFERENT'}"
            )
        print(
            f"{delimiter!r:4} mean of {len(paradigms)}: {score.accuracy:.4f}, {score.ties} ties; "
            f"log-likelihoods within {furthest:.1e} (relative)"
        )
    sys.exit(differ > 0)


if __name__ == "__main__":
    main(Path(sys.argv[1]), Path(sys.argv[2]), int(sys.argv[3]) if len(sys.argv) > 3 else 100)
