"""Recordings of singular values in place of matrices."""

import numpy as np
import pytest
import scipy.linalg
import torch
import xarray as xr
from peft.tuners.lora import LoraLayer
from torch import nn

import dynamics as dy
from dynamics import schema
from dynamics.auditing import audit
from dynamics.errors import DynamicsError, MissingError
from dynamics.runs.run import Dense
from dynamics.spectra import noise
from dynamics.spectra.gram import gram_error
from dynamics.spectra.spectrum import spectrum
from probes import Recorder, at_steps
from probes.checks import FailedCheckWarning
from probes.records.live_spectra import live_spectrum
from tests.dynamics.spectra.test_gram import HARD
from tests.probes import adapted, training

DTYPES = [torch.float64, torch.float32, torch.float16, torch.bfloat16, torch.float8_e4m3fn]
ALL = ("weight", "gradient", "adapter", "probed_gradient", "update", "displacement")
needs_cuda = pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")
BOUNDS = (schema.NOISE_FLOOR, schema.SINGULAR_VALUE_ERROR)


def _stored(tensor):
    exact = tensor if tensor.dtype == torch.float64 else tensor.float()
    return Dense(exact.numpy(), str(tensor.dtype).removeprefix("torch."))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("shape", [(1, 1), (24, 12), (12, 24), (300, 20), (20, 300)], ids=str)
