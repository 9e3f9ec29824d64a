"""Runs know what they were made with; means and paired differences pool nothing else."""

import numpy as np
import pytest
import scipy.stats
import xarray as xr
from zarr.storage import MemoryStore

import dynamics as dy
from dynamics.analysis.settings import settings_of
from dynamics.errors import DynamicsError, MissingError
from dynamics.recordings import RecordingWriter, matrix_path

NAME = "layers.0.weight"


def recorded(number, attrs, *, rows=6):
    """(a recording of one matrix at the steps 0 and 1, the matrix at step 1)."""
    store, path = MemoryStore(), matrix_path("weight", NAME)
    rng = np.random.default_rng(number)
    writer = RecordingWriter(store, attrs)
    for step in (0, 1):
        weight = rng.standard_normal((rows, 4))
        writer.append(step, {path: weight}, attrs={path: {"source_dtype": "float64"}})
    return dy.open_run(store), weight


def compare(attrs_of, **options):
    made = {label: recorded(i, attrs) for i, (label, attrs) in enumerate(attrs_of.items())}
    both = dy.compare(
        {label: run for label, (run, _) in made.items()},
        metrics=["frobenius_norm"], kinds=["weight", "update"], **options,
    )  # fmt: skip
    return both, np.array([np.linalg.norm(weight) for _, weight in made.values()])


def last(dataset):
    return dataset["frobenius_norm"].sel(kind="weight", step=1, matrix=NAME)


SWEEP = {
    f"{lr}/{seed}": {"seed": seed, "training_arguments": {"seed": seed, "learning_rate": lr}}
    for lr in (0.1, 0.2, 0.4)
    for seed in (0, 1, 2)
}


@pytest.fixture(scope="module")
def swept():
    """(comparison of three learning rates with three seeds, norms of the weights at step 1)."""
    return compare(SWEEP)


# Settings ---------------------------------------------------------------------------------------


def test_settings_are_flat_and_named_by_their_last_part():
    found = settings_of(
        {
            "format": "learning-dynamics-recording",
            "versions": {"torch": "2"},
            "account": {"matrices": 3},
            "seed": 0,
            "training_arguments": {"seed": 0, "lr": 0.1, "fp16": False, "output_dir": "/home/me"},
            "config": {"text": {"size": 8}, "vision": {"size": 4}, "heads": None, "blocks": [{}]},
            "adapter_config": {"target_modules": ["v_proj", "q_proj"], "betas": [0.9, 0.5]},
        }
    )
    assert found == {
        "seed": 0,
        "lr": 0.1,
        "fp16": False,
        "config.text.size": 8,
        "config.vision.size": 4,
        "target_modules": "q_proj, v_proj",
        "betas": "0.9, 0.5",
    }


def test_only_settings_that_differ_are_coordinates_of_their_own_type():
    both, _ = compare(
        {
            "a": {"seed": 0, "lr": 0.1, "bf16": True, "name": "x", "same": 3, "run_name": "one"},
            "b": {"seed": 1, "lr": 1, "bf16": False, "adapter_config": {"r": 8, "peft": "LORA"}},
            "c": {"seed": 2, "lr": 0.1, "adapter_config": {"r": 8, "use_dora": False}, "same": 3},
        }
    )
    found = {name: both[name] for name in ("seed", "lr", "bf16", "name", "same", "r", "peft")}
    assert {name: each.dtype.kind for name, each in found.items()} == {
        "seed": "i", "lr": "f", "bf16": "b", "name": "U", "same": "f", "r": "f", "peft": "U"
    }  # fmt: skip
    np.testing.assert_array_equal(both["r"], [np.nan, 8, 8])
    np.testing.assert_array_equal(both["same"], [3, np.nan, 3])
    assert both["name"].values.tolist() == ["x", "", ""]
    assert both["bf16"].values.tolist() == [True, False, False]
    assert "use_dora" not in both.coords  # switched off and not there are the same
    assert "run_name" not in both.coords
    assert {each.dims for each in found.values()} == {("run",)}


def test_zero_is_a_value_and_a_missing_number_is_not_zero():
    both, _ = compare({"a": {"seed": 0}, "b": {}})
    np.testing.assert_array_equal(both["seed"], [0, np.nan])


def test_settings_that_are_named_like_variables_keep_their_path():
    attrs = {"layer": 1, "config": {"frobenius_norm": 1, "status": 1}}
    other = {"layer": 2, "config": {"frobenius_norm": 2, "status": 1}}
    both, norms = compare({"a": attrs, "b": other})
    assert both["attrs.layer"].values.tolist() == [1, 2]
    assert both["config.frobenius_norm"].values.tolist() == [1, 2]
    np.testing.assert_allclose(last(both), norms)


