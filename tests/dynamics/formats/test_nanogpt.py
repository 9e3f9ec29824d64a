import shutil

import pytest
import torch
from torch import nn

import dynamics as dy
from dynamics.runs.attention_config import read_architecture
from dynamics.schema import Status
from tests.dynamics.formats.checking import Touch, assert_bits, assert_problem, assert_refused

N_EMBD = 8


class Block(nn.Module):
    def __init__(self):
        super().__init__()
        self.ln_1 = nn.LayerNorm(N_EMBD, bias=False)
        self.attn = nn.ModuleDict(
            {
                "c_attn": nn.Linear(N_EMBD, 3 * N_EMBD, bias=False),
                "c_proj": nn.Linear(N_EMBD, N_EMBD, bias=False),
            }
        )
        self.mlp = nn.ModuleDict(
            {
                "c_fc": nn.Linear(N_EMBD, 4 * N_EMBD, bias=False),
                "c_proj": nn.Linear(4 * N_EMBD, N_EMBD, bias=False),
            }
        )
        # Where there is no fused attention, its causal mask is a buffer.
        self.attn.register_buffer("bias", torch.tril(torch.ones(6, 6)).view(1, 1, 6, 6))


class GPT(nn.Module):
    """The parameters of nanoGPT's model.py by name and shape, with its tied embedding."""

    def __init__(self, seed):
        super().__init__()
        torch.manual_seed(seed)
        self.transformer = nn.ModuleDict(
            {
                "wte": nn.Embedding(11, N_EMBD),
                "wpe": nn.Embedding(6, N_EMBD),
                "h": nn.ModuleList([Block() for _ in range(2)]),
                "ln_f": nn.LayerNorm(N_EMBD, bias=False),
            }
        )
        self.lm_head = nn.Linear(N_EMBD, 11, bias=False)
        self.transformer["wte"].weight = self.lm_head.weight


def save_nanogpt(path, step, compiled=False):
    """Write a checkpoint as nanoGPT's train.py does, which needs data and is no library.

    `checkpoint = {...}` in train.py of github.com/karpathy/nanoGPT: the state dict of the model,
    with torch.compile under `_orig_mod.`; best_val_loss is a mean of torch's, a tensor of no
    dimension, or the int 1e9 before the first evaluation.
    """
    model = GPT(step)
    optimizer = torch.optim.AdamW(model.parameters())
    sum(each.sum() for each in model.parameters()).backward()
    optimizer.step()
    state = model.state_dict()
    torch.save(
        {
            "model": {f"_orig_mod.{k}": v for k, v in state.items()} if compiled else state,
            "optimizer": optimizer.state_dict(),
            "model_args": {"n_layer": 2, "n_head": 2, "n_embd": N_EMBD, "block_size": 6,
                           "bias": False, "vocab_size": 11, "dropout": 0.0},
            "iter_num": step,
            "best_val_loss": torch.tensor(4.0 - step / 1000),
            "config": {"learning_rate": 6e-4, "out_dir": "out"},
        },
        path,
    )  # fmt: skip
    return {name: each.detach() for name, each in model.named_parameters() if each.ndim == 2}


@pytest.fixture
def several(tmp_path):
    """(directory, step -> parameters) of three files with names of a user's own."""
    names = {"ckpt_1000.pt": 1000, "ckpt_200.pt": 200, "best.pt": 600}
    return tmp_path, {step: save_nanogpt(tmp_path / name, step) for name, step in names.items()}


@pytest.mark.parametrize("compiled", [False, True])
def test_the_parameters_are_read_and_a_tied_embedding_once(tmp_path, compiled):
    expected = save_nanogpt(tmp_path / "ckpt.pt", 250, compiled)
    assert "lm_head.weight" not in expected
    for path in (tmp_path, tmp_path / "ckpt.pt"):
        run = dy.open_run(path, split_fused=False)
        assert (run.format, run.steps.tolist()) == ("nanogpt", [250])
        assert_bits(run, 250, expected)


