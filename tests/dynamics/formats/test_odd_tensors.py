"""What stands in a file beside the weights is left out by name, and the weights are measured."""

import numpy as np
import pytest
import torch
import torch.distributed.checkpoint as dcp
from safetensors.torch import save_file

import dynamics as dy
from tests.dynamics.formats.checking import assert_bits, assert_problem, assert_refused

NAME = "layers.0.up_proj.weight"
POINTER = b"version https://git-lfs.github.com/spec/v1\noid sha256:abc\nsize 123\n"


def weight(seed=0):
    return torch.randn(6, 4, generator=torch.Generator().manual_seed(seed))


def quantised():
    return torch.quantize_per_tensor(torch.ones(3, 2), 0.1, 0, torch.qint8)


# What stands beside the weight in a state dict -> (its shape, how the reason begins).
ODD = {
    "complex": (lambda: torch.ones(4, 3, dtype=torch.complex64), (4, 3), "complex numbers"),
    "conjugate": (lambda: torch.ones(4, 3, dtype=torch.complex128).conj(), (4, 3), "complex"),
    "sparse": (lambda: torch.eye(3).to_sparse(), (3, 3), "sparse tensors"),
    "csr": (lambda: torch.eye(3).to_sparse_csr(), (3, 3), "sparse tensors"),
    "meta": (lambda: torch.ones(3, 2, device="meta"), (3, 2), "meta tensors"),
    "quantised": (quantised, (3, 2), "quantised by torch"),
    "expanded": (lambda: torch.ones(1, 1).expand(9, 9), (9, 9), "tensors that repeat"),
    "nested": (lambda: torch.nested.nested_tensor([torch.ones(2)]), (), "nested tensors"),
    "float8": (lambda: torch.ones(3, 2).to(torch.float8_e4m3fnuz), (3, 2), "numbers of the dtype"),
    "integers": (lambda: torch.ones(3, 2, dtype=torch.int64), (3, 2), "integers"),
}
PLACES = {
    "top": lambda state: state,
    "model": lambda state: {"model": state, "step": 10},
    "lightning": lambda state: {"state_dict": state, "global_step": 10, "epoch": 0},
    "parameters": lambda state: {
        name: torch.nn.Parameter(each) if each.dtype == torch.float32 else each
        for name, each in state.items()
    },
}


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("place", PLACES)
@pytest.mark.parametrize("odd", ODD)
@pytest.mark.parametrize("is_zip", [True, False])
def test_the_weights_beside_an_odd_tensor_are_measured(tmp_path, odd, place, is_zip):
    make, shape, reason = ODD[odd]
    if place == "parameters" and odd in ("meta", "quantised", "nested", "csr", "sparse"):
        pytest.skip("no parameter")
    file = tmp_path / ("step_10.ckpt" if place == "lightning" else "step_10.pt")
    try:
        torch.save(PLACES[place]({NAME: weight(), "odd.table": make()}), file,
                   _use_new_zipfile_serialization=is_zip)  # fmt: skip
    except (NotImplementedError, RuntimeError, AttributeError, TypeError):
        pytest.skip("torch does not save it so")
    run = dy.open_run(tmp_path)
    assert_bits(run, 10, {NAME: weight()})
    [left_out] = run.account.left_out
    assert (left_out.name, left_out.shape) == ("odd.table", shape)
    assert left_out.reason.startswith(reason)


def test_what_stands_beside_the_state_dict_is_left_out_by_name(tmp_path):
    beside = {"rng_state": torch.get_rng_state(), "losses": torch.zeros(9), "table": weight(1),
              "freqs": torch.ones(2, 2, dtype=torch.complex64)}  # fmt: skip
    for key in ("model", "state_dict", "model_state_dict", "module"):
        torch.save({key: {NAME: weight()}, **beside}, tmp_path / "step_10.pt")
        run = dy.open_run(tmp_path)
        assert_bits(run, 10, {NAME: weight()})
        assert {each.name for each in run.account.left_out} == set(beside)


