"""Updates, gradients and adapters of circuits."""

import json
import warnings

import numpy as np
import pytest

import dynamics as dy
from dynamics.recordings import GRADIENT, WEIGHT, RecordingWriter, factor_path, matrix_path
from dynamics.runs.run import Event, Factored
from dynamics.schema import Status
from dynamics.spectra.spectrum import spectrum

COMPONENTS = ["ov_circuit", "qk_circuit"]
NAME = "model.layers.0.self_attn.{}.{}"


def moved(tensors, by, seed):
    """The tensors after a random step of this relative size."""
    rng = np.random.default_rng(seed)
    return {
        name: (each + by * rng.standard_normal(each.shape)).astype(each.dtype)
        for name, each in tensors.items()
    }


@pytest.fixture
def record(tmp_path):
    """record(config, {step: (weights, gradients)}, merges=()): a recording, opened."""

    def write(config, steps, merges=()):
        writer = RecordingWriter(tmp_path / "run.zarr", {"config": config})
        for step, (weights, gradients) in steps.items():
            matrices = {matrix_path(WEIGHT, name): each for name, each in weights.items()}
            matrices |= {matrix_path(GRADIENT, name): each for name, each in gradients.items()}
            attrs = {path: {"source_dtype": str(each.dtype)} for path, each in matrices.items()}
            writer.append(step, matrices, attrs=attrs)
            if step in merges:
                writer.event(Event(step, "merge", {}))
        return dy.open_run(tmp_path / "run.zarr")

    return write


# Differences ------------------------------------------------------------------------------------


@pytest.mark.parametrize("component", COMPONENTS)
@pytest.mark.parametrize("by", [1.0, 1e-4])
def test_factored_differences_are_the_dense_differences(
    by, component, write_run, random_attention, dense_circuit, circuits
):
    config, first = random_attention(4, 2, 3, 20)
    steps = {1: first, 2: moved(first, by, 1), 5: moved(first, by, 2)}
    run = write_run(config, steps)
    for kind, before in (("update", 2), ("displacement", 1)):
        for head in range(4):
            found = circuits(run, component)[NAME.format(component, head)](5, kind)
            now, then = (dense_circuit(steps[s], config, component, head) for s in (5, before))
            assert isinstance(found, Factored)
            assert found.rank_bound == 6
            expected = np.linalg.svd(now - then, compute_uv=False)
            size = np.linalg.norm(now, 2)  # of what was subtracted: float64 knows no better
            np.testing.assert_allclose(spectrum(found).s, expected, rtol=0, atol=1e-13 * size)
            assert spectrum(found).error < 1e-11 * expected[0] / by


def test_the_rank_of_a_difference_is_bounded_by_the_stream(write_run, random_attention, circuits):
    config, first = random_attention(2, 1, 4, 6)
    run = write_run(config, {1: first, 2: moved(first, 1, 1)})
    for read in circuits(run, "ov_circuit").values():
        assert read(2, "update").rank_bound == 6


def test_a_first_record_has_no_update_and_a_missing_projection_no_circuit(
    write_run, random_attention, circuits
):
    config, tensors = random_attention(2, 2, 2, 4)
    without = {name: each for name, each in tensors.items() if "v_proj" not in name}
    run = write_run(config, {1: tensors, 2: without, 3: tensors})
    read = circuits(run, "ov_circuit")[NAME.format("ov_circuit", 1)]
    assert read(1, "update") is read(1, "displacement") is Status.UNDEFINED
    assert read(2, "weight") is read(2, "update") is read(3, "update") is Status.NOT_RECORDED
    assert isinstance(read(3, "displacement"), Factored)
    assert isinstance(circuits(run, "qk_circuit")[NAME.format("qk_circuit", 0)](2, "update"),
                      Factored)  # fmt: skip


def test_the_floor_of_a_difference_covers_the_rounding_of_both_terms(
    random_attention, dense_circuit, record, circuits
):
    config, exact = random_attention(4, 2, 16, 64)
    later = moved(exact, 1e-3, 1)
    rounded = [{n: e.astype(np.float16) for n, e in each.items()} for each in (exact, later)]
    run = record(config, {1: (rounded[0], {}), 2: (rounded[1], {})})
    for head, read in enumerate(circuits(run, "ov_circuit").values()):
        dense = [dense_circuit(each, config, "ov_circuit", head) for each in (exact, later)]
        stored = [dense_circuit(each, config, "ov_circuit", head) for each in rounded]
        norm = np.linalg.norm(stored[1] - stored[0] - dense[1] + dense[0], 2)
        assert norm < spectrum(read(2, "update")).noise_floor < 4 * norm


