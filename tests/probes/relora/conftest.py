"""A model of seconds and the runs that several tests look at."""

from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import PeftModel
from transformers import TrainerCallback

from probes.relora import TextData, TokenBlocks, TrainConfig, add_adapters, build_model, train
from probes.relora.data.text import TrainingData
from probes.relora.training.restart import lora_layers

TOKENS = torch.arange(32).view(2, 16)


def tiny_config(**changes: Any) -> TrainConfig:
    config = TrainConfig(
        method="relora",
        seed=3,
        hidden_size=32,
        intermediate_size=48,
        num_layers=2,
        num_heads=4,
        num_kv_heads=2,
        vocab_size=256,
        sequence_length=16,
        max_steps=16,
        batch_size=2,
        gradient_accumulation_steps=1,
        learning_rate=1e-2,
        weight_decay=0.01,
        max_grad_norm=1.0,
        warmup_steps=2,
        restart_warmup_steps=1,
        reset_every=4,
        lora_rank=4,
        lora_alpha=12.0,
        log_every=2,
        evaluate_every=2,
        record_every=2,
        save_every=2,
    )
    return replace(config, **changes)


def trained_adapters(config: TrainConfig, dtype: torch.dtype = torch.float64) -> PeftModel:
    """A model whose adapters hold an update, as after some steps."""
    model = add_adapters(build_model(config), config).to(dtype).eval()
    generator = torch.Generator().manual_seed(5)
    with torch.no_grad():
        for layer in lora_layers(model).values():
            factor = layer.lora_B["default"].weight
            factor.copy_(0.05 * torch.randn(factor.shape, generator=generator))
    return model


def assert_equal_weights(model: torch.nn.Module, expected: torch.nn.Module) -> None:
    for (name, a), b in zip(model.named_parameters(), expected.parameters(), strict=True):
        assert torch.equal(a, b), name


def random_data(sequences: int = 20) -> TextData:
    blocks = torch.randint(256, (sequences + 2, 16), generator=torch.Generator().manual_seed(11))
    return TextData(train=TokenBlocks(blocks[2:]), validation=TokenBlocks(blocks[:2]))


class BatchWatcher(TrainerCallback):
    """Keeps the token ids of every training forward pass."""

    def __init__(self) -> None:
        self.batches: list[torch.Tensor] = []

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        def keep(module: torch.nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
            if module.training:
                self.batches.append(kwargs["input_ids"].clone())

        self.handle = kwargs["model"].register_forward_pre_hook(keep, with_kwargs=True)

    def on_train_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self.handle.remove()


@dataclass
class FinishedRun:
    config: TrainConfig
    path: Path
    model: torch.nn.Module
    log: list[dict[str, float]]
    batches: list[torch.Tensor]
    events: list[tuple[str, int, dict[str, Any]]] = field(default_factory=list)


def finished_run(
    config: TrainConfig, path: Path, data: TrainingData | None = None, **options: Any
) -> FinishedRun:
    watcher = BatchWatcher()
    events: list[tuple[str, int, dict[str, Any]]] = []
    trainer = train(
        config,
        data or random_data(),
        path,
        callbacks=[watcher],
        on_event=lambda *event: events.append(event),
        **options,
    )
    return FinishedRun(
        config, path, trainer.model, trainer.state.log_history, watcher.batches, events
    )


@pytest.fixture(scope="session")
def relora_run(tmp_path_factory: pytest.TempPathFactory) -> FinishedRun:
    return finished_run(tiny_config(), tmp_path_factory.mktemp("relora"))


@pytest.fixture(scope="session")
def full_rank_run(tmp_path_factory: pytest.TempPathFactory) -> FinishedRun:
    return finished_run(tiny_config(method="full_rank"), tmp_path_factory.mktemp("full_rank"))


@pytest.fixture
def config() -> TrainConfig:
    return tiny_config()


@pytest.fixture
def data() -> TextData:
    return random_data()


@pytest.fixture
def run_to_end() -> Any:
    return finished_run
