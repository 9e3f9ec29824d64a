"""A LightningModule and its trainings, of which Lightning writes the checkpoints."""

import lightning
import torch
from lightning.pytorch.callbacks import ModelCheckpoint
from lightning.pytorch.loggers import CSVLogger

from tests.dynamics.formats.sharded_training import VOCABULARY, Small


class Module(lightning.LightningModule):
    def __init__(self, n_head=1, n_embd=7, activation=torch.relu):
        super().__init__()
        self.save_hyperparameters()
        self.net = Small()

    def training_step(self, batch, _):
        return self.net(batch)

    def configure_optimizers(self):
        trained = [each for each in self.parameters() if each.requires_grad]
        return torch.optim.AdamW(trained, lr=0.1)


class Sharded(Module):
    def configure_model(self):
        from torch.distributed.fsdp import fully_shard

        for layer in self.net.layers:
            fully_shard(layer, mesh=self.device_mesh["data_parallel"])
        fully_shard(self.net, mesh=self.device_mesh["data_parallel"])


def batches():
    tokens = torch.randint(0, VOCABULARY, (8, 3), generator=torch.Generator().manual_seed(0))
    return torch.utils.data.DataLoader(tokens, batch_size=2)


def fit(folder, module=None, **options):
    """Four steps of an epoch, twice; step -> the module's state dict at its checkpoint."""
    states = {}

    class Keep(lightning.Callback):
        def on_save_checkpoint(self, trainer, module, checkpoint):
            saved = checkpoint["state_dict"].items()
            states[trainer.global_step] = {name: tensor.clone() for name, tensor in saved}

    trainer = lightning.Trainer(
        accelerator="cpu",
        logger=CSVLogger(folder),
        callbacks=[
            ModelCheckpoint(every_n_train_steps=2, save_top_k=-1, save_last=True),
            Keep(),
        ],
        enable_progress_bar=False,
        enable_model_summary=False,
        **{"max_epochs": 2, **options},
    )
    trainer.fit(module or Module(), batches())
    return states


def fit_sharded(folder):
    from lightning.pytorch.strategies import ModelParallelStrategy

    torch.manual_seed(0)
    strategy = ModelParallelStrategy(data_parallel_size=2, tensor_parallel_size=1)
    states = fit(folder, Sharded(), strategy=strategy, devices=2)
    full = {
        step: {
            name: each.full_tensor() if hasattr(each, "full_tensor") else each
            for name, each in state.items()
        }
        for step, state in states.items()
    }
    if torch.distributed.get_rank() == 0:
        torch.save(full, folder / "expected.pt")
