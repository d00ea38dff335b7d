"""State dicts of patched models, parted into plain weights and what folding loses."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from hf_stable._ranks import whole_tensor
from hf_stable.methods.sigma_reparam.function import scale_blocks
from hf_stable.methods.sigma_reparam.layers import SigmaLayer
from hf_stable.methods.sigma_reparam.method import sigma_layers
from hf_stable.methods.sigma_reparam.triples import check_present, settle_given

__all__ = ["fold_state_dict"]


@torch.no_grad()
def fold_state_dict(
    model: nn.Module, state_dict: Mapping[str, Any]
) -> tuple[dict[str, Any], dict[str, Tensor]]:
    """Part a state dict of a patched model into plain weights and the raw state.

    The product `gamma / sigma * W` is taken in float32 (float64 for float64 weights) and rounded
    once. Sharded values are gathered whole, which every rank has to take part in.

    Args:
        model: a patched model.
        state_dict: its state dict, or one of the same names (gathered from shards, averaged).
            sigma, u and v that it lacks are taken from the model, and made those of the weights
            that it has where they do not fit.

    Returns:
        `(plain, raw)`: the state dict of the plain model, and the tensors of a sidecar, which is
        empty unless every patched layer is in the state dict.

    Raises:
        ValueError: if a layer's weight is there but not its gamma, or the names are those of a
            wrapper around the model.
        UnsupportedModelError: if accelerate offloads the weights, so that the state dict has none.
    """
    plain = {key: whole_tensor(value) for key, value in state_dict.items()}
    raw: dict[str, Tensor] = {}
    layers = sigma_layers(model)
    num_found = 0
    for name, layer in layers:
        parts = {part: plain.pop(f"{name}.{part}", None) for part in SigmaLayer.SIGMA_TENSORS}
        weight = plain.get(f"{name}.weight")
        if weight is None:
            continue
        num_found += 1
        if weight.is_meta:
            check_present(layer)
        if parts["gamma"] is None:
            raise ValueError(
                f"the state dict has the weight of {name!r} but not its gamma: if it is that of a "
                "plain or folded model, the weights are scaled already and would be scaled twice. "
                "Pass the whole state dict of the patched model, or save the folded model itself"
            )
        for part, tensor in parts.items():
            if tensor is None:
                parts[part] = whole_tensor(getattr(layer, part)).detach().to(weight.device)
        # Averages of weights come with no sigma of theirs, or with the average of sigmas.
        parts |= settle_given(layer, {"weight": weight, **parts})
        raw |= {f"{name}.{part}": tensor for part, tensor in {"weight": weight, **parts}.items()}
        scale = parts["gamma"] / parts["sigma"]
        plain[f"{name}.weight"] = scale_blocks(weight, scale, layer.block_dim)
    for key in plain:
        if key.endswith(".sigma_u"):
            raise ValueError(
                f"the state dict has {key!r}, which is no name of this {type(model).__name__}: it "
                "is the state dict of a wrapper, whose raw weights would be saved unfolded. Pass "
                "that of the model inside"
            )
    return plain, raw if num_found == len(layers) else {}
