"""What hf_stable changes in DeepSpeed: sigma follows the weights of an engine.

The optimizer inside an engine steps flat partitions, before the ranks exchange what has moved. So
it is the engine's own step that a refresh has to follow.
"""

from __future__ import annotations

import inspect
import os
import sys
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from torch.optim import Optimizer

from hf_stable._file_names import SIDECAR_FILE
from hf_stable._late_changes import ask_for_late_changes
from hf_stable._ranks import is_partitioned
from hf_stable.adamw2.optimizer import AdamW2
from hf_stable.architectures.paths import state_dict_name
from hf_stable.checkpoints.saved_state import SavedState
from hf_stable.checkpoints.sidecar import read_state
from hf_stable.measures.flat_ranges import FlatRange
from hf_stable.methods.agreement import refuse_different_patches
from hf_stable.methods.sigma_reparam.layers import SigmaLayer
from hf_stable.methods.sigma_reparam.method import sigma_layers
from hf_stable.methods.sigma_reparam.stacks import SigmaStack
from hf_stable.methods.sigma_reparam.steps import check_gammas, rate_is_zero, refresh
from hf_stable.methods.sigma_reparam.triples import settle
from hf_stable.trainer.changes import is_in_place, listed, make, wrapping
from hf_stable.trainer.deepspeed_partitions import given_groups, held_of, partition_optimizer
from hf_stable.trainer.deepspeed_settings import read_settings, refuse_unfit_settings

__all__ = ["ON_DEEPSPEED", "follow_deepspeed"]

_ENGINE = "deepspeed.runtime.engine:DeepSpeedEngine"
_EXACT = (torch.float32, torch.float64)
_MARK = "_hf_stable_follows"

ON_DEEPSPEED = "import hf_stable, once deepspeed is imported"


def follow_deepspeed() -> None:
    """Make the changes to DeepSpeed once it is imported, however late that is."""
    ask_for_late_changes(_make_when_there)
    _make_when_there()


def _make_when_there() -> None:
    engine = sys.modules.get("deepspeed.runtime.engine")
    # In the middle of its own import the class is not there yet.
    if engine is None or not hasattr(engine, "DeepSpeedEngine"):
        return
    # Asked at every step of an optimizer, so that `make` does not look at it all again.
    if not all(is_in_place(wrap) for wrap in listed() if wrap.made_by == ON_DEEPSPEED):
        make(ON_DEEPSPEED)


@wrapping(
    "accelerate.accelerator:Accelerator.prepare",
    reason="makes the changes to DeepSpeed, which accelerate imports as late as here",
)
def _prepare(original: Any, accelerator: Any, *args: Any, **kwargs: Any) -> Any:
    if getattr(accelerator.state, "deepspeed_plugin", None) is not None:
        import deepspeed  # noqa: F401  (so that there is something to change)

        _make_when_there()
    return original(accelerator, *args, **kwargs)


@wrapping(
    f"{_ENGINE}.__init__", "model", "optimizer", "model_parameters", "config", "config_class",
    reason="refuses configs that do not fit, a patched model that differs between ranks, a gamma "
    "left out", made_by=ON_DEEPSPEED,
)  # fmt: skip
def _init(original: Any, engine: Any, *args: Any, **kwargs: Any) -> None:
    given = inspect.signature(original).bind(engine, *args, **kwargs).arguments
    model, optimizer = given["model"], given.get("optimizer")
    layers = sigma_layers(model)
    settings = read_settings(given.get("config"))
    refuse_unfit_settings(
        settings, is_patched=bool(layers), uses_adamw2=isinstance(optimizer, AdamW2)
    )
    refuse_different_patches(model)
    own = [layer for _, layer in layers]
    if layers:
        _refuse_other_engines(engine)
        check_gammas(own, _groups_to_come(optimizer, given.get("model_parameters"), settings))
        _round_gammas(own)
        _gather_with_holders(own)
    given_to_adamw2 = given_groups(optimizer, model) if isinstance(optimizer, AdamW2) else None
    original(engine, *args, **kwargs)
    setattr(engine, _MARK, True)
    if given_to_adamw2 is not None and engine.zero_optimization():
        partition_optimizer(engine, given_to_adamw2)
    if engine.zero_optimization_partition_weights():
        if any(layer.weight.dtype not in _EXACT for layer in own):
            refresh(own, weights=_partitions(own))
    else:
        for layer in own:
            settle(layer)  # bfloat16 has rounded the weights


