"""The user's freezing wins: whatever is frozen or copied, training computes the same bits.

Each case trains once without a recorder and once for each of several intervals. What the user sees
between two steps (flags, copies, optimizers) must be the same too.
"""

import copy
import io
import pickle
import warnings

import lightning.pytorch as pl
import pytest
import torch
from lightning.pytorch.callbacks import BackboneFinetuning
from torch import nn
from torch.nn.utils import parametrize
from torch.utils.checkpoint import checkpoint

import dynamics as dy
from probes import Recorder
from probes.frameworks.lightning import RecorderCallback
from probes.gradients.absent import AbsentGradientWarning
from tests.probes.adapted import adam, adapted_model, tokens


class Tower(nn.Module):
    """A frozen body below a head that trains."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.body = nn.Sequential(nn.Linear(8, 8), nn.Tanh(), nn.Linear(8, 8))
        self.head = nn.Linear(8, 8)
        self.body.requires_grad_(False)

    def forward(self, x):
        return self.head(self.body(x))


def batch(step, micro=0):
    return torch.randn(4, 8, generator=torch.Generator().manual_seed(10 * step + micro))


def flags(model):
    return [
        (name, each.requires_grad, each.grad is None, bool(each._backward_hooks))
        for name, each in model.named_parameters()
    ]


def same_bits(tmp_path, train, everies=(1, 2, 3)):
    """Train with and without; `train(recorded)` returns what the user sees, tensors and flags."""
    plain = train(lambda model, optimizer: None)
    for every in everies:
        recorders = []

        def attach(model, optimizer, every=every, recorders=recorders):
            store = tmp_path / f"{every}-{len(recorders)}.zarr"
            recorders.append(Recorder(model, optimizer, store, every=every).attach())

        found = train(attach)
        for recorder in recorders:
            recorder.close()
        assert len(found) == len(plain)
        for one, other in zip(found, plain, strict=True):
            if isinstance(one, torch.Tensor):
                assert torch.equal(one, other)
            else:
                assert one == other


def loop(model, optimizer, attach, *, steps=6, micros=1, at=None):
    """Trains; calls at[moment](step) at "begin", "forward", "backward" and "end" of each step."""
    attach(model, optimizer)
    at, seen = at or {}, []
    for step in range(steps):
        at.get("begin", id)(step)
        for micro in range(micros):
            x = batch(step, micro)
            loss = (model(x) - x).square().mean()
            at.get("forward", id)(step)
            loss.backward()
            at.get("backward", id)(step)
        optimizer.step()
        seen.append(flags(model))
        optimizer.zero_grad()
        at.get("end", id)(step)
    return [*seen, *(each.detach().clone() for each in model.parameters())]


@pytest.mark.parametrize("micros", [1, 2])
@pytest.mark.parametrize("moment", ["begin", "forward", "backward", "end"])
def test_a_part_that_is_unfrozen_trains_from_then_on(tmp_path, moment, micros):
    def train(attach):
        model = Tower()
        optimizer = torch.optim.SGD(model.head.parameters(), lr=0.1)

        def unfreeze(step):
            if step == 2 and not model.body[2].weight.requires_grad:
                model.body[2].requires_grad_(True)
                optimizer.add_param_group({"params": model.body[2].parameters()})

        return loop(model, optimizer, attach, micros=micros, at={moment: unfreeze})

    same_bits(tmp_path, train)


@pytest.mark.parametrize("moment", ["begin", "end"])
def test_parts_may_be_frozen_and_unfrozen_in_turn(tmp_path, moment):
    def train(attach):
        model = Tower()
        # A frozen weight may lie in an optimizer.
        optimizer = torch.optim.AdamW(model.parameters(), lr=0.1)

        def switch(step):
            model.body.requires_grad_(step % 2 == 0)
            model.head.weight.requires_grad_(step % 3 == 0)
            model.train(step % 2 == 0)

        return loop(model, optimizer, attach, at={moment: switch})

    same_bits(tmp_path, train)


def test_what_is_chosen_by_its_flag_is_what_the_user_set(tmp_path):
    def train(attach):
        model = Tower()
        optimizer = torch.optim.SGD(model.head.parameters(), lr=0.1)
        chosen = []

        def choose(step):
            chosen.append([n for n, each in model.named_parameters() if each.requires_grad])

        moments = ("begin", "forward", "backward", "end")
        return loop(model, optimizer, attach, at=dict.fromkeys(moments, choose)) + chosen

    same_bits(tmp_path, train)


COPIES = {
    "deepcopy": copy.deepcopy,
    "pickle": lambda model: pickle.loads(pickle.dumps(model)),
    "state_dict": lambda model: _loaded(copy.deepcopy(model.state_dict())),
}


def _loaded(state):
    model = Tower()
    model.load_state_dict(state)
    return model


def _saved(model):
    file = io.BytesIO()
    torch.save(model, file)
    file.seek(0)
    return torch.load(file, weights_only=False)


COPIES["torch.save"] = _saved


@pytest.mark.parametrize("way", COPIES)
@pytest.mark.parametrize("moment", ["begin", "forward", "backward", "end"])
def test_a_copy_is_one_of_the_model_alone(tmp_path, moment, way):
    def train(attach):
        model, copies = Tower(), []
        optimizer = torch.optim.SGD(model.head.parameters(), lr=0.1)

        def keep(step):
            if step == 2:
                copies.append(COPIES[way](model))

        seen = loop(model, optimizer, attach, steps=4, at={moment: keep})
        other = copies[0]
        hooks = [
            len(module._forward_hooks) + len(module._forward_pre_hooks) + len(vars(module))
            for module in other.modules()
        ]
        optimizer = torch.optim.SGD(
            [each for each in other.parameters() if each.requires_grad], lr=0.1
        )
        return [*seen, hooks, *loop(other, optimizer, lambda *_: None, steps=2)]

    same_bits(tmp_path, train, everies=(1, 3))


def test_frameworks_that_hand_the_model_on_within_a_call_see_the_weights_themselves(tmp_path):
    """As a LightningModule does within DDP, whose forward is its training_step."""

    class Toggling(nn.Module):
        def __init__(self):
            super().__init__()
            self.tower, self.averaged, self.calls = Tower(), [], 0

        def forward(self, x):
            self.calls += 1
            self.averaged.append(copy.deepcopy(self.tower))
            if self.calls == 3:
                self.tower.body.requires_grad_(True)
            return self.tower(x)

    def train(attach):
        model = Toggling()
        optimizer = torch.optim.SGD(model.tower.parameters(), lr=0.1)
        seen = loop(model, optimizer, attach)
        return [*seen, *(flags(each) for each in model.averaged)]

    same_bits(tmp_path, train)


class Thawing(Tower):
    """Unfreezes and freezes its own body while it computes, by a method or by the attribute."""

    def __init__(self, way):
        super().__init__()
        self.way, self.calls = way, 0

    def forward(self, x):
        self.calls += 1
        for weight in (self.body[0].weight, self.body[2].weight):
            trains = self.calls > 2
            if self.way == "method":
                weight.requires_grad_(trains)
            else:
                weight.requires_grad = trains
        return super().forward(x)


@pytest.mark.parametrize("way", ["method", "attribute"])
def test_a_part_that_is_unfrozen_within_a_call_trains_from_then_on(tmp_path, way):
    def train(attach):
        model = Thawing(way)
        return loop(model, torch.optim.SGD(model.parameters(), lr=0.1), attach)

    same_bits(tmp_path, train)


class Remembering(nn.Module):
    """Gradient checkpointing of a function that takes a weight by itself, outside of any module."""

    def __init__(self, reentrant):
        super().__init__()
        self.tower, self.reentrant = Tower(), reentrant
        self.factor = nn.Parameter(torch.ones(8, 8) / 8, requires_grad=False)

    def forward(self, x):
        x = x.clone().requires_grad_()
        h = checkpoint(lambda x: torch.tanh(x @ self.factor), x, use_reentrant=self.reentrant)
        return checkpoint(self.tower, h, use_reentrant=self.reentrant)


@pytest.mark.parametrize("reentrant", [False, True])
def test_checkpointed_functions_compute_again_as_they_did(tmp_path, reentrant):
    def train(attach):
        model = Remembering(reentrant)
        optimizer = torch.optim.SGD(model.tower.head.parameters(), lr=0.1)
        return loop(model, optimizer, attach)

    same_bits(tmp_path, train)
    run = dy.open_run(tmp_path / "1-0.zarr")
    model = Remembering(reentrant)
    model.requires_grad_(True)
    (model(batch(0)) - batch(0)).square().mean().backward()
    for name, parameter in model.named_parameters():
        if parameter.ndim == 2:
            assert (run.read(name, 1, "gradient").values == parameter.grad.numpy()).all(), name


class Above(nn.Module):
    """Reentrant checkpoints above frozen weights: what trains in them gets no gradient of torch."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.frozen, self.within = nn.Linear(8, 8, bias=False), nn.Linear(8, 8, bias=False)
        self.frozen.requires_grad_(False)
        self.within.requires_grad_(False)
        self.lost, self.norm = nn.Linear(8, 8, bias=False), nn.LayerNorm(8)
        self.middle, self.head = nn.Linear(8, 8, bias=False), nn.Linear(8, 8, bias=False)

    def both(self, x):
        return torch.tanh(self.within(self.lost(x)))

    def forward(self, x, again=checkpoint):
        x = again(self.both, self.frozen(x), use_reentrant=True)
        x = self.middle(again(self.norm, x, use_reentrant=True))
        return again(self.head, x, use_reentrant=True)


