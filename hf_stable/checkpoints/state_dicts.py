"""State dicts of patched models, parted into plain weights and what folding loses."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from hf_stable._ranks import whole_tensor
from hf_stable.architectures.paths import plain_name
from hf_stable.architectures.registry import UnsupportedModelError
from hf_stable.methods.sigma_reparam.layers import SigmaLayer
from hf_stable.methods.sigma_reparam.method import sigma_layers
from hf_stable.methods.sigma_reparam.part_arithmetic import scale_parts
from hf_stable.methods.sigma_reparam.stored_parts import plain_weight_name
from hf_stable.methods.sigma_reparam.triples import check_present, settle_given

__all__ = ["fold_state_dict", "raw_layers"]

_EXACT = (torch.float32, torch.float64)


@torch.no_grad()
def fold_state_dict(
    model: nn.Module, state_dict: Mapping[str, Any]
) -> tuple[dict[str, Any], dict[str, Tensor]]:
    """Part a state dict of a patched model into plain weights and the raw state.

    The product `gamma / sigma * W` is taken in float32 (float64 for float64 weights) and rounded
    once. Sharded values are gathered whole, which every rank has to take part in. What
    torch.compile puts into the names is left out.

    Args:
        model: a patched model, or a module that holds one.
        state_dict: its state dict, or one of the same names (gathered from shards, averaged).
            sigma, u and v that it lacks are taken from the model, and made those of the weights
            that it has where they do not fit.

    Returns:
        `(plain, raw)`: the state dict of the plain model, and the tensors of a sidecar, which is
        empty unless every patched layer is in the state dict.

    Raises:
        ValueError: if a layer's weight is there but not its gamma, or the names are those of a
            wrapper around the model.
        UnsupportedModelError: if accelerate offloads the weights or DeepSpeed has partitioned them,
            so that the state dict has none.
    """
    plain = {plain_name(key): whole_tensor(value) for key, value in state_dict.items()}
    raw: dict[str, Tensor] = {}
    layers = {plain_name(name): layer for name, layer in sigma_layers(model)}
    is_whole = True
    for name, layer in layers.items():
        parts = {part: plain.pop(f"{name}.{part}", None) for part in layer.sigma_tensors}
        weight = plain.pop(f"{name}.weight", None)
        if weight is None:
            is_whole = False
            continue
        complete = _completed(name, layer, weight, parts)
        scale = complete["gamma"] / complete["sigma"]
        folded = scale_parts(weight, scale, layer.parts)
        # DeepSpeed's float32 masters of a layer that has their roundings.
        is_master = parts["gamma"] is not None and layer.gamma.dtype not in _EXACT
        folded = folded.to(layer.weight.dtype) if is_master else folded
        plain[plain_weight_name(name, layer.parts)] = folded
        raw |= {f"{name}.{part}": tensor for part, tensor in complete.items()}
    if left := raw_layers(plain):
        raise ValueError(
            f"the state dict has {f'{left[0]}.sigma_u'!r}, which is no name of this "
            f"{type(model).__name__}: it is the state dict of a wrapper, whose raw weights would "
            "be saved unfolded. Pass that of the model inside"
        )
    return plain, raw if is_whole else {}


def raw_layers(names: Iterable[str]) -> list[str]:
    """Return the patched layers whose raw weights are among the tensors of these names.

    The name of a layer is "" where they are of that layer alone.
    """
    ends = (name.rpartition(".") for name in names)
    return [layer for layer, _, tensor in ends if tensor == "sigma_u"]


def _completed(
    name: str, layer: SigmaLayer, weight: Tensor, parts: Mapping[str, Tensor | None]
) -> dict[str, Tensor]:
    """Return the tensors of a layer, those that are not given from the model."""
    if parts["gamma"] is None:
        raise ValueError(
            f"the state dict has the weight of {name!r} but not its gamma: if it is that of a "
            "plain or folded model, the weights are scaled already and would be scaled twice. "
            "Pass the whole state dict of the patched model, or save the folded model itself"
        )
    if weight.is_meta:
        check_present(layer)
    if weight.numel() == 0:
        raise UnsupportedModelError(
            f"the state dict has no entries of {name!r}: DeepSpeed ZeRO-3 has partitioned the "
            "weights. Save with the Trainer, or gather the state dict on every process and pass "
            "it: save_pretrained(folder, state_dict=accelerator.get_state_dict(engine))"
        )
    # Only what is missing is gathered: FSDP gives the whole state dict to the rank that saves, and
    # that one alone would wait for the others.
    complete = {
        "weight": weight,
        **{
            part: whole_tensor(getattr(layer, part)).detach().to(weight.device)
            if given is None
            else given
            for part, given in parts.items()
        },
    }
    # Averages of weights come with no sigma of theirs, or with the average of sigmas.
    return complete | settle_given(layer, complete)