@pytest.mark.parametrize("component", COMPONENTS)
def test_the_floor_of_a_difference_covers_the_rounding_of_each_step(
    component, write_run, random_attention, dense_circuit, circuits
):
    """Both projections are trained in place for 50 steps, in float32."""
    config, first = random_attention(4, 2, 8, 64)
    now = before = {name: each.astype(np.float32) for name, each in first.items()}
    exact = {name: each.astype(np.float64) for name, each in before.items()}
    for seed in range(50):
        steps = moved({name: np.zeros_like(each) for name, each in exact.items()}, 1e-3, seed)
        exact = {name: each + steps[name] for name, each in exact.items()}
        now = {name: (each + steps[name]).astype(np.float32) for name, each in now.items()}
    run = write_run(config, {10: before, 60: now})
    for head in range(4):
        found = spectrum(circuits(run, component)[NAME.format(component, head)](60, "update"))
        of_now, of_exact = (dense_circuit(each, config, component, head) for each in (now, exact))
        noise = np.linalg.norm(of_now - of_exact, 2)
        assert noise <= found.noise_floor <= 6 * noise
        assert noise > found.storage_noise_floor / 3
        assert 3 < found.noise_floor / found.storage_noise_floor < 7.1  # at most √50


@pytest.mark.parametrize("component", COMPONENTS)
@pytest.mark.parametrize("size", [0.1, 5.0])  # of the adapters' entries, over the weights'
def test_the_floor_of_a_difference_covers_merges_and_products(
    component, size, random_attention, dense_circuit, circuits, tmp_path
):
    """ReLoRA on all projections: 30 merges of rank 1, and an adapter in the last record."""
    rng, scale = np.random.default_rng(0), np.float32(2.0)
    config, base = random_attention(4, 2, 16, 64, dtype=np.float32)
    exact = {name: each.astype(np.float64) for name, each in base.items()}
    writer = RecordingWriter(tmp_path / "run.zarr", {"config": config})
    for step in range(32):
        adapters = {
            name: (
                rng.standard_normal((each.shape[0], 1)).astype(np.float32),
                np.float32(size / 2) * rng.standard_normal((1, each.shape[1])).astype(np.float32),
            )
            for name, each in base.items()
        }
        arrays = {}
        for name, (b, a) in adapters.items():
            b *= step > 0  # as in a run that begins
            arrays[factor_path(name, "A")], arrays[factor_path(name, "B")] = a, b
            arrays[matrix_path(WEIGHT, name)] = base[name] + scale * (b @ a)
            exact[name] = exact[name] + scale * (b.astype(np.float64) @ a.astype(np.float64))
        attrs = {path: {"source_dtype": "float32"} for path in arrays}
        for path in arrays:
            if path.startswith("adapter"):
                attrs[path] |= {"scaling": float(scale), "transposed": False}
        writer.append(step, arrays, attrs=attrs)
        if 0 < step < 31:
            writer.event(Event(step, "merge", {}))
            base = {name: arrays[matrix_path(WEIGHT, name)] for name in base}
    run = dy.open_run(tmp_path / "run.zarr")
    first, last = ({n: run.read(n, s, WEIGHT).values for n in base} for s in (0, 31))
    for head in range(4):
        of_first, of_last, of_exact = (
            dense_circuit(each, config, component, head) for each in (first, last, exact)
        )
        noise = np.linalg.norm(of_last - of_exact, 2)
        displacement = circuits(run, component)[NAME.format(component, head)](31, "displacement")
        np.testing.assert_allclose(displacement.product(), of_last - of_first, atol=1e-9)
        assert noise <= spectrum(displacement).noise_floor <= 6 * noise


# Gradients --------------------------------------------------------------------------------------


@pytest.mark.parametrize("component", COMPONENTS)
@pytest.mark.parametrize("size", [1.0, 1e-6, 1e6])
def test_a_gradient_is_the_derivative_along_the_parameters_gradients(
    size, component, random_attention, dense_circuit, record, circuits
):
    config, weights = random_attention(4, 2, 3, 20)
    gradients = {name: size * each for name, each in moved(weights, 1, 7).items()}
    run = record(config, {1: (weights, gradients)})
    for head in range(4):
        found = circuits(run, component)[NAME.format(component, head)](1, "gradient")
        # C(W + tG) is a parabola in t: its central difference is its derivative, exactly.
        ahead, behind = (
            dense_circuit(
                {n: w + t * gradients[n] / size for n, w in weights.items()},
                config, component, head,
            )
            for t in (0.5, -0.5)
        )  # fmt: skip
        expected = size * (ahead - behind)
        atol = 1e-12 * np.abs(expected).max()
        np.testing.assert_allclose(found.product(), expected, rtol=0, atol=atol)
        assert found.rank_bound == 6
        assert spectrum(found).error < 1e-12 * np.linalg.norm(expected, 2)


