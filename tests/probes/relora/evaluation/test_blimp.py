import copy
import json
import math
import re
import threading
from functools import partial
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer

import numpy as np
import pytest
import torch

from dynamics.errors import DynamicsError, FormatError, MissingError
from probes.relora.evaluation.blimp import evaluate_blimp, pair_scores
from probes.relora.evaluation.blimp_data import (
    PARADIGMS,
    Paradigm,
    download_blimp,
    missing_paradigms,
    read_blimp,
)
from probes.relora.evaluation.log_likelihood import start_token
from tests.probes.relora.evaluation.scored_texts import (
    PAIRS,
    english_tokenizer,
    random_llama,
    token_log_probability,
    uniform_llama,
    write_pairs,
)

ALL_PAIRS = [pair for pairs in PAIRS.values() for pair in pairs]


@pytest.fixture(scope="module")
def tokenizer():
    return english_tokenizer()


@pytest.fixture(scope="module")
def model():
    return random_llama()


@pytest.fixture
def blimp_folder(tmp_path):
    return write_pairs(tmp_path / "blimp")


@pytest.mark.slow
@pytest.mark.parametrize("prefix", ["", " "])
def test_a_score_is_the_sum_of_the_log_probabilities_of_the_tokens_after_the_start(
    model, tokenizer, prefix
):
    exact = copy.deepcopy(model).double().eval()
    expected = []
    for sentence in (prefix + sentence for pair in ALL_PAIRS for sentence in pair):
        ids = [0, *tokenizer(sentence)["input_ids"]]
        parts = [token_log_probability(exact, ids[:n], ids[n]) for n in range(1, len(ids))]
        expected.append(math.fsum(parts))
    scores = pair_scores(model, tokenizer, ALL_PAIRS, prefix=prefix)
    np.testing.assert_allclose(scores.ravel(), expected, rtol=2e-6)


def test_a_score_does_not_depend_on_what_is_scored_with_it_but_for_rounding(model, tokenizer):
    together = pair_scores(model, tokenizer, ALL_PAIRS)
    alone = np.concatenate([pair_scores(model, tokenizer, [pair]) for pair in ALL_PAIRS])
    np.testing.assert_allclose(together, alone, rtol=1e-6)


def test_a_model_that_knows_nothing_prefers_fewer_tokens_and_ties_on_as_many(
    tokenizer, blimp_folder
):
    score = evaluate_blimp(uniform_llama(), tokenizer, read_blimp(blimp_folder))
    lengths = {
        name: [[len(tokenizer(sentence)["input_ids"]) for sentence in pair] for pair in pairs]
        for (_, _, name), pairs in PAIRS.items()
    }
    found = {each.name: (each.correct, each.tied) for each in score.paradigms}
    assert found == {
        name: (
            sum(good < bad for good, bad in pairs),
            tuple(index for index, (good, bad) in enumerate(pairs) if good == bad),
        )
        for name, pairs in lengths.items()
    }
    assert score.ties == sum(good == bad for pairs in lengths.values() for good, bad in pairs) > 0


def test_equal_sentences_tie_and_a_tie_is_no_right_answer(model, tokenizer):
    score = evaluate_blimp(
        model, tokenizer, [Paradigm("same", "none", "none", (("The cats sleep.",) * 2,) * 3)]
    )
    assert (score.accuracy, score.ties, score.paradigms[0].tied) == (0.0, 3, (0, 1, 2))


def test_means_are_over_paradigms_whatever_their_number_of_pairs(model, tokenizer, blimp_folder):
    paradigms = read_blimp(blimp_folder)
    score = evaluate_blimp(model, tokenizer, paradigms)
    of = {each.name: each.correct / each.pairs for each in score.paradigms}
    assert score.accuracy == pytest.approx(sum(of.values()) / 4)
    islands = (of["what_island"] + of["who_island"]) / 2
    assert score.by("phenomenon")["island_effects"].accuracy == pytest.approx(islands)
    assert list(score.by("field")) == ["morphology", "syntax", "syntax_semantics"]


def test_turning_the_pairs_around_turns_the_accuracy_around(model, tokenizer, blimp_folder):
    paradigms = read_blimp(blimp_folder)
    turned = [
        Paradigm(p.name, p.phenomenon, p.field, tuple((bad, good) for good, bad in p.pairs))
        for p in paradigms
    ]
    one, other = (evaluate_blimp(model, tokenizer, each) for each in (paradigms, turned))
    assert one.ties == other.ties == 0
    assert one.accuracy + other.accuracy == pytest.approx(1)


