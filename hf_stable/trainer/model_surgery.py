"""What hf_stable changes where PEFT and transformers replace layers of a model."""

from __future__ import annotations

import inspect
from typing import Any

from torch import nn
from transformers import PreTrainedModel

from hf_stable.methods.layernorms.removal import removed_norms
from hf_stable.methods.sigma_reparam.method import sigma_layers
from hf_stable.trainer.changes import wrapping

__all__: list[str] = []


@wrapping(
    "peft.tuners.tuners_utils:BaseTuner.__init__", "model",
    reason="refuses adapters on an unfolded model, whose merge would edit the raw weight",
)  # fmt: skip
def _inject_adapters(
    original: Any, tuner: Any, model: nn.Module, *args: Any, **kwargs: Any
) -> None:
    layers = sigma_layers(model)
    if layers:
        raise ValueError(
            f"{len(layers)} layers of the model (first: {layers[0][0]!r}) are reparametrised: an "
            "adapter merged into them would be scaled by gamma / sigma. Call hf_stable.fold(model) "
            "first, then add the adapter"
        )
    _refuse_removed_norms(model)
    return original(tuner, model, *args, **kwargs)


@wrapping(
    "peft.peft_model:PeftModel.__init__", "model",
    reason="refuses adapters that would name a model with LayerNorms as the base of one without",
)  # fmt: skip
def _wrap_for_adapters(
    original: Any, wrapper: Any, model: nn.Module, *args: Any, **kwargs: Any
) -> None:
    _refuse_removed_norms(model)  # prompts come by no tuner
    return original(wrapper, model, *args, **kwargs)


def _refuse_removed_norms(model: nn.Module) -> None:
    if removed := removed_norms(model):
        raise ValueError(
            f"{len(removed)} LayerNorms of the model (first: {removed[0][0]!r}) were removed in "
            "this process, but the adapter would name the model that has them as its base. Export "
            "the model (hf_stable.export), load that folder, then add the adapter"
        )


@wrapping(
    "transformers.modeling_utils:PreTrainedModel.resize_token_embeddings",
    "new_num_tokens", "pad_to_multiple_of",
    reason="refuses a reparametrised head, for which a plain layer with the raw weight would come",
)  # fmt: skip
def _resize_token_embeddings(
    original: Any, model: PreTrainedModel, *args: Any, **kwargs: Any
) -> Any:
    options = inspect.signature(original).bind(model, *args, **kwargs).arguments
    size, multiple = options.get("new_num_tokens"), options.get("pad_to_multiple_of")
    head = model.get_output_embeddings()
    name = next((name for name, layer in sigma_layers(model) if layer is head), None)
    if name is not None and (multiple or size not in (None, len(head.weight))):
        raise ValueError(
            f"{name!r} is reparametrised, and transformers would put a plain layer with its raw "
            "weight in its place. Call hf_stable.fold(model), resize, and patch it again"
        )
    return original(model, *args, **kwargs)
