"""What is written to a disk is not written to a URL; and no folder "s3:" is made of one."""

from pathlib import Path

import pytest
from typer.testing import CliRunner

import dynamics as dy
from dynamics.analysis.cache import SpectrumCache
from dynamics.cli.app import app
from dynamics.errors import DynamicsError
from dynamics.exports.export import export
from dynamics.plots.figure_files import save_figure

RESULT = "s3://bucket/ranks.zarr"
WRITERS = {
    "save": lambda result, url: dy.save(result, url),
    "load": lambda result, url: dy.load(url),
    "report": lambda result, url: dy.report(result, url),
    "figure": lambda result, url: save_figure(result, Path(url), stem="x"),
    "cache": lambda result, url: SpectrumCache(url),
    **{
        f"export to {to}": lambda result, url, to=to: export(result, to, url)
        for to in ("csv", "parquet", "tensorboard", "wandb", "trackio")
    },
}


@pytest.fixture(scope="module")
def result():
    return dy.load_example("relora_micro").isel(run=[0, 3], step=[0, 1], matrix=[0, 1])


@pytest.mark.parametrize(
    "url", [RESULT, "gs://b/x", "hf://x/y", "https://x.org/y.csv", "file:///x"]
)
@pytest.mark.parametrize("write", WRITERS.values(), ids=WRITERS)
def test_a_url_is_refused(write, url, result, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(DynamicsError, match="is a URL; results, figures and caches lie on a disk"):
        write(result, url)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("name", ["ranks.zarr", "a:b.zarr", "C:/ranks.zarr", "with space/x.zarr"])
def test_names_with_colons_are_no_urls(name, result, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert dy.load(dy.save(result, name)).sizes == result.sizes


def test_the_command_line_says_it_in_one_line(result, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    dy.save(result, "ranks.zarr")
    done = CliRunner().invoke(app, ["plot", "ranks.zarr", "-o", "s3://bucket/figure.png"])
    assert str(done.exception).startswith("s3://bucket/figure.png is a URL")
    assert [each.name for each in tmp_path.iterdir()] == ["ranks.zarr"]
