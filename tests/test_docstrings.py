"""The examples in docstrings hold, and every public function has one.

Examples may use `dy` (dynamics), `np` and `torch`. They run in a folder of their own that holds
`run.zarr` (ReLoRA with a merge after step 4, records at 0, 2, 4, 6 and 8), `full/run.zarr` and
`relora/run.zarr` (twins that began with the same weights) and `checkpoints` (Hugging Face, of
steps 2, 4 and 6).
"""

import doctest
import shutil
from importlib import import_module
from pathlib import Path
from types import SimpleNamespace

import matplotlib
import matplotlib.pyplot as plt
import numpy as np
import pytest
import torch

import dynamics as dy
from dynamics.errors import DynamicsError

ROOT = Path(__file__).parents[1]
STEPS, MERGE = 8, 4

matplotlib.use("Agg")


def modules_with_examples():
    """Found in the text, so that collecting imports none of them."""
    files = [file for package in ("dynamics", "probes") for file in (ROOT / package).rglob("*.py")]
    names = {file.relative_to(ROOT).with_suffix("") for file in files if ">>> " in file.read_text()}
    return sorted(".".join(name.parts).removesuffix(".__init__") for name in names)


def _imported(name):
    try:
        return import_module(name)
    except DynamicsError as error:  # what `require_extra` says
        if not isinstance(error.__cause__, ModuleNotFoundError):
            raise
        pytest.skip(str(error))
    except ModuleNotFoundError as error:
        if error.name is None or error.name.split(".")[0] in ("dynamics", "probes"):
            raise
        pytest.skip(f"needs {error.name}")


# Where the examples run --------------------------------------------------------------------------


def _model():
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=32,
        hidden_size=16,
        intermediate_size=24,
        num_hidden_layers=2,
        num_attention_heads=2,
        num_key_value_heads=2,
    )
    return LlamaForCausalLM(config)


def _train(model, store, *, before_step=None, after_step=None):
    """The recording of a training on the same tokens for every model; saves what it is told to."""
    from probes import Recorder

    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    optimizer = torch.optim.AdamW(trained, lr=1e-2)
    tokens = torch.Generator().manual_seed(1)
    with Recorder(model, optimizer, store, every=2) as recorder:
        for step in range(1, STEPS + 1):
            optimizer.param_groups[0]["lr"] = 1e-3 if step == MERGE + 1 else 1e-2
            if before_step is not None:
                before_step(step, recorder, optimizer)
            ids = (torch.randint(32, (8, 1), generator=tokens) + torch.arange(16)) % 32
            loss = model(input_ids=ids, labels=ids).loss
            optimizer.zero_grad()
            loss.backward()
            recorder.log(loss=loss.item(), tokens=ids.numel() * step)
            optimizer.step()
            if after_step is not None:
                after_step(step)


def _train_full(store, checkpoints):
    model = _model()

    def save(step):
        if step in (2, 4, 6):
            model.save_pretrained(checkpoints / f"checkpoint-{step}")

    _train(model, store, after_step=save)


def _train_relora(store):
    import peft

    from probes.relora import ReLoRACallback

    modules = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]
    config = peft.LoraConfig(r=2, lora_alpha=4, target_modules=modules)
    model = peft.get_peft_model(_model(), config)

    def restart(step, recorder, optimizer):
        def note(kind, at, facts):
            recorder.event(kind, at=at, **facts)

        callback = ReLoRACallback(reset_every=MERGE, seed=0, on_event=note)
        state = SimpleNamespace(global_step=step - 1, max_steps=STEPS)
        if step - 1 == MERGE:
            callback.on_step_begin(None, state, None, model=model, optimizer=optimizer)

    _train(model, store, before_step=restart)


@pytest.fixture(scope="session")
def runs_of_examples(tmp_path_factory):
    """The folder of the examples' runs, to be copied."""
    pytest.importorskip("peft", reason="needs the extra relora")
    folder = tmp_path_factory.mktemp("examples")
    _train_full(folder / "full/run.zarr", folder / "checkpoints")
    _train_relora(folder / "relora/run.zarr")
    shutil.copytree(folder / "relora/run.zarr", folder / "run.zarr")
    return folder


# Tests -------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", modules_with_examples())
def test_the_examples_of_a_module_hold(name, request, tmp_path, monkeypatch):
    monkeypatch.setattr(plt, "show", lambda: None)
    module = _imported(name)
    given = {"dy": dy, "np": np, "torch": torch}
    found = doctest.DocTestFinder().find(module, extraglobs=given)
    tests = [each for each in found if each.examples]
    assert tests, f"{name}: no example that doctest finds"
    code = "".join(example.source for each in tests for example in each.examples)
    if any(run in code for run in ("run.zarr", "checkpoints")):
        runs = request.getfixturevalue("runs_of_examples")
        shutil.copytree(runs, tmp_path, dirs_exist_ok=True)
    monkeypatch.chdir(tmp_path)
    failures = []
    for each in tests:
        torch.manual_seed(0)
        runner = doctest.DocTestRunner(optionflags=doctest.NORMALIZE_WHITESPACE, verbose=False)
        runner.run(each, out=failures.append)
    plt.close("all")
    assert not failures, "\n" + "".join(failures)


@pytest.mark.parametrize("name", ["dynamics", "dynamics.metrics", "probes"])
def test_everything_public_has_an_example(name):
    package = import_module(name)
    public = {each: getattr(package, each) for each in package.__all__}
    without = [
        each
        for each, value in public.items()
        if callable(value) and ">>> " not in (value.__doc__ or "")
    ]
    assert without == [], f"{', '.join(without)}: no example (>>>) in the docstring"
