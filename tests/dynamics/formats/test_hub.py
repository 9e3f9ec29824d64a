"""Histories on the hub: a server that speaks its interface, through the real huggingface_hub."""

import io
import json
import re
import shlex
import shutil
import sqlite3
import time
from contextlib import closing
from pathlib import Path

import numpy as np
import pytest
import xarray as xr

import dynamics as dy
from dynamics.errors import DynamicsError, FormatError, MissingError
from dynamics.formats.hub.cost import Cost
from tests.dynamics.formats.hub_server import TOKEN

constants = pytest.importorskip("huggingface_hub.constants", reason="needs the extra remote")
torch = pytest.importorskip("torch")
safetensors = pytest.importorskip("safetensors.torch")

pytestmark = pytest.mark.slow
STEPS = (0, 1, 1000, 143000)
NAMES = [f"gpt_neox.layers.{i}.attention.dense.weight" for i in range(3)]


def state(step, size=300):
    """Three matrices of 300 x 300 that are measured, and four times as many bytes besides."""
    generator = torch.Generator().manual_seed(step)
    tensors = {name: torch.randn(size, size, generator=generator) for name in NAMES}
    tensors["gpt_neox.embed_in.weight"] = torch.randn(4 * size, size, generator=generator)
    tensors |= {name.replace("weight", "bias"): torch.randn(size) for name in NAMES}
    return tensors