def test_scoring_leaves_the_model_its_modes_and_the_random_state(tokenizer):
    model = random_llama().train()
    model.model.layers[1].eval()
    modes = [module.training for module in model.modules()]
    state = torch.get_rng_state()
    pair_scores(model, tokenizer, ALL_PAIRS)
    assert [module.training for module in model.modules()] == modes
    assert torch.equal(torch.get_rng_state(), state)
    assert all(parameter.grad is None for parameter in model.parameters())


def test_a_sentence_longer_than_the_context_is_refused(tokenizer):
    longest = max(len(tokenizer(s)["input_ids"]) for pair in ALL_PAIRS for s in pair)
    pair_scores(random_llama(context=longest), tokenizer, ALL_PAIRS)
    with pytest.raises(DynamicsError, match=f"has {longest} tokens and the model's context is"):
        pair_scores(random_llama(context=longest - 1), tokenizer, ALL_PAIRS)


def test_texts_begin_after_the_beginning_of_sequence_or_else_the_end_of_text(tokenizer):
    other = copy.deepcopy(tokenizer)
    other.bos_token = "."
    assert start_token(other) == other.convert_tokens_to_ids(".")
    other.bos_token = None
    assert start_token(other) == 0
    other.eos_token = None
    with pytest.raises(DynamicsError, match="set its bos_token"):
        start_token(other)


def test_the_files_give_pairs_in_their_order_and_one_spelling_of_each_field(blimp_folder):
    paradigms = {each.name: each for each in read_blimp(blimp_folder)}
    assert paradigms["reflexive_gender"].field == "syntax_semantics"
    assert {name: list(each.pairs) for name, each in paradigms.items()} == {
        name: pairs for (_, _, name), pairs in PAIRS.items()
    }
    assert sorted(len(each.pairs) for each in read_blimp(blimp_folder, limit=2)) == [1, 2, 2, 2]
    assert [each.name for each in read_blimp(blimp_folder, only=["who_island"])] == ["who_island"]


def test_paradigms_that_are_not_there_are_named(blimp_folder):
    assert missing_paradigms(read_blimp(blimp_folder)) == list(PARADIGMS)
    (blimp_folder / "who_island.jsonl").rename(blimp_folder / "wh_island.jsonl")
    text = (blimp_folder / "wh_island.jsonl").read_text().replace("who_island", "wh_island")
    (blimp_folder / "wh_island.jsonl").write_text(text)
    assert missing_paradigms(read_blimp(blimp_folder)) == [p for p in PARADIGMS if p != "wh_island"]
    with pytest.raises(MissingError, match=r"No inchoative.jsonl in .*available: .*wh_island"):
        read_blimp(blimp_folder, only=["inchoative"])


def test_what_is_no_blimp_file_is_refused(blimp_folder, tmp_path):
    with pytest.raises(MissingError, match="--download-blimp"):
        read_blimp(tmp_path)
    path = blimp_folder / "who_island.jsonl"
    path.write_text(path.read_text() + '{"sentence_good": "a"}\n')
    with pytest.raises(FormatError, match=re.escape(f"Line 2 of {path}")):
        read_blimp(blimp_folder)
    path.write_text("")
    with pytest.raises(FormatError, match="does not hold one paradigm"):
        read_blimp(blimp_folder)


@pytest.fixture
def blimp_server(blimp_folder):
    """The address of a server that has the files."""

    class Quiet(SimpleHTTPRequestHandler):
        def log_message(self, *_):
            pass

    with ThreadingHTTPServer(
        ("127.0.0.1", 0), partial(Quiet, directory=str(blimp_folder))
    ) as server:
        thread = threading.Thread(target=server.serve_forever)
        thread.start()
        yield f"http://127.0.0.1:{server.server_port}"
        server.shutdown()
        thread.join()


NAMES = [name for _, _, name in PAIRS]


def test_files_are_fetched_once(blimp_server, blimp_folder, tmp_path):
    said = []
    download_blimp(tmp_path / "copy", home=blimp_server, only=NAMES, say=said.append)
    assert read_blimp(tmp_path / "copy") == read_blimp(blimp_folder)
    download_blimp(tmp_path / "copy", home="http://127.0.0.1:9", only=NAMES, say=said.append)
    assert len(said) == 1
    assert "4 BLiMP files" in said[0]


def test_a_file_that_cannot_be_fetched_or_is_something_else_leaves_none(
    blimp_server, blimp_folder, tmp_path
):
    with pytest.raises(DynamicsError, match=r"Cannot fetch .*inchoative.jsonl: .*404"):
        download_blimp(tmp_path / "copy", home=blimp_server, only=["inchoative"])
    (blimp_folder / "who_island.jsonl").write_text(json.dumps({"message": "moved"}))
    with pytest.raises(FormatError, match="is not a BLiMP pair"):
        download_blimp(tmp_path / "copy", home=blimp_server, only=["who_island"])
    assert not list((tmp_path / "copy").glob("*.jsonl"))
