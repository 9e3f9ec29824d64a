"""Every recipe of docs/recipes.md runs, word for word, and its tracker has the ranks."""

import re
from pathlib import Path

import pytest
import torch
import torch.distributed as dist

import dynamics as dy
from tests.probes.live import reading
from tests.probes.live.test_trackers import offline

pytestmark = pytest.mark.slow
__all__ = ["offline"]

PAGE = Path(__file__).parents[1] / "docs/recipes.md"


def recipes():
    """(section, tracker, code) of each block."""
    for section in PAGE.read_text("utf-8").split("\n## ")[1:]:
        for code in re.findall(r"```python\n(.*?)```", section, re.DOTALL):
            tracker = "wandb" if "wandb" in code.lower() else "tensorboard"
            yield pytest.param(code, tracker, id=f"{section.splitlines()[0]} {tracker}")


def given():
    """What the recipes take for granted."""
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=32, hidden_size=16, intermediate_size=24, num_hidden_layers=2,
        num_attention_heads=2, num_key_value_heads=2,
    )  # fmt: skip
    model = LlamaForCausalLM(config)
    ids = torch.randint(32, (16, 8))
    dataset = [{"input_ids": each, "labels": each} for each in ids]
    loader = torch.utils.data.DataLoader(dataset, batch_size=2)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
    return {
        "model": model, "optimizer": optimizer, "dataset": dataset, "loader": loader,
        "batches": list(loader), "module": lightning_module(model),
    }  # fmt: skip


def lightning_module(model):
    pl = pytest.importorskip("lightning.pytorch", reason="needs lightning")

    class Module(pl.LightningModule):
        def __init__(self):
            super().__init__()
            self.model = model

        def training_step(self, batch, index):
            return self.model(**batch).loss

        def configure_optimizers(self):
            return torch.optim.AdamW(self.parameters(), lr=1e-3)

    return Module()


@pytest.fixture
def one_process(tmp_path):
    """A group of one process, for what needs a group."""
    dist.init_process_group("gloo", f"file://{tmp_path / 'group'}", rank=0, world_size=1)
    yield
    dist.destroy_process_group()


@pytest.mark.parametrize(("code", "tracker"), recipes())
def test_a_recipe_shows_ranks(code, tracker, tmp_path, monkeypatch, request):
    pytest.importorskip(tracker, reason=f"needs {tracker}")
    if tracker == "wandb":
        request.getfixturevalue("offline")
    if "fully_shard" in code:
        request.getfixturevalue("one_process")
    monkeypatch.chdir(tmp_path)
    exec(compile(code, str(PAGE), "exec"), given())
    assert dy.open_run(tmp_path / "run.zarr").steps.tolist()[:3] == [0, 2, 4]
    if tracker == "wandb":
        rows = reading.rows_of_wandb(tmp_path)
        keys = {key.removeprefix("train/") for row in rows for key in row}
    else:
        found = {**reading.of_tensorboard(tmp_path), **reading.of_tensorboard(tmp_path, "train/")}
        keys = set(found.get(0, ()))
    assert "rank/weight/effective_rank/q_proj" in keys


def test_the_page_has_both_trackers_for_every_loop():
    ids = [each.id for each in recipes()]
    assert len(ids) == len(set(ids)) == 12
