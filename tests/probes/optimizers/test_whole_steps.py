"""A record lies after the whole step, whatever the optimizer is made of; or the recorder says so.

Each training keeps the weights as the loop sees them after each step, and the gradients as each
inner optimizer saw them. Training computes the same bits as without a recorder.
"""

import pickle
import warnings

import accelerate
import numpy as np
import pytest
import torch
from accelerate.state import AcceleratorState
from torch import nn
from torch.utils.checkpoint import checkpoint
from transformers import Trainer, TrainingArguments
from transformers.trainer_pt_utils import LayerWiseDummyOptimizer

import dynamics as dy
from dynamics.errors import DynamicsError
from probes import Recorder
from probes.frameworks.hf_trainer import RecorderCallback
from probes.gradients.absent import AbsentGradientWarning
from probes.gradients.stepped import NoOptimizerWarning
from probes.optimizers.changes import UnseenStepWarning
from tests.probes.stacks import Net, Rows

STEPS = 4


class Layers(nn.Module):
    """Three matrices, of which the last may be left unused, and the first be frozen."""

    def __init__(self, used=3, frozen=0, reentrant=None):
        super().__init__()
        torch.manual_seed(0)
        self.layers = nn.ModuleList(nn.Linear(6, 6, bias=False) for _ in range(3))
        self.used, self.reentrant = used, reentrant
        for layer in self.layers[:frozen]:
            layer.requires_grad_(False)

    def forward(self, x):
        for layer in self.layers[: self.used]:
            if self.reentrant is None:
                x = torch.tanh(layer(x))
            else:
                x = checkpoint(lambda x, layer=layer: torch.tanh(layer(x)), x, use_reentrant=True)
        return x


def batch(step):
    return torch.randn(4, 6, generator=torch.Generator().manual_seed(step)).requires_grad_()


def recorded(tmp_path, build, step_of):
    """Trains without and with: (run, weights after each step, optimizer) of the second one.

    Both must compute the same bits.
    """
    ends = []
    for store in (None, tmp_path / "run.zarr"):
        model, optimizer = build()
        weights = [_weights(model)]
        recorder = Recorder(model, optimizer, store, every=1).attach() if store else None
        for step in range(1, STEPS + 1):
            step_of(model, optimizer, batch(step))
            weights.append(_weights(model))
            assert recorder is None or recorder.step == step
        if recorder is not None:
            recorder.close()
        ends.append(weights)
    for one, other in zip(*ends, strict=True):
        assert all((one[name] == other[name]).all() for name in one)
    return dy.open_run(tmp_path / "run.zarr"), ends[1], optimizer


def of_layers(make):
    def build():
        model = Layers()
        return model, make(model.parameters())

    return build


def _weights(model):
    return {name: each.detach().clone().numpy() for name, each in model.named_parameters()}


def assert_records(run, weights):
    assert run.steps.tolist() == list(range(len(weights)))
    for step, expected in enumerate(weights):
        for name in run.matrices:
            np.testing.assert_array_equal(run.read(name, step, "weight").values, expected[name])


def plain_step(model, optimizer, x):
    optimizer.zero_grad()
    (model(x) - x.detach()).square().mean().backward()
    optimizer.step()


class Lookahead:
    """A wrapper that knows nothing of torch's hooks, and holds its optimizer as `fast`."""

    def __init__(self, optimizer):
        self.fast, self.count = optimizer, 0
        self.slow = [each.detach().clone() for each in self.parameters()]

    def parameters(self):
        return [each for group in self.fast.param_groups for each in group["params"]]

    def zero_grad(self):
        self.fast.zero_grad()

    def step(self):
        self.fast.step()
        self.count += 1
        if self.count % 2 == 0:
            with torch.no_grad():
                for slow, each in zip(self.slow, self.parameters(), strict=True):
                    each.data = slow.lerp_(each, 0.5).clone()


