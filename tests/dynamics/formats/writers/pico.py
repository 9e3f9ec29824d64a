"""Writes runs of pico-train and relora-pico, which are programs and no packages.

pico-lm/pico-train: `src/checkpointing/training.py` saves RUN/training_config.yaml (yaml.dump of the
configs as dicts) and RUN/checkpoints/step_N/ with the Hugging Face model, whose decoder is called
`pico_decoder` (`src/model/pico_decoder.py`), fabric_state/checkpoint.pt, and the link `latest`.
`src/checkpointing/learning_dynamics.py` saves step_N/learning_dynamics/{train,val}_*.pt from a copy
of the model, set up by Fabric: forward hooks on every module with one of the layer suffixes in its
name take its weight, and named_parameters their gradients after a backward pass per sub-batch.

Yu-val-weiss/relora-pico: the same, with A_lora and B_lora in `src/model/relora.py`; hooks pass over
modules without weight. It takes gradients of what is trained.
"""

import copy

import torch
import yaml
from lightning_fabric import Fabric
from torch import nn
from torch.nn.functional import cross_entropy, scaled_dot_product_attention, silu
from transformers import PretrainedConfig, PreTrainedModel

from tests.dynamics.formats.writers.low_rank import LowRankLinear, replace_linears

NAMES = ("A_lora", "B_lora", "s")
SUFFIXES = ("attention.v_proj", "attention.o_proj", "swiglu.w_2")
MODEL = {
    "model_type": "pico_decoder",
    "d_model": 16,
    "n_layers": 2,
    "vocab_size": 40,
    "batch_size": 4,
    "max_seq_len": 32,
    "attention_n_heads": 4,
    "attention_n_kv_heads": 2,
    "activation_hidden_dim": 24,
    "norm_eps": 1e-6,
    "position_emb_theta": 10000.0,
}
RELORA = {
    "target_modules": ["attention", "swiglu"],
    "reset_frequency": 10,
    "r": 3,
    "lora_alpha": 7,
    "lora_dropout": 0.0,
    "keep_original_weights": False,
    "lora_only": False,
    "trainable_scaling": False,
}


class Attention(nn.Module):
    def __init__(self):
        super().__init__()
        self.q_proj, self.o_proj = (nn.Linear(16, 16, bias=False) for _ in range(2))
        self.k_proj, self.v_proj = (nn.Linear(16, 8, bias=False) for _ in range(2))

    def forward(self, x):
        q, k, v = (
            each(x).unflatten(-1, (-1, 4)).transpose(1, 2)
            for each in (self.q_proj, self.k_proj, self.v_proj)
        )
        mixed = scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=True)
        return self.o_proj(mixed.transpose(1, 2).flatten(2))


class SwiGLU(nn.Module):
    def __init__(self):
        super().__init__()
        self.w_0, self.w_1 = (nn.Linear(16, 24, bias=False) for _ in range(2))
        self.w_2 = nn.Linear(24, 16, bias=False)

    def forward(self, x):
        return self.w_2(silu(self.w_0(x)) * self.w_1(x))


class Block(nn.Module):
    def __init__(self):
        super().__init__()
        self.attention, self.swiglu = Attention(), SwiGLU()
        self.attention_norm, self.swiglu_norm = nn.RMSNorm(16), nn.RMSNorm(16)

    def forward(self, x):
        x = x + self.attention(self.attention_norm(x))
        return x + self.swiglu(self.swiglu_norm(x))


class Decoder(nn.Module):
    def __init__(self):
        super().__init__()
        self.embedding_proj = nn.Embedding(40, 16)
        self.layers = nn.ModuleList(Block() for _ in range(2))
        self.output_norm = nn.RMSNorm(16)
        self.de_embedding_proj = nn.Linear(16, 40, bias=False)

    def forward(self, ids):
        x = self.embedding_proj(ids)
        for layer in self.layers:
            x = layer(x)
        return self.de_embedding_proj(self.output_norm(x))


