import shutil

import pytest
import torch

import dynamics as dy
from dynamics.runs.attention_config import read_architecture
from dynamics.runs.parameter_names import clean_name
from dynamics.schema import Status
from tests.dynamics.formats.checking import Touch, assert_bits, assert_problem, assert_refused
from tests.dynamics.formats.sharded_training import matrices, torchrun

lightning = pytest.importorskip("lightning")


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    """(folder, step -> state dict) of a Trainer that saved every second of eight steps."""
    from tests.dynamics.formats.lightning_training import fit

    folder = tmp_path_factory.mktemp("lightning")
    lightning.seed_everything(0)
    return folder, fit(folder)


@pytest.fixture(scope="module")
def sharded(tmp_path_factory):
    """What two processes saved under ModelParallelStrategy."""
    return torchrun("lightning", tmp_path_factory.mktemp("sharded"))


@pytest.fixture
def copied(trained, tmp_path):
    """The directory with the .ckpt, to be changed."""
    folder = trained[0] / "lightning_logs/version_0/checkpoints"
    return shutil.copytree(folder, tmp_path / "checkpoints")


def named(state_dict):
    """The matrices as a run names them."""
    return {clean_name(name): each for name, each in matrices(state_dict).items()}


# What is read -----------------------------------------------------------------------------------


@pytest.mark.parametrize("below", ["", "lightning_logs", "lightning_logs/version_0/checkpoints"])
def test_every_checkpoint_has_the_modules_values_at_its_global_step(trained, below):
    folder, states = trained
    run = dy.open_run(folder / below)
    assert run.format == "lightning"
    assert run.steps.tolist() == [2, 4, 6, 8]
    for step in (2, 4, 6, 8):
        assert_bits(run, step, named(states[step]))
    assert run.scalars["epoch"].tolist() == [0, 0, 1, 1]


def test_one_file_is_a_run(copied):
    run = dy.open_run(copied / "epoch=0-step=4.ckpt")
    assert (run.format, run.steps.tolist()) == ("lightning", [4])
    assert dy.open_run(copied / "last.ckpt", format="lightning").steps.tolist() == [8]


def test_hyperparameters_are_the_config_without_what_is_no_json(trained):
    run = dy.open_run(trained[0])
    assert run.attrs["config"] == {"n_head": 1, "n_embd": 7}  # `activation` is a function
    assert read_architecture(run.attrs, "x").num_heads == 1
    assert run.attrs["lightning_version"] == lightning.__version__


def test_analyze_knows_the_layers_behind_the_attribute(trained):
    folder, states = trained
    analysis = dy.analyze(folder, metrics=["frobenius_norm"])
    name = next(each for each in analysis["matrix"].values if each.endswith("layers.1.weight"))
    stored = "net.layers.1.weight"
    update = states[8][stored].double() - states[6][stored].double()
    found = analysis["frobenius_norm"].sel(matrix=name, kind="update", step=8)
    assert float(found) == pytest.approx(float(update.norm()), rel=1e-12)
    assert (analysis["status"].sel(kind="weight") == Status.MEASURED).all()
    assert int(analysis["layer"].sel(matrix=name)) == 1


@pytest.mark.slow
def test_shards_of_a_strategy_are_put_together(sharded):
    run = dy.open_run(sharded)
    assert (run.format, run.steps.tolist()) == ("lightning", [2, 4])
    expected = torch.load(sharded / "expected.pt")
    for step in (2, 4):
        assert_bits(run, step, named(expected[step]))
    assert run.attrs["config"]["n_head"] == 1
    file = next(sharded.glob("lightning_logs/version_0/checkpoints/epoch=0-step=2.ckpt"))
    assert file.is_dir()
    assert dy.open_run(file).steps.tolist() == [2]


def test_fsdps_key_for_the_model_is_known(copied):
    """FSDPStrategy, which needs GPUs, saves the weights as "model" and the rest as meta.pt."""
    import torch.distributed.checkpoint as dcp

    file = copied / "epoch=0-step=4.ckpt"
    saved = torch.load(file, weights_only=False)
    file.unlink()
    state, optimizers = saved.pop("state_dict"), saved.pop("optimizer_states")
    dcp.save({"model": state, "optimizer_0": optimizers[0]}, checkpoint_id=file, no_dist=True)
    torch.save(saved, file / "meta.pt")
    assert_bits(dy.open_run(copied), 4, named(state))
    (file / ".metadata").unlink()
    assert_problem(dy.open_run(copied), 4, "did not finish")


