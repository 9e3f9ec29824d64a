"""The sentences say what the numbers say, computed here another way."""

import json
import re

import numpy as np
import pytest
from scipy import stats

import dynamics as dy
from dynamics import schema
from dynamics.exports.report.facts import cell_counts, floor_facts
from dynamics.exports.report.sentences import LIMIT, sentences_of
from dynamics.schema import Status
from tests.dynamics.exports.report.conftest import made_by_hand

METHODS = ["full_rank", "relora", "relora-as_published", "lora"]


def texts(comparison):
    return [each.text for each in sentences_of(comparison)]


@pytest.fixture(scope="module")
def said(example):
    return texts(example)


def layer_matrices(example, kind, metric, method):
    """(seed, step, matrix) float64 of the weights of the layers, by plain indexing."""
    runs = [i for i, run in enumerate(example.run.values) if run.rpartition("-seed")[0] == method]
    names = [
        i for i, name in enumerate(example.matrix.values) if re.search(r"_proj\.weight$", name)
    ]
    k = example.kind.values.tolist().index(kind)
    values = example[metric].transpose("run", "kind", "step", "matrix").values
    return values[np.ix_(runs, [k], range(29), names)][:, 0].astype(float)


def test_there_are_five_and_they_are_short(said):
    assert len(said) == 5
    assert max(map(len, said)) <= LIMIT


def test_broken_names_the_runs_that_fail_and_why(example, said):
    audits = json.loads(example.attrs["audits"])
    failing = {
        run for run, checks in audits.items() if any(c[0] == "fail" for c in checks.values())
    }
    assert f"{len(failing)} of {len(audits)} runs fail" in said[0]
    assert {run.rpartition("-seed")[0] for run in failing} == {"relora-as_published"}
    assert "(relora-as_published)" in said[0]
    for check in ("merge_fidelity", "moments", "dead_adapter"):
        count = sum(checks[check][0] == "fail" for checks in audits.values())
        assert f"{check} in {count}" in said[0]
    assert "forgot the scale s = 2" in said[0]


def test_measured_counts_runs_records_tokens_and_cells(example, said):
    status = example.status.values
    assert (
        "12 runs (4 × 3 seeds), 28 matrices in 4 layers, 29 records from step 0 to 560" in said[1]
    )
    assert "(1.15 M tokens)" in said[1]
    assert int(example.tokens.max()) == 1146880
    assert f"{int((status == Status.MEASURED).sum()):,} of" in said[1]


def test_cells_that_do_not_apply_are_no_missing_ones(example):
    counts = cell_counts(example)
    assert sum(counts.values()) == example.status.size
    # No adapters in the three runs at full rank: every record, every matrix.
    assert counts["does not apply"] >= 3 * 29 * 34
    assert counts["measured"] == int((example.status == Status.MEASURED).sum())


def test_weights_give_means_and_intervals_over_seeds(example, said):
    for method in METHODS:
        means = layer_matrices(example, "weight", "effective_rank", method).mean(-1)
        last = means[:, -1]
        low, high = stats.t.interval(0.95, 2, loc=last.mean(), scale=stats.sem(last))
        number, half = _after(said[2], method)
        assert number == pytest.approx(last.mean(), abs=0.051)
        assert half == pytest.approx((high - low) / 2, rel=0.5)
        assert "from 98.6 to" in said[2]
        assert means[:, 0].mean() == pytest.approx(98.6, abs=0.05)


def _after(text, method):
    """The number and the interval behind the name of a group."""
    pattern = rf" {re.escape(method)} (\d+\.?\d*)(?: ± (\d+\.?\d*))?[;.]"
    number, half = re.search(pattern, text).groups()
    return float(number), float(half or 0)


def test_weights_name_the_matrix_that_changed_most(example, said):
    changes = {}
    for method in METHODS:
        values = layer_matrices(example, "weight", "effective_rank", method)
        names = [n for n in example.matrix.values if n.endswith("_proj.weight")]
        for name, change in zip(names, (values[:, -1] - values[:, 0]).mean(0), strict=True):
            changes[method, name] = change
    (method, name), change = max(changes.items(), key=lambda item: abs(item[1]))
    layer, module = re.search(r"layers\.(\d+)\.\w+\.(\w+)\.", name).groups()
    assert f"Most in layer {layer} {module} of {method} (−{abs(change):.1f})" in said[2]


def test_learned_gives_ranks_bounds_and_effective_ranks(example, said):
    for method in METHODS:
        rank, bound, effective = (
            layer_matrices(example, "displacement", metric, method)[:, -1].mean()
            for metric in ("numerical_rank", "rank_bound", "effective_rank")
        )
        assert f"{method} {rank:.4g} of {bound:.4g} ({float(f'{effective:.3g}'):g})" in said[3]


