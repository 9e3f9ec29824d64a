"""Where torch chooses a kernel by `requires_grad`, a recorder changes no bit.

torch folds products of three and more dimensions with two if the smaller operand requires a
gradient. Recurrent and attention layers multiply so inside, and attention has another kernel for
masks that require a gradient.
"""

import copy
import functools

import numpy as np
import peft
import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.overrides import _get_current_function_mode_stack
from torch.utils.checkpoint import checkpoint

import dynamics as dy
from probes import Recorder
from probes.gradients.as_frozen import AsFrozen
from tests.probes.adapted import relative_error
from tests.probes.gradients.test_freezing import same_bits
from tests.probes.test_families import FAMILIES, tiny

CASES = [(torch.float64, size) for size in ((2, 7), (3, 1), (1, 9))]
CASES += [(torch.float32, (3, 1)), (torch.bfloat16, (2, 7))]
LAYOUTS = {
    "contiguous": lambda x: x.clone(),
    "last_two_transposed": lambda x: x.mT.contiguous().mT,
    "first_two_transposed": lambda x: x.transpose(0, 1).contiguous().transpose(0, 1),
    "part": lambda x: torch.cat([x, x], 1)[:, x.shape[1] :],
}


def _recurrent(kind, x, *weights):
    state = x.new_zeros(1, x.shape[0], 32)
    state = (state, state) if kind is torch.lstm else state
    return kind(x, state, list(weights), True, 1, 0.0, True, False, True)


def _attention(x, *weights):
    x = x.transpose(0, 1)
    attended = functools.partial(F.multi_head_attention_forward, x, x, x, 32, 4)
    return attended(*weights[:2], None, None, False, 0.5, *weights[2:])[0]


def _masked(x, mask):
    x = x.unflatten(-1, (4, 8)).transpose(1, 2)
    return F.scaled_dot_product_attention(x, x, x, mask[..., : x.shape[2], : x.shape[2]])


W = (32, 32)
# operation of x and weights -> shapes of the weights
OPERATIONS = {
    "x @ w": (lambda x, w: x @ w, [W]),
    "w @ x.T": (lambda x, w: w @ x.mT, [W]),
    "x @ vector": (lambda x, w: x.matmul(w), [W[:1]]),
    "x @ (2 w).T": (lambda x, w: torch.matmul(x, (2 * w).T), [W]),
    "4 dimensions": (lambda x, w: torch.linalg.matmul(x[None].expand(2, -1, -1, -1).mT.mT, w), [W]),
    "linear": (lambda x, w: F.linear(x, w), [W]),
    "linear, by name": (lambda x, w: F.linear(weight=w, input=x), [W]),
    "linear and bias": (F.linear, [W, W[:1]]),
    "changed in place": (lambda x, w: (w @ x.mT).add_(1).relu_(), [W]),
    "rmatmul": (lambda x, w: w.__rmatmul__(x), [W]),
    "aten": (lambda x, w: torch.ops.aten.matmul(x, w), [W]),
    "mask": (_masked, [(1, 4, 9, 9)]),
    "lstm": (functools.partial(_recurrent, torch.lstm), [(128, 32), (128, 32), (128,), (128,)]),
    "gru": (functools.partial(_recurrent, torch.gru), [(96, 32), (96, 32), (96,), (96,)]),
    "rnn": (functools.partial(_recurrent, torch.rnn_tanh), [W, W, W[:1], W[:1]]),
    "attention": (_attention, [(96, 32), (96,), W, W[:1]]),
}


def _computed(operation, x, weights, how):
    """Output and the gradient of x; gradients of the weights unless `how` is "frozen"."""
    x = x.detach().requires_grad_()
    given = [weight.clone() for weight in weights]
    for weight in given if how != "frozen" else ():
        weight.requires_grad_().stands_for = weight
    mode = AsFrozen()
    if how == "as frozen":
        mode.start()
    torch.manual_seed(1)
    output = operation(x, *given)
    mode.stop()
    outputs = [output] if isinstance(output, torch.Tensor) else list(output)
    numbers = torch.get_rng_state()
    torch.autograd.backward(outputs, [torch.ones_like(each).cumsum(-1) for each in outputs])
    return [*outputs, x.grad, numbers], [weight.grad for weight in given]


@pytest.mark.parametrize("name", OPERATIONS)
def test_operations_compute_the_bits_of_frozen_weights_and_gradients_of_stand_ins(name):
    operation, shapes = OPERATIONS[name]
    for dtype, size in CASES:
        torch.manual_seed(0)
        data = torch.randn(*size, 32).to(dtype)
        weights = [torch.randn(shape).to(dtype) / 4 for shape in shapes]
        for layout in LAYOUTS.values():
            x = layout(data)
            plain, none = _computed(operation, x, weights, "frozen")
            found, gradients = _computed(operation, x, weights, "as frozen")
            _, expected = _computed(operation, x, weights, "as it is")
            assert none == [None] * len(weights)
            assert all(map(torch.equal, found, plain))
            if dtype != torch.bfloat16:
                torch.testing.assert_close(gradients, expected)


