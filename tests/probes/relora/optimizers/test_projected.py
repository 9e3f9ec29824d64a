"""GaLore, Fira and APOLLO, against their packages where there are any, and by their properties."""

import copy
import io
import warnings
from itertools import pairwise

import pytest
import torch

from probes.relora.optimizers.projected import ProjectedAdamW

RANK, GAP = 3, 4
SHAPES = [(12, 7), (7, 12), (9, 9)]


def group(parameters, method, scale=0.25):
    options = {"projection": method, "rank": RANK, "gap": GAP, "scale": scale, "seed": 0}
    return {"params": parameters, **options}


def parameters(dtype=torch.float64):
    generator = torch.Generator().manual_seed(0)
    return [torch.nn.Parameter(torch.randn(s, generator=generator, dtype=dtype)) for s in SHAPES]


def give_gradients(to, step):
    generator = torch.Generator().manual_seed(100 + step)
    for each in to:
        drawn = torch.randn(each.shape, generator=generator, dtype=torch.float64)
        # Correlated from step to step, as in a training.
        each.grad = (drawn + 2 * torch.sin(each.detach().double() + step / 9)).to(each.dtype)


def stepped(optimizer, to, steps, begin=0):
    for step in range(begin, begin + steps):
        give_gradients(to, step)
        optimizer.step()
    return to


@pytest.mark.parametrize(
    ("method", "module", "name", "scale"),
    [("galore", "galore_torch", "GaLoreAdamW", "scale"), ("fira", "fira", "FiraAdamW", "alpha")],
)
def test_it_is_what_the_package_of_the_method_computes(method, module, name, scale):
    package = pytest.importorskip(module, reason=f"needs {module}")
    ours, theirs = parameters(torch.float32), parameters(torch.float32)
    options = {"rank": RANK, "update_proj_gap": GAP, scale: 0.25, "proj_type": "std"}
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", FutureWarning)
        optimizer = getattr(package, name)([{"params": theirs, **options}], lr=0.05)
    stepped(optimizer, theirs, 11)
    stepped(ProjectedAdamW([group(ours, method)], lr=0.05), ours, 11)
    for one, other in zip(ours, theirs, strict=True):
        torch.testing.assert_close(one, other, rtol=2e-5, atol=2e-6)


def test_galore_moves_within_r_directions_and_r_more_with_each_projector():
    weights = parameters()
    start = copy.deepcopy(weights)
    optimizer = ProjectedAdamW([group(weights, "galore")], lr=0.05)
    for steps in range(1, 2 * GAP + 1):
        stepped(optimizer, weights, 1, begin=steps - 1)
        for weight, first in zip(weights, start, strict=True):
            s = torch.linalg.svdvals(weight.detach() - first.detach())
            rank = RANK if steps <= GAP else 2 * RANK
            # The directions are those of a float32 SVD; all of the change lies within them.
            assert int((s > 1e-9 * s[0]).sum()) == min(rank, *weight.shape)


