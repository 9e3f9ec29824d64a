"""Every notebook runs from top to bottom, alone in a folder."""

import re
from pathlib import Path

import nbclient
import nbformat
import pytest

NOTEBOOKS = sorted((Path(__file__).parents[1] / "notebooks").glob("*.ipynb"))


@pytest.fixture
def hub(tmp_path_factory, monkeypatch):
    """A server instead of the hub, with a history of the name that the notebook has."""
    pytest.importorskip("huggingface_hub", reason="needs the extra remote")
    from tests.dynamics.formats import hub_server, test_hub

    folder = tmp_path_factory.mktemp("hub")
    with hub_server.serving() as server:
        monkeypatch.setenv("HF_ENDPOINT", server.url)
        monkeypatch.setenv("HF_HOME", str(folder / "hf"))
        monkeypatch.setenv("XDG_CACHE_HOME", str(folder / "cache"))
        test_hub.history(server, folder, steps=(0, 1, 8, 64, 512), name="EleutherAI/pythia-14m")
        yield


@pytest.mark.slow
@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)
def test_a_notebook_runs_and_draws(path, tmp_path, request):
    if "hub" in path.stem:
        request.getfixturevalue("hub")
    notebook = nbformat.read(path, as_version=4)
    client = nbclient.NotebookClient(
        notebook, timeout=300, resources={"metadata": {"path": str(tmp_path)}}
    )
    client.execute()
    outputs = [output for cell in notebook.cells for output in cell.get("outputs", [])]
    assert any("image/png" in output.get("data", {}) for output in outputs)
    errors = "".join(each["text"] for each in outputs if each.get("name") == "stderr")
    # huggingface_hub would rather have widgets for its progress.
    known = r"^(Recorder: records .*|.*TqdmWarning.*|.*import tqdm as notebook_tqdm)\n"
    assert re.sub(known, "", errors, flags=re.MULTILINE) == ""
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)
def test_a_notebook_is_committed_without_outputs(path):
    cells = nbformat.read(path, as_version=4).cells
    assert all(not cell.outputs for cell in cells if cell.cell_type == "code")
