"""The Hugging Face Trainer on a small model with LoRA adapters, in one process or in several."""

import torch
from transformers import Trainer, TrainingArguments

from probes.frameworks.hf_trainer import RecorderCallback
from tests.probes.adapted import adapted_model, tokens


class Tokens(torch.utils.data.Dataset):
    """32 sequences of 8 tokens."""

    def __init__(self):
        self.ids = torch.cat([tokens(step) for step in range(8)])

    def __len__(self):
        return len(self.ids)

    def __getitem__(self, index):
        return {"input_ids": self.ids[index], "labels": self.ids[index]}


def trained_by_trainer(folder, name, *, batch, every=None, dropout=0.0, callbacks=(), **options):
    """The adapted model after 4 steps; recorded to FOLDER/NAME.zarr if `every` is given."""
    arguments = TrainingArguments(
        output_dir=str(folder / name),
        max_steps=4,
        per_device_train_batch_size=batch,
        gradient_accumulation_steps=2,
        max_grad_norm=0.05,
        learning_rate=1e-2,
        logging_steps=1,
        save_strategy="no",
        **{"report_to": "none", **options},
        disable_tqdm=True,
        use_cpu=True,
        ddp_backend="gloo" if torch.distributed.is_initialized() else None,
        train_sampling_strategy="sequential",
    )
    callbacks = list(callbacks)
    if every is not None:
        callbacks.append(RecorderCallback(folder / f"{name}.zarr", every=every))
    model = adapted_model(dropout)
    flags = [parameter.requires_grad for parameter in model.parameters()]
    trainer = Trainer(model, arguments, train_dataset=Tokens(), callbacks=callbacks)
    trainer.train()
    assert flags == [parameter.requires_grad for parameter in model.parameters()]
    return trainer