def test_galore_is_written_down_once_more():
    """One step from zero moments: m̂/(√v̂ + eps') is the sign of R."""
    (weight, *_) = parameters()
    start = weight.detach().clone()
    give_gradients([weight], 0)
    gradient = weight.grad.clone()
    ProjectedAdamW([group([weight], "galore", scale=0.5)], lr=0.1, eps=0.0).step()
    p = torch.linalg.svd(gradient.float(), full_matrices=False)[2][:RANK].double()
    expected = start - 0.1 * 0.5 * torch.sign(gradient @ p.T) @ p
    torch.testing.assert_close(weight.detach(), expected, rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize("inside", [True, False])
def test_firas_residual_keeps_a_share_of_what_lies_inside(inside):
    """G − α·R P: all of the gradient outside of the directions, 1 − α of that inside."""
    (weight, *_) = parameters()
    start = weight.detach().clone()
    give_gradients([weight], 0)
    gradient = weight.grad.clone()
    ProjectedAdamW([group([weight], "fira")], lr=1.0, eps=0.0).step()
    p = torch.linalg.svd(gradient.float(), full_matrices=False)[2][:RANK].double()
    r = gradient @ p.T
    phi = RANK**0.5 / r.norm(dim=1, keepdim=True)  # ‖sign(R)‖ of each row over ‖R‖
    change = start - weight.detach()
    if inside:
        expected = 0.25 * torch.sign(r) + 0.75 * phi * r
        torch.testing.assert_close(change @ p.T, expected, rtol=1e-6, atol=1e-8)
    else:
        outside = torch.eye(7, dtype=torch.float64) - p.T @ p
        torch.testing.assert_close(
            change @ outside, phi * (gradient @ outside), rtol=1e-6, atol=1e-7
        )


def test_apollo_scales_the_channels_of_the_raw_gradient():
    weights = parameters()
    optimizer = ProjectedAdamW([group(weights, "apollo", scale=1.0)], lr=0.05)
    for step in range(6):
        before = [each.detach().clone() for each in weights]
        stepped(optimizer, weights, 1, begin=step)
        for weight, last in zip(weights, before, strict=True):
            change, gradient = last - weight.detach(), weight.grad
            along = 1 if weight.shape[0] >= weight.shape[1] else 0
            cosine = torch.nn.functional.cosine_similarity(change, gradient, dim=along)
            torch.testing.assert_close(cosine, torch.ones_like(cosine), rtol=0, atol=1e-12)


@pytest.mark.parametrize("method", ["fira", "apollo"])
def test_a_gradient_that_jumps_makes_no_step_that_does(method):
    (weight, *_) = parameters()
    optimizer = ProjectedAdamW([group([weight], method)], lr=1e-3)
    norms = []
    for step in range(8):
        give_gradients([weight], step)
        weight.grad *= 1000 if step == 5 else 1
        optimizer.step()
        norms.append(float(optimizer.state[weight]["last_norm"]))
    growth = [after / before for before, after in pairwise(norms)]
    assert max(growth) <= 1.01 + 1e-9
    if method == "fira":  # APOLLO's factor falls by as much
        assert growth[4] == pytest.approx(1.01)


@pytest.mark.parametrize("method", ["galore", "fira", "apollo"])
def test_it_goes_on_from_a_file_with_the_same_bits(method):
    whole = parameters(torch.float32)
    stepped(ProjectedAdamW([group(whole, method)], lr=0.05), whole, 2 * GAP + 3)
    cut = parameters(torch.float32)
    first = ProjectedAdamW([group(cut, method)], lr=0.05)
    stepped(first, cut, GAP + 1)
    file = io.BytesIO()
    torch.save(first.state_dict(), file)
    file.seek(0)
    second = ProjectedAdamW([group(cut, method)], lr=0.05)
    second.load_state_dict(torch.load(file))  # weights only: nothing of ours is unpickled
    stepped(second, cut, GAP + 2, begin=GAP + 1)
    assert all(map(torch.equal, cut, whole))


def test_what_is_not_projected_is_adamw():
    ours, theirs = parameters(), parameters()
    stepped(ProjectedAdamW(ours, lr=0.01, eps=1e-30), ours, 5)
    stepped(torch.optim.AdamW(theirs, lr=0.01, eps=1e-30, weight_decay=0.0), theirs, 5)
    for one, other in zip(ours, theirs, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-12, atol=1e-14)


def test_a_new_projector_is_told_with_its_energy_and_overlap():
    weights = parameters()
    optimizer = ProjectedAdamW([group(weights, "galore")], lr=0.05)
    projectors = []
    for step in range(GAP + 2):
        stepped(optimizer, weights, 1, begin=step)
        told = optimizer.refreshed()
        assert bool(told) == (step % GAP == 0)
        if not told:
            continue
        p = optimizer.state[weights[0]]["projector"]
        gradient = weights[0].grad
        energy = (gradient @ p.T).norm() ** 2 / gradient.norm() ** 2
        assert told[weights[0]]["energy_inside"] == pytest.approx(float(energy), rel=1e-6)
        if projectors:
            overlap = (p @ projectors[-1].T).norm() ** 2 / RANK
            assert told[weights[0]]["overlap_with_last"] == pytest.approx(float(overlap), rel=1e-6)
        else:
            assert "overlap_with_last" not in told[weights[0]]
        projectors.append(p.clone())
