"""Subspaces of gradients over time, against dense float64 computations."""

import numpy as np
import pytest
import torch

import dynamics as dy
from dynamics.errors import MissingError
from dynamics.recordings import GRADIENT, RecordingWriter, matrix_path
from probes import Recorder
from probes.relora.optimizers.projected import ProjectedAdamW
from tests.dynamics.conftest import SHAPES

K = 3


@pytest.mark.parametrize("name", sorted(SHAPES))
def test_energies_and_overlaps_are_those_of_dense_svds(write_recording, tmp_path, name):
    path = write_recording(tmp_path / "run.zarr", steps=(0, 10, 20, 30))
    found = dy.gradient_subspaces(path, k=K).sel(kind="gradient", matrix=name)
    run = dy.open_run(path)
    gradients = [run.read(name, step, "gradient").values.astype(float) for step in (10, 20, 30)]
    rows, cols = SHAPES[name]
    assert rows >= cols  # so the right vectors are GaLore's
    bases = [np.linalg.svd(each)[2][:K].T for each in gradients]
    for t, step in enumerate((10, 20, 30)):
        here, at = gradients[t], found.sel(step=step)
        s = np.linalg.svd(here, compute_uv=False)
        assert float(at["energy"]) == pytest.approx((s[:K] ** 2).sum() / (s**2).sum(), rel=1e-9)
        assert float(at["chance"]) == K / cols
        for word, other in (("last", t - 1), ("first", 0)):
            if t == 0:
                assert np.isnan(at[f"energy_in_{word}"])
                continue
            inside = np.linalg.norm(here @ bases[other]) ** 2 / np.linalg.norm(here) ** 2
            overlap = np.linalg.norm(bases[t].T @ bases[other]) ** 2 / K
            assert float(at[f"energy_in_{word}"]) == pytest.approx(inside, rel=1e-9)
            assert float(at[f"overlap_with_{word}"]) == pytest.approx(overlap, rel=1e-9)
    assert np.isnan(found["energy"].sel(step=0))  # nothing was trained yet


def recorded(folder, gradients):
    writer = RecordingWriter(folder / "run.zarr", {})
    path = matrix_path(GRADIENT, "w.weight")
    for step, each in enumerate(gradients):
        attrs = {path: {"source_dtype": str(each.dtype)}}
        writer.append(step, {path: each}, attrs=attrs)
    return dy.gradient_subspaces(folder / "run.zarr", k=K).isel(kind=0, matrix=0)


def test_a_wide_gradient_has_left_directions_and_few_of_them_are_few(tmp_path):
    rng = np.random.default_rng(0)
    fixed = rng.standard_normal((6, 2))
    gradients = [(fixed @ rng.standard_normal((2, 40))).astype(np.float32) for _ in range(3)]
    found = recorded(tmp_path, gradients)
    assert found["subspace_dimension"].values.tolist() == [2, 2, 2]
    np.testing.assert_allclose(found["chance"], 2 / 6)
    np.testing.assert_allclose(found["energy_in_last"][1:], 1, atol=1e-6)
    np.testing.assert_allclose(found["overlap_with_first"][1:], 1, atol=1e-6)


def test_rounding_bounds_how_far_it_turns_the_directions(tmp_path):
    rng = np.random.default_rng(0)
    s = np.array([4, 3, 2, 1.98, 1, 0.5])
    u, v = (np.linalg.qr(rng.standard_normal((n, 6)))[0] for n in (50, 6))
    exact = u * s @ v.T
    bounds = []
    for dtype in (np.float16, np.float32):
        found = recorded(tmp_path / dtype.__name__, [exact.astype(dtype)])
        bounds.append(float(found["rounding"][0]))
        stored = np.linalg.svd(exact.astype(dtype).astype(float))[2][:K].T
        assert np.linalg.norm(v[:, K:].T @ stored, 2) <= bounds[-1] < 1
    assert bounds[0] > 1000 * bounds[1]


def test_a_record_without_a_gradient_has_no_directions_to_compare_with(tmp_path):
    rng = np.random.default_rng(0)
    some = rng.standard_normal((8, 5)).astype(np.float32)
    found = recorded(tmp_path, [some, np.zeros_like(some), some, np.full_like(some, np.nan), some])
    assert np.isfinite(found["energy"]).values.tolist() == [True, False, True, False, True]
    assert "energy_in_last" not in found
    np.testing.assert_allclose(found["energy_in_first"][[2, 4]], found["energy"][0])


def test_a_run_without_gradients_is_refused(tmp_path):
    writer = RecordingWriter(tmp_path / "run.zarr", {})
    writer.append(0, {matrix_path("weight", "w.weight"): np.ones((2, 2), np.float32)})
    with pytest.raises(MissingError, match=r"no gradients; it has weight"):
        dy.gradient_subspaces(tmp_path / "run.zarr")


def trained_with_galore(store, every, bounded=True, **options):
    """Step -> name -> (projector, gradient) of a training by GaLore, which is recorded."""
    torch.manual_seed(0)
    model = torch.nn.Sequential(torch.nn.Linear(20, 30), torch.nn.Tanh(), torch.nn.Linear(30, 12))
    weights = {name: each for name, each in model.named_parameters() if each.ndim == 2}
    biases = [each for each in model.parameters() if each.ndim == 1]
    group = {"projection": "galore", "rank": K, "gap": 4, "scale": 1.0, "seed": 0}
    optimizer = ProjectedAdamW(
        [{"params": [*weights.values()], **group}, {"params": biases}], lr=1e-2, **options
    )
    facts = {"rank": K, "bounded": bounded, "matrices": list(weights)}
    used = {}
    with Recorder(model, optimizer, store, every=every) as recorder:
        for step in range(1, 13):
            x = torch.randn(16, 20)
            optimizer.zero_grad()
            (model(x) - x[:, :12].sin()).square().mean().backward()
            gradients = {name: each.grad.double().numpy() for name, each in weights.items()}
            optimizer.step()
            if optimizer.refreshed():
                recorder.event("projection", at=step - 1, **facts)
            used[step] = {
                name: (optimizer.state[each]["projector"].double().numpy(), gradients[name])
                for name, each in weights.items()
            }
    return used


@pytest.mark.parametrize(
    ("every", "unknown"),
    [(2, []), (3, [6])],  # 3: of steps 5 to 8, the only record is that of step 6
)
def test_the_energy_in_the_projector_is_that_in_the_true_one(tmp_path, every, unknown):
    used = trained_with_galore(tmp_path / "run.zarr", every)
    found = dy.gradient_subspaces(tmp_path / "run.zarr", k=K)
    for step in found["step"].values[1:].tolist():
        for name, (projector, gradient) in used[step].items():
            here = found.sel(kind="gradient", step=step, matrix=name)
            tall = gradient.T if len(gradient) < gradient.shape[1] else gradient
            inside = np.linalg.norm(tall @ projector.T) ** 2 / np.linalg.norm(tall) ** 2
            share = float(here["energy_in_projector"])
            if step in unknown:
                assert np.isnan(share)
            else:
                assert share == pytest.approx(inside, abs=1e-6)
                assert share <= float(here["energy"]) + 1e-6  # K directions, as the projector has


def test_a_projector_is_not_known_where_the_update_has_another_rank_than_it(tmp_path):
    for bounded in (True, False):  # weight decay ends the bound, whatever the event says
        store = tmp_path / f"{bounded}.zarr"
        trained_with_galore(store, 2, bounded=bounded, weight_decay=0.1)
        assert "energy_in_projector" not in dy.gradient_subspaces(store, k=K)
