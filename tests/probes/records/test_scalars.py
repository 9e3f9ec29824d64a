"""What can be logged is a single real number; all else is refused in the call, by name."""

import math
import warnings
from decimal import Decimal
from fractions import Fraction

import numpy as np
import pytest
import torch
import xarray as xr

import dynamics as dy
from dynamics.errors import DynamicsError
from probes import Recorder
from probes.records.step_records import LateValuesWarning
from tests.probes.training import build, train

FLOATS = [torch.float64, torch.float32, torch.float16, torch.bfloat16, torch.float8_e4m3fn]
NUMBERS = [
    *(2, 2.0, True, Fraction(5, 2), Decimal("2.5"), math.inf, -0.0, 2**60, 10**300),
    *(np.float32(2.5), np.float16(2.5), np.int8(2), np.bool_(True), np.array(2.5), np.array([[3]])),
    *(torch.tensor(2.5, dtype=dtype) for dtype in FLOATS),
    *(torch.tensor(2), torch.tensor(True), torch.tensor([2.5]), torch.tensor([[2.5]])),
    torch.tensor(2.5, requires_grad=True) * 1,
    torch.nn.Parameter(torch.tensor(2.5)),
    xr.DataArray(2.5),
]
REFUSED = [
    *(None, "x", "2.5", b"2", [], [2.5], (1, 2), {"a": 1}, {1}, object(), 2j, 10**400, lambda: 1),
    *(np.complex64(2), np.array([1, 2]), np.array([]), np.array("x"), np.str_("2.5"), np.array(2j)),
    *(np.datetime64("2020"), np.timedelta64(1), np.array([None]), Decimal("sNaN")),
    *(torch.tensor([1.0, 2.0]), torch.tensor([]), torch.tensor(2j), torch.ones((), device="meta")),
    torch.ones(1).to_sparse(),
]


@pytest.fixture
def recorder(tmp_path):
    model, optimizer = build()
    with Recorder(model, optimizer, tmp_path / "run.zarr", every=1) as recorder:
        recorder.advance = lambda: train(model, optimizer, recorder.step + 1, start=recorder.step)
        yield recorder


def scalars(recorder):
    recorder.close()
    return dy.open_run(recorder.store).scalars


def test_every_real_number_is_read_back(recorder):
    values = {f"value {index}": value for index, value in enumerate(NUMBERS)}
    recorder.log(**values)
    recorder.advance()
    found = scalars(recorder)
    for name, value in values.items():
        number = value.detach().double() if isinstance(value, torch.Tensor) else value
        assert found[name][1] == (number.item() if hasattr(number, "item") else number), name


@pytest.mark.parametrize("value", REFUSED, ids=lambda value: type(value).__name__)
@pytest.mark.parametrize("where", [None, 0])
def test_what_is_no_number_is_refused_in_the_call_by_name(recorder, value, where):
    with pytest.raises(DynamicsError, match=r"found my loss=") as caught:
        recorder.log(at=where, **{"my loss": value, "other": 1.0})
    assert "\n" not in str(caught.value)
    assert len(str(caught.value)) < 300
    recorder.log(loss=1.0)
    recorder.advance()
    assert set(scalars(recorder)) == {"loss", "learning_rate"}


def test_a_step_that_is_not_recorded_refuses_the_same(tmp_path):
    model, optimizer = build()
    with (
        Recorder(model, optimizer, tmp_path / "run.zarr", every=100) as recorder,
        pytest.raises(DynamicsError, match="loss=None"),
    ):
        recorder.log(loss=None)


def test_a_value_without_a_name_is_refused(recorder):
    with pytest.raises(DynamicsError, match="without a name"):
        recorder.log(**{"": 1.0})


def test_names_of_arguments_are_names_too(recorder):
    names = ["self", "kind", "step", "name", "value", "loss/ce", "loss", "scalars"]
    recorder.log(**dict.fromkeys(names, 2.0))
    recorder.event("merge", **dict.fromkeys(["name", "value", "step"], 2))
    recorder.advance()
    found = scalars(recorder)
    assert {name: found[name][1] for name in names} == dict.fromkeys(names, 2.0)