def test_trust_doubles_the_floor_of_every_spectrum(example, said):
    s = example.singular_value.values.astype(float).reshape(-1, 128)
    floors = example.noise_floor.values.astype(float).ravel()
    found = ~np.isnan(s[:, 0]) & ~np.isnan(floors)
    changed, margins, noise = 0, [], 0
    for values, floor in zip(s[found], floors[found], strict=True):
        counted = values[values > floor]
        changed += np.sum(values > 2 * floor) != counted.size
        noise = max(noise, np.sum(values > 0) - counted.size)
        if counted.size and floor > 0:
            margins.append(counted.min() / floor)
    facts = floor_facts(example)
    assert (facts.spectra, facts.changed, facts.noise) == (found.sum(), changed, noise)
    assert facts.margin == pytest.approx(np.median(margins))
    assert f"in {changed} of {found.sum()} spectra" in said[4]
    assert f"up to {noise} directions" in said[4]


def test_a_floor_that_decides_is_no_good_news():
    result = made_by_hand()
    result["noise_floor"][:] = 0.9
    facts = floor_facts(result)
    assert facts.changed > 0
    assert sentences_of(result)[4].tone == "warn"


def test_a_rank_beyond_its_bound_is_bad():
    result = made_by_hand()
    result["rank_bound"][:] = 2
    sentence = sentences_of(result)[4]
    assert sentence.tone == "bad"
    assert "exceed their bound" in sentence.text


def test_nan_and_unreadable_files_come_first():
    result = made_by_hand()
    result["status"][0, 0, 0, 0] = Status.NON_FINITE
    result["status"][0, 0, 1, :2] = Status.UNREADABLE
    sentence = sentences_of(result)[0]
    assert sentence.text.startswith("1 of 16 matrices hold NaN or Inf, 2 of 16 matrices cannot")
    assert sentence.tone == "bad"


@pytest.mark.parametrize(
    ("severities", "tone", "text"),
    [
        ({"a": "pass", "b": "pass"}, "good", "Nothing is broken: both runs pass the audit."),
        ({"a": "warn", "b": "pass"}, "warn", "1 of 2 audits warns (a)"),
        ({"a": "fail", "b": "warn"}, "bad", "1 of 2 runs fails the audit (a): finite in 1."),
        ({"a": "pass"}, "good", "1 of 2 runs were audited, and all of them pass."),
        ({}, "warn", "No verdicts are in this result."),
    ],
)
def test_the_verdict_in_one_sentence(severities, tone, text):
    audits = {run: {"finite": {"severity": s, "meaning": "m"}} for run, s in severities.items()}
    result = made_by_hand(runs=("a", "b")).assign_attrs(audits=json.dumps(audits))
    sentence = sentences_of(result)[0]
    assert text in sentence.text
    assert sentence.tone == tone


def test_sentences_stay_short_with_many_runs_of_long_names():
    names = [f"a_very_long_name_of_a_run_that_nobody_can_read_{i}" * 3 for i in range(40)]
    result = made_by_hand(runs=names)
    audits = {run: {"finite": {"severity": "fail", "meaning": "word " * 99}} for run in names}
    said = texts(result.assign_attrs(audits=json.dumps(audits)))
    assert max(map(len, said)) <= LIMIT
    assert "38 more below" in said[2]


@pytest.mark.parametrize("kinds", [("weight",), ("base",), ("gradient",), ("adapter",)])
def test_any_kind_alone_has_its_sentences(kinds):
    said = texts(made_by_hand(kinds=kinds, steps=(5,)))
    assert len(said) == 5
    assert all(said)
    spectra = "4 of 4 spectra measured."
    assert said[1] == f"1 run, 4 matrices in 2 layers, 1 record at step 5. {spectra}"


def test_layers_of_two_stacks_are_counted_apart():
    stacks = ["encoder", "encoder", "decoder", "decoder"]
    result = made_by_hand().assign_coords(layer=("matrix", [0] * 4), stack=("matrix", stacks))
    said = texts(result)
    assert "4 matrices in 2 layers" in said[1]
    assert "coder." in said[2].rpartition("Most in layer 0 ")[2]


def test_a_run_of_which_nothing_was_measured():
    result = made_by_hand()
    result["status"][:] = Status.NOT_RECORDED
    for name in ("effective_rank", "numerical_rank", "rank_bound", "singular_value"):
        result[name][:] = np.nan
    assert len(texts(result)) == 5


def test_runs_that_end_early_count_with_their_own_last_record(example):
    shorter = example.copy(deep=True)
    which = {"run": 0, "step": slice(10, None)}
    for name in ("effective_rank", "status"):
        shorter[name] = shorter[name].astype(float)
        shorter[name][which] = np.nan
    means = layer_matrices(shorter, "weight", "effective_rank", "full_rank").mean(-1)
    expected = np.mean([means[0, 9], means[1, -1], means[2, -1]])
    number, half = _after(texts(shorter)[2], "full_rank")
    assert number == pytest.approx(expected, abs=max(half, 0.1))


def test_difference_and_statistics_are_refused(example):
    small = example[["effective_rank"]].isel(matrix=[0])
    for result in (dy.difference(small, baseline="lora-seed=0"), dy.over(small, "seed")):
        with pytest.raises(dy.DynamicsError, match="give the comparison itself"):
            dy.report(result, "never.html")


def test_what_is_no_result_is_refused(tmp_path):
    with pytest.raises(dy.DynamicsError, match="takes runs"):
        dy.report(made_by_hand()[[schema.STATUS]], tmp_path / "never.html")
    assert not (tmp_path / "never.html").exists()