@pytest.mark.filterwarnings("ignore:None of the inputs have requires_grad")
def test_what_reentrant_checkpointing_leaves_untrained_stays_so(tmp_path):
    def train(attach):
        model = Above()
        optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
        return loop(model, optimizer, attach)

    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", category=AbsentGradientWarning)
        same_bits(tmp_path, train)
    run = dy.open_run(tmp_path / "1-0.zarr")
    model = Above().requires_grad_(True)
    out = model(batch(0), again=lambda function, x, use_reentrant: function(x))
    (out - batch(0)).square().mean().backward()
    for name in ("frozen", "within", "middle", "head"):
        expected = model.get_submodule(name).weight.grad.numpy()
        assert (run.read(f"{name}.weight", 1, "gradient").values == expected).all(), name
    assert run.read("lost.weight", 1, "gradient") is None


def test_a_recorder_may_come_and_go_between_forward_and_backward(tmp_path):
    """Then computing again must still do what the forward pass did."""

    def train(attach):
        model, recorders = Remembering(False), []
        optimizer = torch.optim.SGD(model.tower.head.parameters(), lr=0.1)

        def come_or_go(step):
            if step == 1:
                recorders.append(attach(model, optimizer))
            elif step == 3 and recorders[0] is not None:
                recorders[0].close()

        return loop(model, optimizer, lambda *_: None, at={"forward": come_or_go})

    plain = train(lambda *_: None)
    store = tmp_path / "run.zarr"
    found = train(lambda *given: Recorder(*given, store, every=1).attach())
    for one, other in zip(found, plain, strict=True):
        assert torch.equal(one, other) if isinstance(one, torch.Tensor) else one == other