class HookedLookahead(Lookahead, torch.optim.Optimizer):
    """The same, as an optimizer of torch, which runs hooks around its step."""

    def __init__(self, optimizer):
        torch.optim.Optimizer.__init__(self, optimizer.param_groups, {})
        Lookahead.__init__(self, optimizer)


class Both:
    """Two optimizers as one, inside of a list."""

    def __init__(self, parameters):
        first, *rest = parameters
        self.all = [torch.optim.SGD(rest, lr=0.1), torch.optim.AdamW([first], lr=0.1)]

    def zero_grad(self):
        for each in self.all:
            each.zero_grad()

    def step(self):
        for each in reversed(self.all):
            each.step()
        with torch.no_grad():
            for each in self.all[0].param_groups[0]["params"]:
                each.clamp_(-0.3, 0.3)


def sgd(parameters):
    return torch.optim.SGD(parameters, lr=0.1)


WRAPPERS = {
    "lookahead": lambda p: Lookahead(sgd(p)),
    "hooked": lambda p: HookedLookahead(sgd(p)),
    "twice": lambda p: Lookahead(Lookahead(sgd(p)).fast),
    "both": lambda p: Both(list(p)),
    "in a list": lambda p: [Lookahead(sgd(p))],
}


@pytest.mark.parametrize("name", WRAPPERS)
def test_a_record_lies_after_the_outermost_step(tmp_path, name):
    def step(model, optimizer, x):
        plain_step(model, optimizer[0] if isinstance(optimizer, list) else optimizer, x)

    run, weights, _ = recorded(tmp_path, of_layers(WRAPPERS[name]), step)
    assert_records(run, weights)
    for matrix in run.matrices:
        assert run.read(matrix, STEPS, "gradient") is not None


def test_a_wrapper_nested_in_a_wrapper_counts_once(tmp_path):
    class Averaged(Lookahead):
        def step(self):
            self.fast.step()
            with torch.no_grad():
                for each in self.fast.parameters():
                    each.mul_(0.99)

        def parameters(self):
            return []

    build = of_layers(lambda p: Averaged(Lookahead(sgd(p))))
    run, weights, _ = recorded(tmp_path, build, plain_step)
    assert_records(run, weights)


def test_a_watched_class_gets_its_own_step_back(tmp_path):
    model, own = Layers(), Lookahead.step
    optimizer = Lookahead(sgd(model.parameters()))
    before = dict(vars(optimizer))
    recorders = [
        Recorder(model, optimizer, tmp_path / f"{number}.zarr", every=1).attach()
        for number in (0, 1)
    ]
    assert vars(optimizer) == before
    pickle.loads(pickle.dumps(optimizer))
    other = Layers()
    plain_step(other, Lookahead(sgd(other.parameters())), batch(0))  # is watched by nobody
    plain_step(model, optimizer, batch(0))
    assert [recorder.step for recorder in recorders] == [1, 1]
    recorders[0].close()
    plain_step(model, optimizer, batch(0))
    recorders[1].close()
    assert Lookahead.step is own
    assert dy.open_run(tmp_path / "1.zarr").steps.tolist() == [0, 1, 2]


class SAM(torch.optim.Optimizer):
    """As published: two steps of other names, or one step with a closure."""

    def __init__(self, parameters):
        super().__init__(parameters, {"lr": 0.1})
        self.base_optimizer = torch.optim.SGD(self.param_groups, lr=0.1)
        self.seen = []

    def _all(self):
        return [each for group in self.param_groups for each in group["params"]]

    @torch.no_grad()
    def first_step(self):
        self.old = [each.clone() for each in self._all()]
        for each in self._all():
            each.add_(0.1 * each.grad)
        self.zero_grad()

    @torch.no_grad()
    def second_step(self):
        for each, old in zip(self._all(), self.old, strict=True):
            each.copy_(old)
        self.seen.append([each.grad.clone().numpy() for each in self._all()])
        self.base_optimizer.step()
        self.zero_grad()

    @torch.no_grad()
    def step(self, closure):
        closure = torch.enable_grad()(closure)
        self.first_step()
        closure()
        self.second_step()


