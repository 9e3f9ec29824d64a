"""A view of a run passes on every public member that it does not change."""

import inspect

import numpy as np
import pytest
import torch
from transformers import GPT2Config, GPT2LMHeadModel

import dynamics as dy
from dynamics.formats.recording import RecordingRun
from dynamics.runs.dependencies import TracedRun
from dynamics.runs.fused import SplitRun, kept_whole, split_fused
from dynamics.runs.intervals import IntervalRun
from dynamics.runs.matrix_cache import CachedRun
from dynamics.runs.run import Dense, Run
from dynamics.runs.run_view import RunView
from probes import Recorder

MEMBERS = sorted(
    name
    for name in {*Run.__annotations__, *(name for name, _ in inspect.getmembers(Run))}
    if not name.startswith("_")
)
PLAIN = "transformer.h.0.attn.c_proj.weight"  # a matrix that no view changes
ARGUMENTS = {
    "read": (PLAIN, 10, "weight"),
    "read_group": (PLAIN, 10, "weight"),
    "read_spectrum": (PLAIN, 10, "update"),
    "origin": (PLAIN, 10, "weight"),
    "group_of": (PLAIN,),
    "merges_between": (PLAIN, 0, 20),
    "trains": (PLAIN,),
    "sparse_entries": (PLAIN,),
    "update_reference": (10,),
    "require_matrices": ("A test",),
    "check_step": (10,),
}


class Distinct(RecordingRun):
    """A recording in which no public member has the value that `Run` gives it by default."""

    def __init__(self, path):
        super().__init__(path)
        self.problems = {99: "step 99 is damaged"}
        self.absent_kinds = {"adapter": "there is none"}
        self.places = {0: "step 0 is here"}
        self.passed_over = {"last": "it tells no step"}
        self.merges_told_by_events = True

    @property
    def kinds(self):
        return (*super().kinds, "of its own")

    def group_of(self, name):
        return (name, "another")

    def read_group(self, name, step, kind):
        return {name: self.read(name, step, kind), "another": None}

    def read_spectrum(self, name, step, kind):
        return dy.Spectrum(np.ones(2), 2, 2, 2, 0.0, 0.0)

    def origin(self, name, step, kind):
        return f"origin of {name} at {step}"

    def merges_between(self, name, before, now):
        return 7

    def trains(self, name):
        return name == PLAIN

    def sparse_entries(self, name):
        return 9 if name == PLAIN else None

    def update_reference(self, step):
        return step - 7

    def require_matrices(self, purpose):
        raise dy.DynamicsError(f"{purpose} is refused")


class WithSpectra(Distinct):
    """The same with spectra, too, which `split_fused` would leave whole."""

    def __init__(self, path):
        super().__init__(path)
        self.spectrum_kinds = ("update",)


@pytest.fixture
def run(write_recording, tmp_path):
    shapes = {"transformer.h.0.attn.c_attn.weight": (8, 24), PLAIN: (8, 8)}
    return WithSpectra(write_recording(tmp_path / "run.zarr", shapes=shapes, merges=(10,)))


VIEWS = {
    "RunView": RunView,
    "SplitRun": lambda run: SplitRun(run, split_fused(Distinct(run.path))._parts),
    "CachedRun": CachedRun,
    "TracedRun": TracedRun,
    "IntervalRun": lambda run: IntervalRun(run, {10: run.update_reference(10), 20: 0}),
}
# What a view changes on purpose, or may answer from `read` instead of passing on.
CHANGED = {
    "RunView": {"group_of", "read_group"},
    "SplitRun": {"matrices", "group_of", "read_group"},
    "CachedRun": {"group_of", "read_group"},
    "TracedRun": {"group_of", "read_group"},
    "IntervalRun": set(),
}


def outcome(run, member):
    value = getattr(run, member)
    if member not in ARGUMENTS:
        return value
    try:
        return value(*ARGUMENTS[member])
    except dy.DynamicsError as error:
        return str(error)


def plain(value):
    """The value without dataclasses, which compare arrays by truth."""
    if isinstance(value, dict):
        return {name: plain(each) for name, each in value.items()}
    return vars(value) if isinstance(value, Dense | dy.Spectrum) else value


def test_every_view_is_tested():
    views = {each.__name__ for each in RunView.__subclasses__()}
    assert {*views, "RunView"} == set(VIEWS)


@pytest.mark.parametrize(
    ("view", "member"),
    [(view, member) for view in VIEWS for member in MEMBERS if member not in CHANGED[view]],
)
def test_every_public_member_is_that_of_the_run(view, member, run):
    seen, own = outcome(VIEWS[view](run), member), outcome(run, member)
    default = vars(Run).get(member)
    if isinstance(default, tuple | dict | bool):  # else a view that forgets it would pass, too
        assert own != default
    np.testing.assert_equal(plain(seen), plain(own))


@pytest.mark.parametrize("view", ["RunView", "CachedRun", "TracedRun"])
def test_a_group_is_what_the_view_itself_reads(view, run):
    seen = VIEWS[view](run)
    assert seen.group_of(PLAIN) == (PLAIN,)
    np.testing.assert_equal(
        plain(seen.read_group(PLAIN, 10, "weight")), plain({PLAIN: run.read(PLAIN, 10, "weight")})
    )


def test_spectra_of_fused_matrices_are_those_of_the_whole(tmp_path):
    """A recording of spectra cannot be split; nothing of it may get lost for that."""
    config = GPT2Config(
        vocab_size=24, n_positions=8, n_embd=16, n_layer=1, n_head=2, bos_token_id=0, eos_token_id=0
    )
    torch.manual_seed(0)
    model, tokens = GPT2LMHeadModel(config), torch.arange(6)[None]
    optimizer = torch.optim.SGD(model.parameters(), lr=1e-3)
    with Recorder(model, optimizer, tmp_path / "run.zarr", every=1, spectra_only=True):
        for _ in range(2):
            model(input_ids=tokens, labels=tokens).loss.backward()
            optimizer.step()
    run = dy.open_run(tmp_path / "run.zarr")
    fused = "transformer.h.0.attn.c_attn.weight"
    assert fused in run.matrices
    analysis = dy.analyze(run, kinds=["weight"])
    assert (analysis["status"] == dy.Status.MEASURED).all()
    stored = model.get_parameter(fused).detach().double().numpy()
    np.testing.assert_allclose(
        analysis["singular_value"].sel(matrix=fused, step=2, kind="weight"),
        np.linalg.svd(stored, compute_uv=False),
        rtol=1e-6,
    )
    assert "as a whole" in kept_whole(run)[fused]
    with pytest.raises(dy.DynamicsError, match="singular values"):
        dy.analyze(run, components=["ov_circuit"])
