"""`dynamics export`: a saved result as a file."""

import pandas as pd
import pytest

import dynamics as dy


@pytest.fixture(scope="module")
def saved(write_recording, tmp_path_factory):
    folder = tmp_path_factory.mktemp("saved")
    analysis = dy.analyze(write_recording(folder / "run.zarr"), kinds=["weight", "update"])
    return dy.save(analysis, folder / "run.analysis.zarr")


def test_a_file_is_named_after_the_result_and_holds_its_table(command, saved, here):
    code, out, err = command("export", saved, "--to", "csv")
    assert (code, out, err) == (0, "Saved to run.csv\n", "")
    read, expected = pd.read_csv("run.csv"), dy.to_frame(dy.load(saved))
    assert read.columns.tolist() == expected.columns.tolist()
    assert read["effective_rank"].tolist() == expected["effective_rank"].tolist()


def test_it_takes_every_choice(command, saved, here):
    code, _, err = command(
        "export", saved, "--to", "json", "-o", "x/y.json", "--spectra", "--metrics",
        "stable_rank, effective_rank", "--kinds", "update",
    )  # fmt: skip
    assert (code, err) == (0, "")
    read = pd.read_json("x/y.json", orient="table")
    assert set(read["kind"]) == {"update"}
    assert "spectral_norm" not in read
    assert read["singular_value"].map(len).min() == 8


def test_what_cannot_be_is_one_line(refused, command, saved, here, tmp_path):
    assert "does not exist" in refused("export", tmp_path / "nowhere", "--to", "csv")
    assert "No metric 'er'" in refused("export", saved, "--to", "csv", "--metrics", "er")
    assert "--spectra is for files" in refused("export", saved, "--to", "wandb", "--spectra")
    (here / "run.csv").write_text("mine")
    assert "run.csv exists" in refused("export", saved, "--to", "csv")
    assert command("export", saved, "--to", "csv", "--overwrite")[0] == 0
    code, _, err = command("export", saved, "--to", "xlsx")
    assert code == 2
    assert "xlsx" in err
