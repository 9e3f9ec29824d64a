"""The command line, called in this process, and what it is called with."""

import sys

import numpy as np
import pytest

import dynamics as dy
from dynamics.cli import app

UP1 = "model.layers.1.mlp.up_proj.weight"


@pytest.fixture
def here(tmp_path, monkeypatch):
    """An empty working directory: outputs without -o go there."""
    (tmp_path / "work").mkdir()
    monkeypatch.chdir(tmp_path / "work")
    return tmp_path / "work"


@pytest.fixture
def command(here, monkeypatch, capfd):
    """command(*arguments): (exit code, stdout, stderr) of `dynamics`, in this process."""
    monkeypatch.setenv("COLUMNS", "160")

    def call(*arguments):
        monkeypatch.setattr(sys, "argv", ["dynamics", *map(str, arguments)])
        capfd.readouterr()
        code = 0
        try:
            app.main()
        except SystemExit as ended:
            code = 0 if ended.code is None else ended.code
        out, err = capfd.readouterr()
        return code, out, err

    return call


@pytest.fixture
def refused(command):
    """refused(*arguments): the error's text, having checked that it is one line and exit code 2."""

    def call(*arguments):
        code, out, err = command(*arguments)
        assert code == 2, err
        assert out == ""
        lines = err.splitlines()
        assert len(lines) == 1, err
        assert lines[0].startswith("error: ")
        assert "Traceback" not in err
        return lines[0]

    return call


@pytest.fixture
def recording(write_recording, tmp_path):
    return write_recording(tmp_path / "run.zarr", merges=(10,))


@pytest.fixture
def other(write_recording, tmp_path):
    return write_recording(tmp_path / "other.zarr", seed=1, steps=(0, 20))


@pytest.fixture
def with_nan(write_recording, tmp_path):
    def spoil(step, name, weight):
        if step == 10 and name == UP1:
            weight[0, 0] = np.nan

    return write_recording(tmp_path / "nan.zarr", spoil=spoil)


@pytest.fixture(scope="module")
def saved(write_recording, tmp_path_factory):
    """(an analysis, a comparison), saved."""
    directory = tmp_path_factory.mktemp("saved")
    a = dy.analyze(write_recording(directory / "a.zarr", merges=(10,)))
    b = dy.analyze(write_recording(directory / "b.zarr", seed=1))
    return (
        dy.save(a, directory / "a.analysis.zarr"),
        dy.save(dy.compare({"a": a, "b": b}), directory / "both.zarr"),
    )


def made_by_command(dataset):
    """A saved result without the command line in it, which must be there."""
    assert dataset.attrs["command"].startswith("dynamics ")
    return dataset.drop_attrs(deep=False).assign_attrs(
        {name: each for name, each in dataset.attrs.items() if name not in ("command", "made")}
    )
