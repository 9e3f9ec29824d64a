"""The command line, called in this process."""

import sys

import pytest

from dynamics.cli import app


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
