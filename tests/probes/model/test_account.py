"""What is recorded of a model, and how the user is told."""

import logging
import warnings
from math import prod

import pytest
import torch
from torch import nn

import dynamics as dy
from dynamics.runs.account import Account
from probes import Recorder
from probes.model.parameters import NOT_SELECTED, track

VECTORS = "vectors (norms, biases)"


class Model(nn.Module):
    """A matrix, a norm, and a tensor of three dimensions that is neither experts nor a kernel."""

    def __init__(self, heads=(2, 3, 4)):
        super().__init__()
        self.up_proj, self.norm = nn.Linear(8, 6), nn.LayerNorm(6)
        self.heads = nn.Parameter(torch.randn(heads))

    def forward(self, x):
        return self.norm(self.up_proj(x)).square().sum() + self.heads.square().sum()


def record(model, path, **options):
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    return Recorder(model, optimizer, path, every=1, **options)


def test_every_parameter_is_recorded_or_left_out_for_a_reason():
    model = Model()
    tracked, account = track(model)
    assert [each.name for each in tracked] == ["up_proj.weight"]
    assert {each.name: each.reason for each in account.left_out} == {
        "heads": "tensors of 3 dimensions that are neither experts nor convolutions",
        "up_proj.bias": VECTORS,
        "norm.weight": VECTORS,
        "norm.bias": VECTORS,
    }
    assert set(account.measured) == {"up_proj.weight"}
    assert account.share == 48 / (48 + 24 + 18)
    assert account.trained_share == account.share
    model.requires_grad_(False).heads.requires_grad_(True)
    assert track(model)[1].trained_share == 0


def test_the_account_counts_every_number_of_the_model_once():
    peft = pytest.importorskip("peft")
    model = peft.get_peft_model(
        nn.Sequential(nn.Linear(8, 6), nn.Linear(6, 8), nn.Conv2d(2, 3, 3)),
        peft.LoraConfig(r=2, target_modules=["0"], modules_to_save=["1"]),
    )
    for select in (None, "0", "1", ["0", "2"]):
        account = track(model, select)[1]
        numbers = account.numbers + sum(each.numbers for each in account.left_out)
        assert numbers == sum(parameter.numel() for parameter in model.parameters())
        trained = sum(p.numel() for p in model.parameters() if p.requires_grad)
        others = sum(each.numbers for each in account.left_out if each.trains)
        assert account.trained_numbers + others == trained


def test_what_the_user_left_out_is_called_so_and_does_not_warn(tmp_path):
    model = nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 4))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        with record(model, tmp_path / "run.zarr", select="0") as recorder:
            pass
    (other,) = [each for each in recorder.account.left_out if each.name == "1.weight"]
    assert (other.reason, other.chosen, other.trains) == (NOT_SELECTED, True, True)


@pytest.mark.parametrize(("heads", "warns"), [((2, 3, 4), True), ((1, 1, 4), False)])
def test_more_than_one_percent_left_out_unasked_is_a_warning(heads, warns, tmp_path):
    with warnings.catch_warnings(record=True) as said:
        warnings.simplefilter("always")
        record(Model(heads), tmp_path / "run.zarr").attach().close()
    told = [str(each.message) for each in said if each.category is dy.LeftOutWarning]
    assert len(told) == warns
    assert all("33.3 % of the numbers that train" in each and "(heads)" in each for each in told)


def test_one_line_on_attaching_goes_to_stderr_or_to_the_logger(tmp_path, capsys, caplog):
    model = nn.Linear(4, 4)
    line = "Recorder: records 1 of 2 tensors, 80.0 % of 20 numbers; left out: 1 vectors"
    logger = logging.getLogger("probes")
    handlers, logging.root.handlers = logging.root.handlers, []
    try:
        record(model, tmp_path / "first.zarr").attach().close()
        assert capsys.readouterr().err.startswith(line)
    finally:
        logging.root.handlers = handlers
    with caplog.at_level(logging.INFO, logger.name):
        record(model, tmp_path / "second.zarr").attach().close()
    assert capsys.readouterr().err == ""
    assert [each.getMessage()[: len(line)] for each in caplog.records] == [line]


def test_recording_inspect_and_results_carry_the_account(tmp_path):
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        with record(Model(), tmp_path / "run.zarr") as recorder:
            pass
        run = dy.open_run(tmp_path / "run.zarr")
        result = dy.analyze(run, metrics=["stable_rank"], kinds=["weight"])
    assert run.account == recorder.account
    assert isinstance(run.account, Account)
    assert '"heads": "tensors of 3 dimensions' in result.attrs["left_out"]


@pytest.mark.parametrize("spectra_only", [False, True])
def test_experts_with_lora_are_recorded_one_by_one(spectra_only, tmp_path):
    peft, transformers = pytest.importorskip("peft"), pytest.importorskip("transformers")
    torch.manual_seed(0)
    config = transformers.MixtralConfig(
        vocab_size=16, hidden_size=16, intermediate_size=8, num_hidden_layers=1,
        num_attention_heads=2, num_key_value_heads=2, num_local_experts=3,
    )  # fmt: skip
    lora = peft.LoraConfig(
        r=2, target_modules=["q_proj"], target_parameters=["experts.gate_up_proj"],
        init_lora_weights=False,
    )  # fmt: skip
    model = peft.get_peft_model(transformers.MixtralModel(config), lora)
    with record(model, tmp_path / "run.zarr", spectra_only=spectra_only, select="*experts*"):
        pass
    run = dy.open_run(tmp_path / "run.zarr")
    merged = model.merge_and_unload().layers[0].mlp.experts.gate_up_proj.detach()
    base = "layers.0.block_sparse_moe.experts"
    ranks = dy.analyze(run, metrics=["spectral_norm", "numerical_rank"])
    for expert in range(3):
        for name, rows in (("w1", slice(0, 8)), ("w3", slice(8, 16))):
            matrix, cell = merged[expert, rows], {"matrix": f"{base}.{expert}.{name}.weight"}
            if not spectra_only:
                assert torch.equal(
                    torch.from_numpy(run.read(cell["matrix"], 0, "weight").values), matrix
                )
            norm = ranks["spectral_norm"].sel(cell).sel(kind="weight").item()
            assert norm == pytest.approx(torch.linalg.matrix_norm(matrix.double(), 2).item())
            assert ranks["numerical_rank"].sel(cell).sel(kind="adapter").item() == 2
            assert ranks["expert"].sel(cell).item() == expert
    assert prod(run.account.measured["layers.0.mlp.experts.gate_up_proj"]) == 3 * 16 * 16
