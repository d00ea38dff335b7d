"""Which ways of sharding a reparametrised model can take; the others are refused before it is cut.

What they raise by themselves, if anything, comes from deep within torch or accelerate and names
neither the cause nor the setting.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import nn

from hf_stable.methods.sigma_reparam.method import sigma_layers

__all__ = ["refuse_unfit_sharding"]


def refuse_unfit_sharding(
    model: nn.Module,
    *,
    fsdp_plugin: Any = None,
    mixed_precision: str = "no",
) -> None:
    """Raise for settings under which sigma layers cannot train; other models pass.

    Args:
        model: before it is wrapped or sharded.
        fsdp_plugin: accelerate's `FullyShardedDataParallelPlugin`, or None.
        mixed_precision: accelerate's setting. Anything but "no" makes it train float32 weights.

    Raises:
        ValueError: under FSDP1, with cpu_ram_efficient_loading, or for weights of less
            than float32 under FSDP2 without mixed precision.
    """
    layers = [layer for _, layer in sigma_layers(model)]
    if not layers:
        return
    if fsdp_plugin is None:
        return
    if fsdp_plugin.fsdp_version != 2:
        raise ValueError(
            "a model patched with sigma_reparam does not train under FSDP1: it flattens the "
            "parameters, so there are no matrices to take a spectral norm of. Use FSDP2 "
            "(fsdp_version 2), DeepSpeed ZeRO or DDP"
        )
    if fsdp_plugin.cpu_ram_efficient_loading:
        raise ValueError(
            "cpu_ram_efficient_loading=True lets one process alone hold the weights, but every "
            "process has to hold those of a reparametrised model, with sigma and its vectors. Set "
            "cpu_ram_efficient_loading to false: in TrainingArguments.fsdp_config, or as "
            "fsdp_cpu_ram_efficient_loading in accelerate's config file"
        )
    dtypes = {layer.weight.dtype for layer in layers} - {torch.float32, torch.float64}
    if dtypes and mixed_precision == "no":
        name = str(dtypes.pop()).removeprefix("torch.")
        raise ValueError(
            f"the weights are {name} and gamma of a sigma layer is float32, but FSDP2 shards "
            "parameters of one dtype only. Load or cast the model to float32 and compute in "
            f"{name}: TrainingArguments(bf16=True), Accelerator(mixed_precision=...) or "
            f"fully_shard(..., mp_policy=MixedPrecisionPolicy(param_dtype=torch.{name}))"
        )