@wrapping(
    f"{_ENGINE}.step",
    reason="refreshes sigma once the weights of a patched model have moved on every rank",
    made_by=ON_DEEPSPEED,
)
def _step(original: Any, engine: Any, *args: Any, **kwargs: Any) -> Any:
    layers = [layer for _, layer in sigma_layers(engine.module) if layer.weight.requires_grad]
    if layers and not hasattr(engine, _MARK):
        raise RuntimeError(
            "this DeepSpeed engine was built before hf_stable could see DeepSpeed, and has taken "
            "steps without a refresh of sigma: import deepspeed before hf_stable.patch is called, "
            "and build the engine anew"
        )
    # Asked for before: a scheduler of DeepSpeed's takes its step inside.
    rests = not layers or all(map(rate_is_zero, engine.basic_optimizer.param_groups))
    result = original(engine, *args, **kwargs)
    # An optimizer that steps the model's own weights (stage 0 in float32) has refreshed already.
    by_engine = engine.optimizer is not engine.basic_optimizer
    if by_engine and not rests and engine.was_step_applied():
        partitioned = engine.zero_optimization_partition_weights()
        refresh(layers, weights=_partitions(layers) if partitioned else None)
    return result


@wrapping(
    f"{_ENGINE}.load_checkpoint", "load_dir",
    reason="sigma is that of the weights that were loaded: universal checkpoints bring no buffers",
    made_by=ON_DEEPSPEED,
)  # fmt: skip
def _load_checkpoint(original: Any, engine: Any, load_dir: str, *args: Any, **kwargs: Any) -> Any:
    result = original(engine, load_dir, *args, **kwargs)
    layers = sigma_layers(engine.module)
    if layers and engine.load_universal_checkpoint():
        if os.path.isfile(os.path.join(load_dir, SIDECAR_FILE)):
            _take_triples(layers, read_state(load_dir))
        for _, layer in layers:
            settle(layer)  # a triple that fits stays, bit for bit
    return result


@torch.no_grad()
def _take_triples(layers: Sequence[tuple[str, SigmaLayer]], saved: SavedState) -> None:
    """Give layers sigma, u and v of the sidecar beside a checkpoint."""
    known = set(saved.layers)
    for name, layer in layers:
        if (key := state_dict_name(name)) in known:
            tensors = saved.layer(key)
            for part in ("sigma", "sigma_u", "sigma_v"):
                getattr(layer, part).copy_(tensors[part])


def _gather_with_holders(layers: Sequence[SigmaLayer]) -> None:
    """Have ZeRO-3 gather stacks of experts when the module runs that uses them.

    It gathers the parameters of a module that is called, and a stack is not: its holder is.
    """
    from deepspeed.utils import set_z3_leaf_module

    for layer in layers:
        if isinstance(layer, SigmaStack):
            set_z3_leaf_module(layer.holder, True)


@torch.no_grad()
def _round_gammas(layers: Sequence[SigmaLayer]) -> None:
    """Give gamma the dtype of a weight that is partitioned already, as the engine does to others.

    It casts the parameters of a model that comes whole, and takes one that comes partitioned to be
    cast. Parameters that it flattens together have to be of one dtype.
    """
    for layer in layers:
        if is_partitioned(layer.weight) and not is_partitioned(layer.gamma):
            layer.gamma.data = layer.gamma.data.to(layer.weight.dtype)


def _partitions(layers: Sequence[SigmaLayer]) -> list[FlatRange]:
    return [held_of(layer.weight) for layer in layers]


@wrapping(
    "accelerate.accelerator:Accelerator.get_state_dict", "model",
    reason="a patched model's state dict has DeepSpeed's float32 weights, not their roundings",
)  # fmt: skip
def _get_state_dict(original: Any, accelerator: Any, model: Any, *args: Any, **kwargs: Any) -> Any:
    state = original(accelerator, model, *args, **kwargs)
    if hasattr(model, _MARK):
        for name, value in _master_weights(model).items():
            if state is not None:  # ranks that do not save take part all the same
                state[name] = value
    return state


def _master_weights(engine: Any) -> dict[str, Tensor]:
    """Return weight and gamma of each sigma layer in float32, where the model has roundings."""
    from deepspeed.utils import safe_get_full_fp32_param

    found = {}
    for name, layer in sigma_layers(engine.module):
        for part in ("weight", "gamma"):
            param = getattr(layer, part)
            if param.dtype in (torch.bfloat16, torch.float16) and param.requires_grad:
                master = safe_get_full_fp32_param(param)
                if master is not None:
                    found[f"{name}.{part}"] = master.detach().cpu()
    return found


def _groups_to_come(optimizer: Any, parameters: Any, settings: Any) -> Sequence[dict[str, Any]]:
    """Return the groups that an engine's optimizer will have, before they are flattened."""
    if isinstance(optimizer, Optimizer):
        return optimizer.param_groups
    given = list(parameters or ())
    decay = ((settings.get("optimizer") or {}).get("params") or {}).get("weight_decay")
    groups = given if given and isinstance(given[0], dict) else [{"params": given}]
    return [{"weight_decay": decay, **group} for group in groups]


def _refuse_other_engines(engine: Any) -> None:
    name = type(engine).__name__
    if name != "DeepSpeedEngine":
        raise ValueError(
            f"a model patched with sigma_reparam does not train in DeepSpeed's {name}: stages of a "
            "pipeline and engines that generate move weights at other times. Use the plain engine "
            "(deepspeed.initialize with a module, hybrid_engine off)"
        )