@pytest.mark.parametrize("ratio", [1.0, 1e-3, 0.0])
def test_the_floor_of_a_gradient_is_that_of_its_terms(
    ratio, random_attention, dense_circuit, record, circuits
):
    # Gradients are orders of magnitude smaller than weights, and not all alike (`ratio`).
    config, exact = random_attention(4, 2, 16, 64)
    exact_gradients = {
        name: each * 1e-4 * (ratio if "v_proj" in name else 1)
        for name, each in moved(exact, 1, 3).items()
    }
    weights, gradients = (
        {name: each.astype(np.float32) for name, each in group.items()}
        for group in (exact, exact_gradients)
    )
    run = record(config, {1: (weights, gradients)})

    def change(w, g, head):
        plus, minus = (
            dense_circuit({n: w[n].astype(float) + t * g[n].astype(float) for n in w}, config,
                          "ov_circuit", head)
            for t in (0.5, -0.5)
        )  # fmt: skip
        return plus - minus

    for head, read in enumerate(circuits(run, "ov_circuit").values()):
        measured = spectrum(read(1, "gradient"))
        noise = change(weights, gradients, head) - change(exact, exact_gradients, head)
        norm = np.linalg.norm(noise, 2)
        assert norm < measured.noise_floor < 12 * norm
        assert (measured.s[:16] > measured.noise_floor).all()


def test_without_a_gradient_of_both_projections_there_is_none_of_the_circuit(
    random_attention, record, circuits
):
    config, weights = random_attention(2, 2, 2, 4)
    some = {name: each for name, each in weights.items() if "o_proj" in name}
    run = record(config, {0: (weights, {}), 1: (weights, some), 2: (weights, weights)})
    read = circuits(run, "ov_circuit")[NAME.format("ov_circuit", 0)]
    assert read(0, "gradient") is read(1, "gradient") is Status.NOT_RECORDED
    assert isinstance(read(2, "gradient"), Factored)


def test_a_zero_gradient_is_a_zero_matrix(random_attention, record, circuits):
    config, weights = random_attention(2, 2, 2, 4)
    run = record(config, {1: (weights, {name: 0 * each for name, each in weights.items()})})
    for read in circuits(run, "ov_circuit").values():
        assert (spectrum(read(1, "gradient")).s == 0).all()


def test_nan_in_a_weight_or_gradient_is_non_finite(random_attention, record):
    config, weights = random_attention(2, 2, 2, 4)
    broken = {name: each.copy() for name, each in weights.items()}
    broken["model.layers.0.self_attn.v_proj.weight"][0, 0] = np.nan  # of head 0 only
    run = record(config, {1: (weights, broken), 2: (broken, weights)})
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", dy.UnmeasuredWarning)
        analysis = dy.analyze(run, components=["ov_circuit"])
    found = analysis["status"]
    assert "ov_circuit.0 (gradient) at step 1 holds NaN or Inf" in analysis.attrs["problems"]
    for kind, step in (("gradient", 1), ("weight", 2), ("update", 2), ("gradient", 2)):
        assert found.sel(kind=kind, step=step).values.tolist() == [
            Status.NON_FINITE, Status.MEASURED,
        ]  # fmt: skip


# Adapters ---------------------------------------------------------------------------------------


def test_circuits_of_adapters_are_those_of_the_effective_weights(adapted, dense_circuit, circuits):
    run, base, merged = adapted
    config = base.config.to_dict() | {"head_dim": 4}
    assert json.loads(json.dumps(run.attrs["config"]))["num_key_value_heads"] == 2
    for component in COMPONENTS:
        for head in range(4):
            read = circuits(run, component)[NAME.format(component, head)]
            for kind, model in (("weight", merged), ("base", base)):
                tensors = {n: each.detach().numpy() for n, each in model.state_dict().items()}
                expected = dense_circuit(tensors, config, component, head)
                atol = 1e-6 * np.abs(expected).max()  # the merge itself was in float32
                np.testing.assert_allclose(read(2, kind).product(), expected, atol=atol)
            assert not np.allclose(read(2, "weight").product(), read(2, "base").product())
            assert read(2, "adapter") is Status.UNDEFINED


def test_the_cycle_of_a_circuit_is_that_of_its_adapted_projection(adapted, circuits):
    run, _, _ = adapted
    measured = dy.analyze(run, components=["ov_circuit"])
    status = measured["status"].sel(step=2)
    assert (status.sel(kind=["weight", "base", "update", "cycle_update"]) == 1).all()
    assert (status.sel(kind="adapter") == Status.UNDEFINED).all()
    cycle, update = (measured["spectral_norm"].sel(step=2, kind=k) for k in
                     ("cycle_update", "update"))  # fmt: skip
    np.testing.assert_array_equal(cycle, update)  # nothing was merged
