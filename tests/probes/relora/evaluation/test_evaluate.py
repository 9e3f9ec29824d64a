import io
import json
import re
import shutil
from dataclasses import replace

import numpy as np
import pytest
import torch
from rich.console import Console
from transformers import AutoModelForCausalLM
from typer.testing import CliRunner

import dynamics as dy
from dynamics import schema
from dynamics.errors import DynamicsError, FormatError, MissingError
from dynamics.formats.shared.evaluations import EVALUATIONS
from probes.relora.__main__ import app
from probes.relora.evaluation.blimp_data import read_blimp
from probes.relora.evaluation.evaluate import Evaluated, evaluate, validation_loss
from probes.relora.evaluation.evaluations import BlimpEvaluation, PerplexityEvaluation
from probes.relora.evaluation.tables import evaluation_tables
from probes.relora.evaluation.trained_models import load_model, load_tokenizer
from probes.relora.experiment import run_experiment
from tests.probes.relora.evaluation.scored_texts import PAIRS, SEQUENCE_LENGTH, TEXTS, write_pairs
from tests.short_run import TEXT, short_config

STEPS = [6, 12, 18, 24]


@pytest.fixture(scope="session")
def text(tmp_path_factory):
    folder = tmp_path_factory.mktemp("text")
    sentences = [sentence for pairs in PAIRS.values() for pair in pairs for sentence in pair]
    (folder / "all.txt").write_text(TEXT[:60_000] + " ".join(sentences * 20))
    return folder


@pytest.fixture(scope="session", params=["relora", "full_rank"])
def trained(request, tmp_path_factory, text):
    """A recorded run of 24 steps with four checkpoints."""
    output = tmp_path_factory.mktemp(request.param) / "run"
    config = short_config(method=request.param, sequence_length=SEQUENCE_LENGTH, batch_size=4)
    run_experiment(config, output, text=text, say=lambda line: None)
    return output


@pytest.fixture
def run(trained, tmp_path):
    return shutil.copytree(trained, tmp_path / "run")


@pytest.fixture
def blimp(tmp_path):
    return BlimpEvaluation(read_blimp(write_pairs(tmp_path / "blimp")))


def silent(line):
    pass


@pytest.mark.slow
def test_the_model_of_a_checkpoint_computes_with_the_effective_weights(trained):
    effective = dy.open_run(trained)
    for step in STEPS:
        folder = trained / f"checkpoint-{step}"
        model = load_model(folder).eval()
        base = folder / "base" if (folder / "base").is_dir() else folder
        plain = AutoModelForCausalLM.from_pretrained(base).eval()
        with torch.no_grad():
            for name, parameter in plain.named_parameters():
                if name in effective.matrices:
                    values = effective.read(name, step, schema.WEIGHT).values
                    parameter.copy_(torch.tensor(values))
            ids = torch.arange(40).view(2, 20)
            torch.testing.assert_close(model(ids).logits, plain(ids).logits, rtol=1e-4, atol=1e-5)


@pytest.mark.slow
def test_results_are_scalars_of_the_checkpoints_and_of_the_recording(run, blimp):
    found = evaluate(run, [blimp, PerplexityEvaluation(TEXTS)], say=silent)
    assert [each.step for each in found] == STEPS * 2
    tokenizer = load_tokenizer(run)
    for path in (run, run / "run.zarr"):
        scalars = dy.open_run(path).scalars
        steps = dy.open_run(path).steps
        for position, step in enumerate(STEPS):
            model = load_model(run / f"checkpoint-{step}")
            alone = blimp(model, tokenizer).scalars
            alone |= PerplexityEvaluation(TEXTS)(model, tokenizer).scalars
            index = steps.tolist().index(step)
            assert {name: scalars[name][index] for name in alone} == alone
            assert found[position].scalars["blimp"] == alone["blimp"]
        elsewhere = [step not in STEPS for step in steps]
        assert np.isnan(scalars["blimp"][elsewhere]).all()


