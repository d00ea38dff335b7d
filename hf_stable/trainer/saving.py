"""What hf_stable changes where transformers and the Trainer save and publish."""

from __future__ import annotations

import inspect
import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from contextvars import ContextVar
from typing import Any

from huggingface_hub import ModelCard
from torch import nn
from transformers import PreTrainedModel

from hf_stable import modeling_hf_stable
from hf_stable.checkpoints.card_pictures import draw_curves
from hf_stable.checkpoints.completeness import mark_incomplete
from hf_stable.checkpoints.model_cards import amend_card
from hf_stable.checkpoints.saving import save, save_held
from hf_stable.checkpoints.sidecar import remove_state
from hf_stable.methods.config import folded_methods
from hf_stable.methods.layernorms.standalone import is_standalone
from hf_stable.methods.patching import is_patched, patch_configs
from hf_stable.monitor.rollbacks import checkpoint
from hf_stable.trainer.changes import wrapping
from hf_stable.trainer.training_record import provenance_of

__all__ = ["has_adapters", "is_adapted"]

_publishing: ContextVar[bool] = ContextVar("hf_stable_publishing", default=False)


@wrapping(
    "transformers.modeling_utils:PreTrainedModel.save_pretrained",
    "save_directory", "is_main_process", "state_dict", "max_shard_size", "variant",
    "save_original_format",
    reason="folds a patched model's weights, guards one without LayerNorms, writes the sidecar; "
    "removes stale ones",
)  # fmt: skip
def _save_pretrained(original: Any, model: PreTrainedModel, *args: Any, **kwargs: Any) -> Any:
    if has_adapters(model):
        return original(model, *args, **kwargs)
    call = inspect.signature(original).bind(model, *args, **kwargs)
    call.apply_defaults()
    return save(
        model,
        call.arguments,
        lambda: original(*call.args, **call.kwargs),
        provenance_of(model),
        for_continuing=not _publishing.get(),
    )


@wrapping(
    "transformers.trainer:Trainer._save", "output_dir", "state_dict",
    reason="folds the weights of a module that holds a patched model, and writes the sidecar",
)  # fmt: skip
def _save(
    original: Any, trainer: Any, output_dir: str | None = None, state_dict: Any = None
) -> None:
    # The original calls save_pretrained where there is one; its own file is what is left.
    module = trainer.accelerator.unwrap_model(trainer.model, keep_torch_compile=False)
    folder = trainer.args.output_dir if output_dir is None else output_dir
    if not trainer.args.should_save or isinstance(module, PreTrainedModel) or is_adapted(module):
        return original(trainer, output_dir, state_dict)
    if not is_patched(module):
        if os.path.isdir(folder):
            remove_state(folder)
        return original(trainer, output_dir, state_dict)

    def write(plain: dict[str, Any]) -> None:
        original(trainer, output_dir, plain)

    save_held(module, state_dict, folder, write, provenance_of(module))


def has_adapters(model: nn.Module) -> bool:
    """Say whether adapters were added to a model of transformers, which saves these alone."""
    return getattr(model, "_hf_peft_config_loaded", False)


def is_adapted(module: nn.Module) -> bool:
    """Say whether a module is PEFT's wrapper around a model, which saves adapters alone."""
    return type(module).__module__.startswith("peft.")


def _publish(original: Any, *args: Any, **kwargs: Any) -> Any:
    token = _publishing.set(True)
    try:
        return original(*args, **kwargs)
    finally:
        _publishing.reset(token)


for _target in (
    "transformers.modeling_utils:PreTrainedModel.push_to_hub",
    "transformers.trainer:Trainer.push_to_hub",
):
    wrapping(_target, reason="saves without the sidecar, which is not for publishing")(_publish)


@wrapping(
    "transformers.trainer:Trainer._push_from_checkpoint", "checkpoint_folder",
    reason="pushes the modeling file of a model without LayerNorms along, and no stale sidecar",
)  # fmt: skip
def _push_from_checkpoint(original: Any, trainer: Any, checkpoint_folder: str) -> None:
    # The original copies weights and config from the checkpoint into the folder that it uploads.
    output_dir = trainer.args.output_dir
    code = os.path.join(checkpoint_folder, os.path.basename(modeling_hf_stable.__file__))
    if os.path.isfile(code):
        shutil.copy(code, output_dir)
    if patch_configs(trainer.model):
        remove_state(output_dir)
    return original(trainer, checkpoint_folder)


@wrapping(
    "transformers.trainer:Trainer.create_model_card",
    reason="the card of a patched or folded model says what was patched and how to load it",
)
def _create_model_card(original: Any, trainer: Any, *args: Any, **kwargs: Any) -> None:
    model = trainer.accelerator.unwrap_model(trainer.model)
    with _lending_config(trainer.model) if is_patched(model) else nullcontext():
        original(trainer, *args, **kwargs)
    ours = patch_configs(model) or folded_methods(model) or is_standalone(model)
    if trainer.is_world_process_zero() and ours:
        path = os.path.join(trainer.args.output_dir, "README.md")
        name = trainer.hub_model_id or os.path.basename(os.path.abspath(trainer.args.output_dir))
        picture = draw_curves(trainer.state.log_history, trainer.args.output_dir)
        amend_card(ModelCard.load(path), model, name=name, picture=picture).save(path)


@contextmanager
def _lending_config(module: nn.Module) -> Iterator[None]:
    """Let a module that has no config be asked for that of the model that it holds."""
    configs = (each.config for each in module.modules() if isinstance(each, PreTrainedModel))
    config = next(configs, None)
    if config is None or hasattr(module, "config"):
        yield
        return
    module.config = config
    try:
        yield
    finally:
        del module.config


@wrapping(
    "transformers.trainer:Trainer._save_checkpoint", "trial",
    reason="a checkpoint that is saved again counts as whole only once all of it is written anew",
)  # fmt: skip
def _save_checkpoint(original: Any, trainer: Any, model: nn.Module, trial: Any) -> None:
    # The original writes trainer_state.json last, but leaves one that is there where it is.
    if trainer.args.should_save:
        folder = trainer._get_output_dir(trial=trial)
        mark_incomplete(checkpoint(folder, trainer.state.global_step))
    return original(trainer, model, trial)
