"""Muon as it is used: on the matrices of the blocks, with AdamW on everything else."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn
from torch.optim import Optimizer
from transformers import PreTrainedModel
from transformers.pytorch_utils import Conv1D

__all__ = ["MuonWithAdamW", "muon_with_adamw"]


class MuonWithAdamW(Optimizer):
    """`torch.optim.Muon` and `torch.optim.AdamW` as one optimizer, under one schedule.

    The two have groups and state in common with it, so that a scheduler, `state_dict` and
    `load_state_dict` see one optimizer.
    """

    def __init__(self, muon: Optimizer, adamw: Optimizer) -> None:
        """Take two optimizers that have no step behind them."""
        self.parts = (muon, adamw)
        super().__init__([*muon.param_groups, *adamw.param_groups], {})
        self._share()

    def step(self, closure: Any = None) -> Any:
        """Take a step with both; a closure is called once, before them."""
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        for part in self.parts:
            part.step()
        return loss

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Load what `state_dict` returned, for both."""
        super().load_state_dict(state_dict)
        self._share()

    def _share(self) -> None:
        groups = list(self.param_groups)
        for part in self.parts:
            number = len(part.param_groups)
            part.param_groups, groups = groups[:number], groups[number:]
            part.state = self.state


def muon_with_adamw(
    model: PreTrainedModel,
    *,
    lr: float,
    weight_decay: float,
    betas: tuple[float, float],
    **options: Any,
) -> MuonWithAdamW:
    """Return Muon for the matrices of a model's blocks, and AdamW for all else, at one rate.

    Muon's update has the root mean square of AdamW's, 0.2 of the rate (Liu et al. 2025, "Muon is
    scalable for LLM training"), so that rates of the two can be compared. A fused projection of
    queries, keys and values is one matrix.

    Args:
        model: to train. Embeddings, heads, convolutions, biases and gains are AdamW's.
        lr: of both.
        weight_decay: of both, but for biases and gains.
        betas: AdamW's.
        **options: Muon's own.

    Raises:
        ValueError: if the installed torch has no Muon, which came with 2.9.
    """
    if not hasattr(torch.optim, "Muon"):
        raise ValueError(
            f"torch {torch.__version__} has no Muon, which came with 2.9; upgrade torch, or take "
            "optim pytorch_optimizer:AdaMuon, say"
        )
    matrices = [
        module.weight
        for module in model.base_model.modules()
        if isinstance(module, nn.Linear | Conv1D) and module.weight.requires_grad
    ]
    taken = {id(each) for each in matrices}
    rest = [p for p in model.parameters() if p.requires_grad and id(p) not in taken]
    decayed = [p for p in rest if p.ndim > 1]
    others = [p for p in rest if p.ndim <= 1]
    options = {"adjust_lr_fn": "match_rms_adamw"} | options
    return MuonWithAdamW(
        torch.optim.Muon(matrices, lr=lr, weight_decay=weight_decay, **options),
        torch.optim.AdamW(
            [{"params": decayed}, {"params": others, "weight_decay": 0.0}],
            lr=lr,
            betas=betas,
            weight_decay=weight_decay,
        ),
    )