@pytest.mark.slow
def test_results_stand_beside_the_ranks_of_an_analysis(run, blimp):
    evaluate(run, [blimp], say=silent)
    dataset = dy.analyze(run / "run.zarr", kinds=["weight"], metrics=["effective_rank"])
    assert dataset["blimp"].dims == ("step",)
    assert dataset["blimp"].sel(step=STEPS).notnull().all()
    assert {"blimp_binding", "blimp_morphology", "blimp_ties", "loss"} <= set(dataset)


@pytest.mark.slow
def test_what_is_there_is_not_computed_again(run, blimp):
    first = evaluate(run, [blimp], steps=[6, 12], say=silent)
    said = []
    again = evaluate(run, [blimp, PerplexityEvaluation(TEXTS)], steps=[6, 12, 18], say=said.append)
    assert [each.scalars for each in again[:2]] == [each.scalars for each in first]
    assert [line.split(":")[0] for line in said] == ["step 6", "step 12", "step 18", "step 18"]
    content = (run / EVALUATIONS).read_bytes()
    evaluate(run, [blimp, PerplexityEvaluation(TEXTS)], steps=[6, 12, 18], say=pytest.fail)
    assert (run / EVALUATIONS).read_bytes() == content


@pytest.mark.slow
def test_an_evaluation_that_was_killed_while_it_wrote_goes_on(run, blimp):
    evaluate(run, [blimp], say=silent)
    path = run / EVALUATIONS
    content = path.read_bytes()
    path.write_bytes(content[:-20])
    scalars = dy.open_run(run).scalars["blimp"]
    assert np.isnan(scalars).tolist() == [False, False, False, True]
    said = []
    evaluate(run, [blimp], say=said.append)
    assert len(said) == 1
    assert path.read_bytes() == content


@pytest.mark.slow
def test_other_weights_at_the_same_step_are_evaluated_anew(run):
    perplexity = PerplexityEvaluation(TEXTS)
    first = evaluate(run, [perplexity], steps=[6, 24], say=silent)
    shutil.rmtree(run / "checkpoint-24")
    shutil.copytree(run / "checkpoint-6", run / "checkpoint-24")
    again = evaluate(run, [perplexity], steps=[6, 24], say=silent)
    assert again[1].scalars == first[0].scalars != first[1].scalars
    assert dy.open_run(run).scalars["perplexity"][-1] == first[0].scalars["perplexity"]


@pytest.mark.slow
def test_a_series_does_not_mix_two_ways_to_evaluate(run, blimp):
    evaluate(run, [blimp], say=silent)
    one_pair = BlimpEvaluation([replace(each, pairs=each.pairs[:1]) for each in blimp.paradigms])
    (last,) = evaluate(run, [one_pair], steps=[24], say=silent)
    series = dy.open_run(run).scalars["blimp"]
    assert np.isnan(series[:3]).all()
    assert series[3] == last.scalars["blimp"]
    with_space = BlimpEvaluation(blimp.paradigms, prefix=" ")
    tokenizer = load_tokenizer(run)
    assert len({each.key(tokenizer) for each in (blimp, one_pair, with_space)}) == 3


@pytest.mark.slow
def test_the_validation_loss_is_the_one_that_the_trainer_logged(run, text):
    found = evaluate(run, [validation_loss(run, text)], say=silent)
    logged = dy.open_run(run).scalars["eval_loss"]
    losses = [each.scalars["validation_loss"] for each in found]
    np.testing.assert_allclose(losses, logged, rtol=2e-6)


@pytest.mark.slow
def test_other_text_than_the_run_was_trained_on_is_refused(run, tmp_path):
    (tmp_path / "other").mkdir()
    (tmp_path / "other" / "a.txt").write_text(TEXT[:70_000])
    with pytest.raises(DynamicsError, match=r"was not trained on .*other; give the folder"):
        validation_loss(run, tmp_path / "other")
    (run / "train_config.json").unlink()
    with pytest.raises(MissingError, match="how the run was trained"):
        validation_loss(run)


