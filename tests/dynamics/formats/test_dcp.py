import pickle
import shutil
from dataclasses import replace

import pytest
import torch
import torch.distributed.checkpoint as dcp
from torch.distributed.checkpoint import metadata

import dynamics as dy
from dynamics.schema import Status
from tests.dynamics.formats.checking import Touch, assert_bits, assert_problem, assert_refused
from tests.dynamics.formats.sharded_training import Small, batch, matrices, torchrun


@pytest.fixture(scope="module")
def sharded(tmp_path_factory):
    """What two processes of torchrun saved of a model under FSDP2."""
    return torchrun("fsdp2", tmp_path_factory.mktemp("fsdp2"))


@pytest.fixture
def copied(sharded, tmp_path):
    """A copy to be changed."""
    return shutil.copytree(sharded / "checkpoint", tmp_path / "checkpoint")


def save(state, path):
    dcp.save(state, checkpoint_id=path, no_dist=True)


def rewritten(path, change):
    """The metadata of a checkpoint, changed by `change(metadata)`, written again."""
    content = pickle.loads((path / ".metadata").read_bytes())
    change(content)
    (path / ".metadata").write_bytes(pickle.dumps(content))


def model_and_optimizer():
    torch.manual_seed(0)
    model = Small()
    optimizer = torch.optim.AdamW(model.parameters())
    model(batch()).backward()
    optimizer.step()
    return model, optimizer


# What is read -----------------------------------------------------------------------------------


@pytest.mark.slow
def test_shards_of_two_processes_are_put_together(sharded):
    names = {path.name for path in (sharded / "checkpoint/step-1").iterdir()}
    assert names == {".metadata", "__0_0.distcp", "__1_0.distcp"}
    expected = torch.load(sharded / "expected.pt")
    for path in (sharded, sharded / "checkpoint"):
        run = dy.open_run(path)
        assert run.format == "dcp"
        assert run.steps.tolist() == [1, 2]
        for step in (1, 2):
            assert_bits(run, step, matrices(expected[step]))
    assert dy.open_run(sharded / "checkpoint/step-2").steps.tolist() == [2]


@pytest.mark.slow
def test_opening_reads_no_shard_and_a_matrix_reads_its_own(copied):
    whole = {file: file.read_bytes() for file in copied.glob("step-*/*.distcp")}
    for file, content in whole.items():
        file.write_bytes(bytes(len(content)))
    run = dy.open_run(copied)
    for file, content in whole.items():
        file.write_bytes(content)
    assert run.read("layers.0.weight", 1, "weight") is not None


@pytest.mark.slow
def test_analyze_measures_the_assembled_matrices(sharded):
    analysis = dy.analyze(sharded, metrics=["frobenius_norm"])
    expected = torch.load(sharded / "expected.pt")
    name = "layers.1.weight"
    update = expected[2][name].double() - expected[1][name].double()
    found = analysis["frobenius_norm"].sel(matrix=name, kind="update", step=2)
    assert float(found) == pytest.approx(float(update.norm()), rel=1e-12)
    assert (analysis["status"].sel(kind="weight") == Status.MEASURED).all()
    assert int(analysis["layer"].sel(matrix=name)) == 1


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16, torch.float16])
def test_one_process_saves_every_dtype(tmp_path, dtype):
    model = Small().to(dtype)
    save({"model": model.state_dict()}, tmp_path / "iter_0000300")
    run = dy.open_run(tmp_path)
    assert run.steps.tolist() == [300]
    assert_bits(run, 300, matrices(model.state_dict()))


