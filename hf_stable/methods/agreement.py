"""Whether all ranks patch a model alike: those that do not would wait for each other for ever.

Weights that ranks share take collectives of all of them, when a model is patched and at each step.
So the ranks compare what they are about to do first, and every one of them is told.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence

from torch import nn
from torch.distributed.tensor import DTensor

from hf_stable._ranks import is_partitioned, values_of_all_ranks
from hf_stable.methods.config import MethodConfig
from hf_stable.methods.sigma_reparam.layers import SigmaLayer

__all__ = ["refuse_different_configs", "refuse_different_patches"]


def refuse_different_configs(
    model: nn.Module, configs: Iterable[MethodConfig], present: Iterable[MethodConfig]
) -> None:
    """Raise on every rank if ranks are about to patch a model differently that they share.

    Nothing is compared where each rank has a model of its own.

    Args:
        model: plain, or patched already.
        configs: what is asked for.
        present: what is in force.

    Raises:
        ValueError: naming both configs.
    """
    if not any(isinstance(p, DTensor) or is_partitioned(p) for p in model.parameters()):
        return
    mine = [*sorted(map(repr, configs)), *sorted(f"{config}, in force" for config in present)]
    for rank, theirs in enumerate(values_of_all_ranks(mine)):
        if theirs != mine:
            raise ValueError(
                "the ranks patch a model differently that they share: this one with "
                f"{'; '.join(mine)}, rank {rank} with {'; '.join(theirs) or 'nothing'}. Call "
                "hf_stable.patch with the same arguments on every rank"
            )


def refuse_different_patches(layers: Sequence[tuple[str, SigmaLayer]]) -> None:
    """Raise on every rank if ranks have patched a model differently. Every rank has to call it.

    Args:
        layers: of this rank's model, by name.

    Raises:
        ValueError: naming a layer.
    """
    mine = [
        f"{name}: {layer.parts}, power_iterations={layer.power_iterations}, "
        f"trained={layer.weight.requires_grad}"
        for name, layer in layers
    ]
    for rank, theirs in enumerate(values_of_all_ranks(mine)):
        if theirs != mine:
            odd = (sorted(set(theirs) ^ set(mine)) or mine)[0]
            raise ValueError(
                f"the ranks have patched the model differently: {odd!r} is on one of this rank, "
                f"with {len(mine)} reparametrised layers, and rank {rank}, with {len(theirs)}. "
                "Call hf_stable.patch with the same arguments on every rank"
            )
