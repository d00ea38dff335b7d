"""The optimizers that AdamW2 is measured beside, all over the same parameters."""

from __future__ import annotations

from importlib.util import find_spec
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from hf_stable.adamw2.model_optimizer import ModelAdamW2
from hf_stable.adamw2.optimizer import AdamW2

__all__ = ["BASELINE", "TORCH_ALONE", "make_optimizers", "make_peers"]

BASELINE = "AdamW fused"

TORCH_ALONE = "AdamW2 by torch alone"
"""The subject that uses no kernels."""

PEERS = ("AdamW", "StableAdamW", "SPAM")
"""Optimizers of pytorch_optimizer."""


def make_optimizers(model: nn.Module) -> dict[str, Optimizer]:
    """Return torch's AdamW in its forms, the first twice, and AdamW2 in its own.

    The ratio of the second to the first is what noise alone makes.
    """
    params = list(model.parameters())
    return {
        BASELINE: torch.optim.AdamW(params, fused=True),
        "AdamW fused, again": torch.optim.AdamW(params, fused=True),
        "AdamW foreach": torch.optim.AdamW(params, foreach=True),
        "AdamW2": ModelAdamW2([dict(params=params)], structure=model),
        "AdamW2, embeddings too": AdamW2(params),
        TORCH_ALONE: ModelAdamW2([dict(params=params)], structure=model),
    }


def make_peers(model: nn.Module) -> dict[str, Optimizer]:
    """Return the paper's algorithm written down plainly, and others that stabilise AdamW.

    The latter are those of pytorch_optimizer, where it is installed.
    """
    params = list(model.parameters())
    peers: dict[str, Optimizer] = {"naive loop": _NaiveAdamW2(params)}
    if find_spec("pytorch_optimizer") is not None:
        import pytorch_optimizer

        for name in PEERS:
            kind: Any = pytorch_optimizer.load_optimizer(name.lower())
            peers[f"pytorch_optimizer's {name}"] = kind(params, lr=1e-3)
    return peers


class _NaiveAdamW2(Optimizer):
    """Algorithm 1 as one would write it first: weight by weight, three cold power iterations."""

    def __init__(self, params: Any, lr: float = 1e-3, tau: float = 0.01) -> None:
        super().__init__(params, dict(lr=lr, tau=tau))

    @torch.no_grad()
    def step(self, closure: Any = None) -> Any:
        for group in self.param_groups:
            for param in group["params"]:
                state = self.state[param]
                if not state:
                    state.update(t=0, m=torch.zeros_like(param), v=torch.zeros_like(param))
                state["t"] += 1
                state["m"].lerp_(param.grad, 0.1)
                state["v"].mul_(0.999).addcmul_(param.grad, param.grad, value=0.001)
                root = (state["v"] / (1 - 0.999 ** state["t"])).sqrt() + 1e-8
                update = state["m"] / (1 - 0.9 ** state["t"]) / root
                bound = group["tau"] * self._sigma(param) / self._sigma(update)
                rate = min(group["lr"], bound) if bound > 0 else group["lr"]
                param.sub_(rate * update + rate * 0.01 * param)

    def _sigma(self, weight: Tensor) -> float:
        matrix = weight.flatten(1) if weight.ndim > 1 else weight.unsqueeze(1)
        v = torch.randn(matrix.shape[1], device=matrix.device)
        for _ in range(3):
            u = nn.functional.normalize(matrix @ v, dim=0)
            v = matrix.T @ u
            sigma = v.norm()
            v = v / (sigma + 1e-30)
        return sigma.item()
