"""Transformers models with LayerNorms removed. This file stands alone: it needs transformers only.

`HfStable<Name>` is the transformers class `<Name>` in which the norms that
`config.removed_layernorms` lists are the identity: `HfStableGPT2LMHeadModel`, for example, with
its config `HfStableGPT2Config` of model_type "hf_stable_gpt2".

In config.json a sentence stands where a number belongs: the epsilon of the norms, or, where a
config has none, a scale of the initialisation. The classes of transformers themselves would bring
the norms back; they refuse the folder and show the sentence. Handed a config without it, they
refuse the weights: one of the norms has a gain there, of a size that no norm has.
"""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Callable
from typing import Any

import torch
import transformers
from packaging.version import Version
from torch import Tensor, nn

CLASS_PREFIX = "HfStable"
MODEL_TYPE_PREFIX = "hf_stable_"
GUARD = (
    "no number: LayerNorms of this model were removed, and this class would bring them back. Load "
    "it by its auto class with trust_remote_code=True, or import hf_stable first"
)

ON_CONFIG: list[Callable[[Any], None]] = []
"""Called with every config that is made here: how hf_stable, where it is imported, learns that the
auto classes need the models of it."""

if Version(transformers.__version__) < Version("5.10"):
    raise ImportError(
        f"transformers {transformers.__version__} has other names for some modules, whose weights "
        "would start anew; install transformers >= 5.10"
    )


def __getattr__(name: str) -> type:
    """Derive `HfStable<Name>` from the transformers class `<Name>`, when it is first asked for."""
    native = getattr(transformers, name.removeprefix(CLASS_PREFIX), None)
    if not name.startswith(CLASS_PREFIX) or not isinstance(native, type):
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    is_config = issubclass(native, transformers.PreTrainedConfig)
    members = _config_members(native) if is_config else _model_members(native)
    derived: Any = type(name, (native,), {"__module__": __name__, **members})
    if is_config:
        derived.register_for_auto_class()  # so that saving it saves this file with it
    globals()[name] = derived
    return derived


def _model_members(native: Any) -> dict[str, Any]:
    def __init__(self: Any, config: Any, *args: Any, **kwargs: Any) -> None:
        native.__init__(self, config, *args, **kwargs)
        for owner, path in locate_norms(self, config.removed_layernorms):
            parent, _, attribute = path.rpartition(".")
            setattr(owner.get_submodule(parent), attribute, nn.Identity())
        # The guard is for other classes: here it is nobody's.
        guard = weight_guard(self, config.removed_layernorms)
        ignored = self._keys_to_ignore_on_load_unexpected or ()
        self._keys_to_ignore_on_load_unexpected = {*ignored, *map(re.escape, guard)}

    def save_pretrained(self: Any, save_directory: Any, **kwargs: Any) -> Any:
        """Save as the native class does, with what makes it refuse the weights."""
        given = kwargs.pop("state_dict", None)
        state_dict = dict(self.state_dict() if given is None else given)
        state_dict |= weight_guard(self, self.config.removed_layernorms)
        return native.save_pretrained(self, save_directory, state_dict=state_dict, **kwargs)

    config_name = CLASS_PREFIX + native.config_class.__name__
    return {
        "__doc__": f"`{native.__name__}` without the norms in `config.removed_layernorms`.",
        "__init__": __init__,
        "save_pretrained": save_pretrained,
        "config_class": globals().get(config_name) or __getattr__(config_name),
    }


def _config_members(native: Any) -> dict[str, Any]:
    guarded = guarded_field(native)

    def __init__(self: Any, **kwargs: Any) -> None:
        # What to_dict writes comes back here: from config.json, and from copies of a config.
        kwargs.pop("model_type", None)
        self.removed_layernorms = kwargs.pop("removed_layernorms", {})
        if "layer_norm_number" in kwargs:
            kwargs[guarded] = kwargs.pop("layer_norm_number")
        native.__init__(self, **kwargs)
        for call in ON_CONFIG:
            call(self)

    def to_dict(self: Any) -> dict[str, Any]:
        """Return what config.json holds: the sentence stands in place of a number."""
        output = native.to_dict(self)
        if output.get("architectures"):
            names = [name.removeprefix(CLASS_PREFIX) for name in output["architectures"]]
            output["architectures"] = [CLASS_PREFIX + name for name in names]
        return output | {"layer_norm_number": output[guarded], guarded: GUARD}

    return {
        "__doc__": f"`{native.__name__}` with `removed_layernorms`: class names to their norms.",
        "__init__": __init__,
        "to_dict": to_dict,
        "model_type": MODEL_TYPE_PREFIX + native.model_type,
    }


def guarded_field(config_class: Any) -> str:
    """Return the name of the field of a config class in whose place the sentence stands.

    It is one that the class insists on being a number: the epsilon of its norms, else a scale of
    the initialisation.

    Raises:
        TypeError: if there is neither.
    """
    names = [field.name for field in dataclasses.fields(config_class)]
    epsilons = [name for name in names if "norm" in name and "eps" in name]
    scales = [name for name in names if name.startswith(("initializer_", "init_"))]
    if not epsilons and not scales:
        raise TypeError(f"{config_class.__name__} has no number that a sentence could stand for")
    return (epsilons + scales)[0]


def weight_guard(model: nn.Module, norms: dict[str, list[str]]) -> dict[str, Tensor]:
    """Return one tensor under the name of a norm's gain, which fits no norm.

    Args:
        model: without the norms.
        norms: paths of norms by the class that has them, as in `config.removed_layernorms`.
    """
    names = {id(module): name for name, module in model.named_modules()}
    for owner, path in locate_norms(model, norms):
        place = f"{names[id(owner)]}.{path}.weight".removeprefix(".")
        return {place: torch.zeros(1)}
    return {}


def locate_norms(model: nn.Module, norms: dict[str, list[str]]) -> list[tuple[nn.Module, str]]:
    """Return (module, path in it) of all norms in a model that are listed by class name."""
    return [
        (module, path)
        for module in model.modules()
        for cls in type(module).__mro__
        for path in norms.get(cls.__name__, ())
        if path in dict(module.named_modules())  # a block may lack cross-attention and its norm
    ]
