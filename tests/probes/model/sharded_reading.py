"""What each rank of `test_sharded_weights` does: shard models, train them, and read them.

python -m torch.distributed.run --nproc_per_node 2 -m tests.probes.model.sharded_reading FOLDER
"""

import copy
import json
import sys
import warnings
from pathlib import Path

import peft
import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.fsdp import fully_shard
from torch.nn.utils import parametrizations

from probes.model.sharding import gather
from probes.model.twin import whole
from probes.model.weights import find_weights
from tests.probes.model.reading import Mixed, randomised

LAYERS = ["embed", "linear", "conv1d", "conv2d", "conv1x1", "conv3d"]


class Experts(nn.Module):
    def __init__(self):
        super().__init__()
        self.up = nn.Parameter(torch.randn(4, 6, 8))

    def forward(self, x):
        return torch.einsum("eoi,bi->beo", self.up, x)


class Layers(Mixed):
    def forward(self, x):
        y = self.linear(self.norm(self.embed(x))).square().sum()
        y = y + self.conv1d(torch.ones(1, 4, 5)).square().sum()
        y = y + self.conv1x1(torch.ones(1, 4, 5, 5)).square().sum()
        y = y + self.conv2d(torch.ones(1, 4, 5, 5)).square().sum()
        return y + self.conv3d(torch.ones(1, 2, 3, 3, 3)).square().sum()


def _adapted(model, config):
    return randomised(peft.get_peft_model(model, config))


def _normed(norm):
    model = Layers()
    for layer in (model.linear, model.conv2d):
        norm(layer)
    return model


TOKENS, NUMBERS = torch.arange(6)[None], torch.ones(3, 8)
CASES = {
    "lora": (lambda: _adapted(Layers(), peft.LoraConfig(r=4, target_modules=LAYERS)), TOKENS),
    "dora": (
        lambda: _adapted(Layers(), peft.LoraConfig(r=4, target_modules=LAYERS, use_dora=True)),
        TOKENS,
    ),
    "loha": (
        lambda: _adapted(Layers(), peft.LoHaConfig(r=4, target_modules=["linear", "conv2d"])),
        TOKENS,
    ),
    "saved": (
        lambda: _adapted(
            Layers(), peft.LoraConfig(target_modules=["linear"], modules_to_save=["embed"])
        ),
        TOKENS,
    ),
    "experts": (
        lambda: _adapted(
            nn.Sequential(Experts()), peft.LoraConfig(r=4, target_parameters=["0.up"])
        ),
        NUMBERS,
    ),
    "weight_norm": (lambda: _normed(parametrizations.weight_norm), TOKENS),
    "spectral_norm": (lambda: _normed(parametrizations.spectral_norm), TOKENS),
}


def _train(model, x):
    optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=1e-3)
    for _ in range(2):
        model(x).square().mean().backward()
        optimizer.step()
        optimizer.zero_grad()


def _deviations(make, x):
    """Name -> largest difference between the weight of the sharded and of the whole model."""
    torch.manual_seed(0)
    reference = make()
    model = copy.deepcopy(reference)
    inner = model.base_model.model if isinstance(model, peft.PeftModel) else model
    for module in inner.children():
        fully_shard(module)
    fully_shard(model)
    weights, _ = find_weights(model)
    expected = {each.name: each for each in find_weights(reference)[0]}
    assert expected.keys() == {each.name for each in weights}
    for each in (model, reference):
        _train(each, x)
    found = {}
    for each in weights:
        own, others = (w.factors() for w in (each, expected[each.name]))
        assert (own is None) == (others is None), each.name
        pairs = [(gather(each.read()), expected[each.name].read())]
        pairs += [(whole(own.a), others.a), (whole(own.b), others.b)] if own else []
        found[each.name] = max((a - b).abs().max().item() for a, b in pairs)
    return found


def main(folder):
    """Write the deviations of each case, or why it failed."""
    warnings.simplefilter("ignore")
    dist.init_process_group("gloo")
    found = {}
    for case, (make, x) in CASES.items():
        try:
            found[case] = _deviations(make, x)
        except Exception as error:
            found[case] = f"{type(error).__name__}: {error}"
    if dist.get_rank() == 0:
        Path(folder, "deviations.json").write_text(json.dumps(found))
    dist.destroy_process_group()


if __name__ == "__main__":
    main(sys.argv[1])
