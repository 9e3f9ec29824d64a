"""What the tests of evaluation share: pairs, texts, a tokenizer, a model, scores in float64."""

import json
import math
from pathlib import Path
from typing import Any

import torch
from transformers import LlamaConfig, LlamaForCausalLM

from probes.relora import train_tokenizer
from probes.relora.evaluation.trained_models import as_transformers

PAIRS = {
    ("morphology", "subject_verb_agreement", "verb_number"): [
        ("The cats sleep.", "The cats sleeps."),
        ("The dog near the trees barks.", "The dog near the trees bark."),
        ("These books seem old.", "These books seems old."),
    ],
    ("syntax/semantics", "binding", "reflexive_gender"): [
        ("Anna praised herself.", "Anna praised himself."),
        ("The king hurt himself.", "The king hurt herself."),
    ],
    ("syntax", "island_effects", "who_island"): [
        ("Who did you think that she met?", "Who did you wonder whether that she met?"),
    ],
    ("syntax", "island_effects", "what_island"): [
        ("What had he bought and sold?", "What had he bought the book and sold?"),
        ("What is he eating?", "What he is eating?"),
    ],
}
TEXTS = {
    "news": [
        "The king met the queen of the trees, and the dogs that sleep near the books bark.",
        "Old books seem old. " * 20,
        "x",
        "Who bought the dog?",
    ],
    "speech": ["My fellow citizens, what had she sold to the king, and who had bought it?"],
}
SEQUENCE_LENGTH = 64


def write_pairs(folder: Path) -> Path:
    """PAIRS as BLiMP's files."""
    folder.mkdir(parents=True, exist_ok=True)
    for (field, phenomenon, name), pairs in PAIRS.items():
        rows = [
            {
                "sentence_good": good,
                "sentence_bad": bad,
                "field": field,
                "linguistics_term": phenomenon,
                "UID": name,
                "pairID": str(index),
            }
            for index, (good, bad) in enumerate(pairs)
        ]
        (folder / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return folder


def english_tokenizer() -> Any:
    sentences = [sentence for pairs in PAIRS.values() for pair in pairs for sentence in pair]
    return as_transformers(train_tokenizer(sentences + TEXTS["news"] + TEXTS["speech"], 320))


def random_llama(vocab_size: int = 320, context: int = SEQUENCE_LENGTH) -> LlamaForCausalLM:
    """Large weights, so that its distributions are far from uniform."""
    config = LlamaConfig(
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        vocab_size=vocab_size,
        max_position_embeddings=context,
        attention_dropout=0.1,
        tie_word_embeddings=False,
        initializer_range=0.3,
    )
    torch.manual_seed(5)
    return LlamaForCausalLM(config)


def uniform_llama(vocab_size: int = 320, context: int = SEQUENCE_LENGTH) -> LlamaForCausalLM:
    """Every token has the probability 1/vocab_size, whatever stands before it."""
    model = random_llama(vocab_size, context)
    torch.nn.init.zeros_(model.lm_head.weight)
    return model


def token_log_probability(model: Any, given: list[int], token: int) -> float:
    """log p(token | given) from one forward pass over `given` alone; `model` in float64."""
    with torch.no_grad():
        logits = model(input_ids=torch.tensor([given])).logits[0, -1]
    assert logits.dtype == torch.float64
    highest = max(logits.tolist())
    return (
        float(logits[token])
        - highest
        - math.log(math.fsum(math.exp(each - highest) for each in logits.tolist()))
    )
