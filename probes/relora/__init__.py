"""ReLoRA on PEFT's LoRA layers, and the experiment that compares it with full-rank training.

Lialin et al. 2023, arXiv 2307.05695; Weiss et al. 2025, arXiv 2509.12960.
"""

from dynamics.errors import require_extra

try:
    from probes.relora.config import TrainConfig
    from probes.relora.data.sequences import TokenBlocks, TokenStream
    from probes.relora.data.text import (
        TextData,
        folder_text,
        prepare_data,
        standard_library_text,
        train_tokenizer,
    )
    from probes.relora.data.token_datasets import open_tokens
    from probes.relora.model import add_adapters, build_model, parameter_counts
    from probes.relora.presets import PRESETS, as_published, micro, small, tiny
    from probes.relora.training.base_checkpoint import load_base, save_base
    from probes.relora.training.optimizer_reset import reset_optimizer
    from probes.relora.training.own_trainer import add_relora
    from probes.relora.training.restart import ReLoRACallback, merge_and_reset, restart
    from probes.relora.training.run_directory import newest_checkpoint
    from probes.relora.training.schedule import jagged_cosine, linear_warmup_decay
    from probes.relora.training.trainer import train
except ModuleNotFoundError as error:
    if error.name not in ("accelerate", "peft", "tokenizers", "transformers"):
        raise
    _missing = error

    def __getattr__(name: str) -> object:
        """Not when the package is imported: its command line says this in one line."""
        if name not in __all__:
            raise AttributeError(name)
        raise require_extra("relora", _missing) from _missing


__all__ = [
    "PRESETS",
    "ReLoRACallback",
    "TextData",
    "TokenBlocks",
    "TokenStream",
    "TrainConfig",
    "add_adapters",
    "add_relora",
    "as_published",
    "build_model",
    "folder_text",
    "jagged_cosine",
    "linear_warmup_decay",
    "load_base",
    "merge_and_reset",
    "micro",
    "newest_checkpoint",
    "open_tokens",
    "parameter_counts",
    "prepare_data",
    "reset_optimizer",
    "restart",
    "save_base",
    "small",
    "standard_library_text",
    "tiny",
    "train",
    "train_tokenizer",
]
