"""What a run over several processes wraps: tensors in shards, values by rank, the optimizer.

With one process everything here returns what it is given.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.tensor import DTensor

__all__ = [
    "failing_together",
    "gathered",
    "inner_optimizer",
    "is_divided",
    "is_partitioned",
    "local_tensor",
    "mean_over_ranks",
    "num_ranks",
    "placed_like",
    "value_of_first_rank",
    "values_of_all_ranks",
    "whole_shape",
    "whole_tensor",
]


def whole_tensor(value: Any) -> Any:
    """Return a sharded or partitioned tensor gathered whole, and anything else as it is.

    Every rank of a sharded tensor has to call it.
    """
    if is_partitioned(value):
        with gathered(value):
            return value.detach().clone()
    return value.full_tensor() if isinstance(value, DTensor) else value


def is_partitioned(value: Any) -> bool:
    """Say whether DeepSpeed ZeRO-3 has taken the entries of a parameter elsewhere.

    It does so to models that are made after `TrainingArguments` with such a config. The parameter
    is empty then; a model may have empty ones of its own (DINOv3 without register tokens).
    """
    return hasattr(value, "ds_id") and value.numel() == 0


def is_divided(value: Any) -> bool:
    """Say whether processes share a tensor, each with a part of its entries."""
    return isinstance(value, DTensor) or is_partitioned(value)


def whole_shape(tensor: Tensor) -> torch.Size:
    """Return the shape of a tensor, of a partitioned one that of all its entries."""
    return torch.Size(tensor.ds_shape) if is_partitioned(tensor) else tensor.shape  # type: ignore[attr-defined]  # DeepSpeed's


def gathered(param: Tensor, *, written: bool = False) -> AbstractContextManager[Any]:
    """Have a partitioned parameter whole inside this context, and any other as it is.

    Every rank has to enter and leave it.

    Args:
        param: of a module.
        written: whether the context writes to it. What the first rank has written counts.
    """
    if not is_partitioned(param):
        return nullcontext()
    import deepspeed

    rank = 0 if written else None
    gathering: AbstractContextManager[Any]
    gathering = deepspeed.zero.GatheredParameters([param], modifier_rank=rank)
    return gathering


def local_tensor(tensor: Tensor) -> Tensor:
    """Return the rows of a sharded tensor that this process holds, and a plain one as it is."""
    return tensor.to_local() if isinstance(tensor, DTensor) else tensor


def placed_like(value: Tensor, like: Tensor) -> Tensor:
    """Return a sharded tensor placed as another is, and anything else as it is.

    The gradient of a weight may still have to be summed over ranks, or be whole on each (that of an
    embedding which tensor parallelism has cut), until an operation needs both.
    """
    if isinstance(value, DTensor) and isinstance(like, DTensor):
        return value.redistribute(placements=like.placements)
    return value


def num_ranks() -> int:
    """Return the number of processes that run together."""
    return dist.get_world_size() if dist.is_available() and dist.is_initialized() else 1


def mean_over_ranks(*values: Tensor) -> list[float]:
    """Return each number's mean over all processes, with one read from the device."""
    device = values[0].device
    joined = torch.stack([value.to(device, torch.float32).reshape(()) for value in values])
    if num_ranks() > 1:
        dist.all_reduce(joined)
        joined /= num_ranks()
    return joined.tolist()


def value_of_first_rank(value: Any) -> Any:
    """Return what the first process holds, on every process."""
    if num_ranks() == 1:
        return value
    box = [value]
    dist.broadcast_object_list(box)
    return box[0]


def values_of_all_ranks(value: Any) -> list[Any]:
    """Return what each process holds, in the order of their ranks, on every process."""
    if num_ranks() == 1:
        return [value]
    values: list[Any] = [None] * num_ranks()
    dist.all_gather_object(values, value)
    return values


@contextmanager
def failing_together(is_shared: bool) -> Iterator[None]:
    """Raise on every rank where the block has raised on one, which others would wait for later on.

    Every rank has to come by here, and nothing in the block may need the others.

    Args:
        is_shared: whether the ranks work together. Otherwise nothing is asked of them.

    Raises:
        RuntimeError: naming the rank that failed and why, on those that did not.
    """
    own: BaseException | None = None
    try:
        yield
    except BaseException as error:
        own = error
    said = None if own is None else f"{type(own).__name__}: {own}"
    everyone = values_of_all_ranks(said) if is_shared else [said]
    if own is not None:
        raise own
    for rank, why in enumerate(everyone):
        if why is not None:
            raise RuntimeError(f"rank {rank} could not do its part, so that none does: {why}")


def inner_optimizer(optimizer: Any) -> Any:
    """Return the optimizer inside accelerate's wrapper, and any other as it is."""
    return getattr(optimizer, "optimizer", optimizer)