@pytest.mark.parametrize("with_closure", [False, True])
def test_sam_is_recorded_after_its_second_step_with_the_gradient_of_it(tmp_path, with_closure):
    def step(model, optimizer, x):
        def loss():
            value = (model(x) - x.detach()).square().mean()
            value.backward()
            return value

        loss()
        if with_closure:
            optimizer.step(loss)
        else:
            optimizer.first_step()
            loss()
            optimizer.second_step()

    with warnings.catch_warnings():
        warnings.simplefilter("error", UnseenStepWarning)  # the first step is a part of the step
        run, weights, optimizer = recorded(tmp_path, of_layers(SAM), step)
    assert_records(run, weights)
    for number, seen in enumerate(optimizer.seen, start=1):
        for name, expected in zip(run.matrices, seen, strict=True):
            np.testing.assert_array_equal(run.read(name, number, "gradient").values, expected)


def test_schedule_free_optimizers_are_recorded_after_their_step(tmp_path):
    schedulefree = pytest.importorskip("schedulefree")

    def make(parameters):
        optimizer = schedulefree.AdamWScheduleFree(parameters, lr=0.1, warmup_steps=2)
        optimizer.train()
        return optimizer

    run, weights, _ = recorded(tmp_path, of_layers(make), plain_step)
    assert_records(run, weights)
    np.testing.assert_allclose(run.scalars["learning_rate"][1:3], [0.05, 0.1], rtol=1e-6)


def test_a_wrapper_of_schedule_free_is_recorded_after_its_step(tmp_path):
    schedulefree = pytest.importorskip("schedulefree")

    def make(parameters):
        optimizer = schedulefree.ScheduleFreeWrapper(sgd(parameters), momentum=0.9)
        optimizer.train()
        return optimizer

    run, weights, _ = recorded(tmp_path, of_layers(make), plain_step)
    assert_records(run, weights)


@pytest.mark.parametrize("wrap", [False, True])
def test_accelerate_counts_only_steps_that_are_taken(tmp_path, wrap):
    AcceleratorState._reset_state(reset_partial_state=True)
    accelerator = accelerate.Accelerator(cpu=True, gradient_accumulation_steps=2)
    model = Layers()
    optimizer = sgd(model.parameters())
    prepared, stepping = accelerator.prepare(model, optimizer)
    given = Lookahead(stepping) if wrap else stepping
    weights = [_weights(model)]
    with Recorder(prepared, given, tmp_path / "run.zarr", every=1) as recorder:
        for number in range(2 * STEPS):
            with accelerator.accumulate(prepared):
                x = batch(number)
                accelerator.backward((prepared(x) - x.detach()).square().mean())
                stepping.step()
                stepping.zero_grad()
            if number % 2:
                weights.append(_weights(model))
        assert recorder.step == STEPS
    assert_records(dy.open_run(tmp_path / "run.zarr"), weights)


def test_what_changes_weights_after_the_step_is_noticed_once(tmp_path):
    model = Layers()
    optimizer = sgd(model.parameters())
    with Recorder(model, optimizer, tmp_path / "run.zarr", every=1) as recorder:
        plain_step(model, optimizer, batch(0))
        recorder.event("merge")
        with torch.no_grad():
            model.layers[0].weight.mul_(2)  # was announced
        plain_step(model, optimizer, batch(1))
        with torch.no_grad():
            model.layers[1].weight.clamp_(-0.1, 0.1)
        with pytest.warns(UnseenStepWarning, match=r"Step 2: .* 1 weights \(layers.1.weight\)"):
            plain_step(model, optimizer, batch(2))
        model.layers[1].weight.data = model.layers[1].weight.data.clone()
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            plain_step(model, optimizer, batch(3))


class Renamed(torch.optim.SGD):
    def update(self):
        with torch.no_grad():
            for group in self.param_groups:
                for each in group["params"]:
                    each.sub_(each.grad)


