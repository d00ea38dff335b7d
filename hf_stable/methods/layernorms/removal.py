"""The methods that take LayerNorms out of a model, and their undoing.

A removed norm leaves an identity in its place, which keeps the norm aside. How a model without
LayerNorms is saved is told by `standalone`.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, ClassVar, Literal, cast

import transformers
from torch import Tensor, nn
from torch.distributed.fsdp import FSDPModule
from transformers import PreTrainedModel

from hf_stable._live_objects import live_instances
from hf_stable.architectures.finding import FoundNorm, Placement, find_norms
from hf_stable.architectures.registry import (
    UnsupportedModelError,
    architecture_of,
    model_type_of,
    require_model,
)
from hf_stable.methods.config import MethodConfig, method_options, take_out_configs
from hf_stable.methods.layernorms.standalone import is_standalone
from hf_stable.methods.undoing import Undo, keep_attributes, undoing
from hf_stable.modeling_hf_stable import CLASS_PREFIX, guarded_field

__all__ = [
    "RemovalConfig",
    "check_can_be_saved",
    "RemovalPlan",
    "RemoveLayerNormConfig",
    "RemovePreLayerNormConfig",
    "RemovedNorm",
    "needs_standalone_form",
    "plan_removal",
    "removed_norms",
    "restore_layernorms",
]


@method_options
class RemovePreLayerNormConfig(MethodConfig):
    """Take out the norms in front of attention and MLP (GPT-2, ViT, Swin).

    Zhai et al. 2023 train such a ViT with sigmaReparam.

    Attributes:
        scope: `"blocks"` removes the pre-norms of every block; `"all"` also the norms outside the
            blocks (final, embedding, patch merging), as the authors' vision code does.
    """

    scope: Literal["blocks", "all"] = "blocks"

    method: ClassVar[str] = "remove_pre_layernorm"
    placements: ClassVar[tuple[Placement, ...]] = ("pre",)


@method_options
class RemoveLayerNormConfig(MethodConfig):
    """Take out the norms behind the residual additions of post-LN blocks (BERT).

    Norms at the end of a branch, before it is added (OLMo 2, Gemma 2), go too.

    Attributes:
        scope: `"blocks"` removes the norms of every block; `"all"` also those outside the blocks
            (embeddings, prediction head).
    """

    # Paper: sigmaReparam keeps the norms of post-LN models; nobody removes these by accident.
    scope: Literal["blocks", "all"] = "blocks"

    method: ClassVar[str] = "remove_layernorm"
    placements: ClassVar[tuple[Placement, ...]] = ("post", "branch")


RemovalConfig = RemovePreLayerNormConfig | RemoveLayerNormConfig


class RemovedNorm(nn.Identity):
    """The identity in the place of a norm.

    Attributes:
        norm: the norm that stood here. No submodule: its parameters are not the model's.
    """

    norm: nn.Module

    def __init__(self, norm: nn.Module) -> None:
        """Keep the norm aside."""
        super().__init__()
        self.__dict__["norm"] = norm

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> RemovedNorm:
        # The norm follows the model to its device and dtype, so that it can come back.
        self.norm._apply(fn, recurse)
        super()._apply(fn, recurse)
        return self

    def extra_repr(self) -> str:
        """Show what stood here."""
        return f"removed {self.norm}"


@dataclass(frozen=True)
class RemovalPlan:
    """Norms that are there and are to go, each by the module that has it and its name there."""

    norms: tuple[tuple[nn.Module, str], ...]

    def apply(self, undo: Undo) -> None:
        """Put an identity in the place of each norm."""
        for parent, attribute in self.norms:
            undo.append(keep_attributes(parent))
            setattr(parent, attribute, RemovedNorm(getattr(parent, attribute)))


def plan_removal(model: nn.Module, config: RemovalConfig) -> RemovalPlan:
    """Find the norms that a method removes, without touching the model.

    Raises:
        UnsupportedModelError: if the architecture is not registered, has no norm of this kind, or
            could not be saved without its norms.
    """
    norms = find_norms(model)
    if not any(norm.placement in config.placements for norm in norms):
        _refuse_placement(model, config, norms)
    for whole in (model, *_models_around(model)):
        check_can_be_saved(whole)
    chosen = [
        norm for norm in norms if norm.placement in config.placements or config.scope == "all"
    ]
    return RemovalPlan(
        tuple(
            _owner(model, norm.name)
            for norm in chosen
            if not isinstance(norm.module, nn.Identity)  # loaded without it
        )
    )


def removed_norms(model: nn.Module) -> list[tuple[str, RemovedNorm]]:
    """Return (name, identity) of every norm removed in this process, in the model's order."""
    return [(name, m) for name, m in model.named_modules() if isinstance(m, RemovedNorm)]