def test_a_setting_is_one_wherever_its_run_has_it_from():
    both, _ = compare(
        {
            "trainer": {"training_arguments": {"seed": 0, "lr": 0.1, "eps": 1e-8, "optim": "adam"}},
            "twice": {"seed": 1, "training_arguments": {"seed": 1, "lr": 0.2, "eps": 1e-8}},
            "loop": {"seed": 2, "lr": 0.1},
        }
    )
    assert both["seed"].values.tolist() == [0, 1, 2]
    assert both["lr"].values.tolist() == [0.1, 0.2, 0.1]
    # Of the loop's other arguments nothing is known: one coordinate keeps it apart.
    assert both["training_arguments"].values.tolist() == [True, True, False]
    assert "eps" not in both.coords
    assert both["optim"].values.tolist() == ["adam", "", ""]


def test_settings_of_two_parts_of_a_model_stay_two():
    both, _ = compare(
        {
            "a": {"config": {"encoder": {"dropout": 0.1}, "size": 4}},
            "b": {"config": {"decoder": {"dropout": 0.1}, "size": 4}},
            "c": {"config": {"decoder": {"dropout": 0.2}, "size": 4}},
        }
    )
    np.testing.assert_array_equal(both["config.encoder.dropout"], [0.1, np.nan, np.nan])
    np.testing.assert_array_equal(both["config.decoder.dropout"], [np.nan, 0.1, 0.2])


def test_settings_survive_saving_and_follow_a_run(swept, tmp_path):
    both = swept[0]
    loaded = dy.load(dy.save(both, tmp_path / "both.zarr"))
    xr.testing.assert_identical(loaded, both)
    assert dy.select_run(loaded, "0.2/1")["learning_rate"].item() == 0.2
    assert loaded["seed"].values.tolist() == [0, 1, 2] * 3


# over() -----------------------------------------------------------------------------------------


def test_seeds_of_three_learning_rates_are_three_settings_whatever_the_runs_are_called(swept):
    both, norms = swept
    found = dy.over(last(both), "seed", level=0.9)
    assert found["run"].values.tolist() == [f"learning_rate={lr}" for lr in (0.1, 0.2, 0.4)]
    assert found["learning_rate"].values.tolist() == [0.1, 0.2, 0.4]
    assert "seed" not in found.coords
    assert found["count"].values.tolist() == [3, 3, 3]
    for at, sample in enumerate(norms.reshape(3, 3)):
        lower, upper = scipy.stats.t.interval(0.9, 2, sample.mean(), scipy.stats.sem(sample))
        numbers = [float(found[name][at]) for name in ("lower", "mean", "upper")]
        np.testing.assert_allclose(numbers, [lower, sample.mean(), upper], rtol=1e-12)


def test_of_a_dataset_each_variable_has_the_statistics(swept):
    both, norms = swept
    found = dy.over(both, "seed")
    of_rates = last(found).sel(statistic="mean")
    np.testing.assert_allclose(of_rates, norms.reshape(3, 3).mean(axis=1), rtol=1e-12)
    assert found["frobenius_norm"].dims[:2] == ("run", "statistic")
    assert found["frobenius_norm"].attrs == both["frobenius_norm"].attrs
    assert found["statistic"].values.tolist() == ["mean", "lower", "upper", "count"]
    assert "status" not in found
    assert found["reference_step"].sel(kind="update").values.tolist() == [[-1, 0]] * 3
    assert (found.attrs["over"], found.attrs["level"]) == ("seed", 0.95)


def test_learning_rates_can_be_pooled_too(swept):
    both, norms = swept
    found = dy.over(last(both), "learning_rate")
    assert found["seed"].values.tolist() == [0, 1, 2]
    np.testing.assert_allclose(found["mean"], norms.reshape(3, 3).mean(axis=0), rtol=1e-12)


def test_names_without_the_seed_name_the_settings():
    both, _ = compare(
        {f"{m}-seed={s}-b": {"seed": s, "method": m} for m in ("full", "lora") for s in (1, 11)}
    )
    assert dy.over(last(both), "seed")["run"].values.tolist() == ["full-b", "lora-b"]


def test_runs_that_differ_in_something_else_as_well_are_not_pooled():
    both, _ = compare(
        {
            "a": {"seed": 0, "lr": 0.1, "size": 8, "decay": 1.0},
            "b": {"seed": 1, "lr": 0.2, "size": 4, "decay": 2.0},
            "c": {"seed": 2, "lr": 0.2, "size": 16, "decay": 2.0},
        }
    )
    with pytest.raises(
        DynamicsError,
        match=r"No two runs differ in seed alone: 'b' and 'c' differ in size \(4 and 16\), too",
    ):
        dy.over(both, "seed")
    rest = both.sel(run=["b", "c"])
    assert dy.over(last(rest), ("seed", "size"))["count"].values.tolist() == [2]