def test_a_live_matrix_has_the_spectrum_and_floor_of_the_stored_one(dtype, shape):
    generator = torch.Generator().manual_seed(1)
    matrix = torch.randn(shape, generator=generator, dtype=torch.float64)
    matrix[0] *= 2.0**-20
    matrix[:, shape[1] // 3 : shape[1] // 2] = 0  # columns of padding
    matrix[shape[0] // 2 :, 0] = 0.5  # a power of two, below which numbers lie closer
    matrix = matrix.to(dtype)

    live, stored = live_spectrum(matrix), spectrum(_stored(matrix))

    np.testing.assert_allclose(live.s, stored.s, rtol=0, atol=1e-13 * stored.s[0])
    assert live.noise_floor == pytest.approx(stored.noise_floor, rel=1e-12)
    assert live.error == pytest.approx(stored.error)
    assert (live.rows, live.cols, live.rank_bound) == (*shape, min(shape))


@pytest.mark.parametrize("decay", [0.0, 12.0], ids=["ordinary", "ill-conditioned"])
def test_a_larger_matrix_goes_the_same_way_live_and_stored(decay):
    generator = torch.Generator().manual_seed(5)
    matrix = torch.randn(400, 150, generator=generator, dtype=torch.float64)
    matrix *= 10 ** torch.linspace(0, -decay, 150, dtype=torch.float64)

    live, stored = live_spectrum(matrix), spectrum(_stored(matrix))

    exact = np.linalg.svd(matrix.numpy(), compute_uv=False)
    for each in (live, stored):
        assert (abs(each.s - exact) <= each.error).all()
    # By the Gram matrix, whose bound is that of the least; by an SVD where that says too little.
    by_svd = 400 * np.finfo(float).eps * exact[0]
    for each in (live, stored):
        assert (each.error == pytest.approx(by_svd, rel=1e-6)) == (decay > 0)
    assert live.error == pytest.approx(stored.error, rel=1e-6)


@pytest.mark.parametrize("name", HARD)
@pytest.mark.parametrize("shape", [(384, 96), (256, 256)])
def test_the_error_bound_holds_for_torch_as_for_numpy(name, shape):
    matrix = HARD[name](np.random.default_rng(0), *shape)
    live = live_spectrum(torch.from_numpy(matrix))
    exact = scipy.linalg.svd(matrix, compute_uv=False, lapack_driver="gesvd")
    assert np.abs(live.s - exact).max() <= live.error
    product = torch.from_numpy(matrix).T @ torch.from_numpy(matrix)
    squares = torch.linalg.eigvalsh(product).numpy()[::-1]
    assert np.abs(squares - exact**2).max() <= gram_error(squares[0], max(shape))


def test_a_live_difference_counts_the_rounding_of_both_and_of_merges():
    now, before = (torch.randn(40, 30, generator=torch.Generator().manual_seed(s)) for s in (1, 2))

    live = live_spectrum(now, before=before, merges=2, rank_bound=7)

    exact = np.linalg.svd(now.double().numpy() - before.double().numpy(), compute_uv=False)
    terms = [(now.numpy(), "float32")] * 3 + [(before.numpy(), "float32")]
    np.testing.assert_allclose(live.s, exact, rtol=0, atol=1e-13 * exact[0])
    assert live.noise_floor == pytest.approx(noise.noise_floor(*terms), rel=1e-12)
    assert live.rank_bound == 7


def test_blocks_of_a_tall_matrix_are_measured_as_the_whole(monkeypatch):
    monkeypatch.setattr("dynamics.spectra.torch_spectrum._BLOCK", 64)
    tall = torch.randn(997, 6, generator=torch.Generator().manual_seed(3), dtype=torch.float64)
    before = 0.9 * tall + 0.1

    live, wide = live_spectrum(tall, before=before), live_spectrum(tall.T, before=before.T)

    exact = np.linalg.svd((tall - before).numpy(), compute_uv=False)
    for each in (live, wide):
        np.testing.assert_allclose(each.s, exact, rtol=0, atol=1e-14 * exact[0] * 10)


def _train_adapted(path, resume_at=None, **options):
    """Eight steps with a merge after the fourth, recorded in one part or two; returns the model."""
    model = adapted.adapted_model()
    optimizer = adapted.adam(model)
    for first, last in [(0, 8)] if resume_at is None else [(0, resume_at), (resume_at, 8)]:
        again = {"resume_at": first} if first else {}
        with Recorder(model, optimizer, path, every=2, **again, **options) as recorder:
            for step in range(first + 1, last + 1):
                optimizer.zero_grad()
                ids = adapted.tokens(step)
                model(input_ids=ids, labels=ids).loss.backward()
                optimizer.step()
                if step == 4:
                    _merge(model)
                    recorder.event(schema.MERGE)
    return model


@torch.no_grad()
def _merge(model):
    """Add s·B·A to the base weights and begin a new cycle with B = 0."""
    for module in model.modules():
        if isinstance(module, LoraLayer):
            module.get_base_layer().weight.add_(module.get_delta_weight("default"))
            module.lora_B["default"].weight.zero_()


@pytest.fixture(scope="module")
def matrices_and_spectra(tmp_path_factory):
    """The same adapted training recorded as matrices and as spectra."""
    folder = tmp_path_factory.mktemp("twins")
    models = [
        _train_adapted(folder / "matrices"),
        _train_adapted(folder / "spectra", spectra_only=True, record=ALL),
    ]
    return folder / "matrices", folder / "spectra", models


@pytest.mark.slow
def test_spectra_measured_in_training_are_those_of_the_recorded_matrices(matrices_and_spectra):
    kinds = ["weight", "adapter", "gradient", "update", "displacement"]
    stored, live = (dy.analyze(path, kinds=kinds) for path in matrices_and_spectra[:2])

    assert list(live.matrix.values) == list(stored.matrix.values)
    assert list(live.step.values) == [0, 2, 4, 6, 8]
    np.testing.assert_array_equal(live[schema.STATUS], stored[schema.STATUS])
    scale = stored[schema.SINGULAR_VALUE].max(schema.INDEX)
    assert (
        (abs(live[schema.SINGULAR_VALUE] - stored[schema.SINGULAR_VALUE]) <= 1e-13 * scale)
        .where(stored[schema.SINGULAR_VALUE].notnull(), True)
        .all()
    )
    for name in BOUNDS:
        np.testing.assert_allclose(live[name], stored[name], rtol=1e-9)
    for name in ("numerical_rank", "rank_bound", "effective_rank_above_floor"):
        np.testing.assert_allclose(live[name], stored[name], rtol=1e-9, err_msg=name)
    assert set(dy.open_run(matrices_and_spectra[1]).kinds) == set(kinds)


@pytest.mark.slow
def test_a_resumed_recording_knows_the_adapters_of_the_weights_it_refers_to(
    matrices_and_spectra, tmp_path
):
    _train_adapted(tmp_path / "resumed", resume_at=6, spectra_only=True, record=ALL)
    resumed, whole = (
        dy.analyze(path, kinds=["displacement"])
        for path in (tmp_path / "resumed", matrices_and_spectra[1])
    )
    for name in (schema.SINGULAR_VALUE, *BOUNDS, "rank_bound"):
        np.testing.assert_array_equal(resumed[name], whole[name])


@pytest.mark.slow
@pytest.mark.parametrize("device", ["cpu", pytest.param("cuda", marks=needs_cuda)])
def test_large_matrices_are_measured_where_the_model_is(tmp_path, device):
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(200, 300), nn.Tanh(), nn.Linear(300, 200)).to(device)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
    kinds = ["weight", "gradient", "update", "displacement"]
    live = Recorder(model, optimizer, tmp_path / "live", every=1, spectra_only=True, record=kinds)
    with live, Recorder(model, optimizer, tmp_path / "stored", every=1):
        for _ in range(3):
            optimizer.zero_grad()
            x = torch.randn(64, 200, device=device)
            (model(x) - x.flip(1)).square().mean().backward()
            optimizer.step()

    live, stored = (dy.analyze(tmp_path / name, kinds=kinds) for name in ("live", "stored"))

    np.testing.assert_array_equal(live[schema.STATUS], stored[schema.STATUS])
    errors = live[schema.SINGULAR_VALUE_ERROR] + stored[schema.SINGULAR_VALUE_ERROR]
    apart = abs(live[schema.SINGULAR_VALUE] - stored[schema.SINGULAR_VALUE])
    assert apart.notnull().any()
    assert (apart <= errors).where(apart.notnull(), True).all()
    np.testing.assert_allclose(live[schema.NOISE_FLOOR], stored[schema.NOISE_FLOOR], rtol=1e-9)


@needs_cuda
def test_a_matrix_for_which_a_gpu_has_no_memory_is_measured_on_the_cpu():
    matrix = torch.randn(2000, 1000, generator=torch.Generator().manual_seed(0))
    here = live_spectrum(matrix, before=matrix / 2)
    there = matrix.cuda()
    before = there / 2
    torch.cuda.empty_cache()
    torch.cuda.set_per_process_memory_fraction(1e-4)
    try:
        found = live_spectrum(there, before=before)
    finally:
        torch.cuda.set_per_process_memory_fraction(1.0)
    assert np.abs(found.s - here.s).max() <= found.error + here.error
    assert found.noise_floor == pytest.approx(here.noise_floor, rel=1e-12)


def test_spectra_only_leaves_training_as_it_is(matrices_and_spectra):
    for one, other in zip(*(model.parameters() for model in matrices_and_spectra[2]), strict=True):
        assert torch.equal(one, other)


def test_a_record_of_spectra_is_small_and_opens_in_plain_xarray(matrices_and_spectra):
    with xr.open_datatree(matrices_and_spectra[1], engine="zarr") as tree:
        weight = tree["spectra/weight"]
        matrices = dy.open_run(matrices_and_spectra[1]).matrices
        assert weight["singular_value"].dims == ("step", "matrix", "index")
        assert weight["singular_value"].shape[:2] == (5, len(matrices))
        told = weight["singular_value"].attrs["matrices"]
        assert {each["name"] for each in told} == set(matrices)
    chunks = [p for p in (matrices_and_spectra[1] / "weight").rglob("c/*") if p.is_dir()]
    assert {p.name for p in chunks} == {"0"}, "the weights of the first record only"


@pytest.mark.slow
def test_a_resumed_recording_of_spectra_refers_to_the_same_weights(tmp_path):
    def record(path, start, end, **options):
        model, optimizer = training.build()
        training.train(model, optimizer, start)
        with Recorder(
            model,
            optimizer,
            path,
            every=at_steps([0, 2, 4, 6, 9]),
            spectra_only=True,
            record=ALL,
            **options,
        ):
            training.train(model, optimizer, end, start=start)

    record(tmp_path / "whole", 0, 9)
    record(tmp_path / "twice", 0, 6)
    record(tmp_path / "twice", 4, 9, resume_at=4)
    record(tmp_path / "gap", 0, 6)
    record(tmp_path / "gap", 5, 9, resume_at=5)

    whole, twice, gap = (dy.analyze(tmp_path / name) for name in ("whole", "twice", "gap"))
    singular = schema.SINGULAR_VALUE
    np.testing.assert_array_equal(twice[singular], whole[singular])
    np.testing.assert_array_equal(twice[schema.NOISE_FLOOR], whole[schema.NOISE_FLOOR])
    # After step 5 nobody knows the weights of step 4 any more.
    unknown = gap[schema.STATUS].sel(kind="update", step=6)
    assert (unknown == schema.Status.NOT_RECORDED).all()
    for kind, step in (("update", 9), ("displacement", 6), ("displacement", 9)):
        np.testing.assert_array_equal(
            gap[singular].sel(kind=kind, step=step), whole[singular].sel(kind=kind, step=step)
        )


def test_numbers_that_are_not_finite_are_named_when_recorded_and_when_analyzed(tmp_path):
    model, optimizer = training.build()
    recorder = Recorder(model, optimizer, tmp_path / "r", every=1, spectra_only=True).attach()
    training.train(model, optimizer, 1)
    with torch.no_grad():
        model.up_proj.weight[3, 4] = torch.inf
    optimizer.zero_grad()
    optimizer.step()
    with pytest.warns(FailedCheckWarning, match="Step 2: weight of up_proj.weight holds NaN or"):
        recorder.close()
    with pytest.warns(UserWarning, match="up_proj.weight .weight. at step 2 holds NaN"):
        found = dy.analyze(tmp_path / "r", kinds=["weight"])
    status = found[schema.STATUS].sel(step=2, matrix="up_proj.weight").item()
    assert status == schema.Status.NON_FINITE


def test_what_needs_matrices_is_refused(matrices_and_spectra):
    for ask in (
        lambda: audit(matrices_and_spectra[1]),
        lambda: dy.analyze(matrices_and_spectra[1], components=["ov_circuit"]),
        lambda: dy.subspace_overlaps(dy.open_run(matrices_and_spectra[1]), k=2),
        lambda: dy.gradient_expressibility(matrices_and_spectra[1]),
    ):
        with pytest.raises(MissingError, match=r"needs the matrices, and .*spectra_only=True"):
            ask()


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"record": ["update"]}, "update: analyze computes it from the weights"),
        ({"record": ["update", "momentum"], "spectra_only": True}, "record takes some of .*update"),
        ({"spectra_only": True, "storage_dtype": "bfloat16"}, "storage_dtype='bfloat16'"),
        ({"spectra_only": True, "when_full": "skip"}, "when_full='skip'"),
    ],
)
def test_options_that_do_not_go_together_are_refused(options, message, tmp_path):
    model, optimizer = training.build()
    with pytest.raises(DynamicsError, match=message):
        Recorder(model, optimizer, tmp_path / "r", **options)


