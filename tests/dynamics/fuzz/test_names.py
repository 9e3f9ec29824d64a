"""Whatever a directory's entries are called, each checkpoint is read, named, or refused in a line.

See `test_parsers`. The entries are sound checkpoints of several kinds, damaged ones, and others.
"""

import shutil

import pytest
from hypothesis import given
from hypothesis import strategies as st

import dynamics as dy
from dynamics.formats.shared.look import LATEST
from dynamics.formats.shared.steps import named_step
from tests.dynamics.fuzz.test_parsers import fuzz

torch = pytest.importorskip("torch")
save_file = pytest.importorskip("safetensors.torch").save_file

WEIGHTS = {"layers.0.up_proj.weight": torch.ones(3, 2)}
_WORDS = st.sampled_from(
    ["step", "steps", "checkpoint", "ckpt", "epoch", "global_step", "iter", "model", "last",
     "best", "final", "ema", "v", "loss", "of", "rank", "lora", "b", "k", "M", "Schritt", "étape",
     "步", "٣", "e5", "Q4_K", "00001-of-00002", "2026-01-01", "deadbeef", ""]
)  # fmt: skip
_NUMBERS = st.one_of(
    st.integers(0, 30).map(str), st.integers(0, 99).map("{:08}".format),
    st.sampled_from(["1e3", "1.5", "10k", "99999999999999999999", "-1", "٤٢", "²"]),
)  # fmt: skip
_GAPS = st.sampled_from(["", "-", "_", "=", ".", " ", "__"])
NAMES = st.lists(st.tuples(_WORDS, _GAPS, _NUMBERS, _GAPS), min_size=1, max_size=3).map(
    lambda parts: "".join("".join(part) for part in parts).strip(". /") or "x"
)
KINDS = ["file", "tensors", "directory", "plain", "nested", "empty", "damaged", "link", "folder"]


def put(at, kind):
    """Write an entry; whether it is a sound checkpoint, and where."""
    if kind in ("file", "tensors"):
        at = at.with_name(at.name + (".pt" if kind == "file" else ".safetensors"))
        (torch.save if kind == "file" else save_file)(WEIGHTS, at)
        return at
    if kind in ("empty", "damaged"):
        at.with_name(at.name + ".pt").write_bytes(b"" if kind == "empty" else b"PK\x03\x04damaged")
        return None
    if kind == "link":
        at.symlink_to("nowhere")
        return None
    at.mkdir()
    if kind == "directory":
        save_file(WEIGHTS, at / "model.safetensors")
    elif kind == "plain":
        torch.save(WEIGHTS, at / "model.pt")
    elif kind == "nested":
        (at / "hf").mkdir()
        save_file(WEIGHTS, at / "hf/model.safetensors")
    return at if kind in ("directory", "plain") else None


def is_told(at):
    """Whether a name says that it is that of a checkpoint."""
    stem = at.name.removesuffix(".pt").removesuffix(".safetensors")
    named = named_step(stem)
    return (named is not None and named.level == 0) or LATEST.fullmatch(stem) is not None


@pytest.mark.slow
@fuzz
@given(entries=st.dictionaries(NAMES, st.sampled_from(KINDS), min_size=1, max_size=6))
def test_a_checkpoint_is_read_or_named_whatever_it_is_called(tmp_path_factory, entries):
    run = tmp_path_factory.mktemp("names") / "run"
    run.mkdir()
    written = [put(run / name, kind) for name, kind in entries.items()]
    opened, refusal = None, ""
    try:
        opened = dy.open_run(run)
    except dy.DynamicsError as problem:
        refusal = str(problem)
    shutil.rmtree(run)
    assert "\n" not in refusal
    if opened is None:
        return
    assert all(0 <= step < 10**15 for step in opened.steps.tolist())
    texts = [*opened.passed_over.values(), *opened.problems.values()]
    assert all("\n" not in each for each in texts)
    said = [*opened.places.values(), *opened.passed_over, *opened.problems.values()]
    for at in written:
        is_read = at is not None and str(at.parent) in said  # the only file of its directory
        if at is not None and is_told(at) and not is_read:
            assert any(at.name in each for each in said), at.name
