import copy
import math

import numpy as np
import pytest
import torch
from transformers import BloomConfig, BloomForCausalLM

from dynamics.errors import DynamicsError
from probes.relora.evaluation.perplexity import evaluate_perplexity, overall, windows
from tests.probes.relora.evaluation.scored_texts import (
    TEXTS,
    english_tokenizer,
    random_llama,
    token_log_probability,
    uniform_llama,
)

CONTEXT = 24


@pytest.fixture(scope="module")
def tokenizer():
    return english_tokenizer()


@pytest.fixture(scope="module")
def model():
    return random_llama(context=CONTEXT)


@pytest.fixture(scope="module")
def exact(model):
    return copy.deepcopy(model).double().eval()


@pytest.fixture(scope="module")
def perplexities(model, tokenizer):
    return evaluate_perplexity(model, tokenizer, TEXTS)


@pytest.mark.parametrize("length", [0, 1, 5, 6, 7, 12, 13, 29])
def test_the_windows_of_a_text_score_each_token_once_with_what_the_context_holds(length):
    tokens = list(range(1, length + 1))
    pieces = windows(tokens, start=0, context=6)
    assert [token for piece, scored in pieces for token in piece[-scored:]] == tokens
    assert all(len(piece) - 1 == min(6, piece[-1]) for piece, _ in pieces)
    assert all(piece == list(range(piece[0], piece[-1] + 1)) for piece, _ in pieces)


@pytest.mark.slow
def test_perplexity_per_token_is_that_of_each_token_after_those_of_its_window(
    exact, perplexities, tokenizer
):
    for domain, texts in TEXTS.items():
        parts = []
        for text in texts:
            ids = [0, *tokenizer(text)["input_ids"]]
            last = len(ids) - 1
            for n in range(1, len(ids)):
                # Windows score the targets 1..C, C+1..2C, ...; the last ends with the text.
                end = min(-(-n // CONTEXT) * CONTEXT, last)
                parts.append(token_log_probability(exact, ids[max(0, end - CONTEXT) : n], ids[n]))
        assert len(parts) == perplexities[domain].tokens
        expected = math.exp(-math.fsum(parts) / len(parts))
        assert perplexities[domain].per_token == pytest.approx(expected, rel=1e-6)


def test_the_mean_over_texts_is_that_of_the_published_tool(exact, perplexities, tokenizer):
    for domain, texts in TEXTS.items():
        values = []
        for text in texts:
            ids = tokenizer(text)["input_ids"][:CONTEXT]
            if len(ids) < 2:
                continue
            parts = [token_log_probability(exact, ids[:n], ids[n]) for n in range(1, len(ids))]
            values.append(math.exp(-math.fsum(parts) / len(parts)))
        assert perplexities[domain].mean_over_texts == pytest.approx(
            sum(values) / len(values), rel=1e-6
        )


def test_texts_that_are_cut_or_too_short_are_counted(perplexities, tokenizer):
    lengths = [len(tokenizer(text)["input_ids"]) for text in TEXTS["news"]]
    assert perplexities["news"].texts == 4
    assert perplexities["news"].tokens == sum(lengths)
    assert perplexities["news"].cut == sum(length > CONTEXT for length in lengths) == 2
    assert perplexities["news"].too_short == 1


def test_all_domains_together_weigh_tokens_alike_and_texts_alike(model, tokenizer, perplexities):
    together = overall(perplexities)
    in_one = evaluate_perplexity(model, tokenizer, {"all": [*TEXTS["news"], *TEXTS["speech"]]})
    assert together.per_token == pytest.approx(in_one["all"].per_token, rel=1e-6)
    assert together.mean_over_texts == pytest.approx(in_one["all"].mean_over_texts, rel=1e-6)


def test_a_model_that_knows_nothing_is_as_perplexed_as_there_are_tokens(tokenizer):
    perplexities = evaluate_perplexity(uniform_llama(context=CONTEXT), tokenizer, TEXTS)
    for each in [*perplexities.values(), overall(perplexities)]:
        assert each.per_token == pytest.approx(320, rel=1e-6)
        assert each.mean_over_texts == pytest.approx(320, rel=1e-6)


def test_without_a_token_there_is_no_perplexity(model, tokenizer):
    perplexities = evaluate_perplexity(model, tokenizer, {"empty": [""], "none": []})
    assert all(math.isnan(each.per_token) for each in perplexities.values())
    assert all(math.isnan(each.mean_over_texts) for each in perplexities.values())


def test_the_order_of_texts_does_not_matter(model, tokenizer):
    texts = [text for each in TEXTS.values() for text in each]
    one, other = (
        evaluate_perplexity(model, tokenizer, {"all": each})["all"] for each in (texts, texts[::-1])
    )
    np.testing.assert_allclose(one.text_perplexities, other.text_perplexities[::-1], rtol=1e-6)


def test_a_model_that_does_not_tell_its_context_is_refused(tokenizer):
    model = BloomForCausalLM(BloomConfig(hidden_size=16, n_layer=1, n_head=2, vocab_size=320))
    with pytest.raises(DynamicsError, match="no max_position_embeddings"):
        evaluate_perplexity(model, tokenizer, TEXTS)


def test_bfloat16_models_are_scored_by_float32_log_softmax(tokenizer):
    model = random_llama(context=CONTEXT).to(torch.bfloat16)
    ids = tokenizer(TEXTS["speech"][0])["input_ids"][:CONTEXT]
    with torch.no_grad():
        logits = model.eval()(input_ids=torch.tensor([ids[:-1]])).logits[0].double()
    expected = torch.nn.functional.cross_entropy(logits, torch.tensor(ids[1:])).exp()
    perplexity = evaluate_perplexity(model, tokenizer, {"one": TEXTS["speech"]})["one"]
    assert perplexity.mean_over_texts == pytest.approx(float(expected), rel=1e-5)