class DecoderConfig(PretrainedConfig):
    model_type = "pico_decoder"


class HuggingFaceDecoder(PreTrainedModel):
    config_class = DecoderConfig

    def __init__(self, config, decoder):
        super().__init__(config)
        self.pico_decoder = decoder


def decoder(seed=0, **relora):
    """A model; with the options of its config's section relora, one with factors."""
    torch.manual_seed(seed)
    model = Decoder()
    if not relora:
        return model
    settings = RELORA | relora

    def low_rank(linear):
        layer = LowRankLinear(
            linear,
            r=settings["r"],
            alpha=settings["lora_alpha"],
            names=NAMES,
            trained=settings["trainable_scaling"],
            with_weight=not settings["lora_only"],
        )
        if layer.weight is not None:
            layer.weight.requires_grad = False
        return layer

    return replace_linears(model, settings["target_modules"], low_rank)


def save_config(run, **relora):
    """RUN/training_config.yaml."""
    section = {"relora": RELORA | relora} if relora else {}
    run.mkdir(parents=True, exist_ok=True)
    with (run / "training_config.yaml").open("w") as file:
        yaml.dump({"model": MODEL | section, "training": {"max_steps": 10}}, file)


def save_model(model, run, step, **relora):
    """RUN/checkpoints/step_N/ with the model; lora_only keeps weights of zeros, which go unused."""
    at = run / "checkpoints" / f"step_{step}"
    config = DecoderConfig(**MODEL, **({"relora": RELORA | relora} if relora else {}))
    model = copy.deepcopy(model)
    for layer in model.modules():
        if isinstance(layer, LowRankLinear) and layer.weight is None:
            a, b = layer.factors
            layer.weight = nn.Parameter(torch.zeros(b.out_features, a.in_features))
    wrapped = HuggingFaceDecoder(config, model)
    wrapped.save_pretrained(at)
    (at / "fabric_state").mkdir()
    torch.save(
        {"_model": model.state_dict(), "_checkpoint_step": step}, at / "fabric_state/checkpoint.pt"
    )
    latest = run / "checkpoints/latest"
    latest.unlink(missing_ok=True)
    latest.symlink_to(f"step_{step}", target_is_directory=True)
    return at


def save_dynamics(model, run, step, split, *, gradients=True, seed=0):
    """step_N/learning_dynamics/{split}_*.pt; returns (weights, gradients) as Fabric names them."""
    at = run / "checkpoints" / f"step_{step}" / "learning_dynamics"
    at.mkdir(parents=True, exist_ok=True)
    fabric = Fabric(accelerator="cpu", devices=1)
    copied = fabric.setup(copy.deepcopy(model))
    activations, weights, taken = {}, {}, {}

    def hook(name):
        def take(module, _, out):
            if getattr(module, "weight", None) is not None:
                activations[name] = out[:, -1].detach()
                weights[name] = module.weight.detach().cpu()

        return take

    for name, module in copied.named_modules():
        if any(suffix in name for suffix in SUFFIXES):
            module.register_forward_hook(hook(name))
    generator = torch.Generator().manual_seed(seed)
    for _ in range(2):  # sub-batches
        ids = torch.randint(0, 40, (4, 9), generator=generator)
        loss = cross_entropy(copied(ids[:, :-1]).transpose(1, 2), ids[:, 1:])
        if gradients:
            fabric.backward(loss)
    for name, parameter in copied.named_parameters() if gradients else ():
        taking = "weight" in name and parameter.requires_grad
        if taking and any(suffix in name for suffix in SUFFIXES):
            taken[name.replace(".weight", "")] = parameter.grad.detach().cpu()
    for what, tensors in (("activations", activations), ("weights", weights), ("gradients", taken)):
        if tensors:
            torch.save(tensors, at / f"{split}_{what}.pt")
    return weights, taken
