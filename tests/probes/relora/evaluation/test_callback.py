import json
from dataclasses import replace

import numpy as np
import pytest
import torch

import dynamics as dy
from dynamics.errors import DynamicsError
from probes.frameworks.hf_trainer import RecorderCallback
from probes.relora import prepare_data, train
from probes.relora.evaluation.blimp_data import read_blimp
from probes.relora.evaluation.callback import EvaluationCallback
from probes.relora.evaluation.evaluate import evaluate
from probes.relora.evaluation.evaluations import BlimpEvaluation, PerplexityEvaluation
from probes.relora.evaluation.trained_models import as_transformers
from tests.probes.relora.evaluation.scored_texts import SEQUENCE_LENGTH, TEXTS, write_pairs
from tests.short_run import TEXT, short_config

pytestmark = pytest.mark.slow

# With dropout, whose masks any other use of the random state would change.
CONFIG = short_config(
    method="relora", sequence_length=SEQUENCE_LENGTH, batch_size=4, lora_dropout=0.2, max_steps=12
)


@pytest.fixture(scope="module")
def data():
    return prepare_data([TEXT[:60_000]], CONFIG)


@pytest.fixture(scope="module")
def evaluations(tmp_path_factory):
    blimp = read_blimp(write_pairs(tmp_path_factory.mktemp("blimp")))
    return [BlimpEvaluation(blimp), PerplexityEvaluation(TEXTS)]


@pytest.fixture(scope="module")
def evaluated(data, evaluations, tmp_path_factory):
    """A run that is evaluated every third step; the recorder is called before the evaluation."""
    folder = tmp_path_factory.mktemp("evaluated") / "run"
    recorder = RecorderCallback(folder / "run.zarr", every=3)
    callback = EvaluationCallback(
        evaluations, as_transformers(data.tokenizer), every=3, recorder=recorder
    )
    model = train(
        CONFIG, data, folder, callbacks=[recorder, callback], on_event=recorder.event
    ).model
    return folder, model


def test_evaluating_does_not_change_the_training(data, evaluated, tmp_path):
    alone = train(CONFIG, data, tmp_path / "alone").model
    for (name, one), other in zip(evaluated[1].named_parameters(), alone.parameters(), strict=True):
        assert torch.equal(one, other), name
    folder = evaluated[0]
    losses = [
        [entry["loss"] for entry in json.loads(path.read_text())["log_history"] if "loss" in entry]
        for path in (
            folder / "checkpoint-12" / "trainer_state.json",
            tmp_path / "alone" / "checkpoint-12" / "trainer_state.json",
        )
    ]
    assert losses[0] == losses[1]


def test_the_scalars_are_in_the_recording_and_in_the_checkpoints(evaluated):
    recording, checkpoints = (
        dy.open_run(path) for path in (evaluated[0] / "run.zarr", evaluated[0])
    )
    assert recording.steps.tolist() == [0, 3, 6, 9, 12]
    for name in ("blimp", "blimp_ties", "blimp_binding", "perplexity", "mean_text_perplexity_news"):
        series = recording.scalars[name]
        assert np.isnan(series).tolist() == [True, False, False, False, False]
        np.testing.assert_array_equal(checkpoints.scalars[name], series[[2, 4]])


def test_they_are_what_the_checkpoints_give_afterwards(evaluated, evaluations):
    folder = evaluated[0]
    during = dict(dy.open_run(folder).scalars)
    evaluate(folder, evaluations, say=lambda line: None)
    after = dy.open_run(folder).scalars
    for name in ("blimp", "perplexity", "mean_text_perplexity", "perplexity_speech"):
        np.testing.assert_allclose(during[name], after[name], rtol=1e-6)


def test_steps_between_evaluations_are_not_evaluated(data, evaluations, tmp_path):
    callback = EvaluationCallback(evaluations[:1], as_transformers(data.tokenizer), every=5)
    trainer = train(replace(CONFIG, max_steps=11), data, tmp_path / "run", callbacks=[callback])
    entries = [entry for entry in trainer.state.log_history if "blimp" in entry]
    assert [entry["step"] for entry in entries] == [5, 10]
    with pytest.raises(DynamicsError, match="every 0 steps; give 1 or more"):
        EvaluationCallback(evaluations, None, every=0)