def test_an_interrupted_forward_pass_leaves_the_weights_in_place(tmp_path):
    model = Tower()
    weight, calls = model.body[0].weight, []

    def interrupt(module, args):
        calls.append(module)
        raise (KeyboardInterrupt if len(calls) == 2 else ValueError("of the user"))

    handle = model.head.register_forward_pre_hook(interrupt)
    optimizer = torch.optim.SGD(model.head.parameters(), lr=0.1)
    with Recorder(model, optimizer, tmp_path / "run.zarr", every=1):
        with pytest.raises(ValueError, match="of the user"):
            model(batch(0))
        assert model.body[0].weight is weight
        with pytest.raises(KeyboardInterrupt):
            model(batch(0))
        handle.remove()
        model(batch(0)).sum().backward()
        optimizer.step()
        assert model.body[0].weight is weight
    assert model.body[0].weight is weight
    assert dy.open_run(tmp_path / "run.zarr").read("body.0.weight", 1, "gradient") is not None


class Offset(nn.Module):
    """W + offset, as PEFT parametrises weights in each of its forward passes."""

    def __init__(self, offset):
        super().__init__()
        self.offset = [offset]

    def forward(self, weight):
        return weight + self.offset[0]


class Moving(Tower):
    """Adds a parametrisation of a frozen weight within each forward pass, and takes it out."""

    def __init__(self):
        super().__init__()
        self.offset = nn.Parameter(torch.zeros(8, 8))

    def forward(self, x):
        first = self.body[0]
        parametrize.register_parametrization(first, "weight", Offset(self.offset))
        try:
            return super().forward(x)
        finally:
            parametrize.remove_parametrizations(first, "weight", leave_parametrized=False)


def test_a_frozen_weight_that_a_forward_pass_moves_stays_the_models_parameter(tmp_path):
    def train(attach):
        model = Moving()
        kept = model.body[0].weight
        trained = [model.offset, *model.head.parameters()]
        seen = loop(model, torch.optim.SGD(trained, lr=0.1), attach)
        return [*seen, model.body[0].weight is kept, [name for name, _ in model.named_buffers()]]

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        same_bits(tmp_path, train)


def test_a_frozen_lstm_and_functional_calls_are_left_right(tmp_path):
    def train(attach):
        torch.manual_seed(0)
        model = nn.ModuleDict({"lstm": nn.LSTM(8, 8), "head": nn.Linear(8, 8)})
        model["lstm"].requires_grad_(False)
        optimizer = torch.optim.SGD(model["head"].parameters(), lr=0.1)
        attach(model, optimizer)
        doubled = {name: 2 * each.detach() for name, each in model["lstm"].named_parameters()}
        for step in range(3):
            x = batch(step)
            y = model["head"](model["lstm"](x)[0])
            z = torch.func.functional_call(model["lstm"], doubled, (x,))[0]
            (y - x + z).square().mean().backward()
            optimizer.step()
            optimizer.zero_grad()
        return [flags(model), *(each.detach().clone() for each in model.parameters())]

    same_bits(tmp_path, train)
    run = dy.open_run(tmp_path / "1-0.zarr")
    assert run.read("lstm.weight_ih_l0", 1, "gradient") is not None


