"""Which models can be patched as they are: those that nothing has wrapped, cut or emptied yet."""

from __future__ import annotations

import sys
from typing import Any

import torch
from torch import nn
from torch.distributed.fsdp import FSDPModule, FullyShardedDataParallel
from torch.nn.parallel import DataParallel, DistributedDataParallel

from hf_stable._live_objects import live_instances
from hf_stable.architectures.finding import find_layers, find_norms, find_regions
from hf_stable.architectures.registry import UnsupportedModelError

__all__ = ["refuse_unpatchable"]


def refuse_unpatchable(model: nn.Module) -> None:
    """Raise for every state of a model in which a patch would be lost or wrong.

    Raises:
        UnsupportedModelError: saying what to do instead.
    """
    _refuse_made_over(model)
    find_regions(model)
    _refuse_absent_weights(model)
    _refuse_untrainable(model)
    sharded = [name for name, module in model.named_modules() if isinstance(module, FSDPModule)]
    if sharded:
        raise UnsupportedModelError(
            f"{sharded[0] or 'the model'!r} is sharded by FSDP2 already, which would not average "
            "gamma over ranks; call hf_stable.patch before fully_shard or accelerator.prepare. A "
            "model that tensor parallelism has cut can be patched"
        )
    # All that the entry names, whatever the method: `describe` and the monitor ask for it later.
    find_layers(model)
    find_norms(model)


def _refuse_made_over(model: nn.Module) -> None:
    """Raise for a model that is wrapped, adapted, quantised or spread over a pipeline."""
    wrapper = _wrapper_of(model)
    if wrapper is not None:
        raise UnsupportedModelError(
            f"the model is wrapped in {wrapper} already: gamma would not be averaged over ranks "
            "or compiled with the rest; call hf_stable.patch first, then wrap"
        )
    if type(model).__module__.startswith("peft.") or getattr(model, "peft_config", None):
        raise UnsupportedModelError(
            "the model has PEFT adapters: their merge would edit the raw weight under sigma; "
            "train with sigma_reparam first, hf_stable.fold, then add the adapters"
        )
    if getattr(model, "is_quantized", False) or getattr(model, "hf_quantizer", None) is not None:
        raise UnsupportedModelError(
            "the model is quantised: its weights are no matrices of floating-point numbers; patch "
            "the model before it is quantised"
        )
    distributed: Any = getattr(getattr(model, "config", None), "distributed_config", None)
    if getattr(distributed, "pp_size", 1) > 1:
        raise UnsupportedModelError(
            f"pp_size={distributed.pp_size}: transformers' pipeline runs forwards alone. It gives "
            "no loss, no gradient crosses its stages, and each process has some of the layers. "
            "Load the model without pp_size; tp_size and FSDP2 can train it"
        )


def _refuse_absent_weights(model: nn.Module) -> None:
    """Raise for a model with parameters whose values are elsewhere, or nowhere yet."""
    for name, parameter in model.named_parameters():
        if parameter.is_meta:
            raise UnsupportedModelError(
                f"{name} is on the meta device and has no values to take a spectrum of; load the "
                "weights first (under FSDP on every process: cpu_ram_efficient_loading=False; with "
                "a device_map without offloading, over devices that hold all of it)"
            )


def _refuse_untrainable(model: nn.Module) -> None:
    """Raise where autograd could not train the model: its tensors come from `inference_mode`."""
    if torch.is_inference_mode_enabled():
        raise UnsupportedModelError(
            "hf_stable.patch was called under torch.inference_mode(), where gamma would be a "
            "tensor that no training can use. Call it outside; torch.no_grad() does no harm"
        )
    for name, parameter in model.named_parameters():
        if parameter.is_inference():
            raise UnsupportedModelError(
                f"{name} was made under torch.inference_mode(), and no training can use it, "
                "patched or not. Build or load the model outside, then call hf_stable.patch"
            )


def _wrapper_of(model: nn.Module) -> str | None:
    """Name what the model is wrapped in, wherever the wrapper is held."""
    if hasattr(model, "_orig_mod") or getattr(model, "_compiled_call_impl", None) is not None:
        return "torch.compile"
    if isinstance(model, DistributedDataParallel | DataParallel | FullyShardedDataParallel):
        return type(model).__name__
    if torch.distributed.is_available() and torch.distributed.is_initialized():
        engine = getattr(sys.modules.get("deepspeed.runtime.engine"), "DeepSpeedEngine", None)
        for kind in {DistributedDataParallel, engine or DistributedDataParallel}:
            for wrapper in live_instances(kind):
                if any(module is model for module in wrapper.modules()):
                    return type(wrapper).__name__
    return None
