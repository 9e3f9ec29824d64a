"""The same bytes behind s3:// and http:// as on a disk, from servers that run here."""

import asyncio
import shutil
import threading
import warnings

import numpy as np
import pytest
import xarray as xr

import dynamics as dy
from dynamics.errors import DynamicsError, FormatError

pytest.importorskip("s3fs", reason="needs the extra remote")
web = pytest.importorskip("aiohttp.web", reason="needs the extra remote")
torch = pytest.importorskip("torch")
peft = pytest.importorskip("peft")


@pytest.fixture(scope="module")
def web_server(tmp_path_factory):
    """(the folder it serves, its URL, the bytes that it has sent so far)."""
    folder = tmp_path_factory.mktemp("served")
    sent = [0]

    async def count(request, response):
        # fsspec asks whether a file exists by a GET that it breaks off; these have status 200.
        if response.status == 206:
            sent[0] += int(response.headers.get("Content-Length", 0))

    loop = asyncio.new_event_loop()

    async def start():
        app = web.Application()
        app.on_response_prepare.append(count)
        app.router.add_static("/", folder, show_index=True)
        runner = web.AppRunner(app)
        await runner.setup()
        await web.TCPSite(runner, "127.0.0.1", 0).start()
        return runner

    runner = loop.run_until_complete(start())
    thread = threading.Thread(target=loop.run_forever)
    thread.start()
    yield folder, f"http://127.0.0.1:{runner.addresses[0][1]}", sent
    asyncio.run_coroutine_threadsafe(runner.cleanup(), loop).result(10)
    loop.call_soon_threadsafe(loop.stop)
    thread.join(10)


def same_but_for_the_path(found, expected):
    for each in (found, expected):
        each.attrs.pop("source")
    xr.testing.assert_identical(found, expected)


def pickled(checkpoints, folder, tiny_llama):
    """The same run with pytorch_model.bin, one of them in the form before torch 1.6."""
    for position, step in enumerate((2, 4)):
        directory = folder / f"checkpoint-{step}"
        directory.mkdir(parents=True)
        torch.save(
            tiny_llama(position).state_dict(),
            directory / "pytorch_model.bin",
            _use_new_zipfile_serialization=step == 4,
        )
    return folder


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["safetensors", "sharded", "pickled", "peft", "recording"])
def test_a_run_on_s3_gives_what_it_gives_on_a_disk(
    s3, tiny_llama, llama_checkpoints, write_recording, tmp_path, kind
):
    local = tmp_path / f"{kind}.zarr"
    if kind == "safetensors":
        shutil.copytree(llama_checkpoints, local)
    elif kind == "sharded":
        for step in (1, 2):
            tiny_llama(step).save_pretrained(local / f"checkpoint-{step}", max_shard_size="8KB")
    elif kind == "pickled":
        pickled(llama_checkpoints, local, tiny_llama)
    elif kind == "peft":
        model = peft.get_peft_model(
            tiny_llama(0),
            peft.LoraConfig(r=4, target_modules=["q_proj"], init_lora_weights=False),
        )
        model.save_pretrained(local / "checkpoint-3")
        tiny_llama(0).save_pretrained(local / "base")
    else:
        write_recording(local)
    s3.put(str(local), f"bucket/{kind}.zarr", recursive=True)
    expected = dy.analyze(local)
    found = dy.analyze(f"s3://bucket/{kind}.zarr")
    assert (found["status"] == dy.schema.Status.MEASURED).any()
    same_but_for_the_path(found, expected)


@pytest.mark.slow
def test_a_run_on_a_web_server_gives_what_it_gives_on_a_disk(
    web_server, llama_checkpoints, write_recording
):
    folder, url, _ = web_server
    shutil.copytree(llama_checkpoints, folder / "run")
    write_recording(folder / "recorded.zarr")
    for name in ("run", "recorded.zarr"):
        same_but_for_the_path(dy.analyze(f"{url}/{name}/"), dy.analyze(folder / name))


@pytest.mark.slow
def test_of_a_large_remote_file_only_the_matrix_asked_for_is_fetched(web_server):
    folder, url, sent = web_server
    (folder / "large").mkdir()
    safetensors = pytest.importorskip("safetensors.torch")
    weights = {f"layers.{i}.up_proj.weight": torch.randn(256, 1024) for i in range(16)}  # 16 MiB
    safetensors.save_file(weights, folder / "large/model.safetensors")
    run = dy.open_run(f"{url}/large/")
    opening = sent[0]
    found = run.read("layers.3.up_proj.weight", 0, "weight")
    np.testing.assert_array_equal(found.values, weights["layers.3.up_proj.weight"].numpy())
    assert opening < 2**17
    assert sent[0] - opening == 2**20


@pytest.mark.slow
def test_a_checkpoint_that_arrives_later_is_seen(s3, tiny_llama, tmp_path):
    for step in (1, 2):
        tiny_llama(step).save_pretrained(tmp_path / f"checkpoint-{step}")
        s3.put(str(tmp_path / f"checkpoint-{step}"), f"bucket/grows/checkpoint-{step}", True)
        assert dy.open_run("s3://bucket/grows").steps[-1] == step


