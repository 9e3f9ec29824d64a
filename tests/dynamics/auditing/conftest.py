"""Runs of the reference trainer with one planted defect each, and healthy ones."""

import warnings
from contextlib import contextmanager
from dataclasses import dataclass

import pytest
import torch

from dynamics.auditing import Report, audit
from probes.frameworks.hf_trainer import RecorderCallback
from probes.relora import TextData, prepare_data, train
from probes.relora.training import restart
from tests.short_run import TEXT, short_config


@dataclass
class AuditedRun:
    """The audits of the recording and the checkpoints of a finished run, and its warnings."""

    recording: Report
    checkpoints: Report
    warned: list[str]


@pytest.fixture(scope="session")
def text_data() -> TextData:
    return prepare_data([TEXT], short_config())


@pytest.fixture(scope="session")
def audited_run(text_data, tmp_path_factory):
    """audited_run(name, plant=None, **config): trained once per name, with a defect planted."""
    runs: dict[str, AuditedRun] = {}

    def run(name, plant=None, **config) -> AuditedRun:
        if name not in runs:
            folder = tmp_path_factory.mktemp(name)
            recorder = RecorderCallback(folder / "run.zarr", every=3)
            with (
                pytest.MonkeyPatch.context() as patch,
                warnings.catch_warnings(record=True) as caught,
            ):
                warnings.simplefilter("always")
                if plant is not None:
                    plant(patch)
                train(
                    short_config(**config),
                    text_data,
                    folder / "checkpoints",
                    callbacks=[recorder],
                    on_event=recorder.event,
                )
            runs[name] = AuditedRun(
                audit(folder / "run.zarr"),
                audit(folder / "checkpoints"),
                [str(each.message) for each in caught if issubclass(each.category, UserWarning)],
            )
        return runs[name]

    return run


def factors(layer):
    return layer.lora_A["default"].weight, layer.lora_B["default"].weight


@contextmanager
def adapters_kept(model, which="AB"):
    """Around a merge and reset: afterwards, these factors get their old values back."""
    layers = list(restart.lora_layers(model).values())
    kept = [[factor.detach().clone() for factor in factors(layer)] for layer in layers]
    yield layers, kept
    with torch.no_grad():
        for layer, copies in zip(layers, kept, strict=True):
            for name, factor, copy in zip("AB", factors(layer), copies, strict=True):
                if name in which:
                    factor.copy_(copy)