def test_a_file_of_odd_tensors_alone_is_refused_by_their_kind(tmp_path):
    torch.save({"a": torch.ones(2, 2, dtype=torch.complex64)}, tmp_path / "step_1.pt")
    assert_refused(tmp_path, "a is complex numbers")


def test_what_safetensors_and_npz_hold_beside_weights_is_left_out_by_name(tmp_path):
    beside = torch.ones(2, 2, dtype=torch.complex64)
    save_file({NAME: weight(), "odd": beside}, tmp_path / "step_1.safetensors")
    np.savez(tmp_path / "step_2.npz", **{NAME: weight(2).numpy(), "odd": beside.numpy()})
    for step, name in ((1, "step_1.safetensors"), (2, "step_2.npz")):
        run = dy.open_run(tmp_path / name)
        assert_bits(run, step, {NAME: weight(0 if step == 1 else 2)})
        assert [(each.name, each.shape) for each in run.account.left_out] == [("odd", (2, 2))]


@pytest.mark.filterwarnings("ignore:torch.distributed is disabled")
def test_what_a_distributed_checkpoint_holds_beside_weights_is_left_out_by_name(tmp_path):
    state = {NAME: weight(), "odd": torch.ones(3, 2, dtype=torch.complex64),
             "ids": torch.ones(3, 2, dtype=torch.int64)}  # fmt: skip
    dcp.save({"model": state}, checkpoint_id=tmp_path / "step_1", no_dist=True)
    run = dy.open_run(tmp_path)
    assert_bits(run, 1, {NAME: weight()})
    assert {each.name for each in run.account.left_out} == {"odd", "ids"}


@pytest.mark.parametrize("is_zip", [True, False])
def test_a_negative_view_keeps_its_sign(tmp_path, is_zip):
    pairs = torch.view_as_complex(torch.stack([weight(1), weight(2)], dim=-1))
    negative = pairs.conj().imag
    assert negative.is_neg()
    torch.save({NAME: negative}, tmp_path / "step_1.pt", _use_new_zipfile_serialization=is_zip)
    loaded = torch.load(tmp_path / "step_1.pt")[NAME]
    assert torch.equal(loaded, -weight(2))
    run = dy.open_run(tmp_path)
    assert_bits(run, 1, {NAME: loaded.resolve_neg()})
    torch.save({NAME: pairs.imag.clone()}, tmp_path / "step_2.pt")
    norms = dy.analyze(tmp_path, kinds=["update"], metrics=["spectral_norm"])["spectral_norm"]
    twice = 2 * np.linalg.norm(weight(2).double().numpy(), 2)
    assert float(norms.sel(step=2).squeeze()) == pytest.approx(twice, rel=1e-6)


@pytest.mark.parametrize(
    "name",
    ["step_2.pt", "step_2.safetensors", "step_2.npz", "step_2.bin", "step_2/model.safetensors",
     "step_2/pytorch_model.bin", "step_2/config.json", "step_2/.metadata"],
)  # fmt: skip
def test_a_pointer_of_git_lfs_is_called_one(tmp_path, name):
    file = tmp_path / name
    file.parent.mkdir(exist_ok=True)
    if file.parent == tmp_path:
        torch.save({NAME: weight()}, tmp_path / "step_1.pt")
    elif file.name == ".metadata":
        dcp.save({"model": {NAME: weight()}}, checkpoint_id=tmp_path / "step_1", no_dist=True)
    else:
        (tmp_path / "step_1").mkdir()
        save_file({NAME: weight()}, tmp_path / "step_1/model.safetensors")
        if file.name == "config.json":
            save_file({NAME: weight()}, tmp_path / "step_2/model.safetensors")
    file.write_bytes(POINTER)
    assert_problem(dy.open_run(tmp_path), 2, f"{file.name} .*pointer of Git LFS.*git lfs pull")
