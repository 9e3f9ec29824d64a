"""Whatever bytes lie in a run, reading it gives matrices or one line that says what is wrong.

Each target takes a run that a real library wrote, lets hypothesis damage one of its files, and
reads everything. `make test` runs a few fixed examples of each, `make fuzz` thousands of new ones
(FUZZ_EXAMPLES). Memory is watched: no more than the file's own size in reasonable multiples.
"""

import io
import json
import os
import shutil
import tracemalloc
import warnings
import zipfile

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

import dynamics as dy
from dynamics.errors import DynamicsError
from tests.dynamics.fuzz.mutations import damaged_bytes, damaged_json, encoded

torch = pytest.importorskip("torch")
peft = pytest.importorskip("peft")
save_file = pytest.importorskip("safetensors.torch").save_file

EXAMPLES = int(os.environ.get("FUZZ_EXAMPLES", "0"))
fuzz = settings(
    max_examples=EXAMPLES or 40,
    derandomize=not EXAMPLES,
    database=None,
    deadline=None,
    suppress_health_check=list(HealthCheck),
    print_blob=True,
)
_MEMORY = 48 * 2**20


def read_all(path):
    """Open a run and read all it has; only a DynamicsError of one line may come out."""
    tracemalloc.start()
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            run = dy.open_run(path)
            problems = list(run.problems.values())
            for step in run.steps.tolist():
                for name in run.matrices:
                    for kind in run.stored_kinds:
                        try:
                            run.read(name, step, kind)
                        except DynamicsError as error:
                            problems.append(str(error))
            assert all(isinstance(series, object) for series in run.scalars.values())
            len(run.events)
    except DynamicsError as error:
        problems = [str(error)]
    finally:
        _, peak = tracemalloc.get_traced_memory()
        tracemalloc.stop()
    assert not any("\n" in problem for problem in problems), problems
    assert peak < _MEMORY, f"{peak} bytes were asked for"
    return problems


def adapters():
    """A method of each kind: LoRA with more than s·B·A, a product, a rotation, a scaling."""
    on = {"target_modules": ["q_proj", "down_proj"]}
    return {
        "dora": peft.LoraConfig(r=2, use_dora=True, trainable_token_indices=[1, 3], **on),
        "pissa": peft.LoraConfig(r=2, init_lora_weights="pissa", **on),
        "lokr": peft.LoKrConfig(r=2, **on),
        "oft": peft.OFTConfig(oft_block_size=4, **on),
        "ia3": peft.IA3Config(feedforward_modules=["down_proj"], **on),
        "vera": peft.VeraConfig(r=2, **on),
    }


@pytest.fixture(scope="module")
def runs(tmp_path_factory, tiny_llama, write_recording):
    """Small runs of each layout, to be copied and damaged."""
    folder = tmp_path_factory.mktemp("seeds")
    small = {"num_hidden_layers": 1}
    tiny_llama(0, **small).save_pretrained(folder / "single/checkpoint-1")
    state = {"global_step": 1, "log_history": [{"step": 1, "loss": 2.5, "epoch": 0.1}]}
    (folder / "single/checkpoint-1/trainer_state.json").write_text(json.dumps(state))
    tiny_llama(0, **small).save_pretrained(folder / "sharded/checkpoint-1", max_shard_size="4KB")
    for name, zipped in (("zipped", True), ("legacy", False)):
        (folder / name / "checkpoint-1").mkdir(parents=True)
        torch.save(
            tiny_llama(0, **small).state_dict(),
            folder / name / "checkpoint-1/pytorch_model.bin",
            _use_new_zipfile_serialization=zipped,
        )
    adapted = peft.get_peft_model(
        tiny_llama(0, **small), peft.LoraConfig(r=2, target_modules=["q_proj"])
    )
    adapted.save_pretrained(folder / "adapter/checkpoint-1")
    tiny_llama(0, **small).save_pretrained(folder / "adapter/base")
    for method, config in adapters().items():
        at = folder / method / "checkpoint-1"
        peft.get_peft_model(tiny_llama(0, **small), config).save_pretrained(at)
        tiny_llama(0, **small).save_pretrained(folder / method / "base")
    inside = peft.get_peft_model(tiny_llama(0, **small), adapters()["dora"])
    (folder / "inside").mkdir()
    save_file(
        {name: each.contiguous().clone() for name, each in inside.state_dict().items()},
        folder / "inside/step1.safetensors",
    )
    inside.peft_config["default"].save_pretrained(folder / "inside")
    (folder / "inside/hyperparameters.yaml").write_text("lora_alpha: 8\nlora_query: true\n")
    (folder / "sparse/model_1").mkdir(parents=True)
    path = "model.layers.0.mlp.up_proj"
    sparse = {"lora_A": torch.ones(2, 8), "lora_B": torch.ones(12, 2)}
    sparse |= {"sparse_index": torch.arange(9), "sparse_value": torch.ones(9)}
    save_file(
        {f"{path}.{part}": each for part, each in sparse.items()},
        folder / "sparse/model_1/model.safetensors",
    )
    (folder / "sparse/model_1/training_state.json").write_text("{}")
    (folder / "sparse/model_1/splora_config.json").write_text('{"r": 2, "lora_alpha": 4}')
    name = "model.layers.0.self_attn.q_proj.weight"
    write_recording(folder / "recording", steps=(0, 10), shapes={name: (4, 3)})
    return folder