def test_a_matrix_of_another_shape_is_another_setting():
    made = {label: recorded(i, {"seed": i}, rows=6 + i)[0] for i, label in enumerate("ab")}
    with pytest.raises(DynamicsError, match=r"differ in rows of layers.0.weight \(6 and 7\), too"):
        dy.over(dy.compare(made, kinds=["weight"]), "seed")


def test_a_single_seed_of_each_setting_has_a_mean_and_no_interval():
    both, norms = compare({"a": {"seed": 0, "lr": 1.0}, "b": {"seed": 0, "lr": 2.0}})
    both = both.assign_coords(seed=("run", [0, 0]))
    found = dy.over(last(both), "seed")
    np.testing.assert_allclose(found["mean"], norms)
    assert found["run"].values.tolist() == ["a", "b"]
    assert found["lower"].isnull().all()


@pytest.mark.parametrize(
    ("attrs", "said"),
    [
        ([{"seed": 0}, {"seed": 1}, {"seed": 1}], "'b' and 'c' both have seed=1, and no setting"),
        ([{"seed": 0}, {"seed": 1}, {}], "Run 'c' has no seed"),
        ([{"lr": 0}, {"lr": 1}, {"lr": 2}], "No setting 'seed' along run; known: lr"),
        ([{}, {}, {}], "No setting 'seed' along run; known: none"),
    ],
)
def test_runs_whose_seeds_are_not_known_are_refused(attrs, said):
    both, _ = compare(dict(zip("abc", attrs, strict=True)))
    with pytest.raises(DynamicsError, match=said):
        dy.over(both, "seed")


def test_one_analysis_is_no_comparison():
    with pytest.raises(DynamicsError, match="it has a dimension 'run'"):
        dy.over(dy.analyze(recorded(0, {})[0]), "seed")


# Paired differences -----------------------------------------------------------------------------


def test_paired_differences_are_seed_by_seed(swept):
    both, norms = swept
    shuffled = both.isel(run=[4, 0, 8, 2, 6, 1, 3, 7, 5])
    less = dy.difference(shuffled, baseline="0.1/1", pair="seed")
    assert less["run"].values.tolist() == ["0.2/1", "0.4/2", "0.4/0", "0.2/0", "0.4/1", "0.2/2"]
    norms = dict(zip(SWEEP, norms, strict=True))
    expected = [norms[run] - norms[f"0.1/{run[-1]}"] for run in less["run"].values.tolist()]
    np.testing.assert_allclose(last(less), expected, rtol=1e-12)
    assert less["seed"].values.tolist() == [1, 2, 0, 0, 1, 2]
    assert less["learning_rate"].values.tolist() == [0.2, 0.4, 0.4, 0.2, 0.4, 0.2]
    assert less["reference_step"].sel(kind="update", step=1).values.tolist() == [0] * 6
    by_setting = dy.difference(shuffled, baseline="learning_rate=0.1", pair="seed")
    np.testing.assert_array_equal(last(by_setting), last(less))


def test_the_mean_of_pairs_has_the_interval_of_the_paired_t_test(swept):
    both, norms = swept
    found = dy.over(last(dy.difference(both, baseline="0.1/0", pair="seed")), "seed")
    by_rate = norms.reshape(3, 3)
    for at, sample in enumerate(by_rate[1:]):
        test = scipy.stats.ttest_rel(sample, by_rate[0])
        interval = test.confidence_interval(0.95)
        numbers = [float(found[name][at]) for name in ("lower", "mean", "upper")]
        mean = (sample - by_rate[0]).mean()
        np.testing.assert_allclose(numbers, [interval.low, mean, interval.high], rtol=1e-9)


def test_runs_without_a_partner_are_named(swept):
    both = swept[0]
    with pytest.raises(DynamicsError, match=r"only 'learning_rate=0.1' has a run with seed=2; le"):
        dy.difference(both.drop_sel(run="0.4/2"), baseline="0.1/0", pair="seed")
    with pytest.raises(DynamicsError, match=r"only 'learning_rate=0.2' has a run with seed=1; le"):
        dy.difference(both.drop_sel(run="0.1/1"), baseline="0.1/0", pair="seed")
    with pytest.raises(MissingError, match=r"No run '0\.3' in this comparison"):
        dy.difference(both, baseline="0.3", pair="seed")
    with pytest.raises(DynamicsError, match="nothing to compare it with"):
        dy.difference(both.isel(run=[0, 1, 2]), baseline="0.1/0", pair="seed")
    with pytest.raises(MissingError, match="No setting 'lr' along run; known: seed, learning_rate"):
        dy.difference(both, baseline="0.1/0", pair="lr")


def test_a_difference_keeps_the_settings_of_its_runs(swept):
    less = dy.difference(swept[0], baseline="0.1/0")
    assert less["seed"].values.tolist() == [1, 2, 0, 1, 2, 0, 1, 2]
    assert less["learning_rate"].values.tolist() == [0.1] * 2 + [0.2] * 3 + [0.4] * 3
