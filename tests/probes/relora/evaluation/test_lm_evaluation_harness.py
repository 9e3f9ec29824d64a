"""Agreement with lm-evaluation-harness, which counts a tie as right."""

from pathlib import Path

import numpy as np
import pytest
from lm_eval.api.instance import Instance

from probes.relora.evaluation.blimp import evaluate_blimp, pair_scores
from probes.relora.evaluation.blimp_data import PARADIGMS, read_blimp
from probes.relora.evaluation.perplexity import evaluate_perplexity, windows
from tests.probes.relora.evaluation.harness import harness_blimp, harness_model
from tests.probes.relora.evaluation.scored_texts import (
    PAIRS,
    TEXTS,
    english_tokenizer,
    random_llama,
    uniform_llama,
    write_pairs,
)

pytestmark = pytest.mark.slow

OFFICIAL = Path(__file__).parents[5] / "shared" / "data" / "blimp"


@pytest.fixture(scope="module")
def tokenizer():
    return english_tokenizer()


def agrees(model, tokenizer, folder, names, delimiter, limit, cache):
    theirs = harness_blimp(
        model, tokenizer, folder, names, delimiter=delimiter, limit=limit, cache=cache
    )
    paradigms = read_blimp(folder, limit=limit, only=names)
    score = evaluate_blimp(model, tokenizer, paradigms, prefix=delimiter)
    for paradigm, found in zip(paradigms, score.paradigms, strict=True):
        accuracy, sums = theirs[found.name]
        scores = pair_scores(model, tokenizer, paradigm.pairs, prefix=delimiter)
        np.testing.assert_allclose(scores, sums, rtol=2e-6)
        right = found.correct + len(found.tied)
        assert accuracy == pytest.approx(right / found.pairs, abs=1e-12), found.name
    return score


@pytest.mark.parametrize("delimiter", ["", " "])
def test_accuracies_on_official_files_are_the_harness_s(tokenizer, tmp_path, delimiter):
    if not OFFICIAL.is_dir():
        pytest.skip(f"BLiMP is not in {OFFICIAL}")
    model = random_llama(context=128)
    score = agrees(model, tokenizer, OFFICIAL, PARADIGMS[::10], delimiter, 20, tmp_path)
    assert score.ties == 0
    assert 0.2 < score.accuracy < 0.8


@pytest.mark.parametrize("delimiter", ["", " "])
@pytest.mark.parametrize("build", [random_llama, uniform_llama])
def test_accuracies_are_the_harness_s_and_ties_are_what_it_counts_as_right(
    tokenizer, tmp_path, build, delimiter
):
    folder = write_pairs(tmp_path / "blimp")
    names = [name for _, _, name in PAIRS]
    score = agrees(build(), tokenizer, folder, names, delimiter, None, tmp_path)
    assert (score.ties > 0) == (build is uniform_llama)


def test_texts_are_cut_into_the_windows_of_the_harness_and_scored_alike(tokenizer):
    model = random_llama(context=24)
    texts = [text for each in TEXTS.values() for text in each]
    requests = [
        Instance(request_type="loglikelihood_rolling", doc={}, arguments=(text,), idx=index)
        for index, text in enumerate(texts)
    ]
    theirs = harness_model(model, tokenizer).loglikelihood_rolling(requests, disable_tqdm=True)
    assert any(len(windows(tokenizer(text)["input_ids"], 0, 24)) > 2 for text in texts)
    for text, expected in zip(texts, theirs, strict=True):
        found = evaluate_perplexity(model, tokenizer, {"one": [text]})["one"]
        assert found.log_likelihood == pytest.approx(expected, rel=2e-6)
