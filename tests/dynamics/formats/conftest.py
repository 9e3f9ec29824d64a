"""A hub to read from."""

import pytest

from tests.dynamics.formats.hub_server import serving


@pytest.fixture
def hub(monkeypatch, tmp_path):
    """A hub of the tests, and no other; nothing is kept yet."""
    reason = "needs the extra remote"
    constants = pytest.importorskip("huggingface_hub.constants", reason=reason)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    monkeypatch.delenv("HF_TOKEN", raising=False)
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "hf"))
    monkeypatch.setattr(constants, "HF_TOKEN_PATH", str(tmp_path / "no-token"))
    with serving() as server:
        monkeypatch.setenv("HF_ENDPOINT", server.url)  # for other processes
        monkeypatch.setattr(constants, "ENDPOINT", server.url)
        template = server.url + "/{repo_id}/resolve/{revision}/{filename}"
        monkeypatch.setattr(constants, "HUGGINGFACE_CO_URL_TEMPLATE", template)
        yield server
