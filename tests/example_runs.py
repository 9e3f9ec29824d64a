"""The small runs that examples in docstrings and on pages find in their folder.

`run.zarr` (ReLoRA with a merge after step 4, records at 0, 2, 4, 6 and 8), `full/run.zarr` and
`relora/run.zarr` (twins that began with the same weights) and `checkpoints` (Hugging Face, of
steps 2, 4 and 6).
"""

import shutil
from types import SimpleNamespace

import torch

STEPS, MERGE = 8, 4


def small_llama():
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=32,
        hidden_size=16,
        intermediate_size=24,
        num_hidden_layers=2,
        num_attention_heads=2,
        num_key_value_heads=2,
    )
    return LlamaForCausalLM(config)


def _train(model, store, *, before_step=None, after_step=None):
    """The recording of a training on the same tokens for every model; saves what it is told to."""
    from probes import Recorder

    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    optimizer = torch.optim.AdamW(trained, lr=1e-2)
    tokens = torch.Generator().manual_seed(1)
    with Recorder(model, optimizer, store, every=2) as recorder:
        for step in range(1, STEPS + 1):
            optimizer.param_groups[0]["lr"] = 1e-3 if step == MERGE + 1 else 1e-2
            if before_step is not None:
                before_step(step, recorder, optimizer)
            ids = (torch.randint(32, (8, 1), generator=tokens) + torch.arange(16)) % 32
            loss = model(input_ids=ids, labels=ids).loss
            optimizer.zero_grad()
            loss.backward()
            recorder.log(loss=loss.item(), tokens=ids.numel() * step)
            optimizer.step()
            if after_step is not None:
                after_step(step)


def _train_full(store, checkpoints):
    model = small_llama()

    def save(step):
        if step in (2, 4, 6):
            model.save_pretrained(checkpoints / f"checkpoint-{step}")

    _train(model, store, after_step=save)


def _train_relora(store):
    import peft

    from probes.relora import ReLoRACallback

    modules = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]
    config = peft.LoraConfig(r=2, lora_alpha=4, target_modules=modules)
    model = peft.get_peft_model(small_llama(), config)

    def restart(step, recorder, optimizer):
        def note(kind, at, facts):
            recorder.event(kind, at=at, **facts)

        callback = ReLoRACallback(reset_every=MERGE, seed=0, on_event=note)
        state = SimpleNamespace(global_step=step - 1, max_steps=STEPS)
        if step - 1 == MERGE:
            callback.on_step_begin(None, state, None, model=model, optimizer=optimizer)

    _train(model, store, before_step=restart)


def make(folder):
    """Train all of them into a folder."""
    _train_full(folder / "full/run.zarr", folder / "checkpoints")
    _train_relora(folder / "relora/run.zarr")
    shutil.copytree(folder / "relora/run.zarr", folder / "run.zarr")