def test_a_deepspeed_strategys_directory_is_read(copied, tmp_path):
    """DeepSpeedStrategy, which needs GPUs, has the engine save with the tag "checkpoint".

    Stage 0: one file of model states, whose names begin with the strategy's wrapper; the client
    state, Lightning's, lies beside `module`. Source: lightning/pytorch/strategies/deepspeed.py.
    """
    saved = torch.load(copied / "epoch=0-step=4.ckpt", weights_only=False)
    state = saved.pop("state_dict")
    del saved["optimizer_states"]
    module = {f"_forward_module.{name}": tensor for name, tensor in state.items()}
    directory = tmp_path / "run/epoch=0-step=4.ckpt/checkpoint"
    directory.mkdir(parents=True)
    torch.save(
        {"module": module, "global_steps": 4, **saved}, directory / "mp_rank_00_model_states.pt"
    )
    run = dy.open_run(tmp_path / "run")
    assert (run.format, run.steps.tolist()) == ("lightning", [4])
    assert_bits(run, 4, named(state))


# Which checkpoint counts ------------------------------------------------------------------------


def test_of_two_files_of_a_step_the_one_called_last_is_left_out(copied):
    saved = torch.load(copied / "last.ckpt", weights_only=False)
    for tensor in saved["state_dict"].values():
        tensor += 1
    for name in ("last.ckpt", "last-v1.ckpt"):
        torch.save(saved, copied / name)
    expected = torch.load(copied / "epoch=1-step=8.ckpt", weights_only=False)["state_dict"]
    assert_bits(dy.open_run(copied), 8, named(expected))
    (copied / "epoch=1-step=8.ckpt").unlink()
    assert_bits(dy.open_run(copied), 8, named(saved["state_dict"]))


def test_two_other_files_of_a_step_are_its_problem(copied):
    shutil.copy(copied / "epoch=1-step=8.ckpt", copied / "epoch=1-step=8-v1.ckpt")
    match = r"epoch=1-step=8-v1\.ckpt and epoch=1-step=8\.ckpt, both of step 8"
    assert_problem(dy.open_run(copied), 8, match)


def test_several_versions_are_named(trained, tmp_path):
    for version in ("version_0", "version_1"):
        shutil.copytree(trained[0] / "lightning_logs/version_0", tmp_path / version)
    assert_refused(tmp_path, r"2 directories .*version_0/checkpoints, version_1/checkpoints")


# What is refused --------------------------------------------------------------------------------


@pytest.mark.parametrize("garbage", [b"", b"garbage", None])
def test_a_damaged_file_is_the_problem_of_the_step_in_its_name(copied, garbage):
    file = copied / "epoch=0-step=4.ckpt"
    file.write_bytes(file.read_bytes()[:1000] if garbage is None else garbage)
    assert_problem(dy.open_run(copied), 4, r"epoch=0-step=4\.ckpt .*not a readable file")
    assert_refused(file, r"not a readable file of torch\.save")


@pytest.mark.parametrize("garbage", [b"", b"garbage", None])
def test_a_damaged_file_whose_name_has_no_step_is_passed_over_by_name(copied, garbage):
    (copied / "last.ckpt").unlink()
    if garbage is None:
        (copied / "last.ckpt").symlink_to(copied / "gone.ckpt")
    else:
        (copied / "last.ckpt").write_bytes(garbage)
    run = dy.open_run(copied)
    assert (run.steps.tolist(), dict(run.problems)) == ([2, 4, 6, 8], {})
    assert list(run.passed_over) == ["last.ckpt"]
    assert str(copied / "last.ckpt") in run.passed_over["last.ckpt"]
    for file in copied.glob("epoch*"):
        file.unlink()
    assert_refused(copied, r"last\.ckpt")


def test_ckpt_files_that_are_not_lightnings_are_plain_files(tmp_path):
    torch.save({"weights": torch.ones(3, 3)}, tmp_path / "model.ckpt")
    assert dy.open_run(tmp_path).format == "files"
    assert_refused(tmp_path, "has no number global_step", format="lightning")


def test_nothing_in_a_file_is_run(copied, tmp_path):
    file, marker = copied / "epoch=0-step=4.ckpt", tmp_path / "marker"
    saved = torch.load(file, weights_only=False)
    saved["hyper_parameters"]["callback"] = Touch(marker)
    torch.save(saved, file)
    run = dy.open_run(file)
    assert run.attrs["config"] == {"n_head": 1, "n_embd": 7}
    assert not marker.exists()
    torch.load(file, weights_only=False)
    assert marker.exists()
