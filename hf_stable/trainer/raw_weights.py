"""What hf_stable changes where transformers takes weights: raw ones never pass for plain ones.

Nor do those of a model without LayerNorms for those of one that has them.

The state dict of a patched model has raw weights, and beside them gamma and sigma, which a plain
model leaves out: it would compute with weights of another size, and say so in a log at most.
"""

from __future__ import annotations

import os
from collections.abc import Mapping
from typing import Any

from torch import nn
from transformers import PreTrainedModel

from hf_stable.architectures.paths import join, state_dict_name
from hf_stable.checkpoints.described_models import read_content
from hf_stable.checkpoints.state_dicts import raw_layers
from hf_stable.checkpoints.weight_files import open_weights
from hf_stable.methods.sigma_reparam.method import sigma_layers
from hf_stable.modeling_hf_stable import CLASS_PREFIX, MODEL_TYPE_PREFIX
from hf_stable.trainer.changes import wrapping

__all__: list[str] = []


@wrapping(
    "transformers.modeling_utils:PreTrainedModel.from_pretrained",
    "pretrained_model_name_or_path",
    reason="refuses a patched model's raw weights for a plain one, and norms for a model without",
)
def _from_pretrained(
    original: Any, model_class: Any, pretrained_model_name_or_path: Any, *args: Any, **kwargs: Any
) -> Any:
    state_dict, folder = kwargs.get("state_dict"), pretrained_model_name_or_path
    if isinstance(state_dict, Mapping):
        _refuse(raw_layers(state_dict), model_class, "the state dict")
    elif folder is not None and os.path.isdir(folder):
        place = os.path.join(folder, kwargs.get("subfolder") or "")
        _refuse(_raw_layers_in(place), model_class, place)
        if kwargs.get("ignore_mismatched_sizes") and kwargs.get("config") is not None:
            _refuse_norms(model_class, place)
    return original(model_class, pretrained_model_name_or_path, *args, **kwargs)


@wrapping(
    "torch.nn.modules.module:Module.load_state_dict", "state_dict", "strict",
    reason="refuses a patched model's raw weights for a plain module, where strict=False would "
    "leave gamma and sigma out",
)  # fmt: skip
def _load_state_dict(
    original: Any, module: nn.Module, state_dict: Mapping[str, Any], *args: Any, **kwargs: Any
) -> Any:
    if isinstance(state_dict, Mapping) and (raw := raw_layers(state_dict)):
        _refuse(_plain_ones_among(raw, module), type(module), "the state dict")
    return original(module, state_dict, *args, **kwargs)


def _plain_ones_among(raw: list[str], module: nn.Module) -> list[str]:
    """Return the layers of a state dict that are plain in a module; others need not be there."""
    own = {name for name, _ in sigma_layers(module)}
    others = [name for name in raw if name not in own]
    if not own and isinstance(module, PreTrainedModel):
        return others  # by other names it would be a whole model that takes nothing
    present = {state_dict_name(name) for name, _ in module.named_parameters()}
    return [name for name in others if not present.isdisjoint((name, join(name, "weight")))]


def _raw_layers_in(folder: str) -> list[str]:
    try:
        return open_weights(folder).raw_layers
    except (OSError, ValueError):  # no safetensors, or damaged ones: the original says which
        return []


def _refuse_norms(model_class: Any, folder: str) -> None:
    """Raise ValueError where a class would bring norms back that a saved model does not have.

    A config of its own is not read from config.json, where the sentence stands, and the tensor that
    fits no norm counts as one of another size.
    """
    path = os.path.join(folder, "config.json")
    if model_class.__name__.startswith(CLASS_PREFIX) or not os.path.isfile(path):
        return
    if str(read_content(folder).get("model_type", "")).startswith(MODEL_TYPE_PREFIX):
        raise ValueError(
            f"{folder} cannot be loaded as a {model_class.__name__}: LayerNorms of the model in it "
            "were removed, and this class would bring them back; with a config of your own and "
            "ignore_mismatched_sizes=True nothing else would refuse. Load it by its auto class "
            "(hf_stable.load, to continue it), which takes your config and leaves the norms out"
        )


def _refuse(raw: list[str], model_class: Any, source: str) -> None:
    if raw:
        first = join(raw[0], "weight")
        raise ValueError(
            f"{source} holds the raw weights of a patched model (first: {first!r}), which a plain "
            f"{model_class.__name__} would take for its own: its outputs would be others. Call "
            "hf_stable.patch on the model before it loads them, or take folded weights: those that "
            "save_pretrained writes, or hf-stable fold makes"
        )
