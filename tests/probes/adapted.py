"""A small Llama with LoRA adapters whose base is frozen, and its training loop, for the tests."""

from contextlib import nullcontext

import peft
import torch
from torch import nn
from transformers import LlamaConfig, LlamaForCausalLM

from dynamics.runs.parameter_names import clean_name

CONFIG = LlamaConfig(
    vocab_size=32,
    hidden_size=16,
    intermediate_size=24,
    num_hidden_layers=2,
    num_attention_heads=2,
    num_key_value_heads=1,
)


def adapted_model(dropout=0.0, dtype=torch.float32, seed=0):
    """LoRA on three kinds of layers, both factors random, as after some training."""
    torch.manual_seed(seed)
    lora = peft.LoraConfig(
        r=3,
        lora_alpha=12,
        lora_dropout=dropout,
        target_modules=["q_proj", "o_proj", "down_proj"],
    )
    base = LlamaForCausalLM(CONFIG).to(dtype)
    model = peft.get_peft_model(base, lora, autocast_adapter_dtype=False)
    for name, parameter in model.named_parameters():
        if "lora_" in name:
            nn.init.normal_(parameter, std=0.1)
    return model.train()


def frozen_matrices(model):
    """Clean name -> frozen two-dimensional parameter."""
    return {
        clean_name(name): parameter
        for name, parameter in model.named_parameters()
        if parameter.ndim == 2 and not parameter.requires_grad
    }


def tokens(step, micro=0, rank=0):
    generator = torch.Generator().manual_seed(10_000 * rank + 100 * step + micro)
    return torch.randint(32, (4, 8), generator=generator)


def train(
    model,
    optimizer,
    steps,
    *,
    accumulate=1,
    rank=0,
    clip=None,
    after_forward=None,
    before_clipping=None,
    after_backward=None,
):
    """Steps 1 ... steps; returns the gradient norms, as clipping over all parameters saw them."""
    torch.manual_seed(1)  # dropout
    norms = []
    for step in range(1, steps + 1):
        optimizer.zero_grad()
        for micro in range(accumulate):
            last = micro == accumulate - 1
            with nullcontext() if last or not hasattr(model, "no_sync") else model.no_sync():
                ids = tokens(step, micro, rank)
                loss = model(input_ids=ids, labels=ids).loss / accumulate
                if after_forward is not None:
                    after_forward(step)
                loss.backward()
        if before_clipping is not None:
            before_clipping(step)
        largest = float("inf") if clip is None else clip
        norms.append(float(nn.utils.clip_grad_norm_(model.parameters(), largest)))
        if after_backward is not None:
            after_backward(step)
        optimizer.step()
    return norms


def adam(model, **options):
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    return torch.optim.AdamW(trained, lr=1e-2, **options)


def unfrozen_gradients(model, optimizer, frozen, steps, **options):
    """(step, name) -> gradients of the weights of `frozen`, which here require them throughout.

    They are taken away before clipping and the optimizer does not hold them: the trajectory is
    that of the frozen model.
    """
    gradients = {}

    def keep(step):
        for name, parameter in frozen.items():
            gradients[step, name] = parameter.grad.clone()
            parameter.grad = None

    train(model, optimizer, steps, before_clipping=keep, **options)
    return gradients


def relative_error(found, expected):
    found, expected = torch.as_tensor(found), torch.as_tensor(expected)
    return float(torch.linalg.norm(found - expected) / torch.linalg.norm(expected))
