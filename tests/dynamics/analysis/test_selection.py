"""Steps may be a text, as on the command line, wherever the library takes steps."""

import pytest
import xarray as xr

import dynamics as dy
from dynamics.analysis.selection import steps_so_far


@pytest.fixture
def run(write_recording, tmp_path):
    return dy.open_run(write_recording(tmp_path / "run.zarr", steps=(0, 10, 20, 30)))


@pytest.mark.parametrize(
    ("text", "steps"),
    [("10", [10]), ("0,20:", [0, 20, 30]), (":15", [0, 10]), (" 30 , 5:12", [10, 30])],
)
def test_a_text_of_steps_selects_what_the_steps_do(run, text, steps):
    xr.testing.assert_identical(
        dy.analyze(run, steps=text, kinds=["weight"]),
        dy.analyze(run, steps=steps, kinds=["weight"]),
    )


def test_of_a_run_in_progress_only_the_steps_so_far_are_taken(run):
    assert steps_so_far(run, "20,40,25:") == [20, 30]
    assert steps_so_far(run, [20, 40]) == [20]
    assert steps_so_far(run, None) is None


def test_a_run_in_progress_is_followed_by_its_path(run):
    results = dy.follow(run.path, stopped=lambda: False, steps="20:", kinds=["weight"])
    assert next(results)["step"].values.tolist() == [20, 30]
