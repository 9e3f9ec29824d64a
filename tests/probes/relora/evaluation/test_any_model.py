"""Models and adapters that this package did not train are evaluated as they lie."""

import math

import peft
import pytest
import torch
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import GPT2Config, GPT2LMHeadModel, PreTrainedTokenizerFast

import dynamics as dy
from dynamics.errors import MissingError
from probes.relora.evaluation.evaluate import evaluate
from probes.relora.evaluation.evaluations import PerplexityEvaluation

SENTENCE = "the cat sat on the mat"


def tokenizer():
    words = {word: index for index, word in enumerate(["<s>", *sorted(set(SENTENCE.split()))])}
    made = Tokenizer(models.WordLevel(words, unk_token="<s>"))
    made.pre_tokenizer = pre_tokenizers.Whitespace()
    return PreTrainedTokenizerFast(tokenizer_object=made, bos_token="<s>", eos_token="<s>")


def gpt2(seed):
    torch.manual_seed(seed)
    return GPT2LMHeadModel(GPT2Config(vocab_size=8, n_positions=16, n_embd=8, n_layer=1, n_head=2))


def loss_of(model):
    ids = torch.tensor([[0, *tokenizer()(SENTENCE)["input_ids"]]])
    with torch.no_grad():
        return float(model.eval()(input_ids=ids, labels=ids).loss)


def evaluated(folder, **options):
    """Step -> loss per token."""
    texts = PerplexityEvaluation({"some": [SENTENCE]})
    found = evaluate(folder, [texts], say=lambda line: None, **options)
    return {each.step: math.log(each.scalars["perplexity"]) for each in found}


def test_a_model_is_evaluated_with_the_tokenizer_beside_it(tmp_path):
    gpt2(0).save_pretrained(tmp_path / "model")
    with pytest.raises(MissingError, match=r"No .*tokenizer.json; name the tokenizer"):
        evaluated(tmp_path / "model")
    tokenizer().save_pretrained(tmp_path / "model")
    assert evaluated(tmp_path / "model") == {0: pytest.approx(loss_of(gpt2(0)), rel=1e-5)}
    assert "perplexity" in dy.open_run(tmp_path / "model").scalars


def test_a_series_that_another_trainer_wrote_is_evaluated_step_by_step(tmp_path):
    for step in (5, 10):
        gpt2(step).save_pretrained(tmp_path / "out" / f"step_{step}" / "hf")
    tokenizer().save_pretrained(tmp_path / "tokenizer")
    found = evaluated(tmp_path / "out", tokenizer=str(tmp_path / "tokenizer"))
    assert found == {step: pytest.approx(loss_of(gpt2(step)), rel=1e-5) for step in (5, 10)}
    assert list(evaluated(tmp_path / "out", steps=[10], tokenizer=str(tmp_path / "tokenizer"))) == [
        10
    ]


def test_an_adapter_is_evaluated_on_the_base_that_its_config_names_or_that_is_given(tmp_path):
    gpt2(0).save_pretrained(tmp_path / "base")
    model = GPT2LMHeadModel.from_pretrained(tmp_path / "base")
    config = peft.LoraConfig(r=2, target_modules=["c_attn"], init_lora_weights=False)
    adapted = peft.get_peft_model(model, config)
    adapted.save_pretrained(tmp_path / "adapter")
    tokenizer().save_pretrained(tmp_path / "adapter")
    expected = pytest.approx(loss_of(adapted), rel=1e-5)
    assert evaluated(tmp_path / "adapter") == {0: expected}
    assert loss_of(gpt2(0)) != expected
    (tmp_path / "base").rename(tmp_path / "moved")
    (tmp_path / "adapter" / "evaluation.jsonl").unlink()
    with pytest.raises(MissingError, match=r"base model '.*base' of the adapter .*\(--base\)"):
        evaluated(tmp_path / "adapter")
    assert evaluated(tmp_path / "adapter", base=str(tmp_path / "moved")) == {0: expected}


def test_what_holds_no_model_is_refused(tmp_path):
    torch.save({"layer.weight": torch.ones(2, 2)}, tmp_path / "step_1.pt")
    with pytest.raises(MissingError, match=r"no other model or adapter of transformers or PEFT"):
        evaluated(tmp_path)
