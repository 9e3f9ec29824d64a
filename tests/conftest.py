"""What several test packages share."""

import logging
import os
import signal

import pytest
from filelock import FileLock

# In the background of a shell Ctrl-C is ignored, and so it is by the processes that tests start.
signal.signal(signal.SIGINT, signal.default_int_handler)


def pytest_collection_modifyitems(items):
    """Files with slow tests come first, so that no process is left alone with one at the end."""
    slow = {item.path for item in items if item.get_closest_marker("slow")}
    items.sort(key=lambda item: item.path not in slow)


@pytest.fixture(scope="session")
def short_demo(tmp_path_factory):
    """The demo's folder, from a run of seconds; see `short_config`. Made once for all processes."""
    from probes.relora.demo import run_demo
    from tests.short_run import TEXT, short_config

    base = tmp_path_factory.getbasetemp()
    folder = (base.parent if "PYTEST_XDIST_WORKER" in os.environ else base) / "demo"
    with FileLock(f"{folder}.lock"):
        if not (folder / "finished").exists():
            (folder / "text").mkdir(parents=True)
            (folder / "text/numbers.txt").write_text(TEXT)
            run_demo(folder / "out", short_config(), text=folder / "text")
            (folder / "finished").touch()
    return folder / "out"


@pytest.fixture(scope="session")
def runs_of_examples(tmp_path_factory):
    """The folder of the runs of `tests/example_runs.py`, to be copied."""
    pytest.importorskip("peft", reason="needs the extra relora")
    from tests import example_runs

    folder = tmp_path_factory.mktemp("examples")
    example_runs.make(folder)
    return folder


@pytest.fixture(scope="session")
def s3():
    """An fsspec file system of a bucket on a server of this machine."""
    s3fs = pytest.importorskip("s3fs", reason="needs the extra remote")
    moto_server = pytest.importorskip("moto.server", reason="needs moto, of the extra dev")
    with pytest.MonkeyPatch.context() as environment:
        for name in ("AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY"):
            environment.setenv(name, "testing")
        environment.setenv("AWS_DEFAULT_REGION", "us-east-1")
        logging.getLogger("werkzeug").disabled = True
        server = moto_server.ThreadedMotoServer(ip_address="127.0.0.1", port=0, verbose=False)
        server.start()
        host, port = server.get_host_and_port()
        environment.setenv("AWS_ENDPOINT_URL", f"http://{host}:{port}")
        s3fs.S3FileSystem.clear_instance_cache()
        files = s3fs.S3FileSystem()
        files.mkdir("bucket")
        yield files
        s3fs.S3FileSystem.clear_instance_cache()
        server.stop()