def test_a_training_without_a_step_is_noticed_on_closing(tmp_path):
    model = Layers()
    optimizer = Renamed(model.parameters(), lr=0.1)
    recorder = Recorder(model, optimizer, tmp_path / "run.zarr", every=1).attach()
    model(batch(0)).sum().backward()
    optimizer.update()
    with pytest.warns(UnseenStepWarning, match="No step of Renamed was seen, and 3 weights"):
        recorder.close()
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        Recorder(model, optimizer, tmp_path / "other.zarr", every=1).attach().close()


def test_weights_of_no_optimizer_are_named_on_attaching(tmp_path):
    model = Layers()
    optimizer = sgd(model.layers[0].parameters())
    with pytest.warns(NoOptimizerWarning, match=r"2 recorded weights .*: layers.1.weight, layers"):
        Recorder(model, optimizer, tmp_path / "run.zarr", every=1).attach().close()
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        Recorder(model, optimizer, tmp_path / "one.zarr", select="layers.0").attach().close()
    with pytest.raises(DynamicsError, match="No parameter of the optimizer SGD is one of"):
        Recorder(model, [optimizer, sgd(Layers().parameters())], tmp_path / "two.zarr")


@pytest.mark.parametrize("records", [1, 5])
def test_gradients_that_never_arrive_are_named_once(tmp_path, records):
    model = Layers(used=2, frozen=1)
    optimizer = sgd(model.layers[1:].parameters())
    with warnings.catch_warnings(record=True) as warned:
        warnings.simplefilter("always")
        with Recorder(model, optimizer, tmp_path / "run.zarr", every=1):
            for step in range(records):
                plain_step(model, optimizer, batch(step))
    absent = [str(each.message) for each in warned if each.category is AbsentGradientWarning]
    assert len(absent) == 1
    assert absent[0].startswith("1 recorded weights had no gradient")
    assert ": layers.2.weight." in absent[0]


def in_backward(model, *, order=1, make=sgd, clip=None):
    """One optimizer for each parameter, which steps as soon as its gradient is there."""
    trained = [each for each in model.parameters() if each.requires_grad][::order]
    optimizers = {each: make([each]) for each in trained}
    for each in trained:
        each.register_post_accumulate_grad_hook(_Step(optimizers[each], clip))
    return optimizers


class _Step:
    def __init__(self, optimizer, clip):
        self.optimizer, self.clip, self.seen = optimizer, clip, []

    def __call__(self, parameter):
        if self.clip is not None:
            nn.utils.clip_grad_norm_([parameter], self.clip)
        self.seen.append(parameter.grad.clone().numpy())
        self.optimizer.step()
        self.optimizer.zero_grad()


def backward(model, optimizer, x):
    (model(x) - x.detach()).square().mean().backward()


GIVEN = {
    "dict": lambda optimizers: optimizers,
    "list": lambda optimizers: list(optimizers.values()),
    "generator": lambda optimizers: (each for each in optimizers.values()),
    "dummy": lambda optimizers: LayerWiseDummyOptimizer(optimizer_dict=optimizers),
}


