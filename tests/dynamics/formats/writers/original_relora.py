"""Writes what the original ReLoRA saves: Guitaricet/relora, whose script needs CUDA and wandb.

`torchrun_main.py`, `save_model_ddp`: `SAVE_DIR/model_{update_step}/` with
`ReLoRaModel.save_pretrained`, optimizer.pt and training_state.json.
`peft_pretraining/relora.py`: `save_pretrained` is transformers' own of the wrapped model, in which
each adapted Linear has `weight`, `lora_A.weight` (r, in), `lora_B.weight` (out, r) and, with
`trainable_scaling`, `scaling` (1,); beside it relora_config.json, in which `lora_only` and
`trainable_scaling` stay false whatever was trained.
"""

import json

import huggingface_hub
import torch

from tests.dynamics.formats.writers.low_rank import LowRankLinear, low_rank_layers, replace_linears

NAMES = ("lora_A", "lora_B", "scaling")


def with_relora(model, **options):
    """The model with low-rank layers in place of its attention and MLP."""
    settings = {"r": 4, "alpha": 32, "names": NAMES} | options
    return replace_linears(model, ("attn", "mlp"), lambda each: LowRankLinear(each, **settings))


def save_relora(model, save_dir, step, *, restarts=0, pickled=False, **config):
    """model_{step}/ as save_model_ddp writes it after that many optimizer steps."""
    directory = save_dir / f"model_{step}"
    if pickled:  # transformers before 4.35
        directory.mkdir(parents=True)
        huggingface_hub.save_torch_state_dict(
            model.state_dict(), directory, safe_serialization=False
        )
        model.config.save_pretrained(directory)
    else:
        model.save_pretrained(directory)
    if low_rank_layers(model):
        settings = {
            "r": 4,
            "lora_alpha": 32,
            "lora_dropout": 0.1,
            "target_modules": ["attn", "mlp"],
            "keep_original_weights": True,
            "lora_only": False,
            "trainable_scaling": False,
            "quantize": None,
            "use_double_quant": False,
        }
        (directory / "relora_config.json").write_text(json.dumps(settings | config, indent=4))
    state = {
        "global_step": 2 * step,
        "update_step": step,
        "tokens_seen": 100 * step,
        "tokens_seen_before": 100 * (step - 1),
        "n_lora_restarts": restarts,
        "update_time": 0.5,
        "wandb_id": "abc",
    }
    torch.save({"optimizer": {}, "update_step": step, "dtype": "fp32"}, directory / "optimizer.pt")
    (directory / "training_state.json").write_text(json.dumps(state, indent=4))
    return directory