@pytest.mark.parametrize(
    "wrap",
    [
        lambda model, optimizer: {"model": model, "optimizer": optimizer, "ema": model},
        lambda model, optimizer: {"state_dict": model, "optimizer_0": optimizer},
        lambda model, optimizer: {"app": {"model": model, "optim": optimizer}, "step": 3},
        lambda model, optimizer: {**model, "optimizer": optimizer, "lr_scheduler": {"a": 1}},
        lambda model, optimizer: {**model, "optimizer": {"state.w.exp_avg": torch.ones(3, 3)}},
        lambda model, optimizer: {"net": model, "optimizers": [optimizer]},
    ],
    ids=["model", "state_dict", "app", "top", "flattened", "net"],
)
def test_the_models_tensors_are_told_from_the_optimizers(tmp_path, wrap):
    model, optimizer = model_and_optimizer()
    save(wrap(model.state_dict(), optimizer.state_dict()), tmp_path / "step-5")
    assert_bits(dy.open_run(tmp_path), 5, matrices(model.state_dict()))


def test_keys_alone_are_enough(tmp_path):
    """Other planners than torch's leave no paths, only keys joined by dots."""
    model = Small()
    save({"app": {"model": model.state_dict()}}, tmp_path / "step-5")
    rewritten(tmp_path / "step-5", lambda content: setattr(content, "planner_data", None))
    assert_bits(dy.open_run(tmp_path), 5, matrices(model.state_dict()))


@pytest.mark.parametrize("name", ["step-7", "step_7", "iter_0000007", "checkpoint-7", "7", "ckpt7"])
def test_the_step_is_in_the_directorys_name(tmp_path, name):
    save({"model": Small().state_dict()}, tmp_path / "run" / name)
    assert dy.open_run(tmp_path / "run").steps.tolist() == [7]


def test_a_directory_without_a_number_is_step_0_and_a_trainers_shards_are_found(tmp_path):
    save({"model": Small().state_dict()}, tmp_path / "final")
    assert dy.open_run(tmp_path / "final").steps.tolist() == [0]
    # As accelerate's save_fsdp_model names it.
    save({"model": Small().state_dict()}, tmp_path / "out/checkpoint-20/pytorch_model_fsdp_0")
    assert dy.open_run(tmp_path / "out").steps.tolist() == [20]
    assert dy.open_run(tmp_path / "out/checkpoint-20").steps.tolist() == [20]


def test_the_format_may_be_forced(tmp_path):
    save({"model": Small().state_dict()}, tmp_path / "final")
    assert dy.open_run(tmp_path / "final", format="dcp").format == "dcp"
    (tmp_path / "empty").mkdir()
    assert_refused(tmp_path / "empty", "holds no matrices", format="dcp")


# What is refused --------------------------------------------------------------------------------


@pytest.mark.slow
def test_two_directories_of_one_step_are_its_problem(copied):
    shutil.copytree(copied / "step-2", copied / "step_2")
    assert_problem(dy.open_run(copied), 2, "step-2 and step_2, both of step 2")


@pytest.mark.slow
def test_a_missing_shard_is_named_and_the_other_step_measured(copied):
    (copied / "step-2/__1_0.distcp").unlink()
    run = dy.open_run(copied)
    assert_problem(run, 2, "lacks __1_0.distcp, which holds a part of ")
    assert run.read("layers.0.weight", 1, "weight") is not None


@pytest.mark.slow
def test_a_truncated_shard_is_named(copied):
    file = copied / "step-2/__1_0.distcp"
    file.write_bytes(file.read_bytes()[:100])
    assert_problem(dy.open_run(copied), 2, r"__1_0.distcp ends before the part of ")


@pytest.mark.slow
def test_a_save_that_did_not_finish_is_named(copied):
    (copied / "step-2/.metadata").unlink()
    assert_problem(dy.open_run(copied), 2, "did not finish")


@pytest.mark.slow
@pytest.mark.parametrize("garbage", [b"", b"garbage", pickle.dumps([1]), None])
def test_damaged_metadata_is_named(copied, garbage):
    file = copied / "step-2/.metadata"
    file.write_bytes(file.read_bytes()[:300] if garbage is None else garbage)
    assert_problem(dy.open_run(copied), 2, r"step-2/.metadata is not readable metadata")