@pytest.mark.parametrize(
    "damage",
    [
        lambda listed: listed.pop(),
        lambda listed: listed.append(dict(listed[0], name="another")),
        lambda listed: listed[0].update(name=listed[1]["name"]),
        lambda listed: [each.update(rows=each["rows"] + 1, cols=100) for each in listed],
    ],
    ids=["fewer", "more", "twice", "wider"],
)
def test_damaged_spectra_are_one_line(matrices_and_spectra, tmp_path, damage):
    import json
    import shutil

    copied = tmp_path / "copy"
    shutil.copytree(matrices_and_spectra[1], copied)
    root = json.loads((copied / "zarr.json").read_text())
    path = "spectra/weight/singular_value"
    damage(root["consolidated_metadata"]["metadata"][path]["attributes"]["matrices"])
    (copied / "zarr.json").write_text(json.dumps(root))
    with pytest.raises(DynamicsError, match=f"{path} of .* metadata are damaged"):
        dy.open_run(copied)


def test_a_model_of_linear_layers_of_all_shapes_is_recorded(tmp_path):
    torch.manual_seed(0)
    model = nn.Sequential(nn.Embedding(500, 8), nn.Linear(8, 32), nn.Linear(32, 3))
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    with Recorder(model, optimizer, tmp_path / "r", every=1, spectra_only=True):
        model(torch.arange(20)).square().mean().backward()
        optimizer.step()
    run = dy.open_run(tmp_path / "r")
    for name, parameter in model.named_parameters():
        if parameter.ndim == 2:
            found = run.read_spectrum(name, 1, "weight")
            exact = np.linalg.svd(parameter.detach().double().numpy(), compute_uv=False)
            np.testing.assert_allclose(found.s, exact, rtol=1e-12, atol=1e-13 * exact[0])