@pytest.mark.slow
def test_what_cannot_be_evaluated_is_refused(run, blimp, tmp_path):
    with pytest.raises(
        MissingError, match=r"No complete checkpoint of step 7 in .*: 6, 12, 18, 24"
    ):
        evaluate(run, [blimp], steps=[7])
    with pytest.raises(MissingError, match="No complete checkpoint-N in"):
        evaluate(tmp_path / "nowhere", [blimp])
    weights = next((run / "checkpoint-12").glob("*.safetensors"))
    weights.write_bytes(weights.read_bytes()[:100])
    with pytest.raises(FormatError, match=r"Cannot load the model of .*checkpoint-12"):
        evaluate(run, [blimp], say=silent)
    assert [json.loads(line)["step"] for line in (run / EVALUATIONS).open()] == [6]
    (run / "tokenizer.json").unlink()
    with pytest.raises(MissingError, match=r"No .*tokenizer.json; name the tokenizer"):
        evaluate(run, [blimp])


@pytest.mark.slow
def test_a_damaged_line_is_named(run, blimp):
    evaluate(run, [blimp], say=silent)
    path = run / EVALUATIONS
    path.write_bytes(path.read_bytes().replace(b'"scalars"', b'"scal', 1))
    # Checkpoints are measured without it; it is named among what was passed over.
    assert f"Line 1 of {path} is damaged" in str(dict(dy.open_run(run).passed_over))
    with pytest.raises(FormatError, match=re.escape(f"Line 1 of {path} is damaged")):
        dy.open_run(run / "run.zarr").scalars  # noqa: B018


@pytest.mark.slow
def test_the_command_evaluates_and_shows_ties(run, text, tmp_path):
    write_pairs(tmp_path / "blimp")
    arguments = [
        *("evaluate", str(run), "--blimp", str(tmp_path / "blimp"), "--text", str(text)),
        *("--validation", "--trained-on", str(text), "--steps", "6,24", "--limit", "2"),
    ]
    done = CliRunner().invoke(app, arguments, catch_exceptions=False, env={"COLUMNS": "120"})
    assert done.exit_code == 0
    assert "lacks 67 of the 67 paradigms of BLiMP" in done.output
    lines = [line.split() for line in done.output.splitlines()]
    mean = next(line for line in lines if line[:3] == ["mean", "over", "paradigms"])
    assert mean[-2:] == ["7", "0"]  # pairs, ties
    header = next(line for line in lines if line[:2] == ["step", "validation"])
    assert header[:4] == ["step", "validation", "loss", "perplexity"]
    assert {row["step"] for row in map(json.loads, (run / EVALUATIONS).open())} == {6, 24}


@pytest.mark.slow
def test_the_command_refuses_what_says_nothing(run):
    for arguments, message in (
        ([], "Nothing to evaluate"),
        (["--text", str(run / "tokenizer.json")], "is not a file of texts; give .jsonl"),
        (["--text", "x", "--steps", "6;12"], "--steps takes numbers"),
    ):
        with pytest.raises(DynamicsError, match=message):
            CliRunner().invoke(app, ["evaluate", str(run), *arguments], catch_exceptions=False)


@pytest.mark.slow
def test_the_command_takes_several_runs(run, tmp_path):
    write_pairs(tmp_path / "blimp")
    other = shutil.copytree(run, tmp_path / "other")
    words = ["evaluate", str(run), str(other), "--blimp", str(tmp_path / "blimp"), "--steps", "24"]
    done = CliRunner().invoke(app, words, catch_exceptions=False)
    assert [str(run), str(other)] == [
        line for line in done.output.splitlines() if line in (str(run), str(other))
    ]
    assert (run / EVALUATIONS).read_bytes() == (other / EVALUATIONS).read_bytes()


def test_the_tables_show_ties_and_missing_values():
    paradigm = {"phenomenon": "binding", "field": "syntax", "pairs": 3, "correct": 1, "tied": [2]}
    details = {"paradigms": {"who": paradigm}}
    scalars = {"blimp": 1 / 3, "blimp_ties": 1, "blimp_binding": 1 / 3, "blimp_syntax": 1 / 3}
    console = Console(record=True, width=100, file=io.StringIO())
    for table in evaluation_tables([Evaluated(5, "k", "w", scalars, details)]):
        console.print(table)
    lines = [line.split() for line in console.export_text().splitlines()]
    assert ["binding", "0.3333", "3", "1"] in lines
    assert ["mean", "over", "paradigms", "0.3333", "3", "1"] in lines