def test_values_are_those_of_the_call(recorder):
    array, tensor, listed = np.array(1.0), torch.tensor(1.0), [1]
    recorder.log(array=array, tensor=tensor)
    recorder.event("mine", listed=listed)
    array += 1
    tensor += 1
    listed.append(2)
    recorder.advance()
    found = scalars(recorder)
    assert (found["array"][1], found["tensor"][1]) == (1, 1)
    assert dy.open_run(recorder.store).events[0].attrs == {"listed": [1]}


@pytest.mark.parametrize("tokens", [-1, 1.5, math.nan, math.inf, "3", None, 2**63, [1], 1j])
def test_tokens_are_a_count(recorder, tokens):
    if tokens is None:
        recorder.log(tokens=None)
        return
    with pytest.raises(DynamicsError, match="log\\(\\)"):
        recorder.log(tokens=tokens)


@pytest.mark.parametrize("tokens", [0, 2**60 + 1, np.int64(7), torch.tensor(7), 7.0])
def test_counts_of_every_kind_are_taken(recorder, tokens):
    recorder.log(tokens=tokens)
    recorder.advance()
    assert scalars(recorder)["tokens"][1] == int(tokens)


@pytest.mark.parametrize("at", ["1", 1.5, True])
def test_a_step_is_a_whole_number(recorder, at):
    with pytest.raises(DynamicsError, match="takes at=STEP"):
        recorder.log(at=at, loss=1.0)
    with pytest.raises(DynamicsError, match="takes at=STEP"):
        recorder.event("merge", at=at)


def test_values_belong_to_the_next_step_or_to_the_last_one(tmp_path):
    model, optimizer = build()
    with Recorder(model, optimizer, tmp_path / "run.zarr", every=2) as recorder:
        recorder.log(at=0, a=0.0)
        for step in range(1, 5):
            recorder.log(b=step)
            recorder.log(at=step, c=step)
            train(model, optimizer, step, start=step - 1)
            recorder.log(at=step, a=step)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        found = dy.open_run(tmp_path / "run.zarr").scalars
    for name, expected in (("a", [0, 2, 4]), ("b", [np.nan, 2, 4]), ("c", [np.nan, 2, 4])):
        np.testing.assert_array_equal(found[name], expected)


def test_values_that_come_too_late_are_dropped_with_one_warning(recorder):
    recorder.advance()
    recorder.flush()
    with pytest.warns(LateValuesWarning, match="Values for step 1 were logged after step 1"):
        recorder.log(at=1, loss=1.0)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        recorder.log(at=0, loss=1.0)
    recorder.advance()
    assert "loss" not in scalars(recorder)


@pytest.mark.parametrize("kind", ["", None, 3])
def test_an_event_has_a_kind(recorder, kind):
    with pytest.raises(DynamicsError, match="takes a word"):
        recorder.event(kind)


@pytest.mark.parametrize("fact", [object(), {1, 2}, torch.ones(2), 2j, b"x", {(1, 2): 3}])
def test_a_fact_that_json_cannot_hold_is_refused_in_the_call(recorder, fact):
    with pytest.raises(DynamicsError, match="found my_fact="):
        recorder.event("merge", my_fact=fact)
    recorder.advance()
    recorder.close()
    assert dy.open_run(recorder.store).steps.tolist() == [0, 1]


def test_facts_of_numpy_and_torch_are_numbers(recorder):
    recorder.event(
        "merge", a=np.float32(0.5), b=np.int64(3), c=torch.tensor(0.5), d=[np.bool_(True)]
    )
    recorder.close()
    (event,) = dy.open_run(recorder.store).events
    assert event.attrs == {"a": 0.5, "b": 3, "c": 0.5, "d": [1]}


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs CUDA")
def test_the_number_of_a_gpu_tensor_is_read_without_waiting(tmp_path):
    model, optimizer = build()
    with Recorder(model, optimizer, tmp_path / "run.zarr", every=1) as recorder:
        stream = torch.cuda.Stream()
        with torch.cuda.stream(stream):
            value = torch.zeros((), device="cuda", dtype=torch.bfloat16)
            torch.cuda._sleep(2 * 10**9)  # about a second
            value += 2.5
            done = torch.cuda.Event()
            done.record()
            recorder.log(loss=value, tokens=torch.full((), 7, device="cuda"))
            assert not done.query()
            value += 1
        train(model, optimizer, 1)
    found = dy.open_run(tmp_path / "run.zarr").scalars
    assert (found["loss"][1], found["tokens"][1]) == (2.5, 7)