@pytest.mark.slow
def test_a_damaged_chunk_is_unreadable(copied):
    file = copied / "step-2/__1_0.distcp"
    file.write_bytes(bytes(file.stat().st_size))
    analysis = dy.analyze(copied, select="layers.0.weight", kinds=["weight"], metrics=[])
    assert analysis["status"].squeeze().values.tolist() == [Status.MEASURED, Status.UNREADABLE]


def of_layer_0(content):
    return content.state_dict_metadata["model.layers.0.weight"]


def without_a_chunk(content):
    of_layer_0(content).chunks.pop()


def overlapping(content):
    chunks = of_layer_0(content).chunks
    chunks[1] = metadata.ChunkStorageMetadata(torch.Size([1, 0]), chunks[1].sizes)


def beyond(content):
    chunks = of_layer_0(content).chunks
    chunks[1] = metadata.ChunkStorageMetadata(torch.Size([5, 0]), chunks[1].sizes)


def nowhere(content):
    for index in [each for each in content.storage_data if each.fqn == "model.layers.0.weight"]:
        del content.storage_data[index]


def transformed(content):
    index = next(each for each in content.storage_data if each.fqn == "model.layers.0.weight")
    info = content.storage_data[index]
    content.storage_data[index] = replace(info, transform_descriptors=["zstd"])


def outside(content):
    index = next(each for each in content.storage_data if each.fqn == "model.layers.0.weight")
    info = content.storage_data[index]
    content.storage_data[index] = replace(info, relative_path="../step-1/__0_0.distcp")


def huge(content):
    described = of_layer_0(content)
    described.size = torch.Size([2**40, 7])
    described.chunks[1].sizes = torch.Size([2**40 - 4, 7])


def without_tensors(content):
    content.state_dict_metadata = 3


@pytest.mark.slow
@pytest.mark.parametrize(
    ("change", "match"),
    [
        (without_a_chunk, "chunks of model.layers.0.weight do not make up its shape"),
        (overlapping, "chunks of model.layers.0.weight overlap"),
        (beyond, "do not make up its shape"),
        (nowhere, "does not say where the chunk"),
        (transformed, r"transformed by \['zstd'\]"),
        (outside, "names a file outside its directory"),
        (huge, r"would have a float32 chunk \(1099511627772, 7\) in \d+ bytes"),
        (without_tensors, "not readable metadata"),
    ],
)
def test_metadata_that_promises_what_is_not_there_is_refused(copied, change, match):
    rewritten(copied / "step-2", change)
    assert_problem(dy.open_run(copied), 2, match)


@pytest.mark.slow
def test_a_chunk_of_another_shape_is_refused_when_it_is_read(copied):
    def exchanged(content):
        places = content.storage_data
        first, second = (
            next(each for each in places if each.fqn == f"model.{name}" and each.offset[0] == 0)
            for name in ("layers.0.weight", "embed_tokens.weight")
        )
        places[first], places[second] = places[second], places[first]

    rewritten(copied / "step-2", exchanged)
    run = dy.open_run(copied)
    with pytest.raises(dy.errors.FormatError, match="something else than the float32"):
        run.read("layers.0.weight", 2, "weight")


def test_two_models_are_refused_by_their_names(tmp_path):
    weights = Small().state_dict()
    save({"a": {"model": weights}, "b": {"model": weights}}, tmp_path / "step-5")
    assert_refused(tmp_path, r"tensors in a\.model, b\.model, where one model was expected")


@pytest.mark.slow
def test_nothing_in_metadata_is_run(copied, tmp_path):
    marker = tmp_path / "marker"
    rewritten(copied / "step-2", lambda content: setattr(content, "version", Touch(marker)))
    assert dy.open_run(copied).read("layers.0.weight", 2, "weight") is not None
    assert not marker.exists()
    pickle.loads((copied / "step-2/.metadata").read_bytes())
    assert marker.exists()
