"""Healthy trainings of several families, optimizers and schedules: no check of histories alarms."""

import numpy as np
import pytest
import torch

from dynamics.auditing import Severity, audit
from tests.short_run import TEXT

transformers = pytest.importorskip("transformers")
pytestmark = pytest.mark.slow

SIZES = {"hidden_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4, "vocab_size": 128}
SIZES["num_key_value_heads"] = 2
TOKENS = torch.tensor(list(TEXT.encode()))
EVERY = (1, 3, 10)

# family, optimizer, rate, schedule over the share of the steps, full batches
RUNS = [
    ("llama", "AdamW", 1e-3, "warm"),
    ("gpt_neox", "AdamW", 1e-3, "cosine"),
    ("gpt2", "AdamW", 3e-3, "warm"),
    ("olmo2", "AdamW", 1e-3, "constant"),
    ("qwen2", "AdamW", 1e-2, "constant"),
    ("mixtral", "AdamW", 1e-3, "warm"),
    ("bert", "AdamW", 3e-3, "cyclic"),
    ("opt", "AdamW", 1e-3, "warm"),
    ("bloom", "AdamW", 1e-3, "cosine"),
    ("llama", "SGD", 0.3, "constant"),
    ("gpt2", "SGD", 0.5, "full batches"),  # at the edge of stability
    ("gpt_neox", "momentum", 0.1, "constant"),
    ("llama", "Muon", 1e-2, "warm"),
    ("qwen2", "AdamW", 3e-4, "fine-tuning"),
]


def rate(schedule, share):
    if schedule == "warm":
        return min(10 * share, 1.0) * np.cos(share * 1.4)
    if schedule == "cosine":
        return 0.55 + 0.45 * np.cos(np.pi * share)
    if schedule == "cyclic":
        return 0.5 - 0.5 * np.cos(6 * np.pi * share)
    return 1.0


def optimizer_of(name, model, lr):
    if name == "AdamW":
        return [torch.optim.AdamW(model.parameters(), lr=lr, weight_decay=0.1)]
    if name == "Muon":
        matrices = [each for each in model.parameters() if each.ndim == 2]
        others = [each for each in model.parameters() if each.ndim != 2]
        return [torch.optim.Muon(matrices, lr=lr), torch.optim.AdamW(others, lr=lr)]
    momentum = 0.9 if name == "momentum" else 0.0
    return [torch.optim.SGD(model.parameters(), lr=lr, momentum=momentum)]


def trained(model, optimizers, schedule, steps, seed):
    """Yield step, model of each step."""
    generator = torch.Generator().manual_seed(seed)
    rates = [[group["lr"] for group in each.param_groups] for each in optimizers]
    tokens = None
    yield 0, model
    for step in range(steps):
        if tokens is None or schedule != "full batches":
            starts = torch.randint(0, len(TOKENS) - 32, (8,), generator=generator)
            tokens = torch.stack([TOKENS[each : each + 32] for each in starts])
        model.zero_grad()
        model(input_ids=tokens, labels=tokens).loss.backward()
        for each, own in zip(optimizers, rates, strict=True):
            for group, lr in zip(each.param_groups, own, strict=True):
                group["lr"] = lr * rate(schedule, step / steps)
            each.step()
        yield step + 1, model


@pytest.mark.parametrize(
    ("family", "optimizer", "lr", "schedule"), RUNS, ids=["-".join(map(str, r)) for r in RUNS]
)
def test_a_healthy_training_gives_no_alarm(tmp_path, family, optimizer, lr, schedule):
    torch.manual_seed(len(family) + len(schedule))
    names = {"gpt2": {"n_positions": 64, "bos_token_id": 0, "eos_token_id": 0}}
    config = transformers.AutoConfig.for_model(
        family, **SIZES, **names.get(family, {"intermediate_size": 96, "ffn_dim": 96})
    )
    kind = "ForMaskedLM" if family == "bert" else "ForCausalLM"
    model = getattr(transformers, f"AutoModel{kind}").from_config(config).train()
    if schedule == "fine-tuning":
        for _ in trained(model, optimizer_of("AdamW", model, 3e-3), "warm", 100, 1):
            pass
    for step, now in trained(model, optimizer_of(optimizer, model, lr), schedule, 60, 2):
        tensors = {name: each.detach().numpy() for name, each in now.named_parameters()}
        for every in EVERY:
            if step % every == 0:
                (tmp_path / str(every)).mkdir(exist_ok=True)
                np.savez(tmp_path / str(every) / f"step_{step}.npz", **tensors)
    for every in EVERY:
        report = audit(tmp_path / str(every))
        for check in ("distinct_checkpoints", "ordered_history", "step_zero"):
            verdicts = report.of(check)
            assert {each.severity for each in verdicts} == {Severity.PASS}, (every, verdicts)
        # Far from the thresholds of 2, or of 4 where records are few steps apart; and of 1.5.
        (ordered,), (beginning,) = report.of("ordered_history"), report.of("step_zero")
        assert ordered.measured < (1.0 if every == 10 else 2.5)
        assert beginning.measured < 1.1
