"""`ProjectedAdamW`: GaLore, Fira and APOLLO, whose moments live in a few directions of gradients.

Sources: GaLore, Zhao et al. 2024, arXiv 2403.03507, algorithm 2. Fira, Chen et al. 2024, arXiv
2410.01623, equations 4 to 8; its residual follows the published code. APOLLO, Zhu et al. 2024,
arXiv 2412.05270, algorithm 1, from the formulas alone.

The state is tensors and numbers, so that a training that is resumed computes the same bits. The
published packages keep the projector as an object, which torch does not load.
"""

import math
from collections.abc import Callable, Iterable
from typing import Any

import torch

from probes.relora.seeding import PROJECTION, stream_seed

_GROWTH = 1.01  # by how much a residual or a scaled gradient may grow from one step to the next


class ProjectedAdamW(torch.optim.Optimizer):
    """AdamW; in groups with a `projection`, its moments are those of a projected gradient.

    Below, G is a gradient with its longer side first (transposed where it has more columns than
    rows), P (r, short) the projector and R = G Pᵀ. N is Adam's step of R, m̂/(√v̂ + eps).

    - `galore`: W ← W − η·α·N P. P holds the r leading right singular vectors of G.
    - `fira`: W ← W − η·(α·N P + S), S = φ·(G − α·R P), with φ_i = ‖N_i‖/‖R_i‖ for each row. As in
      the published code, the residual keeps 1 − α of the gradient inside the directions.
    - `apollo`: W ← W − η·√α·φ·G. P is random, with entries of variance 1/r.

    P is taken anew at steps 1, gap + 1, 2·gap + 1, ...; the moments go on as they are, whatever the
    new directions and their signs. S and φ·G grow by at most 1 % per step in norm. Other groups are
    plain AdamW.

    Args:
        params: parameters, or groups. A group with `projection` also has `rank` (r), `gap`,
            `scale` (α) and `seed`; its parameters have two dimensions.
        lr: η.
        betas: of Adam.
        eps: of Adam, added to √v before the bias correction, as in the published code.
        weight_decay: decoupled. A projected weight that decays changes with full rank.

    Example:
        >>> weight = torch.nn.Parameter(torch.zeros(6, 4))
        >>> group = {"params": [weight], "projection": "galore", "rank": 1, "gap": 10, "scale": 1.0}
        >>> optimizer = ProjectedAdamW([group | {"seed": 0}], lr=0.1)
        >>> weight.grad = torch.randn(6, 4)
        >>> _ = optimizer.step()
        >>> int(torch.linalg.matrix_rank(weight.detach()))
        1
    """

    def __init__(
        self,
        params: Iterable[Any],
        lr: float,
        *,
        betas: tuple[float, float] = (0.9, 0.999),
        eps: float = 1e-6,
        weight_decay: float = 0.0,
    ):
        defaults = {"lr": lr, "betas": betas, "eps": eps, "weight_decay": weight_decay}
        super().__init__(params, defaults)
        self._refreshed: dict[torch.Tensor, dict[str, float]] = {}

    @torch.no_grad()
    def step(self, closure: Callable[[], Any] | None = None) -> Any:
        """Take one step; returns the loss of `closure`."""
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        self._refreshed, index = {}, 0
        for group in self.param_groups:
            for parameter in group["params"]:
                index += 1
                if parameter.grad is not None:
                    self._step(parameter, group, index)
        return loss

    def refreshed(self) -> dict[torch.Tensor, dict[str, float]]:
        """Parameters whose projector the last step took anew, with facts about it.

        `energy_inside` is the share of the gradient's energy in the directions, ‖G Q‖²/‖G‖² with an
        orthonormal basis Q of the rows of P. `overlap_with_last` is the mean cos² of their angles
        with the directions before, which are missing at the first step.
        """
        return self._refreshed

    def _step(self, parameter: torch.Tensor, group: dict[str, Any], index: int) -> None:
        state, projection = self.state[parameter], group.get("projection")
        done = state.get("step", 0)
        gradient = parameter.grad
        assert gradient is not None
        tall = gradient.T if projection and gradient.shape[0] < gradient.shape[1] else gradient
        if projection and done % group["gap"] == 0:
            seed = stream_seed(group["seed"], PROJECTION, index, done)
            before = state.get("projector")
            state["projector"] = _projector(gradient, group, seed)
            self._refreshed[parameter] = _facts(tall, state["projector"], before)
        small = tall @ state["projector"].T if projection else tall
        normed = _adam(small, state, group["betas"], group["eps"])
        beta1, beta2 = group["betas"]
        rate = group["lr"] * math.sqrt(1 - beta2 ** (done + 1)) / (1 - beta1 ** (done + 1))
        if projection:
            change = _change(tall, small, normed, state, group)
            change = change.T if tall is not gradient else change
        else:
            change = normed
        parameter.add_(change, alpha=-rate)
        state["step"] = done + 1
        if group["weight_decay"]:
            parameter.mul_(1 - group["lr"] * group["weight_decay"])


