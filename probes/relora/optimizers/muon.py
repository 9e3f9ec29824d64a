"""`MuonAndAdamW`: torch's Muon for matrices and AdamW for everything else, as one optimizer."""

from collections.abc import Callable, Iterable
from typing import Any

import torch


class MuonAndAdamW(torch.optim.Optimizer):
    """Muon takes the matrices inside the layers, AdamW the rest; the Trainer takes one optimizer.

    Muon: Jordan et al. 2024, https://kellerjordan.github.io/posts/muon/, as `torch.optim.Muon`.

    Args:
        matrices: parameters of two dimensions.
        others: all other parameters that train.
        lr: of Muon.
        other_lr: of AdamW.
        weight_decay: of both, decoupled.

    Example:
        >>> layer = torch.nn.Linear(4, 3)
        >>> optimizer = MuonAndAdamW([layer.weight], [layer.bias], lr=0.02, other_lr=1e-3)
        >>> [group["lr"] for group in optimizer.param_groups]
        [0.02, 0.001]
    """

    def __init__(
        self,
        matrices: Iterable[torch.Tensor],
        others: Iterable[torch.Tensor],
        *,
        lr: float,
        other_lr: float,
        weight_decay: float = 0.0,
    ):
        self.muon = torch.optim.Muon(matrices, lr=lr, weight_decay=weight_decay)
        self.adamw = torch.optim.AdamW(others, lr=other_lr, weight_decay=weight_decay)
        super().__init__([*self.muon.param_groups, *self.adamw.param_groups], {})
        self._share_groups()

    def _share_groups(self) -> None:
        # A schedule sets the rates of these very groups.
        self.param_groups = [*self.muon.param_groups, *self.adamw.param_groups]

    def step(self, closure: Callable[[], Any] | None = None) -> Any:
        """Take one step of both; returns the loss of `closure`."""
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        self.muon.step()
        self.adamw.step()
        return loss

    def state_dict(self) -> dict[str, Any]:
        """The states of both."""
        return {"muon": self.muon.state_dict(), "adamw": self.adamw.state_dict()}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Take over what `state_dict` gave."""
        self.muon.load_state_dict(state_dict["muon"])
        self.adamw.load_state_dict(state_dict["adamw"])
        self._share_groups()