def test_files_of_any_name_are_at_their_iteration(several):
    directory, expected = several
    (directory / "meta.pkl").write_bytes(b"")
    run = dy.open_run(directory, split_fused=False)
    assert (run.format, run.steps.tolist()) == ("nanogpt", [200, 600, 1000])
    for step, parameters in expected.items():
        assert_bits(run, step, parameters)
    torch.testing.assert_close(run.scalars["best_val_loss"].tolist(), [3.8, 3.4, 3.0])


def test_the_models_arguments_are_its_config(several):
    run = dy.open_run(several[0], format="nanogpt")
    assert run.attrs["training"]["learning_rate"] == 6e-4
    architecture = read_architecture(run.attrs, "x")
    assert (architecture.num_heads, architecture.head_dim) == (2, 4)


def test_analyze_knows_the_layers_and_modules(several):
    directory, expected = several
    analysis = dy.analyze(directory, metrics=["frobenius_norm"])
    name = "transformer.h.1.mlp.c_fc.weight"
    cell = analysis.sel(matrix=name, kind="update", step=1000)
    update = expected[1000][name].double() - expected[600][name].double()
    assert float(cell["frobenius_norm"]) == pytest.approx(float(update.norm()), rel=1e-12)
    assert (int(cell["layer"]), str(cell["module"].values)) == (1, "up_proj")
    assert (analysis["status"].sel(kind="weight") == Status.MEASURED).all()
    assert (
        analysis["best_val_loss"].values.tolist()
        == dy.open_run(directory).scalars["best_val_loss"].tolist()
    )


def test_two_files_of_an_iteration_are_its_problem(several):
    shutil.copy(several[0] / "best.pt", several[0] / "copy.pt")
    assert_problem(dy.open_run(several[0]), 600, r"best\.pt and copy\.pt, both of step 600")


@pytest.mark.parametrize("garbage", [b"", b"garbage", None])
def test_a_damaged_file_is_the_problem_of_the_step_in_its_name(several, garbage):
    file = several[0] / "ckpt_1000.pt"
    file.write_bytes(file.read_bytes()[:1000] if garbage is None else garbage)
    assert_problem(dy.open_run(several[0]), 1000, r"ckpt_1000\.pt .*not a readable file")
    (several[0] / "best.pt").write_bytes(garbage or b"garbage")
    run = dy.open_run(several[0])
    assert (run.format, run.steps.tolist(), list(run.problems)) == ("nanogpt", [200, 1000], [1000])
    assert "not a readable file" in run.passed_over["best.pt"]


def test_a_file_of_another_kind_among_them_is_passed_over_by_name(several):
    torch.save({"model": {"a": torch.ones(3, 3)}}, several[0] / "other_7.pt")
    run = dy.open_run(several[0])
    assert (run.steps.tolist(), dict(run.problems)) == ([200, 600, 1000], {})
    assert "is not a checkpoint of nanoGPT" in run.passed_over["other_7.pt"]
    assert_refused(several[0] / "other_7.pt", "is not a checkpoint of nanoGPT", format="nanogpt")


def test_another_kind_of_checkpoint_is_not_recognised(tmp_path):
    torch.save({"model": {"a": torch.ones(3, 3)}, "iter_num": 3}, tmp_path / "ckpt.pt")
    assert dy.open_run(tmp_path).format == "files"


def test_nothing_in_a_file_is_run(tmp_path):
    marker, file = tmp_path / "marker", tmp_path / "ckpt.pt"
    expected = save_nanogpt(file, 250)
    saved = torch.load(file)
    torch.save({**saved, "config": {"dtype": Touch(marker), "seed": 1}}, file)
    run = dy.open_run(tmp_path, split_fused=False)
    assert_bits(run, 250, expected)
    assert run.attrs["training"] == {"seed": 1}
    assert not marker.exists()
    torch.load(file, weights_only=False)
    assert marker.exists()