def _projector(gradient: torch.Tensor, group: dict[str, Any], seed: int) -> torch.Tensor:
    short = min(gradient.shape)
    rank = min(group["rank"], short)
    if group["projection"] == "apollo":
        generator = torch.Generator().manual_seed(seed)
        drawn = torch.randn(rank, short, generator=generator) / math.sqrt(rank)
        return drawn.to(gradient)
    left, _, right = torch.linalg.svd(gradient.float(), full_matrices=False)
    vectors = left.T if gradient.shape[0] < gradient.shape[1] else right
    return vectors[:rank].to(gradient.dtype).contiguous()


def _adam(
    gradient: torch.Tensor, state: dict[str, Any], betas: tuple[float, float], eps: float
) -> torch.Tensor:
    if "exp_avg" not in state:
        state["exp_avg"] = torch.zeros_like(gradient, memory_format=torch.preserve_format)
        state["exp_avg_sq"] = torch.zeros_like(gradient, memory_format=torch.preserve_format)
    first, second = state["exp_avg"], state["exp_avg_sq"]
    first.mul_(betas[0]).add_(gradient, alpha=1 - betas[0])
    second.mul_(betas[1]).addcmul_(gradient, gradient, value=1 - betas[1])
    return first / (second.sqrt() + eps)


def _change(
    tall: torch.Tensor,
    small: torch.Tensor,
    normed: torch.Tensor,
    state: dict[str, Any],
    group: dict[str, Any],
) -> torch.Tensor:
    projector, scale = state["projector"], group["scale"]
    if group["projection"] == "galore":
        return normed @ projector * scale
    factor = normed.norm(dim=1, keepdim=True) / (small.norm(dim=1, keepdim=True) + 1e-8)
    if group["projection"] == "fira":
        residual = _limited((tall - small @ projector * scale) * factor, state)
        return normed @ projector * scale + residual
    return _limited(tall * factor, state) * math.sqrt(scale)


def _limited(change: torch.Tensor, state: dict[str, Any]) -> torch.Tensor:
    norm, last = change.norm(), state.get("last_norm")
    if last is not None:
        shrink = torch.clamp(norm / (last + 1e-8), min=_GROWTH) / _GROWTH
        change, norm = change / shrink, norm / shrink
    state["last_norm"] = norm
    return change


def _facts(
    tall: torch.Tensor, projector: torch.Tensor, before: torch.Tensor | None
) -> dict[str, float]:
    basis = torch.linalg.qr(projector.T.double())[0]
    gradient = tall.double()
    energy = gradient.square().sum()
    facts = {}
    if energy > 0:
        facts["energy_inside"] = float((gradient @ basis).square().sum() / energy)
    if before is not None:
        last = torch.linalg.qr(before.T.double())[0]
        facts["overlap_with_last"] = float((last.T @ basis).square().sum() / basis.shape[1])
    return facts
