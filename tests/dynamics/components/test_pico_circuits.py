"""pico-analyze's OV circuit, recomputed by hand and against what was published with it."""

import numpy as np
import pytest

import dynamics as dy
from dynamics.schema import Status
from dynamics.spectra.spectrum import spectrum

NAME = "model.layers.{}.self_attn.pico_ov_circuit"


def by_hand(v, o, heads, kv_heads, size):
    """Entry by entry: block h, row i, column j is Σ_k V[g(h)·size + i, k] O[k, h·size + j]."""
    torch = pytest.importorskip("torch")
    v, o = torch.as_tensor(v).double(), torch.as_tensor(o).double()
    blocks = []
    for head in range(heads):
        rows = v.unflatten(0, (kv_heads, size))[head * kv_heads // heads]
        columns = o.unflatten(1, (heads, size))[:, head]
        blocks.append(torch.einsum("ik,kj->ij", rows, columns))
    return torch.cat(blocks, dim=1).numpy()


def test_heads_of_one_dimension_are_numbers_side_by_side(write_run, random_attention, circuits):
    config, tensors = random_attention(3, 3, 1, 5)
    v, o = (tensors[f"model.layers.0.self_attn.{name}_proj.weight"] for name in "vo")
    run = write_run(config, {1: tensors})
    found = circuits(run, "pico_ov_circuit")[NAME.format(0)](1, "weight")
    numbers = [v[head] @ o[:, head] for head in range(3)]
    np.testing.assert_allclose(found.product(), [numbers], rtol=1e-14)
    np.testing.assert_allclose(spectrum(found).s, [np.linalg.norm(numbers)], rtol=1e-14)
    ov = circuits(run, "ov_circuit")["model.layers.0.self_attn.ov_circuit.0"](1, "weight")
    expected = np.linalg.norm(v[0]) * np.linalg.norm(o[:, 0])
    np.testing.assert_allclose(spectrum(ov).s[0], expected)  # no function of v·o


@pytest.mark.parametrize(("heads", "kv_heads"), [(4, 4), (4, 2), (6, 2), (4, 1)])
def test_it_is_what_pico_analyze_computes(heads, kv_heads, write_run, random_attention):
    config, tensors = random_attention(heads, kv_heads, 3, 14, layers=2, dtype=np.float32)
    measured = dy.analyze(write_run(config, {1: tensors}), components=["pico_ov_circuit"])
    for layer in range(2):
        v, o = (tensors[f"model.layers.{layer}.self_attn.{name}_proj.weight"] for name in "vo")
        expected = np.linalg.svd(by_hand(v, o, heads, kv_heads, 3), compute_uv=False)
        row = measured.sel(matrix=NAME.format(layer), kind="weight", step=1)
        np.testing.assert_allclose(row["singular_value"], expected, rtol=0,
                                   atol=1e-10 * expected[0])  # fmt: skip
        p = expected / expected.sum()
        np.testing.assert_allclose(
            row["proportional_effective_rank"], np.exp(-(p * np.log(p)).sum()) / 3, rtol=1e-10
        )
        np.testing.assert_allclose(row["condition_number"], expected[0] / expected[-1], rtol=1e-9)
    assert (measured["rows"] == 3).all()
    assert (measured["cols"] == 3 * heads).all()
    assert (measured["head"] == -1).all()
    assert measured["layer"].values.tolist() == [0, 1]


# Published at step 0 (shared with the code of arXiv 2509.12960; mean over 12 layers), d_model 96
# and 384. In those figures "tiny" and "small" of the full-rank runs stand for each other.
@pytest.mark.slow
@pytest.mark.parametrize(
    ("hidden", "condition_number", "per"), [(96, 1.694, 0.9868), (384, 1.849, 0.9865)]
)
def test_pico_decoders_at_initialisation_have_the_published_numbers(
    hidden, condition_number, per, circuits, write_run
):
    torch = pytest.importorskip("torch")
    torch.manual_seed(0)
    size = hidden // 12
    tensors = {
        f"layers.{layer}.attention.{name}_proj.weight": torch.nn.Linear(
            *shape, bias=False
        ).weight.detach().numpy()
        for layer in range(12)
        for name, shape in {"v": (hidden, 4 * size), "o": (hidden, hidden)}.items()
    }  # fmt: skip
    config = {"d_model": hidden, "attention_n_heads": 12, "attention_n_kv_heads": 4}
    measured = dy.analyze(write_run(config, {0: tensors}), components=["pico_ov_circuit"],
                          metrics=["condition_number", "proportional_effective_rank"],
                          kinds=["weight"]).mean("matrix").squeeze()  # fmt: skip
    # Over seeds, the mean of 12 layers has standard deviations 0.027 and 0.013, and 0.0008.
    assert abs(float(measured["condition_number"]) - condition_number) < 0.07
    assert abs(float(measured["proportional_effective_rank"]) - per) < 0.003


def test_only_weights_follow_this_convention(write_run, random_attention, circuits):
    config, tensors = random_attention(2, 1, 3, 8)
    run = write_run(config, {1: tensors, 2: tensors})
    read = circuits(run, "pico_ov_circuit")[NAME.format(0)]
    for kind in ("gradient", "update", "displacement", "adapter"):
        assert read(2, kind) is Status.UNDEFINED
    assert read(2, "base") is Status.NOT_RECORDED  # without adapters, as of a parameter


def test_adapters_have_it_of_their_effective_and_of_their_base_weights(adapted, circuits):
    run, base, merged = adapted
    read = circuits(run, "pico_ov_circuit")[NAME.format(1)]
    for kind, model in (("weight", merged), ("base", base)):
        projections = model.model.layers[1].self_attn
        v, o = (each.weight.detach() for each in (projections.v_proj, projections.o_proj))
        expected = by_hand(v, o, 4, 2, 4)
        atol = 1e-6 * np.abs(expected).max()  # the merge itself was in float32
        np.testing.assert_allclose(read(2, kind).product(), expected, atol=atol)


def test_the_noise_floor_covers_what_rounding_does(write_run, random_attention, circuits):
    config, exact = random_attention(4, 2, 16, 64)
    stored = {name: each.astype(np.float16) for name, each in exact.items()}
    v, o = (f"model.layers.0.self_attn.{name}_proj.weight" for name in "vo")
    error = by_hand(stored[v], stored[o], 4, 2, 16) - by_hand(exact[v], exact[o], 4, 2, 16)
    run = write_run(config, {1: stored})
    floor = spectrum(circuits(run, "pico_ov_circuit")[NAME.format(0)](1, "weight")).noise_floor
    assert np.linalg.norm(error, 2) < floor < 6 * np.linalg.norm(error, 2)
