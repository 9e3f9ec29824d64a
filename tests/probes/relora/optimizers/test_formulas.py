"""Each optimizer against its formulas, written down once more with NumPy in float64."""

import numpy as np
import pytest
import torch

from probes.relora.optimizers.muon import MuonAndAdamW
from probes.relora.optimizers.projected import ProjectedAdamW

RANK, GAP, SCALE, RATE = 3, 2, 0.25, 0.05
SHAPES = [(12, 7), (7, 12)]


def limited(change, last):
    """Fira's limiter: a norm that grew by more than 1 % is scaled down to that."""
    norm = np.linalg.norm(change)
    if last is not None and norm > 1.01 * last:
        change, norm = change * (1.01 * last / norm), 1.01 * last
    return change, norm


def projected_steps(method, weight, gradients, projectors):
    """GaLore (2403.03507, algorithm 2), Fira (2410.01623, its code) and APOLLO (2412.05270, eq. 5).

    Moments are those of the projection R. Fira's residual subtracts α times what the projector
    holds, where the paper subtracts all of it.
    """
    tall = weight.shape[0] >= weight.shape[1]
    axis = 1 if tall else 0  # of a channel
    first = second = 0.0
    last = None
    for t, gradient in enumerate(gradients):
        if method == "apollo":
            p = projectors[t]
        elif t % GAP == 0:
            left, _, right = np.linalg.svd(gradient, full_matrices=False)
            p = right[:RANK] if tall else left[:, :RANK].T
            # Singular vectors have free signs, which the moments of the last projector feel.
            p = p * np.sign((p * projectors[t]).sum(axis=1, keepdims=True))
        small = gradient @ p.T if tall else p @ gradient

        def back(inside, p=p):
            return inside @ p if tall else p.T @ inside

        first = 0.9 * first + 0.1 * small
        second = 0.999 * second + 0.001 * small**2
        normed = first / np.sqrt(second)
        factor = np.linalg.norm(normed, axis=axis, keepdims=True) / np.linalg.norm(
            small, axis=axis, keepdims=True
        )
        if method == "galore":
            change = SCALE * back(normed)
        elif method == "fira":
            residual, last = limited((gradient - SCALE * back(small)) * factor, last)
            change = SCALE * back(normed) + residual
        else:
            change, last = limited(gradient * factor, last)
            change = SCALE**0.5 * change
        bias = np.sqrt(1 - 0.999 ** (t + 1)) / (1 - 0.9 ** (t + 1))
        weight = weight - RATE * bias * change
    return weight


def muon_steps(weight, gradients):
    """Nesterov momentum, then five Newton-Schulz steps; scaled by √max(1, m/n)."""
    momentum = 0.0
    for gradient in gradients:
        momentum = 0.95 * momentum + 0.05 * gradient
        x = 0.05 * gradient + 0.95 * momentum
        x = x / np.linalg.norm(x)
        for _ in range(5):
            gram = x @ x.T
            x = 3.4445 * x + (-4.775 * gram + 2.0315 * gram @ gram) @ x
        weight = weight - RATE * max(1, weight.shape[0] / weight.shape[1]) ** 0.5 * x
    return weight


def start(shape, steps, dtype=torch.float64):
    rng = np.random.default_rng(0)
    weight = torch.nn.Parameter(torch.tensor(rng.normal(size=shape), dtype=dtype))
    common = rng.normal(size=shape)  # gradients of a training resemble each other
    return weight, [common + rng.normal(size=shape) for _ in range(steps)]


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("method", ["galore", "fira", "apollo"])
def test_three_steps_across_a_new_projector(method, shape):
    weight, gradients = start(shape, 3)
    before = weight.detach().numpy().copy()
    group = {"params": [weight], "projection": method, "rank": RANK, "gap": GAP, "seed": 0}
    optimizer = ProjectedAdamW([{**group, "scale": SCALE}], lr=RATE, eps=0.0)
    projectors = []
    for gradient in gradients:
        weight.grad = torch.tensor(gradient)
        optimizer.step()
        projectors.append(optimizer.state[weight]["projector"].numpy().copy())
    expected = projected_steps(method, before, gradients, projectors)
    step = np.linalg.norm(expected - before)
    # Directions are taken in float32, and norms of channels have 1e-8 added.
    tolerance = 1e-7 if method == "apollo" else 1e-5
    error = np.linalg.norm(weight.detach().numpy() - expected) / step
    assert error < tolerance


@pytest.mark.parametrize("shape", SHAPES)
def test_three_steps_of_muon(shape):
    weight, gradients = start(shape, 3)
    before = weight.detach().numpy().copy()
    optimizer = MuonAndAdamW([weight], [torch.nn.Parameter(torch.zeros(2))], lr=RATE, other_lr=0.1)
    for gradient in gradients:
        weight.grad = torch.tensor(gradient)
        optimizer.step()
    expected = muon_steps(before, gradients)
    # Its Newton-Schulz steps are in bfloat16.
    error = np.linalg.norm(weight.detach().numpy() - expected)
    assert error < 0.03 * np.linalg.norm(expected - before)


@pytest.mark.parametrize("shape", SHAPES)
def test_galores_update_lies_within_its_projector_until_the_next_one(shape):
    weight, gradients = start(shape, 2 * GAP, torch.float32)
    group = {"params": [weight], "projection": "galore", "rank": RANK, "gap": GAP, "seed": 0}
    optimizer = ProjectedAdamW([{**group, "scale": SCALE}], lr=1e-3)
    seen = []
    for gradient in gradients:
        weight.grad = torch.tensor(gradient, dtype=torch.float32)
        before = weight.detach().double().clone()
        optimizer.step()
        p = optimizer.state[weight]["projector"].double()
        seen.append((before, weight.detach().double().clone(), p))

    def share_outside(update, p):
        inside = update @ p.T if shape[0] >= shape[1] else p @ update
        return float(1 - inside.square().sum() / update.square().sum())

    for first, last in ((0, GAP - 1), (GAP, 2 * GAP - 1)):
        assert share_outside(seen[last][1] - seen[first][0], seen[first][2]) < 1e-6
    for before, after, _ in seen:  # each step alone, too
        s = torch.linalg.svdvals(after - before)
        assert float(s[RANK]) < 1e-3 * float(s[RANK - 1])
    across = seen[-1][1] - seen[0][0]
    assert min(share_outside(across, seen[0][2]), share_outside(across, seen[-1][2])) > 0.01
