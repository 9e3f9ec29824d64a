"""The times of a processor: how they are measured, kept, and interpolated."""

import json
from dataclasses import replace

import numpy as np
import pytest

from dynamics.spectra import calibration
from dynamics.spectra.calibration import Rates, load_rates, measure_rates

SIDES = calibration._SIDES
SLOW = Rates(0.0, 1e-9, 1e-9, tuple(1e-9 * side**3 for side in SIDES))
FAST = Rates(0.0, 1e-12, 1e-12, tuple(1e-12 * side**3 for side in SIDES))


@pytest.mark.parametrize("n", [10, 64, 100, 512, 700, 1024, 8192])
def test_the_time_of_eigenvalues_is_a_power_between_and_beyond_the_measured_sides(n):
    rates = Rates(0.0, 0.0, 0.0, tuple(3e-9 * side**2.5 for side in SIDES))
    of_eigenvalues = 3e-9 * max(n, 64) ** 2.5
    assert rates.seconds(n, 5 * n) == pytest.approx(of_eigenvalues)
    more = replace(rates, start=9.0, number=2.0, product=0.5)
    assert more.seconds(n, 5 * n) == more.seconds(5 * n, n)
    assert more.seconds(5 * n, n) == pytest.approx(
        9 + 2 * 5 * n**2 + 0.5 * 5 * n**3 + of_eigenvalues
    )


def test_rates_are_measured_once_and_kept(tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    calls = []

    def measure():
        calls.append(1)
        return SLOW

    for _ in range(2):
        assert load_rates("a", measure) == SLOW
    assert load_rates("b", lambda: FAST) == FAST
    assert (load_rates("a", measure), len(calls)) == (SLOW, 1)
    (file,) = (tmp_path / "cache").rglob("*.*")
    for damage in (
        "",
        "[1]",
        "null",
        json.dumps(dict.fromkeys(json.loads(file.read_text()), 3)),
        '{"a": {}}',
    ):
        file.write_text(damage)
        assert load_rates("a", measure) == SLOW
    assert len(calls) == 6
    (tmp_path / "file").touch()
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "file"))  # no directory
    assert load_rates("a", measure) == SLOW


def test_the_rates_of_this_machine_tell_its_times(tmp_path, monkeypatch):
    monkeypatch.setattr(calibration, "_SIDES", (32, 64, 128))
    same = (lambda x: x, np.isfinite, lambda x: x.T @ x, np.linalg.eigvalsh)
    rates = measure_rates(*same)
    assert 0 < rates.start < 1e-3
    assert 0 <= rates.number < 1e-6
    assert 0 <= rates.product < 1e-6
    assert 0 < rates.eigenvalues[0] < rates.eigenvalues[-1] < 1
