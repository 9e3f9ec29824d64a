"""Runs that train a part of the model by design pass; what should move and does not, fails."""

import warnings

import pytest

import dynamics as dy
from dynamics.auditing import Severity

torch = pytest.importorskip("torch")
peft = pytest.importorskip("peft")

from probes import Recorder  # noqa: E402

pytestmark = pytest.mark.slow
LAYERS = 4


def lora(**settings):
    return peft.LoraConfig(**{"r": 2, "target_modules": ["q_proj", "v_proj"]} | settings)


def audited(model, directory, held=None, *, optimizer=torch.optim.SGD, record=None):
    """Train a few steps with a recorder; the audits of the recording and of PEFT's checkpoints.

    Args:
        model: of PEFT, or plain.
        directory: where to write.
        held: parameter name -> whether the optimizer holds it; by default, if it trains.
        optimizer: its class.
        record: see `Recorder`.
    """
    torch.manual_seed(0)
    parameters = [
        parameter
        for name, parameter in model.named_parameters()
        if parameter.requires_grad and (held is None or held(name))
    ]
    optimizer = optimizer(parameters, lr=0.1)
    options = {} if record is None else {"record": record}
    with (
        warnings.catch_warnings(),
        Recorder(model, optimizer, directory / "run.zarr", every=1, **options) as recorder,
    ):
        warnings.simplefilter("ignore")
        for step in range(1, 5):
            tokens = torch.randint(0, 40, (4, 8))
            loss = model(input_ids=tokens, labels=tokens).loss
            loss.backward()
            recorder.log(loss=loss)
            optimizer.step()
            optimizer.zero_grad()
            model.save_pretrained(directory / f"checkpoints/checkpoint-{step}")
    reports = dy.audit(directory / "run.zarr"), dy.audit(directory / "checkpoints")
    return [
        [each for each in report.verdicts if each.severity is Severity.FAIL] for report in reports
    ]


@pytest.fixture
def llama(tiny_llama, tmp_path):
    """(config of an adapter or None) -> the model, with its base beside the checkpoints."""

    def build(config=None, **sizes):
        model = tiny_llama(num_hidden_layers=LAYERS, **sizes)
        if config is None:
            return model
        model.save_pretrained(tmp_path / "checkpoints/base")
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            return peft.get_peft_model(model, config)

    return build


@pytest.mark.parametrize("record", [None, ["weight", "adapter"]], ids=["all", "no-gradients"])
@pytest.mark.parametrize(
    "config",
    [
        lora(layers_to_transform=[0, 2]),
        lora(layers_to_transform=[3]),
        lora(
            target_modules=r".*layers\.(0\.self_attn\.q_proj|2\.mlp\.up_proj|3\.self_attn\.q_proj)"
        ),
        lora(layers_to_transform=[1], modules_to_save=["lm_head"]),
        lora(layers_to_transform=[1], trainable_token_indices=[1, 2]),
        lora(layers_to_transform=[1, 2], use_dora=True),
        lora(target_modules=["q_proj", "embed_tokens"], layers_to_transform=None),
    ],
    ids=["layers", "top", "regex", "saved", "tokens", "dora", "embedding"],
)
def test_lora_on_a_part_of_the_model_fails_no_check(llama, tmp_path, config, record):
    assert audited(llama(config), tmp_path, record=record) == [[], []]


def test_an_adapter_that_no_optimizer_holds_fails(llama, tmp_path):
    model = llama(lora(layers_to_transform=[0, 2, 3]))
    name = "model.layers.2.self_attn.q_proj.weight"
    failed = audited(model, tmp_path, held=lambda each: "layers.2.self_attn.q_proj" not in each)
    for report in failed:
        assert {(each.check, each.matrix) for each in report} == {("frozen_layer", name)}


def test_all_adapters_of_a_layer_that_do_not_move_fail(llama, tmp_path):
    model = llama(lora(layers_to_transform=[0, 2, 3]))
    for report in audited(model, tmp_path, held=lambda each: "layers.2." not in each):
        assert {each.check for each in report} == {"frozen_layer"}
        assert {each.matrix for each in report} == {
            f"model.layers.2.self_attn.{each}.weight" for each in ("q_proj", "v_proj")
        }


def test_a_saved_module_that_does_not_move_fails_where_others_do(llama, tmp_path):
    model = llama(lora(layers_to_transform=[0, 2], modules_to_save=["up_proj"]))
    recording, checkpoints = audited(
        model, tmp_path, held=lambda each: "layers.1.mlp.up_proj" not in each
    )
    name = "model.layers.1.mlp.up_proj.weight"
    assert {(each.check, each.matrix) for each in checkpoints} == {("frozen_layer", name)}
    assert {each.matrix for each in recording} <= {name}


@pytest.mark.parametrize(
    "frozen", [("embed_tokens",), ("layers.1.",), ("layers.1.", "layers.3."), ("self_attn",)]
)
def test_a_part_that_was_frozen_by_design_fails_no_check(llama, tmp_path, frozen):
    model = llama()
    for name, parameter in model.named_parameters():
        parameter.requires_grad_(not any(each in name for each in frozen))
    assert audited(model, tmp_path) == [[], []]


def test_a_weight_that_an_optimizer_holds_and_that_never_moves_fails(llama, tmp_path):
    class Lazy(torch.optim.SGD):
        """Holds everything, and leaves one kind of weight where it is."""

        def step(self, closure=None):
            kept = [(each, each.detach().clone()) for each in lazy]
            super().step(closure)
            with torch.no_grad():
                for each, before in kept:
                    each.copy_(before)

    model = llama()
    lazy = [each for name, each in model.named_parameters() if "k_proj" in name]
    recording, checkpoints = audited(model, tmp_path, optimizer=Lazy)
    names = {f"model.layers.{layer}.self_attn.k_proj.weight" for layer in range(LAYERS)}
    assert {each.matrix for each in recording} == names
    assert {each.check for each in recording} == {"frozen_layer"}
    assert "although it trains by its settings" in recording[0].meaning
    assert checkpoints == []  # they do not tell what an optimizer held