def write(folder, tensors, kind):
    folder.mkdir(parents=True)
    if kind == "bin":
        torch.save(tensors, folder / "pytorch_model.bin")
    elif kind == "safetensors":
        safetensors.save_file(tensors, folder / "model.safetensors")
    else:
        names = sorted(tensors)
        parts = {"model-00001-of-00002.safetensors": names[:4]}
        parts["model-00002-of-00002.safetensors"] = names[4:]
        for file, held in parts.items():
            safetensors.save_file({name: tensors[name] for name in held}, folder / file)
        index = {name: file for file, held in parts.items() for name in held}
        (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": index}))
    (folder / "config.json").write_text('{"model_type": "gpt_neox"}')
    return folder


def history(hub, tmp_path, kind="safetensors", naming="step{}", steps=STEPS, name="org/pythia"):
    """The same history on the hub, and on the disk."""
    local = tmp_path / "local"
    repo = hub.repo(name)
    for step in steps:
        folder = write(local / f"step{step}", state(step), kind)
        repo.push(folder, naming.format(step))
    repo.push(local / f"step{steps[-1]}", "main")
    return local


def same(found, expected):
    for each in (found, expected):
        for name in ("source", "passed_over"):
            each.attrs.pop(name)
    xr.testing.assert_identical(found, expected)


@pytest.mark.parametrize("kind", ["safetensors", "bin", "sharded"])
def test_branches_give_what_the_files_give_and_cost_what_the_selection_holds(hub, tmp_path, kind):
    local = history(hub, tmp_path, kind)
    expected = dy.analyze(local, select=NAMES)
    run = dy.open_run("hf://org/pythia")
    opened = len(hub.requests)
    hub.clear()
    found = dy.analyze(run, select=NAMES)
    same(found, expected)
    selected = len(STEPS) * len(NAMES) * 300 * 300 * 4
    assert 0.9 * selected <= hub.fetched <= 1.02 * selected  # a part of them lies in a header
    files = len(STEPS) * (2 if kind == "sharded" else 1)
    # refs; a tree, of main too; per file its address and header, of a .bin its end; two or three
    # files of JSON, the same everywhere.
    assert opened <= 1 + len(STEPS) + 1 + files * (3 if kind == "bin" else 2) + 3
    assert run.places[1000].startswith("hf://org/pythia@")


@pytest.mark.parametrize("named", [False, True])
def test_adapters_find_their_base_on_the_hub(hub, tiny_llama, tmp_path, named):
    peft = pytest.importorskip("peft")
    tiny_llama(0).save_pretrained(tmp_path / "base")
    for step in (10, 20):
        model = tiny_llama(0)
        model.name_or_path = "org/base"
        config = peft.LoraConfig(r=4, target_modules=["q_proj"], init_lora_weights=False)
        torch.manual_seed(step)
        peft.get_peft_model(model, config).save_pretrained(tmp_path / f"local/checkpoint-{step}")
        hub.repo("org/adapter").push(tmp_path / f"local/checkpoint-{step}", f"step{step}")
    hub.repo("org/base" if named else "org/other").push(tmp_path / "base")
    expected = dy.analyze(dy.open_run(tmp_path / "local", base=tmp_path / "base"))
    given = None if named else "hf://org/other"
    run = dy.open_run("hf://org/adapter", base=given)
    found = dy.analyze(run)
    assert "base" in found["kind"]
    same(found, expected)


def test_an_adapter_without_its_base_is_measured_alone(hub, tiny_llama, tmp_path):
    peft = pytest.importorskip("peft")
    model = tiny_llama(0)
    model.name_or_path = "org/gone"
    peft.get_peft_model(model, peft.LoraConfig(target_modules=["q_proj"])).save_pretrained(
        tmp_path / "adapter"
    )
    hub.repo("org/adapter").push(tmp_path / "adapter", "main")
    run = dy.open_run("hf://org/adapter")
    assert run.stored_kinds == ("adapter",)
    assert "'org/gone' cannot be read on the hub" in run.absent_kinds["weight"]


def test_stages_that_count_anew_are_shown_and_one_is_chosen(hub, tmp_path):
    local = tmp_path / "local"
    repo = hub.repo("org/olmo")
    for stage in ("stage1", "stage2-ingredient1", "stage2-ingredient2"):
        for step in (0, 1000):
            tensors = state(hash_of(stage) + step, 20)
            folder = write(local / stage / f"step{step}", tensors, "safetensors")
            repo.push(folder, f"{stage}-step{step}-tokens{step // 200}B")
    repo.push(folder, "main")
    with pytest.raises(FormatError, match="each count their own steps") as caught:
        dy.open_run("hf://org/olmo")
    text = str(caught.value)
    assert "'stage1-step*' (2 revisions, steps 0 to 1000)" in text
    assert "'stage2-ingredient2-step*' (2 revisions, steps 0 to 1000)" in text
    assert "\n" not in text
    expected = dy.analyze(local / "stage2-ingredient1")
    same(dy.analyze(dy.open_run("hf://org/olmo", revisions="stage2-ingredient1-*")), expected)
    same(dy.analyze("hf://org/olmo@stage2-ingredient1-*"), dy.analyze(local / "stage2-ingredient1"))
    with pytest.raises(FormatError, match=r"tag or commit 'stage1'.* it has stage1-step0"):
        dy.open_run("hf://org/olmo@stage1")
    with pytest.raises(MissingError, match=r"no branch or tag 'stage3\*'"):
        dy.open_run("hf://org/olmo", revisions="stage3*")


def hash_of(text):
    return sum(map(ord, text))


def test_stages_that_count_on_are_one_run(hub, tmp_path):
    repo = hub.repo("org/counts-on")
    for name in ("stage1-step0", "stage1-step100", "stage2-step200"):
        repo.push(write(tmp_path / name, state(hash_of(name), 20), "safetensors"), name)
    assert dy.open_run("hf://org/counts-on").steps.tolist() == [0, 100, 200]


NAMED = ("alpha_2k", "alpha_10k", "beta_2k", "beta_10k")


@pytest.mark.parametrize(
    ("revisions", "pattern"),
    [(None, r"beta_(\d+k)"), ("beta*", r"_(\d+k)$"), (None, r"(?P<run>beta)_(?P<step>.*)")],
)
def test_a_pattern_finds_the_steps_that_are_not_read_otherwise(hub, tmp_path, revisions, pattern):
    repo = hub.repo("org/named")
    for name in NAMED:
        run, _, step = name.partition("_")
        folder = write(tmp_path / run / f"step{step}", state(hash_of(name), 20), "safetensors")
        repo.push(folder, name)
    run = dy.open_run("hf://org/named", revisions=revisions, ref_pattern=pattern)
    assert run.steps.tolist() == [2000, 10000]
    same(dy.analyze(run), dy.analyze(tmp_path / "beta"))


def test_a_pattern_that_does_not_fit_is_one_line(hub, tmp_path):
    repo = hub.repo("org/named")
    for name in NAMED:
        repo.push(write(tmp_path / name, state(hash_of(name), 20), "safetensors"), name)
    for pattern, error, said in (
        ("(", DynamicsError, "that is no regular expression"),
        ("alpha", DynamicsError, "it has no group; put the step in one"),
        (r"gamma_(\d+)", MissingError, "finds no step in the names alpha_2k, alpha_10k"),
        ("(alpha)", MissingError, "finds no step in the names alpha_2k, alpha_10k"),
        (r"_(\d+k)", FormatError, "alpha_2k and beta_2k, both of step 2000; choose"),
    ):
        with pytest.raises(error, match=said) as caught:
            dy.open_run("hf://org/named", ref_pattern=pattern)
        assert "\n" not in str(caught.value)
    with pytest.raises(DynamicsError, match="--ref-pattern"):
        dy.open_run(tmp_path, ref_pattern="(1)")


def test_two_revisions_of_one_step_are_both_named(hub, tmp_path):
    repo = hub.repo("org/twice")
    for name in ("step5-tokens1B", "step5-tokens2B", "step6-tokens2B"):
        repo.push(write(tmp_path / name, state(hash_of(name), 20), "safetensors"), name)
    with pytest.raises(FormatError, match="step5-tokens1B and step5-tokens2B, both of step 5"):
        dy.open_run("hf://org/twice")


def test_commits_whose_titles_name_steps_are_the_steps(hub, tmp_path):
    local = tmp_path / "local"
    repo = hub.repo("org/pico")
    for step in (0, 50, 100):
        folder = write(local / f"step_{step}", state(step, 20), "safetensors")
        repo.push(folder, title=f"Saving HF Model -- Step {step}")
        repo.push(folder, title=f"Saving Fabric State -- Step {step}", inside="fabric/")
    repo.push(folder, title="Update 3 files", inside="notes/")
    run = dy.open_run("hf://org/pico")
    assert run.steps.tolist() == [0, 50, 100]
    same(dy.analyze(run), dy.analyze(local))
    # The state of a step is the last commit that names it.
    assert run.places[50].endswith(repo.titles[3][0])


def test_folders_are_the_steps(hub, tmp_path):
    local = tmp_path / "local"
    for step in (10, 20):
        write(local / f"checkpoints/step_{step}", state(step, 20), "safetensors")
    hub.repo("org/folders").push(local)
    hub.repo("org/inside").push(local, inside="runs/a/")
    same(dy.analyze("hf://org/folders"), dy.analyze(local))
    same(dy.analyze("hf://org/inside/runs/a"), dy.analyze(local))
    same(dy.analyze("hf://org/inside@main/runs/a/checkpoints/step_*"), dy.analyze(local))
    assert dy.open_run("hf://org/folders/checkpoints/step_20").steps.tolist() == [20]


def test_a_folder_of_each_revision(hub, tmp_path):
    local = history(hub, tmp_path, steps=(1, 2), name="org/plain")
    repo = hub.repo("org/deep")
    for step in (1, 2):
        repo.push(local / f"step{step}", f"step{step}", inside="model/hf/")
    same(dy.analyze("hf://org/deep@step*/model/hf"), dy.analyze(local))


def test_a_name_without_a_path_is_a_model_on_the_hub(hub, tmp_path, monkeypatch):
    local = history(hub, tmp_path, steps=(1, 2))
    monkeypatch.chdir(tmp_path)
    same(dy.analyze("org/pythia"), dy.analyze(local))
    hub.clear()
    with pytest.raises(FormatError, match=r"org/pithia does not exist here, and .* no model of"):
        dy.open_run("org/pithia")
    (tmp_path / "org").mkdir()
    with pytest.raises(FormatError, match=r"org/pythia does not exist\."):
        dy.open_run("org/pythia")
    assert len(hub.requests) == len(hub.asked("refs")) == 1
    with pytest.raises(DynamicsError, match="--revisions"):
        dy.open_run(local, revisions="step*")


def test_what_was_measured_is_not_fetched_again(hub, tmp_path):
    history(hub, tmp_path)
    hub.repo("org/pythia").tags["step7"] = hub.repo("org/pythia").branches["step1000"]
    cache = tmp_path / "ranks.cache"
    dy.analyze("hf://org/pythia", cache=cache, select=NAMES, kinds=["weight"])
    distinct = len(STEPS) * len(NAMES) * 300 * 300 * 4
    assert hub.fetched <= 1.02 * distinct + len(STEPS) * 2**16  # step7 is step1000
    hub.clear()
    dy.analyze("hf://org/pythia", cache=cache, select=NAMES, kinds=["weight"])
    assert [each.path.split("?")[0] for each in hub.requests] == ["/api/models/org/pythia/refs"]


@pytest.mark.parametrize("after", [1, 2, 5, 7])
def test_interrupted_anywhere_it_goes_on_from_there(hub, tmp_path, monkeypatch, after):
    from dynamics.formats.storage.hub import repository, transport

    monkeypatch.setattr(repository, "_MOST_MERGED", 0)  # a request for each tensor
    monkeypatch.setattr(transport, "_WAITS", ())
    history(hub, tmp_path)
    cache = tmp_path / "ranks.cache"
    choice = {"select": NAMES, "kinds": ["weight"], "cache": cache}
    run = dy.open_run("hf://org/pythia")
    hub.clear()
    hub.fails = lambda server, path: (404, {}) if len(hub.requests) > after else None
    with pytest.raises(FormatError):
        dy.analyze(run, strict=True, **choice)
    run.source._pool.shutdown()  # what was under way is over
    hub.fails = lambda server, path: None
    with closing(sqlite3.connect(cache)) as database:
        (measured,) = database.execute("SELECT count(*) FROM spectra").fetchone()
    assert measured < len(STEPS) * len(NAMES)
    hub.clear()
    found = dy.analyze("hf://org/pythia", **choice)
    left = len(STEPS) * len(NAMES) - measured
    assert len(hub.asked("blob", "cdn")) == left
    assert hub.fetched <= left * 300 * 300 * 4
    same(found, dy.analyze(tmp_path / "local", select=NAMES, kinds=["weight"]))


@pytest.mark.parametrize("status", [429, 500, 503])
def test_a_busy_server_is_asked_again(hub, tmp_path, status, monkeypatch):
    local = history(hub, tmp_path, steps=(1, 2))
    seen = set()

    def fails(server, path):
        key = (server, path.split("?")[0])
        if key in seen:
            return None
        seen.add(key)
        return status, {"Retry-After": "0"}

    hub.fails = fails
    same(dy.analyze("hf://org/pythia"), dy.analyze(local))
    assert {each.status for each in hub.requests} >= {status}


def test_signed_addresses_that_expire_and_answers_that_break_off(hub, tmp_path, monkeypatch):
    from dynamics.formats.storage.hub import transport

    monkeypatch.setattr(transport, "_WAITS", (0.01,) * 5)
    local = history(hub, tmp_path, steps=(1, 2))
    hub.lifetime = 2
    cut = iter([True, False, True])
    hub.cut = lambda path: next(cut, False)
    same(dy.analyze("hf://org/pythia"), dy.analyze(local))
    assert 403 in {each.status for each in hub.requests}


def test_a_server_without_ranges_is_one_line_and_nothing_is_downloaded(hub, tmp_path):
    history(hub, tmp_path, steps=(1, 2))
    hub.ranges = False
    with pytest.raises(FormatError, match="gives no byte ranges") as caught:
        dy.open_run("hf://org/pythia")
    assert "\n" not in str(caught.value)


def test_a_branch_that_moves_while_it_is_read_stays_at_its_commit(hub, tmp_path):
    local = history(hub, tmp_path, steps=(1, 2))
    cache = tmp_path / "ranks.cache"
    run = dy.open_run("hf://org/pythia")
    moved = write(tmp_path / "moved", state(99), "safetensors")
    hub.repo("org/pythia").push(moved, "step2")
    same(dy.analyze(run, cache=cache), dy.analyze(local))
    shutil.copy(moved / "model.safetensors", local / "step2")
    same(dy.analyze("hf://org/pythia", cache=cache), dy.analyze(local))


def test_the_token_stays_at_the_hub_and_out_of_messages(hub, tmp_path, monkeypatch, caplog):
    history(hub, tmp_path, steps=(1, 2))
    hub.repo("org/pythia").gated = True
    with pytest.raises(FormatError, match="is gated; accept its conditions at http") as caught:
        dy.open_run("hf://org/pythia")
    hub.repo("org/pythia").private = True
    with pytest.raises(FormatError, match="no model of that name, or it is private"):
        dy.open_run("hf://org/pythia")
    monkeypatch.setenv("HF_TOKEN", TOKEN)
    hub.clear()
    found = dy.analyze("hf://org/pythia")
    assert {each.authorization for each in hub.requests if each.server == "cdn"} == {None}
    assert TOKEN not in str(found.attrs) + str(caught.value) + caplog.text
    assert "Signature" not in str(found.attrs) + caplog.text
    kept = b"".join(each.read_bytes() for each in (tmp_path / "cache").rglob("*") if each.is_file())
    assert TOKEN.encode() not in kept
    assert b"Signature" not in kept


def test_offline_and_without_network_it_is_one_line(hub, tmp_path, monkeypatch):
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    with pytest.raises(FormatError, match="HF_HUB_OFFLINE is set"):
        dy.open_run("hf://org/pythia")
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    monkeypatch.setattr(constants, "ENDPOINT", "http://127.0.0.1:9")
    with pytest.raises(FormatError, match=r"http://127.0.0.1:9 does not answer") as caught:
        dy.open_run("hf://org/pythia")
    assert "\n" not in str(caught.value)


def test_offline_what_was_downloaded_is_read(hub, tmp_path, monkeypatch):
    local = history(hub, tmp_path, steps=(1, 2))
    for step in (1, 2):
        huggingface_hub = pytest.importorskip("huggingface_hub")
        huggingface_hub.snapshot_download(
            "org/pythia", revision=f"step{step}", cache_dir=constants.HF_HUB_CACHE
        )
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    found, expected = dy.analyze("hf://org/pythia"), dy.analyze(local)
    np.testing.assert_array_equal(found["effective_rank"], expected["effective_rank"])


def test_workers_read_the_hub_too(hub, tmp_path):
    local = history(hub, tmp_path, steps=(1, 2))
    same(dy.analyze("hf://org/pythia", workers=2), dy.analyze(local))


def test_many_files_come_in_pages(hub, tmp_path):
    local = history(hub, tmp_path, steps=(1, 2))
    for number in range(5):
        (local / f"step1/extra-{number}.txt").write_text("x")
    hub.repo("org/pythia").push(local / "step1", "step1")
    hub.page = 2
    same(dy.analyze("hf://org/pythia"), dy.analyze(local))


def test_the_cost_is_told_before_and_is_what_is_fetched(hub, tmp_path, monkeypatch):
    from dynamics.analysis.analyze import measure
    from dynamics.analysis.execution import Execution
    from dynamics.analysis.selection import selection_of

    history(hub, tmp_path)
    costs = []

    def fetched(cost):
        costs.append(cost)
        hub.clear()

    def analysed(**choice):
        chosen = selection_of(dy.open_run("hf://org/pythia"), select=NAMES, **choice)
        measure(chosen, Execution(cache=tmp_path / "ranks.cache"), agree=fetched)
        return costs[-1], hub.fetched, len(hub.asked("blob", "cdn"))

    first = analysed(kinds=["weight"], steps="0:1")
    assert first == (costs[0], costs[0].bytes, costs[0].requests)
    assert costs[0].requests == 2  # the three matrices lie side by side
    assert costs[0].revisions == len(STEPS)
    assert 0.8 * 2 * len(NAMES) * 360_000 < costs[0].bytes <= 1.02 * 2 * len(NAMES) * 360_000
    files = (tmp_path / "local").rglob("*.safetensors")
    assert costs[0].of == sum(each.stat().st_size for each in files)
    more = analysed(kinds=["weight", "update", "displacement"])
    assert more == (costs[1], costs[1].bytes, costs[1].requests)
    again = analysed(kinds=["weight", "update", "displacement"])
    assert again == (costs[2], 0, 0)
    assert costs[2].bytes == 0


def test_tensors_that_lie_side_by_side_are_one_request(hub, tmp_path):
    history(hub, tmp_path, steps=(1, 2))
    run = dy.open_run("hf://org/pythia")
    hub.clear()
    same(dy.analyze(run), dy.analyze(tmp_path / "local"))
    assert len(hub.requests) == 2  # the addresses are known, and there are four matrices in each
    assert hub.fetched <= 2 * (tmp_path / "local/step1/model.safetensors").stat().st_size


def test_many_steps_are_fetched_at_once(hub, tmp_path):
    history(hub, tmp_path, steps=range(16), name="org/slow")
    run = dy.open_run("hf://org/slow")
    hub.latency, began = 0.2, time.monotonic()
    dy.analyze(run, select=NAMES[0], kinds=["weight"], metrics=["stable_rank"])
    assert time.monotonic() - began < 16 * 0.2


def test_the_command_says_what_it_will_fetch_and_asks_at_a_terminal(hub, tmp_path, monkeypatch):
    from typer.testing import CliRunner

    from dynamics.cli import output
    from dynamics.cli.app import app

    history(hub, tmp_path)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(output, "_MUCH", 10**6)
    monkeypatch.setattr(output, "_VERY_MUCH", 10**6)
    command = ["analyze", "hf://org/pythia", "--kinds", "weight", *(f"--select={n}" for n in NAMES)]
    hub.clear()
    said = CliRunner().invoke(app, command)
    assert said.exit_code == 0, said.output
    assert "4.3 MB of 10 MB, 4 revisions, 4 requests; --select, --steps narrow it" in said.output

    class Terminal(io.StringIO):
        def isatty(self):
            return True

    asked = []
    monkeypatch.setattr(output.sys, "stdin", Terminal())
    monkeypatch.setattr(output.sys, "stderr", Terminal())
    monkeypatch.setattr(output.typer, "confirm", lambda *_, **__: asked.append(1))
    cost = Cost("hf://org/pythia", 10**7, 10**8, 4, 12)
    with pytest.raises(output.typer.Exit):
        output.agree_to(cost, yes=False)
    output.agree_to(cost, yes=True)
    assert asked == [1]


def test_wrong_uploads_are_found_by_hashes_and_nothing_is_read(hub, tmp_path):
    history(hub, tmp_path, steps=range(0, 1000, 100))
    repo = hub.repo("org/pythia")
    report = dy.audit("hf://org/pythia", hashes_only=True)
    assert report.severity is dy.auditing.Severity.PASS
    for step in (200, 400):
        repo.branches[f"step{step}"] = repo.branches["step900"]
    run = dy.open_run("hf://org/pythia")
    hub.clear()
    report = dy.audit(run, hashes_only=True)
    assert hub.requests == []
    (found,) = report.of("distinct_checkpoints")
    assert found.severity is dy.auditing.Severity.FAIL
    assert "200, 400, 900" in found.meaning


def test_the_commands_of_the_page_run(hub, tmp_path, monkeypatch):
    from typer.testing import CliRunner

    from dynamics.cli.app import app

    local = history(hub, tmp_path, steps=(0, 1, 1000), name="EleutherAI/pythia-160m")
    for step in (0, 1000):
        write(tmp_path / f"olmo/{step}", {"model.layers.0.o_proj.weight": torch.rand(9, 8)}, "bin")
        for stage in ("stage1", "stage2-ingredient1"):
            name = f"{stage}-step{step}-tokens1B"
            hub.repo("allenai/OLMo-2-1124-7B").push(tmp_path / f"olmo/{step}", name)
    for name in ("run-a_1k", "run-a_10k", "run-b_1k"):
        hub.repo("ORG/OTHER").push(tmp_path / f"olmo/{1000 * name.endswith('10k')}", name)
    hub.repo("ORG/NAME").push(local, inside="runs/a/")
    for step in (0, 1, 1000):
        folder = write(tmp_path / f"seed2/{step}", state(step + 5), "safetensors")
        hub.repo("ORG/SEED2").push(folder, f"step{step}")
    monkeypatch.chdir(tmp_path)
    page = (Path(__file__).parents[3] / "docs/hub.md").read_text("utf-8")
    blocks = re.findall(r"^```sh\n(.*?)```", page, re.MULTILINE | re.DOTALL)
    commands = [line for block in blocks for line in block.splitlines() if "pip" not in line]
    assert len(commands) == 9
    for command in commands:
        program, *words = shlex.split(command)
        done = CliRunner().invoke(app, words)
        assert (program, done.exit_code) == ("dynamics", 0), f"{command}: {done.output}"


def test_a_history_that_grows_is_followed(hub, tmp_path):
    local = history(hub, tmp_path, steps=(1, 2))
    cache, ended = tmp_path / "ranks.cache", []
    results = dy.follow(
        "hf://org/pythia",
        stopped=lambda: bool(ended),
        interval=0.1,
        kinds=["weight"],
        select=NAMES,
        cache=cache,
    )
    assert next(results)["step"].values.tolist() == [1, 2]
    hub.repo("org/pythia").push(write(local / "step3", state(3), "safetensors"), "step3")
    hub.clear()
    found = next(results)
    ended.append(True)
    assert found["step"].values.tolist() == [1, 2, 3]
    assert hub.fetched <= 1.02 * len(NAMES) * 360_000 + 2**16  # of the new step alone


def test_two_histories_are_compared(hub, tmp_path):
    history(hub, tmp_path / "a", steps=(1, 2), name="org/a")
    history(hub, tmp_path / "b", steps=(1, 2), name="org/b", kind="bin")
    choice = {"kinds": ["weight"], "select": NAMES}
    both = dy.compare({"a": "hf://org/a", "b": "hf://org/b"}, **choice)
    one, other = (both["effective_rank"].sel(run=run).values for run in ("a", "b"))
    np.testing.assert_array_equal(one, other)