@pytest.mark.slow
def test_a_rewritten_remote_file_has_another_origin(s3, tiny_llama, tmp_path):
    origins = []
    for seed in (0, 0, 1):
        tiny_llama(seed).save_pretrained(tmp_path / "checkpoint-1")
        for name in ("config.json", "model.safetensors"):
            s3.put_file(
                str(tmp_path / "checkpoint-1" / name), f"bucket/rewritten/checkpoint-1/{name}"
            )
        run = dy.open_run("s3://bucket/rewritten")
        origins.append(run.origin("lm_head.weight", 1, "weight"))
    assert None not in origins
    assert origins[0] == origins[1] != origins[2]  # an ETag is a checksum: content, not time


@pytest.mark.slow
@pytest.mark.parametrize(
    ("url", "says"),
    [
        ("s3://bucket/nowhere", "does not exist"),
        ("s3://no-such-bucket/run", "does not exist"),
        ("http://127.0.0.1:9/run", "127.0.0.1:9/run"),
        ("ftq://host/run", "cannot be opened.*ftq"),
    ],
)
def test_a_url_that_gives_nothing_is_one_line(s3, url, says):
    with pytest.raises(FormatError, match=says) as caught:
        dy.open_run(url)
    assert "\n" not in str(caught.value)


@pytest.mark.slow
def test_a_server_that_refuses_is_one_line(s3, monkeypatch):
    import s3fs

    monkeypatch.setenv("AWS_ENDPOINT_URL", "http://127.0.0.1:9")
    s3fs.S3FileSystem.clear_instance_cache()
    with pytest.raises(FormatError, match="s3://bucket/run cannot be read") as caught:
        dy.open_run("s3://bucket/run")
    assert "\n" not in str(caught.value)
    s3fs.S3FileSystem.clear_instance_cache()


@pytest.mark.slow
def test_a_remote_file_cut_off_is_a_problem_of_its_checkpoint(s3, llama_checkpoints):
    s3.put(str(llama_checkpoints), "bucket/cut", recursive=True)
    path = "bucket/cut/checkpoint-4/model.safetensors"
    s3.pipe(path, s3.cat(path)[:-100])
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", dy.UnmeasuredWarning)
        analysis = dy.analyze("s3://bucket/cut", kinds=["weight"])
    assert (analysis["status"].sel(step=4) == dy.schema.Status.UNREADABLE).all()
    assert (analysis["status"].sel(step=2) == dy.schema.Status.MEASURED).all()
    assert "checkpoint-4/model.safetensors" in analysis.attrs["problems"]


def test_a_protocol_without_its_package_names_the_extra(monkeypatch):
    import fsspec

    fsspec.register_implementation("nopackage", "no_such_package.FileSystem", clobber=True)
    with pytest.raises(DynamicsError, match=r"pip install 'learning-dynamics\[remote\]'"):
        dy.open_run("nopackage://host/run")


@pytest.fixture
def requests(s3, monkeypatch):
    """The operations that are asked of S3, in order."""
    import s3fs

    asked, call = [], s3fs.S3FileSystem._call_s3

    async def noting(self, method, *arguments, **options):
        asked.append((method, options.get("Prefix") or options.get("Key")))
        return await call(self, method, *arguments, **options)

    monkeypatch.setattr(s3fs.S3FileSystem, "_call_s3", noting)
    return asked


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["model", "files", "nothing", "images", "nested", "two kinds"])
def test_detection_over_s3_asks_little(s3, requests, tmp_path, kind):
    from dynamics.formats import FORMATS
    from dynamics.formats.choice import detected_format
    from dynamics.formats.storage.files import located

    name = {
        "model": "step_{}/model.safetensors",
        "files": "step_{}.pt",
        "nothing": "step_{}/notes.txt",
        "images": "image_{}.png",
        "nested": "step_{}/hf/model.safetensors",
        "two kinds": "step_{}/model.safetensors",
    }[kind]
    s3.pipe({f"bucket/many_{kind}/" + name.format(i): b"x" for i in range(150)})
    if kind == "two kinds":
        s3.pipe({f"bucket/many_{kind}/step_{i}.pt": b"x" for i in (200, 201, 202)})
        s3.pipe({f"bucket/many_{kind}/model.safetensors": b"x"})
    s3.invalidate_cache()
    requests.clear()
    if kind in ("nothing", "images"):
        with pytest.raises(FormatError, match="holds no run of a known format"):
            dy.open_run(f"s3://bucket/many_{kind}")
    else:
        path = located(f"s3://bucket/many_{kind}")
        assert detected_format(path, FORMATS).name == (
            "files" if kind == "files" else "checkpoints"
        )
    assert len(requests) < 11, requests  # a listing of 10,000 entries takes nine more


@pytest.mark.slow
@pytest.mark.parametrize("naming", ["step_{}", "checkpoints/step_{}/hf"])
def test_steps_and_a_glob_are_found_over_s3(s3, requests, tmp_path, naming):
    safetensors = pytest.importorskip("safetensors.torch")
    top = f"bucket/{len(naming)}"
    for step in (10, 200):
        file = tmp_path / f"{step}.safetensors"
        safetensors.save_file({"layers.0.up_proj.weight": torch.full((4, 3), float(step))}, file)
        s3.put_file(str(file), f"{top}/{naming.format(step)}/model.safetensors")
    s3.invalidate_cache()
    requests.clear()
    run = dy.open_run(f"s3://{top}")
    assert run.steps.tolist() == [10, 200]
    assert len(requests) < 30
    assert (run.read("layers.0.up_proj.weight", 200, "weight").values == 200).all()
    assert dy.open_run(f"s3://{top}/{naming.format('*')}").steps.tolist() == [10, 200]
