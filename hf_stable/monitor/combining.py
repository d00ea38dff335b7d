"""What the records of one probe on several processes say together: as if one had seen all.

Each process probes its own part of the batch. The measures of tokens are put together so that they
are those of one process with the same global batch; those of weights are the same everywhere. Under
tensor parallelism several processes see the same part of the batch, and each of them its own heads.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

import torch.distributed as dist
from torch import nn
from torch.distributed.fsdp import FSDPModule
from torch.distributed.tensor import DTensor

from hf_stable._ranks import values_of_all_ranks
from hf_stable.measures.matrix_shards import groups_of
from hf_stable.monitor.records import Records
from hf_stable.monitor.terms import MODES, find_term

__all__ = ["combine_records", "gather_records", "join_heads", "ranks_with_same_batch"]

Quantities = dict[str, dict[str, Any]]


def gather_records(records: Records, model: nn.Module) -> Quantities:
    """Return on every process what all of them have recorded, as `Records.to_dict` does for one.

    Every process has to call it, one that has recorded nothing included.

    Args:
        records: of this process.
        model: that was probed.
    """
    own = records.to_dict()
    if dist.is_available() and dist.is_initialized() and dist.get_rank():
        own.pop("maps", None)  # large, and only the first process's are kept
    parts = values_of_all_ranks((own, records.weights(), ranks_with_same_batch(model)))
    if len(parts) == 1:
        return own
    num_heads = getattr(getattr(model, "config", None), "num_attention_heads", None)
    together = list(dict.fromkeys(ranks for *_, ranks in parts))  # a process alone, or several
    seen, weights = (
        [join_heads([parts[rank][kind] for rank in ranks], num_heads) for ranks in together]
        for kind in (0, 1)
    )
    return combine_records(seen, weights)


def ranks_with_same_batch(model: nn.Module) -> tuple[int, ...]:
    """Return the ranks that see the part of the batch that this process sees, in their order.

    They are several under tensor parallelism: along the dimension "tp" of a mesh, or wherever
    weights are cut that FSDP2 does not gather.
    """
    if not (dist.is_available() and dist.is_initialized()):
        return (0,)
    gathered = any(isinstance(module, FSDPModule) for module in model.modules())
    for weight in model.parameters():
        if not isinstance(weight, DTensor):
            continue
        mesh = weight.device_mesh
        if "tp" in (mesh.mesh_dim_names or ()):
            return tuple(dist.get_process_group_ranks(mesh.get_group("tp")))
        if not gathered and (groups := groups_of(weight)):
            return tuple(dist.get_process_group_ranks(groups[0]))
    return (dist.get_rank(),)


def join_heads(parts: Sequence[Quantities], num_heads: int | None = None) -> Quantities:
    """Return what processes with the same part of a batch have recorded, each of its own heads.

    Args:
        parts: of the processes, in the order of their heads.
        num_heads: of a layer of the whole model, if known. Who has seen so many has seen all.

    Returns:
        The same with all heads; what is not of each head is the same on all, and the first's.
    """
    if len(parts) == 1:
        return parts[0]
    joined: Quantities = {}
    for name, layers in parts[0].items():
        is_seen = "attention" in find_term(name).needs
        joined[name] = {
            layer: [head for part in parts for head in part.get(name, {}).get(layer, ())]
            if is_seen and isinstance(value, list) and len(value) != num_heads
            else value
            for layer, value in layers.items()
        }
    return joined


def combine_records(
    parts: Sequence[Mapping[str, Mapping[str, Any]]],
    weights: Sequence[Mapping[str, Mapping[str, Any]]],
) -> Quantities:
    """Put together what several processes have recorded, each on its part of a batch.

    - Means over rows of attention are weighted by the number of rows. `rank` looks at one sequence
      on each process and is their mean.
    - Norms of activations add up as squares. The loss is the mean of the processes' losses, so
      gradients are divided by their number, as DDP and FSDP do. With several micro-batches it is
      their mean norms that are added.
    - Counts are summed. Of modes a head gets the worst.
    - What depends on weights only, and `maps`, comes from the first process that has it.

    Args:
        parts: `Records.to_dict()` of each process, empty where one has recorded nothing.
        weights: `Records.weights()` of each.

    Returns:
        The same, for all together.
    """
    combined: Quantities = {}
    for name in dict.fromkeys(name for part in parts for name in part):
        layers = _in_order([part.get(name, {}) for part in parts])
        combined[name] = {
            layer: _combine(
                name,
                [part[name][layer] for part in parts if layer in part.get(name, {})],
                [
                    weight.get(name, {}).get(layer, 1.0)
                    for part, weight in zip(parts, weights, strict=True)
                    if layer in part.get(name, {})
                ],
                len(parts),
            )
            for layer in layers
        }
    return combined


def _in_order(mappings: Sequence[Mapping[str, Any]]) -> list[str]:
    """Return the layers of all, in the order of the one that has most of them."""
    longest = max(mappings, key=len)
    return list(dict.fromkeys(layer for each in (longest, *mappings) for layer in each))


def _combine(name: str, values: Sequence[Any], weights: Sequence[Any], num_ranks: int) -> Any:
    how = find_term(name).combine
    if how == "mean":
        return _mean(values, weights)
    if how in ("norm", "gradient norm"):
        if any(value is None for value in values):
            return None  # not finite on one, so not finite
        return math.hypot(*values) / (num_ranks if how == "gradient norm" else 1)
    if how == "sum":
        return math.fsum(values)
    if how == "worst mode":
        return [max(modes, key=MODES.index) for modes in zip(*values, strict=True)]
    return values[0]


def _mean(values: Sequence[Any], weights: Sequence[Any]) -> Any:
    """Return the weighted mean, head by head; None where no process has a value."""
    if any(isinstance(value, list) for value in values):
        spread = [
            weight if isinstance(weight, list) else [weight] * len(value)
            for value, weight in zip(values, weights, strict=True)
        ]
        return [
            _mean(*heads)
            for heads in zip(zip(*values, strict=True), zip(*spread, strict=True), strict=True)
        ]
    known = [(v, w) for v, w in zip(values, weights, strict=True) if v is not None and w]
    if not known:
        return None
    return math.fsum(v * w for v, w in known) / math.fsum(w for _, w in known)
