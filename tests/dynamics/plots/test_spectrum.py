"""Singular values of one matrix at several steps."""

import numpy as np
import pytest
from zarr.storage import MemoryStore

import dynamics as dy
from dynamics.plots import plot_spectrum
from tests.dynamics.plots.drawn import (
    STEPS,
    UP_0,
    dashed_levels,
    labelled_lines,
)


def test_a_spectrum_is_one_line_per_step_with_the_last_noise_floor(analysis):
    ax = plot_spectrum(analysis, UP_0)
    lines = labelled_lines(ax)
    assert list(lines) == ["step 0", "step 10", "step 20", "noise floor"]
    s = analysis["singular_value"].sel(kind="weight", matrix=UP_0)
    for step in STEPS:
        np.testing.assert_array_equal(lines[f"step {step}"][0], np.arange(1, 9))
        np.testing.assert_array_equal(lines[f"step {step}"][1], s.sel(step=step))
    floor = float(analysis["noise_floor"].sel(kind="weight", matrix=UP_0, step=20))
    assert floor > 0
    assert dashed_levels(ax) == [floor]
    assert ax.get_yscale() == "log"


def test_a_spectrum_shows_the_steps_asked_for(analysis):
    ax = plot_spectrum(analysis, UP_0, kind="update", steps=[10])
    assert list(labelled_lines(ax)) == ["step 10", "noise floor"]
    floor = float(analysis["noise_floor"].sel(kind="update", matrix=UP_0, step=10))
    assert dashed_levels(ax) == [floor]


@pytest.mark.slow
def test_a_spectrum_shows_six_steps_at_most_and_the_ends_among_them(write_recording):
    run = write_recording(MemoryStore(), steps=range(20), shapes={"a": (3, 3)})
    lines = list(labelled_lines(plot_spectrum(dy.analyze(run), "a")))[:-1]
    assert len(lines) == 6
    assert (lines[0], lines[-1]) == ("step 0", "step 19")


def test_exact_zeros_of_a_spectrum_are_left_out(adapter_analysis):
    lines = labelled_lines(plot_spectrum(adapter_analysis, UP_0, kind="adapter"))
    assert np.isfinite(lines["step 5"][1]).tolist() == [True] * 2 + [False] * 6
