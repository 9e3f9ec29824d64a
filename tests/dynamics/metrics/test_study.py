"""The metrics of arXiv 2605.13652: what its code gave, and where an analysis has them."""

import numpy as np
import pytest
import torch
import xarray as xr

import dynamics as dy
from dynamics.analysis import tasks
from dynamics.errors import MissingError
from dynamics.metrics import METRICS, STUDY_METRICS, study_spectrum
from dynamics.recordings import RecordingWriter, factor_path, matrix_path
from dynamics.runs.differences import Difference
from dynamics.runs.run import Dense, Factored
from probes import Live

# share of the weight's norm -> what the published `_metrics_from_singular_values` gave of an update
# of rank 4, `weights(share)`, loaded as it loads them (commit 250ab1e; CPU).
PUBLISHED = {
    1: [64.0, 4.281275272369385, 2.6156234741210938, 0.19395245611667633, 4.0],
    0.1: [64.0, 6.2466721534729, 2.6173176765441895, 0.19423703849315643, 0.0],
    0.01: [64.0, 24.855615615844727, 2.7416317462921143, 0.19301177561283112, 0.0],
    0.001: [64.0, 51.395931243896484, 7.144838809967041, 0.18309767544269562, 0.0],
}
PUBLISHED_OF_WEIGHT = [64.0, 57.251609802246094, 20.98777961730957, 0.035110216587781906, 50.0]
NAME = "model.layers.0.mlp.up_proj.weight"


def weights(share):
    rng = np.random.default_rng(7)
    before = 0.02 * rng.standard_normal((96, 64))
    low = rng.standard_normal((96, 4)) @ rng.standard_normal((4, 64))
    now = before + share * low / np.linalg.norm(low) * np.linalg.norm(before)
    return before.astype(np.float32), now.astype(np.float32)


def measured(matrix):
    return [float(each.function(study_spectrum(matrix))) for each in STUDY_METRICS.values()]


@pytest.mark.parametrize("share", PUBLISHED)
def test_an_update_has_the_values_that_the_published_code_gives(share):
    before, now = (Dense(each, "float32") for each in weights(share))
    update = Difference(now, before)
    assert measured(update) == pytest.approx(PUBLISHED[share], rel=1e-5)
    ours = METRICS["numerical_rank"].function(dy.spectrum(update))
    assert (float(ours), PUBLISHED[share][0]) == (4, 64)


def test_a_weight_has_the_values_that_the_published_code_gives():
    found = measured(Dense(weights(1)[0], "float32"))
    # The gap, 1 - σ₂/σ₁, is a small difference: the last bits of float32 depend on the processor.
    assert found == pytest.approx(PUBLISHED_OF_WEIGHT, rel=1e-5, abs=1e-6)


def independently(matrix):
    s = torch.linalg.svdvals(matrix)
    assert s.dtype == torch.float32
    kept = s[s > 1e-12]
    entropy_rank = torch.distributions.Categorical(probs=kept).entropy().exp()
    gap = 1 - kept[1] / kept[0] if len(kept) > 1 else 1
    of_kept = [len(kept), entropy_rank, (kept**2).sum() / s.max() ** 2, gap]
    return [float(each) for each in (*of_kept, (s > 0.1).sum())]


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.float16, torch.bfloat16])
@pytest.mark.parametrize("shape", [(40, 12), (12, 40), (1, 6)])
def test_any_dtype_is_loaded_as_bfloat16(dtype, shape):
    stored = torch.randn(shape, generator=torch.Generator().manual_seed(0)).to(dtype)
    values = stored.float().numpy() if dtype == torch.bfloat16 else stored.numpy()
    expected = independently(stored.bfloat16().float())
    found = measured(Dense(values, str(dtype).removeprefix("torch.")))
    assert found == pytest.approx(expected, rel=1e-5)


def test_a_matrix_of_zeros_has_zero_in_all_of_them_and_one_direction_a_gap_of_one():
    assert measured(Dense(np.zeros((3, 4)), "float32")) == [0, 0, 0, 0, 0]
    assert measured(Dense(np.diag([2.0, 0.0]), "float32")) == [1, 1, 1, 1, 1]
    assert study_spectrum(Factored(np.ones((4, 1)), np.ones((1, 3)), 1.0, "float32")).s.size == 0


@pytest.fixture
def recording(tmp_path):
    before, now = weights(0.1)
    writer = RecordingWriter(tmp_path / "run.zarr", {})
    factors = {factor_path(NAME, "A"): np.ones((4, 64)), factor_path(NAME, "B"): np.ones((96, 4))}
    for step, weight in ((0, before), (10, now)):
        matrices = {matrix_path("weight", NAME): weight, **factors}
        told = {"source_dtype": "float32", "scaling": 1.0, "transposed": False}
        attrs = dict.fromkeys(matrices, told)
        writer.append(step, matrices, attrs=attrs)
    writer.close()
    return tmp_path / "run.zarr"


@pytest.mark.parametrize("workers", [1, pytest.param(2, marks=pytest.mark.slow)])
def test_an_analysis_has_them_where_a_matrix_is_held_as_values(recording, workers):
    names = [*STUDY_METRICS, "numerical_rank"]
    found = dy.analyze(recording, metrics=names, workers=workers).sel(matrix=NAME, step=10)
    of = {kind: [float(found[each].sel(kind=kind)) for each in names] for kind in found.kind.values}
    assert of["update"] == pytest.approx([*PUBLISHED[0.1], 4], rel=1e-5)
    assert of["weight"][0] == of["base"][0] == 64
    assert np.isnan(of["adapter"][:-1]).all()
    assert of["adapter"][-1] == 1
    assert found["study_rank"].attrs["reference"].startswith("arXiv 2605.13652")


def test_a_cache_keeps_them_beside_ours(recording, tmp_path, monkeypatch):
    computed = []

    def counted(matrix):
        computed.append(matrix)
        return study_spectrum(matrix)

    monkeypatch.setattr(tasks, "study_spectrum", counted)
    cache, kinds = tmp_path / "spectra.cache", ["weight", "update"]
    dy.analyze(recording, cache=cache, kinds=kinds)
    assert computed == []
    options = {"kinds": kinds, "metrics": ["study_rank", "stable_rank"]}
    expected = dy.analyze(recording, **options)
    for times in (6, 6):  # three each without and with the cache, and none again
        xr.testing.assert_identical(dy.analyze(recording, cache=cache, **options), expected)
        assert len(computed) == times


def test_they_are_measured_only_by_name(recording):
    assert not set(STUDY_METRICS) & set(dy.analyze(recording).data_vars)
    with pytest.raises(MissingError, match=r"known: effective_rank.*study_rank"):
        dy.analyze(recording, metrics=["study_ranks"])
    with pytest.raises(MissingError, match="No metric 'study_rank'"):
        Live(metrics=["study_rank"])


def test_spectra_alone_do_not_have_them(tmp_path):
    from probes import Recorder

    model = torch.nn.Sequential(torch.nn.Linear(6, 4))
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    with Recorder(model, optimizer, tmp_path / "run.zarr", every=1, spectra_only=True):
        model(torch.ones(3, 6)).square().mean().backward()
        optimizer.step()
    found = dy.analyze(tmp_path / "run.zarr", kinds=["weight"], metrics=["study_rank"])
    assert np.isnan(found["study_rank"]).all()
    assert np.isfinite(found["noise_floor"]).all()
