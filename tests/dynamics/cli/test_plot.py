"""`dynamics plot`: pictures of saved results, and errors of one line."""

import shutil

import pytest

from tests.dynamics.cli.conftest import UP1

PNG = b"\x89PNG\r\n\x1a\n"


@pytest.mark.slow
@pytest.mark.parametrize(
    ("which", "options", "name"),
    [
        (0, [], "a.trajectory.effective_rank.weight.png"),
        (0, ["--style", "trajectory", "--by", "layer"], "a.trajectory.effective_rank.weight.png"),
        (0, ["--style", "heatmap", "--module", "up_proj"], "a.heatmap.effective_rank.weight.png"),
        (0, ["--style", "spectrum", "--matrix", UP1, "--kind", "update"],
         "a.spectrum.singular_value.update.png"),
        (1, ["--metric", "stable_rank"], "both.comparison.stable_rank.weight.png"),
        (1, ["--module", "q_proj"], "both.comparison.effective_rank.weight.png"),
        (1, ["--run", "b"], "both.trajectory.effective_rank.weight.png"),
        (1, ["--run", "b", "--style", "heatmap"], "both.heatmap.effective_rank.weight.png"),
        (0, ["--style", "spectra", "--matrix", UP1], "a.spectra.singular_value.weight.png"),
        (0, ["--style", "staircase", "--kind", "update"], "a.staircase.update.png"),
        (0, ["--style", "budget", "--by", "layer"], "a.budget.displacement.png"),
        (0, ["--style", "loss", "--x", "tokens"], "a.loss.effective_rank.weight.png"),
        (1, ["--style", "difference", "--baseline", "a"],
         "both.difference.effective_rank.weight.png"),
        (1, ["--style", "heatmap", "--panels", "run"], "both.heatmap.effective_rank.weight.png"),
        (1, ["--style", "trajectory", "--panels", "run", "--by", "layer"],
         "both.trajectory.effective_rank.weight.png"),
        (0, ["--style", "spectrum", "--matrix", UP1, "--steps", "0,20"],
         "a.spectrum.singular_value.weight.png"),
    ],
)  # fmt: skip
def test_each_style_writes_a_picture(command, saved, here, which, options, name):
    code, out, err = command("plot", saved[which], *options)
    assert (code, err) == (0, "")
    assert name in out
    assert [child.name for child in here.iterdir()] == [name]
    content = (here / name).read_bytes()
    assert content.startswith(PNG)
    assert len(content) > 5000


@pytest.mark.slow
def test_a_picture_has_the_size_that_is_asked_for_and_its_caption_is_printed(command, saved, here):
    from matplotlib.image import imread

    for options, width in (
        ([], 1020),
        (["--width", "page"], 2025),
        (["--width", "5", "--height", "2"], 1500),
        (["--slides"], 1500),
    ):
        code, out, _ = command("plot", saved[0], "-o", "figure.png", "--overwrite", *options)
        assert code == 0
        assert imread(here / "figure.png").shape[1] == width
    assert imread(here / "figure.png").shape[0] == 840  # 5.6 of 10 inches
    assert "Effective rank of the weight along optimizer steps." in " ".join(out.split())


@pytest.mark.parametrize(("suffix", "start"), [("pdf", b"%PDF"), ("svg", b"<?xml"), ("png", PNG)])
def test_the_suffix_chooses_the_format(command, saved, here, suffix, start):
    assert command("plot", saved[0], "-o", f"figure.{suffix}")[0] == 0
    assert (here / f"figure.{suffix}").read_bytes().startswith(start)


@pytest.mark.slow
def test_a_figure_that_exists_is_refused_and_left_alone(refused, command, saved, here):
    (here / "figure.png").write_bytes(b"mine")
    assert "figure.png exists" in refused("plot", saved[0], "-o", "figure.png")
    assert (here / "figure.png").read_bytes() == b"mine"
    assert command("plot", saved[0], "-o", "figure.png", "--overwrite")[0] == 0
    assert (here / "figure.png").read_bytes().startswith(PNG)


@pytest.mark.slow
def test_a_figure_that_cannot_be_written_is_one_line(refused, saved, here):
    (here / "directory.png").mkdir()
    for output in ("figure.gif.xyz", "missing/figure.png", "directory.png"):
        message = refused("plot", saved[0], "-o", output, "--overwrite")
        assert output in message
    assert [child.name for child in here.iterdir()] == ["directory.png"]


@pytest.mark.parametrize(
    ("which", "options", "message"),
    [
        (0, ["--metric", "er"], "No metric 'er' in this analysis; it has"),
        (0, ["--kind", "adapter"], "No kind 'adapter' in this analysis; it has weight,"),
        (0, ["--by", "head"], "No grouping 'head'; known: layer, module, matrix"),
        (0, ["--style", "spectrum"], "--style spectrum needs --matrix NAME"),
        (0, ["--style", "spectrum", "--matrix", "w"], "No measured weight of 'w'"),
        (0, ["--style", "heatmap", "--module", "x"], "No weight of a module 'x'"),
        (0, ["--style", "comparison"], "takes what compare() returns"),
        (0, ["--run", "a"], "No run 'a' in this result"),
        (1, ["--run", "c"], "No run 'c' in this result; it has a, b"),
        (1, ["--style", "heatmap"], "choose one of a, b"),
        (1, ["--module", "x"], "'x'"),
        (0, ["--x", "epoch"], "No 'epoch' to draw along in this result; it has step, tokens"),
        (0, ["--style", "spectra"], "--style spectra needs --matrix NAME"),
        (0, ["--style", "loss", "--metric", "er"], "No metric 'er'"),
        (1, ["--style", "difference"], "Give baseline (--baseline), one of a, b"),
        (1, ["--over", "seed"], "No setting 'seed' along run"),
        (0, ["--panels", "run"], "Panels by run are for several runs"),
        (0, ["--panels", "layers"], "did you mean 'layer'"),
        (0, ["--panels", "kind", "--kind", "weight"], "leave kind (--kind) out"),
        (0, ["--width", "colum"], "did you mean 'column'"),
        (0, ["--slides", "--width", "page"], "is a width of paper"),
        (0, ["--height", "0"], "height is 0"),
        (0, ["--style", "spectrum", "--matrix", UP1, "--steps", "0:10"], "--steps takes step num"),
        (0, ["--style", "spectrum", "--matrix", UP1, "--steps", "3"], "at step 3; steps: 0, 10"),
    ],
)
def test_what_a_result_does_not_have_cannot_be_drawn(refused, saved, here, which, options, message):
    assert message in refused("plot", saved[which], *options)
    assert list(here.iterdir()) == []


def test_only_saved_results_are_drawn(refused, recording, tmp_path):
    (tmp_path / "file").write_text("x")
    assert "is not an analysis" in refused("plot", recording)
    assert "does not exist" in refused("plot", tmp_path / "nowhere")
    assert "file" in refused("plot", tmp_path / "file")


@pytest.mark.parametrize("content", [None, "", "{", "[]", '{"zarr_format": 3}', "\0\1"])
def test_a_damaged_analysis_is_one_line(refused, saved, recording, tmp_path, content):
    damaged = shutil.copytree(saved[0], tmp_path / "damaged.zarr")
    if content is None:
        (damaged / "zarr.json").unlink()
    else:
        (damaged / "zarr.json").write_text(content)
    assert "damaged.zarr" in refused("plot", damaged)
    assert "damaged.zarr" in refused("compare", f"a={recording}", f"b={damaged}")