class Mixer(nn.Module):
    """Frozen weights in every place where torch asks whether they require a gradient."""

    def __init__(self, again=None):
        super().__init__()
        torch.manual_seed(0)
        self.below = nn.Linear(32, 32)
        self.left = nn.Parameter(torch.randn(7, 7) / 3)
        self.right = nn.Parameter(torch.randn(32, 32) / 6)
        self.linear = nn.Linear(7, 7)
        self.lstm = nn.LSTM(32, 32, batch_first=True)
        self.attention = nn.MultiheadAttention(32, 4, dropout=0.2, batch_first=True)
        self.positions = nn.Parameter(torch.randn(4, 49) / 3)
        self.above = nn.Linear(32, 32)
        self.again = again
        self.double().requires_grad_(False)
        self.below.requires_grad_(True)
        self.above.requires_grad_(True)

    def mix(self, x, mask):
        x = torch.tanh(self.left @ x)
        x = torch.tanh(x.mT.contiguous().mT @ (2 * self.right).T)
        x = torch.tanh(self.linear(x.mT)).mT
        heads = x.unflatten(-1, (4, 8)).transpose(1, 2)
        x = x + F.scaled_dot_product_attention(heads, heads, heads, mask).transpose(1, 2).flatten(2)
        return x

    def forward(self, x):
        x, mask = self.below(x), self.positions.unflatten(-1, (7, 7))
        if self.again is None:
            x = self.mix(x, mask)
        else:
            x = checkpoint(lambda *given: self.mix(*given), x, mask, use_reentrant=self.again)
            if self.again is False:
                x = checkpoint(self.attention, x, x, x, use_reentrant=False)[0]
        x = x + self.attention(x, x, x)[0] + self.lstm(x)[0]
        return self.above(x)


def batch(step):
    return torch.randn(2, 7, 32, generator=torch.Generator().manual_seed(step)).double()


def loop(model, attach, *, between=lambda step: None, steps=3, called=None):
    trained = [each for each in model.parameters() if each.requires_grad]
    optimizer = torch.optim.SGD(trained, lr=0.1)
    attach(model, optimizer)
    torch.manual_seed(1)
    seen = []
    for step in range(steps):
        loss = (model if called is None else called)(batch(step)).square().mean()
        assert not _get_current_function_mode_stack()
        between(step)
        loss.backward()
        assert not _get_current_function_mode_stack()
        seen += [loss.detach(), *(each.grad.clone() for each in trained)]
        optimizer.step()
        optimizer.zero_grad()
    return [*seen, *(each.detach().clone() for each in model.parameters()), torch.get_rng_state()]


@pytest.mark.slow
@pytest.mark.parametrize("again", [None, False, True])
def test_training_computes_the_same_bits_wherever_torch_asks(tmp_path, again):
    same_bits(tmp_path, lambda attach: loop(Mixer(again), attach), everies=(1, 2))
    run = dy.open_run(tmp_path / "1-0.zarr")
    twin = Mixer(again).requires_grad_(True)
    torch.manual_seed(1)
    twin(batch(0)).square().mean().backward()
    assert len(run.matrices) == 10
    for name, parameter in twin.named_parameters():
        if parameter.ndim == 2:
            found = run.read(name, 1, "gradient").values
            assert relative_error(found, parameter.grad) < 1e-12, name


class Requested(nn.Module):
    """A product by an output of a frozen weight, whose gradient somebody asks for, as PEFT does."""

    def __init__(self, way):
        super().__init__()
        torch.manual_seed(0)
        self.frozen, self.head = nn.Linear(32, 32).double(), nn.Linear(32, 32).double()
        self.way = way
        self.frozen.requires_grad_(False)

    def forward(self, x):
        h = self.frozen(x[0])
        if self.way == "method":
            h.requires_grad_()
        else:
            h.requires_grad = True
        return self.head(x.mT.contiguous().mT @ h.T[:, :7] @ x[0])


@pytest.mark.parametrize("way", ["method", "attribute"])
def test_an_output_whose_gradient_is_asked_for_is_as_one_that_trains(tmp_path, way):
    same_bits(tmp_path, lambda attach: loop(Requested(way), attach), everies=(1,))


def test_outputs_of_frozen_parts_are_read_as_constants(tmp_path):
    """Torch refuses each of these for what requires a gradient, and the training would end."""

    class Reads(Requested):
        def forward(self, x):
            h = self.frozen(x[0])
            h.requires_grad_(False)
            h.requires_grad = False
            self.seen = [h.numpy(), np.asarray(h), copy.deepcopy(h)]
            return self.head(h)

    def train(attach):
        model, seen = Reads(None), []

        def read(step):
            h = model.frozen(batch(step)[0])
            copied = copy.deepcopy(h)
            values = [*model.seen, h.numpy(), np.asarray(h), copied, h.requires_grad_(False)]
            assert not copied.requires_grad
            seen.extend(torch.as_tensor(np.array(each.tolist())) for each in values)

        return [*loop(model, attach, between=read), *seen]

    same_bits(tmp_path, train, everies=(1, 2))
    assert dy.open_run(tmp_path / "1-0.zarr").read("frozen.weight", 1, "gradient") is not None