@pytest.mark.parametrize("given", GIVEN)
@pytest.mark.parametrize("order", [1, -1])
@pytest.mark.parametrize("case", ["plain", "unused", "frozen", "frozen last", "checkpoints"])
def test_steps_within_the_backward_pass_are_one_step(tmp_path, given, order, case):
    def build():
        model = Layers(
            used=2 if case == "unused" else 3,
            frozen=1 if case == "frozen" else 0,
            reentrant=True if case == "checkpoints" else None,
        )
        if case == "frozen last":
            model.layers[2].requires_grad_(False)
        return model, in_backward(model, order=order, clip=0.01)

    ends = []
    for store in (None, tmp_path / "run.zarr"):
        model, optimizers = build()
        weights = [_weights(model)]
        recorder = Recorder(model, GIVEN[given](optimizers), store, every=1) if store else None
        if recorder is not None:
            recorder.attach()
        for step in range(1, STEPS + 1):
            backward(model, None, batch(step))
            weights.append(_weights(model))
            # Within reentrant checkpoints, the end of a pass is seen when the next one begins.
            assert recorder is None or case == "checkpoints" or recorder.step == step
        if recorder is not None:
            recorder.close()
            assert recorder.step == STEPS
        ends.append(weights)
    assert all((a[n] == b[n]).all() for a, b in zip(*ends, strict=True) for n in a)
    run = dy.open_run(tmp_path / "run.zarr")
    assert_records(run, ends[1])
    for name, parameter in model.named_parameters():
        for step in range(1, STEPS + 1):
            found = run.read(name, step, "gradient")
            if parameter in optimizers and not (case == "unused" and name == "layers.2.weight"):
                hook = next(iter(parameter._post_accumulate_grad_hooks.values()))
                np.testing.assert_array_equal(found.values, hook.seen[step - 1])
            else:
                assert (found is None) == (case == "unused")


def test_before_clipping_in_the_backward_pass_it_is_what_arrived(tmp_path):
    model = Layers()
    optimizers = in_backward(model)
    record = ("weight", "gradient_before_clipping")
    with Recorder(model, optimizers, tmp_path / "run.zarr", every=2, record=record):
        for step in range(1, STEPS + 1):
            backward(model, None, batch(step))
    run = dy.open_run(tmp_path / "run.zarr")
    for name, parameter in model.named_parameters():
        hook = next(iter(parameter._post_accumulate_grad_hooks.values()))
        for step in (2, 4):
            np.testing.assert_array_equal(
                run.read(name, step, "gradient").values, hook.seen[step - 1]
            )


def test_a_backward_pass_that_fails_does_not_stop_the_counting(tmp_path):
    model = Layers()
    optimizers = in_backward(model)

    def fail(gradient):
        raise ValueError("of the user")

    with Recorder(model, optimizers, tmp_path / "run.zarr", every=1) as recorder:
        x = batch(1)
        handle = x.register_hook(fail)
        with pytest.raises(ValueError, match="of the user"):
            backward(model, None, x)
        handle.remove()
        backward(model, None, batch(2))
        backward(model, None, batch(3))
        assert recorder.step == 3
    assert dy.open_run(tmp_path / "run.zarr").steps.tolist() == [0, 1, 2, 3]


class LayerWise(Trainer):
    """What `optim="galore_adamw_layerwise"` sets up, without the optimizer of another package."""

    def create_optimizer(self, model=None):
        self.optimizer = LayerWiseDummyOptimizer(optimizer_dict=in_backward(self.model), lr=0.1)
        return self.optimizer


@pytest.mark.slow
def test_the_trainers_layer_wise_optimizers_are_recorded(tmp_path):
    def fit(callbacks):
        AcceleratorState._reset_state(reset_partial_state=True)
        arguments = TrainingArguments(
            output_dir=str(tmp_path),
            max_steps=3,
            per_device_train_batch_size=4,
            max_grad_norm=0.0,
            save_strategy="no",
            report_to="none",
            disable_tqdm=True,
            use_cpu=True,
        )
        model = Net()
        LayerWise(model, arguments, train_dataset=Rows(), callbacks=callbacks).train()
        return model

    plain = fit([])
    found = fit([RecorderCallback(tmp_path / "run.zarr", every=1)])
    run = dy.open_run(tmp_path / "run.zarr")
    assert run.steps.tolist() == [0, 1, 2, 3]
    for name, parameter in found.named_parameters():
        assert torch.equal(parameter, plain.get_parameter(name))
        weights = [run.read(name, step, "weight").values for step in range(4)]
        np.testing.assert_array_equal(weights[3], parameter.detach().numpy())
        for step in (1, 2, 3):
            gradient = torch.as_tensor(run.read(name, step, "gradient").values)
            stepped = torch.as_tensor(weights[step - 1]).add(gradient, alpha=-0.1)
            np.testing.assert_array_equal(weights[step], stepped.numpy())