def damaged_copy(runs, name, file, content):
    """A copy of a run in which one file has other content."""
    copy = runs / "copy"
    shutil.rmtree(copy, ignore_errors=True)
    shutil.copytree(runs / name, copy)
    (copy / file).write_bytes(content)
    return copy


def test_the_undamaged_runs_are_read_without_problems(runs):
    for name in (
        "single",
        "sharded",
        "zipped",
        "legacy",
        "adapter",
        "recording",
        "inside",
        "sparse",
        *adapters(),
    ):
        assert read_all(runs / name) == []


@pytest.mark.slow
@fuzz
@given(data=st.data())
@pytest.mark.parametrize(
    ("name", "file"),
    [
        ("single", "checkpoint-1/model.safetensors"),
        ("zipped", "checkpoint-1/pytorch_model.bin"),
        ("legacy", "checkpoint-1/pytorch_model.bin"),
        ("adapter", "checkpoint-1/adapter_model.safetensors"),
        ("inside", "step1.safetensors"),
        ("sparse", "model_1/model.safetensors"),
        ("inside", "hyperparameters.yaml"),
        ("sharded", "checkpoint-1/model.safetensors.index.json"),
        ("adapter", "checkpoint-1/adapter_config.json"),
        *((method, "checkpoint-1/adapter_config.json") for method in adapters()),
        ("inside", "adapter_config.json"),
        ("single", "checkpoint-1/trainer_state.json"),
        ("single", "checkpoint-1/config.json"),
        ("recording", "zarr.json"),
    ],
)
def test_damaged_bytes(runs, data, name, file):
    content = data.draw(damaged_bytes((runs / name / file).read_bytes()))
    read_all(damaged_copy(runs, name, file, content))


@pytest.mark.slow
@fuzz
@given(data=st.data())
@pytest.mark.parametrize(
    ("name", "file"),
    [
        ("sharded", "checkpoint-1/model.safetensors.index.json"),
        ("adapter", "checkpoint-1/adapter_config.json"),
        *((method, "checkpoint-1/adapter_config.json") for method in adapters()),
        ("inside", "adapter_config.json"),
        ("sparse", "model_1/splora_config.json"),
        ("single", "checkpoint-1/trainer_state.json"),
        ("single", "checkpoint-1/config.json"),
        ("recording", "zarr.json"),
    ],
)
def test_damaged_json(runs, data, name, file):
    seed = json.loads((runs / name / file).read_text())
    read_all(damaged_copy(runs, name, file, encoded(data.draw(damaged_json(seed)))))


@pytest.mark.slow
@fuzz
@given(data=st.data())
@pytest.mark.parametrize(
    ("name", "file"),
    [
        ("single", "checkpoint-1/model.safetensors"),
        ("adapter", "checkpoint-1/adapter_model.safetensors"),
        *((method, "checkpoint-1/adapter_model.safetensors") for method in adapters()),
        ("inside", "step1.safetensors"),
        ("sparse", "model_1/model.safetensors"),
    ],
)
def test_damaged_safetensors_header(runs, data, name, file):
    content = (runs / name / file).read_bytes()
    length = int.from_bytes(content[:8], "little")
    header = encoded(data.draw(damaged_json(json.loads(content[8 : 8 + length]))))
    content = len(header).to_bytes(8, "little") + header + content[8 + length :]
    read_all(damaged_copy(runs, name, file, content))


@pytest.mark.slow
@fuzz
@given(data=st.data())
def test_damaged_pickle_in_a_sound_archive(runs, data):
    file = "checkpoint-1/pytorch_model.bin"
    written = io.BytesIO()
    with zipfile.ZipFile(runs / "zipped" / file) as seed, zipfile.ZipFile(written, "w") as copy:
        for member in seed.infolist():
            content = seed.read(member)
            if member.filename.endswith("data.pkl"):
                content = data.draw(damaged_bytes(content))
            copy.writestr(member.filename, content)
    read_all(damaged_copy(runs, "zipped", file, written.getvalue()))