@pytest.mark.slow
@pytest.mark.parametrize("again", [False, True])
def test_a_recorder_that_goes_before_the_backward_pass_changes_no_bit(tmp_path, again):
    plain = loop(Mixer(again), lambda *_: None)
    recorders = []

    def attach(*given):
        recorders.append(Recorder(*given, tmp_path / "run.zarr", every=1).attach())

    def go(step):
        if step == 1:
            recorders[0].close()

    assert all(map(torch.equal, loop(Mixer(again), attach, between=go), plain))


class Multiplied(torch.autograd.Function):
    """As fused kernels for LoRA do it: there is no gradient for what is frozen."""

    @staticmethod
    def forward(ctx, x, weight):
        ctx.save_for_backward(weight)
        return x.mT.contiguous().mT @ weight

    @staticmethod
    def backward(ctx, gradient):
        return gradient @ ctx.saved_tensors[0].mT, None


def test_a_function_that_gives_no_gradient_to_a_frozen_weight_is_left_alone(tmp_path):
    class Model(nn.Module):
        def __init__(self):
            super().__init__()
            torch.manual_seed(0)
            self.below = nn.Linear(32, 32).double()
            self.weight = nn.Parameter(torch.randn(32, 32).double(), requires_grad=False)

        def forward(self, x):
            return Multiplied.apply(self.below(x), self.weight)

    same_bits(tmp_path, lambda attach: loop(Model(), attach), everies=(1,))
    assert dy.open_run(tmp_path / "1-0.zarr").read("weight", 1, "gradient") is None


@pytest.mark.slow
def test_two_recorders_change_no_bit(tmp_path):
    def train(attach):
        def twice(*given):
            attach(*given)
            attach(*given)

        return loop(Mixer(), twice)

    same_bits(tmp_path, train, everies=(1,))


class Teacher(nn.Module):
    """Has a fast path without gradients, which is not left because of a mode."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        layer = nn.TransformerEncoderLayer(32, 4, 16, batch_first=True)
        self.encoder = nn.TransformerEncoder(layer, 2)
        self.frozen, self.head = nn.Linear(32, 32), nn.Linear(32, 32)
        self.double()
        self.frozen.requires_grad_(False)
        self.encoder.eval()

    def forward(self, x):
        with torch.no_grad():
            target = self.encoder(x)
        return self.head(self.frozen(x.mT.contiguous().mT)) - target + 0 * self.encoder(x)


def test_a_fast_path_that_is_taken_without_gradients_is_taken(tmp_path):
    same_bits(tmp_path, lambda attach: loop(Teacher(), attach), everies=(1,))


@pytest.mark.slow
def test_mamba_with_lora_trains_the_same_bits(tmp_path):
    def train(attach):
        model = tiny("MambaForCausalLM")
        torch.manual_seed(0)
        lora = peft.LoraConfig(r=2, target_modules=["in_proj", "x_proj"], init_lora_weights=False)
        model = peft.get_peft_model(model, lora)
        trained = [each for each in model.parameters() if each.requires_grad]
        optimizer = torch.optim.SGD(trained, lr=1e-2)
        attach(model, optimizer)
        seen = []
        for _ in range(3):
            loss = model(**FAMILIES["MambaForCausalLM"][1]).loss
            loss.backward()
            seen += [loss.detach(), *(each.grad.clone() for each in trained)]
            optimizer.step()
            optimizer.zero_grad()
        return seen

    same_bits(tmp_path, train, everies=(1, 2))


@pytest.mark.slow  # the compiler takes seconds
@pytest.mark.parametrize("part", [False, True])
def test_a_compiled_model_or_layer_is_probed_too(tmp_path, part):
    class Layer(nn.Module):
        def __init__(self):
            super().__init__()
            self.below, self.above = nn.Linear(32, 32), nn.Linear(32, 32)

        def forward(self, x):
            return self.above(torch.tanh(self.below(x)))

    class Outer(nn.Module):
        def __init__(self):
            super().__init__()
            torch.manual_seed(0)
            self.mixer = Mixer()
            self.layer = Layer().double()
            self.layer.below.requires_grad_(False)

        def forward(self, x):
            return self.layer(self.mixer(x))

    model = Outer()
    if part:
        model.layer.compile(backend="aot_eager", fullgraph=True)
    called = None if part else torch.compile(model, backend="aot_eager")

    def attach(*given):
        recorder.append(Recorder(*given, tmp_path / "run.zarr", every=2).attach())

    recorder = []
    found = loop(model, attach, steps=4, called=called)
    recorder[0].close()
    plain = loop(Outer(), lambda *_: None, steps=4)
    for one, other in zip(found[:-1], plain[:-1], strict=True):
        torch.testing.assert_close(one, other)
    assert dy.open_run(tmp_path / "run.zarr").read("layer.below.weight", 2, "gradient") is not None
