"""Kinds that follow cycles: on a recording with known adapters and merges, written by hand."""

import numpy as np
import pytest

import dynamics as dy
from dynamics.errors import MissingError
from dynamics.recordings import RecordingWriter, factor_path, matrix_path
from dynamics.runs.run import Event

NAME = "model.layers.0.mlp.up_proj.weight"
OTHER = "model.embed_tokens.weight"
ROWS, COLS, RANK, SCALE = 24, 32, 2, 1.5
# Record at each step; merges after 4 and 8. Step 5 is one optimizer step after a merge.
STEPS, MERGES = (0, 2, 4, 5, 8, 10), (4, 8)


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    """(path, exact adapter product by step, exact displacement by step)."""
    rng = np.random.default_rng(0)
    path = tmp_path_factory.mktemp("made") / "run.zarr"
    base = rng.standard_normal((ROWS, COLS)).astype(np.float32)
    embedding = rng.standard_normal((40, COLS)).astype(np.float32)
    first = base.astype(np.float64)
    merged = np.zeros((ROWS, COLS))
    products, displacements = {}, {}
    writer = RecordingWriter(path, {})
    for step in STEPS:
        a = rng.standard_normal((RANK, COLS)).astype(np.float32)
        b = rng.standard_normal((ROWS, RANK)).astype(np.float32) * (step > 0)
        product = SCALE * b.astype(np.float64) @ a.astype(np.float64)
        products[step] = product
        displacements[step] = merged + product
        weight = (first + displacements[step]).astype(np.float32)
        attrs = {"source_dtype": "float32", "scaling": SCALE, "transposed": False}
        matrices = {
            matrix_path("weight", NAME): weight,
            matrix_path("weight", OTHER): embedding + np.float32(step),
            factor_path(NAME, "A"): a,
            factor_path(NAME, "B"): b.astype(np.float32),
        }
        writer.append(step, matrices, attrs=dict.fromkeys(matrices, attrs))
        if step in MERGES:
            merged = merged + product
            writer.event(Event(step, "merge", {}))
    return path, products, displacements


@pytest.fixture(scope="module")
def measured(made):
    return dy.analyze(made[0])


def _s(dataset, kind, step, name=NAME):
    return dataset["singular_value"].sel(kind=kind, step=step, matrix=name).dropna("index").values


def _svd(matrix):
    return np.linalg.svd(matrix, compute_uv=False)


def test_a_cycle_update_starts_at_the_last_merge(made, measured):
    _, _, displacements = made
    starts = {2: 0, 4: 0, 5: 4, 8: 4, 10: 8}
    for step, start in starts.items():
        expected = _svd(displacements[step] - displacements[start])
        np.testing.assert_allclose(_s(measured, "cycle_update", step), expected, atol=1e-5)
    ranks = measured["numerical_rank"].sel(kind="cycle_update", matrix=NAME)
    assert ranks.sel(step=[2, 4, 5, 8, 10]).values.tolist() == [RANK] * 5


def test_a_weight_without_an_adapter_has_no_cycles(measured):
    status = measured["status"].sel(kind="cycle_update", matrix=OTHER)
    assert (status == dy.Status.UNDEFINED).all()


def test_an_optimizer_update_needs_the_step_before(measured):
    status = measured["status"].sel(kind="optimizer_update", matrix=NAME)
    assert status.sel(step=5) == dy.Status.MEASURED
    assert (status.drop_sel(step=5) == dy.Status.UNDEFINED).all()
    np.testing.assert_array_equal(_s(measured, "optimizer_update", 5), _s(measured, "update", 5))


def test_the_accumulated_adapter_is_the_displacement_without_its_rounding(made, measured):
    _, _, displacements = made
    for step in STEPS[1:]:
        cycles = 1 + sum(merge < step for merge in MERGES)
        found, exact = _s(measured, "accumulated_adapter", step), _svd(displacements[step])
        assert np.abs(found - exact).max() <= 1e-10 * exact[0]
        assert not found[cycles * RANK :].any()
        cell = measured.sel(kind="accumulated_adapter", step=step, matrix=NAME)
        assert cell["rank_bound"] == cycles * RANK
        assert cell["numerical_rank"] == cycles * RANK


def test_differences_of_adapted_weights_know_their_rank_bound(measured):
    bounds = measured["rank_bound"].sel(matrix=NAME)
    assert bounds.sel(kind="displacement").dropna("step").values.tolist() == [2, 2, 4, 4, 6]
    # From 2 to 4 one adapter replaces another; 4 ends a cycle, so that 5 starts from nothing.
    assert bounds.sel(kind="update").dropna("step").values.tolist() == [2, 4, 2, 4, 2]
    use = measured["rank_bound_use"].sel(matrix=NAME, kind=["displacement", "update"])
    assert (use.dropna("step") <= 1 + 1e-6).all()
    ranks = measured["numerical_rank"].sel(matrix=NAME, kind=["displacement", "update"])
    assert (ranks.dropna("step") == bounds.sel(kind=ranks["kind"]).dropna("step")).all()
    free = measured["rank_bound"].sel(kind="update", matrix=OTHER).dropna("step")
    assert (free == COLS).all()


def test_cycles_are_compared_with_the_cycle_before_as_it_was_merged(made):
    path, products, _ = made
    found = dy.subspace_overlaps(dy.open_run(path), k=RANK, select="*up_proj")
    overlap = found["left_overlap_with_last_cycle"].sel(kind="adapter", matrix=NAME)
    for step, last in ((5, 4), (8, 4), (10, 8)):
        one, other = (np.linalg.svd(products[each])[0][:, :RANK] for each in (step, last))
        expected = np.linalg.norm(one.T @ other) ** 2 / RANK
        assert float(overlap.sel(step=step)) == pytest.approx(expected, rel=1e-6)
    assert overlap.sel(step=[0, 2, 4]).isnull().all()
    energy = found["energy_in_weight"].sel(kind="update", matrix=NAME).dropna("step")
    assert ((energy >= 0) & (energy <= 1)).all()
    with pytest.raises(MissingError, match="No update of kind 'weight'"):
        dy.subspace_overlaps(dy.open_run(path), kinds=["weight"])


def test_a_run_is_aligned_with_itself(made):
    run = dy.open_run(made[0])
    found = dy.run_alignment(run, run, k=3)
    adapted = found.sel(kind="displacement", matrix=NAME).dropna("step")
    np.testing.assert_allclose(adapted["alignment"], 1)
    np.testing.assert_allclose(adapted["left_overlap"], 1)
    assert adapted["subspace_dimension"].values.tolist() == [2, 2, 3, 3, 3]