def needs_standalone_form(model: nn.Module) -> bool:
    """Say whether a plain folder of this model would bring norms back that it does not have."""
    return bool(removed_norms(model))


def restore_layernorms(model: nn.Module) -> nn.Module:
    """Put every norm that was removed in this process back, the same object, in place.

    An optimizer that was built meanwhile does not hold their parameters. A model that has all its
    norms comes back unchanged. A model that was loaded without some norms gets back only those
    that were removed since.

    Returns:
        The same model.

    Raises:
        UnsupportedModelError: if the model was loaded without its norms, which no file has, and
            none was removed since.
    """
    require_model(model, "restore_layernorms")
    if any(map(is_standalone, model.modules())) and not removed_norms(model):
        raise UnsupportedModelError(
            f"this {type(model).__name__} was loaded without its norms, and no file has them; "
            "restore_layernorms undoes a removal that was made in this process"
        )
    with undoing() as undo:
        for name, removed in removed_norms(model):
            parent, attribute = _owner(model, name)
            undo.append(keep_attributes(parent))
            setattr(parent, attribute, removed.norm.train(removed.training))
        take_out_configs(model, RemovalConfig, undo)
    return model


def _refuse_placement(model: nn.Module, config: RemovalConfig, norms: list[FoundNorm]) -> None:
    found = {norm.placement for norm in norms}
    if "pre" in config.placements and "branch" in found:
        problem = (
            "has its norms at the end of each branch, before it is added. To remove them, ask for "
            f"{RemoveLayerNormConfig.method!r}"
        )
    elif "pre" in config.placements and "post" in found:
        problem = (
            "is post-LN: its norms stand behind the residual additions, where the paper keeps "
            f"them. To remove them all the same, ask for {RemoveLayerNormConfig.method!r}"
        )
    elif "post" in config.placements and "pre" in found:
        problem = (
            "is pre-LN: its norms stand in front of attention and MLP. To remove them, ask for "
            f"{RemovePreLayerNormConfig.method!r}"
        )
    else:
        problem = "has no norm in its blocks that its architecture names"
    raise UnsupportedModelError(f"{config.method} does not fit: {type(model).__name__} {problem}")


def _models_around(part: nn.Module) -> list[PreTrainedModel]:
    """Return the models of transformers in this process that hold another one as a part."""
    return [
        each
        for each in live_instances(PreTrainedModel)
        if each is not part and any(m is part for m in each.modules())
    ]


def check_can_be_saved(model: nn.Module) -> None:
    """Raise for a model that, without norms, no folder could be loaded as.

    It is asked before norms are removed, when a training begins, and before anything is saved: a
    part may have lost its norms before it came into the model.

    Raises:
        UnsupportedModelError: if its class is not one of transformers, its architecture is not
            registered, or its config has no place for the guard.
    """
    if architecture_of(model) is None:
        raise UnsupportedModelError(
            f"the norms of a part of a {type(model).__name__} cannot be removed: the whole would "
            "be saved under a name of its own, and there is none for its model_type "
            f"{model_type_of(model)!r}. Keep the norms of its parts, or call "
            "hf_stable.restore_layernorms"
        )
    # FSDP2's fully_shard puts a class of its own in front of the model's.
    own = next(cls for cls in type(model).__mro__ if not issubclass(cls, FSDPModule))
    name = own.__name__
    if not is_standalone(model) and getattr(transformers, name, None) is not own:
        raise UnsupportedModelError(
            f"a {name} without norms could be saved but not loaded: {name} is no model class of "
            "transformers, and of those alone are classes without norms derived. Remove them from "
            "a model of transformers, or keep them"
        )
    config_class = type(cast(Any, model).config)
    name = config_class.__name__.removeprefix(CLASS_PREFIX)
    try:
        guarded_field(config_class)
        known = hasattr(transformers, name)
    except TypeError:
        known = False
    if not known:
        raise UnsupportedModelError(
            f"a {type(model).__name__} without norms could not be saved so that nothing brings "
            f"them back: {name} is no config of transformers with a number in whose place a "
            "sentence could stand. Keep its norms and those of its parts"
        )


def _owner(model: nn.Module, name: str) -> tuple[nn.Module, str]:
    parent, _, attribute = name.rpartition(".")
    return model.get_submodule(parent), attribute