def test_a_fast_path_for_frozen_transformers_is_not_left(tmp_path):
    """torch computes other bits in `eval` where nothing requires a gradient."""

    def train(attach):
        torch.manual_seed(0)
        layer = nn.TransformerEncoderLayer(8, 2, 16, batch_first=True)
        model = nn.Sequential(nn.Linear(8, 8), nn.TransformerEncoder(layer, 2), nn.Linear(8, 8))
        model[:2].requires_grad_(False)
        model[1].eval()
        optimizer = torch.optim.SGD(model[2].parameters(), lr=0.1)
        attach(model, optimizer)
        for step in range(3):
            x = batch(step)[None]
            (model(x) - x).square().mean().backward()
            optimizer.step()
            optimizer.zero_grad()
        return [each.detach().clone() for each in model.parameters()]

    same_bits(tmp_path, train)


@pytest.mark.parametrize("what", ["disable", "merge", "switch"])
def test_adapters_may_be_disabled_merged_and_switched(tmp_path, what):
    import peft

    def train(attach):
        model = adapted_model()
        lora = peft.LoraConfig(r=3, lora_alpha=6, target_modules=["q_proj", "o_proj", "down_proj"])
        model.add_adapter("other", lora)
        optimizer = adam(model)
        attach(model, optimizer)
        seen = []
        for step in range(1, 5):
            if what == "disable":
                with model.disable_adapter(), torch.no_grad():
                    seen.append(model(input_ids=tokens(step)).logits)
            elif what == "merge":
                model.merge_adapter()
                seen.append(model(input_ids=tokens(step)).logits.detach())
                model.unmerge_adapter()
            else:
                model.set_adapter("other" if step % 2 else "default")
            model(input_ids=tokens(step), labels=tokens(step)).loss.backward()
            optimizer.step()
            optimizer.zero_grad()
            seen.append(flags(model))
        return [*seen, *(each.detach().clone() for each in model.parameters())]

    same_bits(tmp_path, train, everies=(1, 2))


class Finetuned(pl.LightningModule):
    def __init__(self):
        super().__init__()
        tower = Tower()
        tower.requires_grad_(True)
        self.backbone, self.head = tower.body, tower.head

    def training_step(self, x, index):
        return (self.head(self.backbone(x)) - x).square().mean()

    def configure_optimizers(self):
        trained = [each for each in self.parameters() if each.requires_grad]
        return torch.optim.SGD(trained, lr=0.1)


@pytest.mark.slow
@pytest.mark.parametrize("precision", ["32", "bf16-mixed"])
def test_lightnings_backbone_finetuning_trains_the_same_bits(tmp_path, precision):
    def fit(callbacks):
        module = Finetuned()
        trainer = pl.Trainer(
            max_epochs=4,
            accelerator="cpu",
            precision=precision,
            callbacks=[BackboneFinetuning(unfreeze_backbone_at_epoch=2), *callbacks],
            logger=False,
            enable_checkpointing=False,
            enable_progress_bar=False,
            enable_model_summary=False,
        )
        data = torch.cat([batch(step) for step in range(3)])
        trainer.fit(module, torch.utils.data.DataLoader(data, batch_size=4))
        return [each.detach() for each in module.parameters()] + [flags(module)]

    plain = fit([])
    for every in (1, 2):
        found = fit([RecorderCallback(tmp_path / f"{every}.zarr", every=every)])
        assert all(map(torch.equal, found[:-1], plain[:-1]))
        assert found[-1] == plain[-1]
    run = dy.open_run(tmp_path / "1.zarr")
    assert run.steps.tolist() == list(range(13))
    # Probed at first, and consumed from the third epoch on.
    assert all(run.read("backbone.0.weight", step, "gradient") is not None for step in range(1, 13))


def test_two_recorders_on_one_model_probe_both(tmp_path):
    def train(attach):
        model = Tower()
        optimizer = torch.optim.SGD(model.head.parameters(), lr=0.1)
        attach(model, optimizer)
        return loop(model, optimizer, attach)

    same_bits(tmp_path, train)
    one, other = (dy.open_run(tmp_path / f"1-{number}.zarr") for number in (0, 1))
    for step in (1, 6):
        gradients = (each.read("body.0.weight", step, "gradient") for each in (one, other))
        first, second = gradients
        assert (first.values == second.values).all()
