"""Weights that something has flattened, resized or replaced since the optimizer was given them."""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor

__all__ = ["refuse_flattened", "refuse_resized"]


def refuse_flattened(param: Tensor, *, replaced: bool = False) -> None:
    """Raise ValueError for a parameter that another library has flattened: it has no spectrum.

    Args:
        param: to be stepped.
        replaced: whether the optimizer was built with a parameter of another shape in its place.
    """
    if replaced or getattr(param, "_fsdp_flattened", False):
        raise ValueError(
            "AdamW2 needs to know the weight matrices, and these parameters were flattened or "
            "replaced. FSDP1 does that: use FSDP2's fully_shard, DDP or DeepSpeed. DeepSpeed ZeRO "
            "says where the matrices are when its engine is built: import deepspeed before the "
            "optimizer is built, and give the engine the optimizer"
        )


def refuse_resized(param: Tensor, shape: Sequence[int]) -> None:
    """Raise ValueError for a weight that has other rows or columns than its state.

    Args:
        param: to be stepped.
        shape: of it when the optimizer was built.
    """
    if len(param.shape) == len(shape) > 1 and param.shape != shape:
        raise ValueError(
            f"a weight of shape {tuple(shape)} has become {tuple(param.shape)} since the optimizer "
            "was built: its moments fit no longer, and layers that came with it "
            "(resize_token_embeddings replaces an untied head) are in no group. Build the "
            "optimizer, and its scheduler, once the model has its last shape"
        )
