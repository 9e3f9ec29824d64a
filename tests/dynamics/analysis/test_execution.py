"""How an analysis is carried out is one value, or keyword arguments that mean the same."""

from dataclasses import FrozenInstanceError, fields

import pytest
import xarray as xr

import dynamics as dy
from dynamics.analysis.execution import Execution, ExecutionOptions


@pytest.fixture
def recording(write_recording, tmp_path):
    return write_recording(tmp_path / "run.zarr", steps=(0, 10))


def test_every_field_is_a_keyword_argument():
    assert list(ExecutionOptions.__annotations__) == [field.name for field in fields(Execution)]


def test_keyword_arguments_mean_the_same_as_the_value(recording, tmp_path):
    by_value = dy.analyze(recording, execution=Execution(cache=tmp_path / "value.cache"))
    by_keyword = dy.analyze(recording, cache=tmp_path / "keyword.cache")
    xr.testing.assert_identical(by_value, by_keyword)
    assert (tmp_path / "value.cache").is_file()
    assert (tmp_path / "keyword.cache").is_file()


def test_a_keyword_argument_changes_one_field_of_the_value(recording, tmp_path):
    execution = Execution(cache=tmp_path / "a.cache")
    dy.compare({"a": recording, "b": recording}, execution=execution, cache=tmp_path / "b.cache")
    assert [path.name for path in tmp_path.glob("*.cache")] == ["b.cache"]
    with pytest.raises(FrozenInstanceError):
        execution.cache = None


@pytest.mark.parametrize(
    ("options", "message"),
    [({"workers": 0}, "workers is 0; at least 1"), ({"device": "tpu"}, "device 'tpu'")],
)
def test_impossible_values_are_refused_before_the_work(recording, options, message):
    with pytest.raises(dy.DynamicsError, match=message):
        dy.analyze(recording, **options)


@pytest.mark.parametrize("function", [dy.analyze, dy.compare])
def test_an_unknown_option_is_named(recording, function):
    runs = recording if function is dy.analyze else {"a": recording, "b": recording}
    with pytest.raises(TypeError, match="no option 'worker'"):
        function(runs, worker=2)
