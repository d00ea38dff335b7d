"""What hf_stable changes in a process: a closed list, each entry with its reason.

The only module that touches names of transformers and PEFT that are not public. Everything here
passes straight through where no patched model is involved, unless its reason says otherwise.
"""

from __future__ import annotations

import functools
import inspect
import os
import pkgutil
import shutil
import sys
import warnings
from collections.abc import Callable
from contextlib import nullcontext
from contextvars import ContextVar
from dataclasses import dataclass
from typing import Any

from huggingface_hub import ModelCard
from torch import Tensor, nn
from transformers import CONFIG_MAPPING, PreTrainedModel, __version__

from hf_stable import modeling_hf_stable
from hf_stable._ranks import inner_optimizer
from hf_stable.adamw2.groups import (
    ModelAdamW2,
    parse_options,
    part_schedule,
    refuse_deepspeed,
)
from hf_stable.adamw2.optimizer import AdamW2
from hf_stable.checkpoints.card_pictures import draw_curves
from hf_stable.checkpoints.model_cards import amend_card
from hf_stable.checkpoints.provenance import keeping_record, provenance_of
from hf_stable.checkpoints.saving import (
    check_writable,
    fold_state_dict,
    is_complete,
    mark_incomplete,
    newest_complete,
    restoring,
)
from hf_stable.checkpoints.sidecar import remove_state, write_state
from hf_stable.checkpoints.weight_files import remove_stale_weights
from hf_stable.methods.layernorms.removal import needs_standalone_form, removed_norms
from hf_stable.methods.layernorms.standalone import (
    is_standalone,
    register_auto_classes,
    standalone_form,
)
from hf_stable.methods.patching import is_patched, patch_configs
from hf_stable.methods.sharding import refuse_unfit_sharding
from hf_stable.methods.sigma_reparam.layers import SigmaLayer
from hf_stable.methods.sigma_reparam.method import sigma_layers
from hf_stable.methods.sigma_reparam.steps import hooks_are_installed
from hf_stable.modeling_hf_stable import MODEL_TYPE_PREFIX
from hf_stable.monitor.rollbacks import checkpoint
from hf_stable.trainer.watching import log_with_pending, observing_step, train_with_rollbacks

_ADVICE = "Install a version that hf_stable's requirements allow, or a newer hf_stable"

try:
    from transformers.conversion_mapping import get_model_conversion_mapping
    from transformers.core_model_loading import WeightRenaming, rename_source_key
    from transformers.trainer_optimizer import _OPTIMIZER_HANDLERS, OptimizerContext
    from transformers.training_args import OptimizerNames
except ImportError as error:
    raise ImportError(
        f"hf_stable does not fit transformers {__version__}: {error}. {_ADVICE}"
    ) from error

__all__ = ["WRAPPED", "Wrap", "is_in_place", "key_renaming", "register"]

OPTIMIZER_NAME = "adamw2"

_MARK = "_hf_stable_wraps"
_publishing: ContextVar[bool] = ContextVar("hf_stable_publishing", default=False)


@dataclass(frozen=True)
class Wrap:
    """One thing in the process that hf_stable changes.

    Attributes:
        target: `module:qualified.name` of what is wrapped or added to.
        reason: why, in one line.
        parameters: names that a function must have for its wrapper to fit.
        wrapper: called with the original function and its arguments; None where nothing is
            replaced but something added.
        is_added: where something is added, says whether it has been.
    """

    target: str
    reason: str
    parameters: tuple[str, ...] = ()
    wrapper: Callable[..., Any] | None = None
    is_added: Callable[[], bool] = lambda: False


_wraps: list[Wrap] = [
    Wrap(
        "transformers.training_args:OptimizerNames",
        'gains the member "adamw2"',
        is_added=lambda: OPTIMIZER_NAME in OptimizerNames._value2member_map_,
    ),
    Wrap(
        "transformers.trainer_optimizer:_OPTIMIZER_HANDLERS",
        'gains the handler that builds AdamW2 for optim="adamw2"',
        is_added=lambda: _OPTIMIZER_HANDLERS.get(OPTIMIZER_NAME) is _build_adamw2,
    ),
    Wrap(
        "transformers:AutoConfig.register",
        "knows the model types of models without LayerNorms, as do the auto classes of models",
        is_added=lambda: any(name.startswith(MODEL_TYPE_PREFIX) for name in CONFIG_MAPPING),
    ),
    Wrap(
        "torch.optim.optimizer:register_optimizer_step_post_hook",
        "gains, at the first patch, the hook that refreshes sigma after each optimizer step",
        is_added=hooks_are_installed,
    ),
]


def _wrapping(target: str, *parameters: str, reason: str) -> Callable[[Any], Any]:
    def note(wrapper: Callable[..., Any]) -> Callable[..., Any]:
        _wraps.append(Wrap(target, reason, parameters, wrapper))
        return wrapper

    return note


def register() -> None:
    """Make every change on the list, once; later calls change nothing.

    Raises:
        ImportError: if a name on the list is not there or has other parameters, naming the
            version. Nothing has been changed then.
    """
    found = [(wrap, _resolve(wrap)) for wrap in WRAPPED if wrap.wrapper and _is_loaded(wrap)]
    for wrap, original in found:
        if getattr(original, _MARK, None) != wrap.target:
            _replace(wrap, original)
    register_auto_classes()
    _add_optimizer_name()
    _OPTIMIZER_HANDLERS[OPTIMIZER_NAME] = _build_adamw2


def is_in_place(wrap: Wrap) -> bool:
    """Say whether a change on the list has been made in this process, and still stands."""
    if wrap.wrapper is None:
        return wrap.is_added()
    if not _is_loaded(wrap):
        return False
    return getattr(pkgutil.resolve_name(wrap.target), _MARK, None) == wrap.target


def _is_loaded(wrap: Wrap) -> bool:
    # The Trainer imports PEFT where it is installed, so what is not here now will not come.
    return wrap.target.partition(".")[0] in sys.modules


def _resolve(wrap: Wrap) -> Any:
    try:
        original = pkgutil.resolve_name(wrap.target)
        missing = set(wrap.parameters) - set(inspect.signature(original).parameters)
        if missing:
            raise AttributeError(f"it has no parameter {sorted(missing)[0]!r}")
    except (ImportError, AttributeError) as error:
        package = wrap.target.partition(".")[0]
        raise ImportError(
            f"hf_stable does not fit {package} {sys.modules[package].__version__}: "
            f"{wrap.target} is not what it was ({error}). {_ADVICE}"
        ) from error
    return original


def _replace(wrap: Wrap, original: Any) -> None:
    function = wrap.wrapper
    assert function is not None

    @functools.wraps(original)
    def wrapper(*args: Any, **kwargs: Any) -> Any:
        return function(original, *args, **kwargs)

    setattr(wrapper, _MARK, wrap.target)
    owner, _, name = wrap.target.replace(":", ".").rpartition(".")
    setattr(pkgutil.resolve_name(owner), name, wrapper)


# Saving and publishing


@_wrapping(
    "transformers.modeling_utils:PreTrainedModel.save_pretrained",
    "save_directory", "is_main_process", "state_dict", "max_shard_size", "variant",
    "save_original_format",
    reason="folds a patched model's weights, guards one without LayerNorms, writes the sidecar; "
    "removes stale ones",
)  # fmt: skip
def _save_pretrained(original: Any, model: PreTrainedModel, *args: Any, **kwargs: Any) -> Any:
    call = inspect.signature(original).bind(model, *args, **kwargs)
    call.apply_defaults()
    options = call.arguments
    folder, saves_here = options["save_directory"], _saves_here(model, options["is_main_process"])
    raw: dict[str, Tensor] = {}
    layers, guarded = sigma_layers(model), needs_standalone_form(model)
    if layers:
        if options.get("distributed_checkpoint"):
            raise ValueError(
                "distributed_checkpoint=True writes each rank's raw weights, which no plain model "
                "can load; save a patched model without it, or hf_stable.fold it first"
            )
        if saves_here:
            check_writable(folder)
        own = options["state_dict"]
        options["state_dict"], raw = fold_state_dict(
            model, model.state_dict() if own is None else own
        )
    if guarded:
        options["save_original_format"] = False  # the names that the modeling file expects
    with standalone_form(model) if guarded else nullcontext():
        result = original(*call.args, **call.kwargs)
    # The sidecar comes after the original, which uploads what it finds (push_to_hub=True).
    if saves_here and os.path.isdir(folder) and not _has_adapters(model):
        if is_patched(model) and options["variant"] is None:
            remove_stale_weights(folder)
        whole = bool(raw) or not layers
        if whole and patch_configs(model) and not _publishing.get():
            configs, size = patch_configs(model), options["max_shard_size"]
            write_state(folder, configs, raw, size, provenance_of(model))
        else:
            remove_state(folder)
    return result


def _saves_here(model: PreTrainedModel, is_main_process: bool) -> bool:
    decide = getattr(model, "should_save_on_this_rank", None)
    return decide(is_main_process) if decide is not None else is_main_process


def _has_adapters(model: PreTrainedModel) -> bool:
    return getattr(model, "_hf_peft_config_loaded", False)


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
    _wrapping(_target, reason="saves without the sidecar, which is not for publishing")(_publish)


@_wrapping(
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


@_wrapping(
    "transformers.trainer:Trainer.create_model_card",
    reason="the card of a patched model says what was patched and how to load it",
)
def _create_model_card(original: Any, trainer: Any, *args: Any, **kwargs: Any) -> None:
    original(trainer, *args, **kwargs)
    model = trainer.accelerator.unwrap_model(trainer.model)
    if trainer.is_world_process_zero() and (patch_configs(model) or is_standalone(model)):
        path = os.path.join(trainer.args.output_dir, "README.md")
        name = trainer.hub_model_id or os.path.basename(os.path.abspath(trainer.args.output_dir))
        picture = draw_curves(trainer.state.log_history, trainer.args.output_dir)
        amend_card(ModelCard.load(path), model, name=name, picture=picture).save(path)


# Resuming


@_wrapping(
    "transformers.trainer:Trainer._load_from_checkpoint", "resume_from_checkpoint", "model",
    reason="renames native keys (also for plain models) and restores a patched model exactly",
)  # fmt: skip
def _load_from_checkpoint(
    original: Any, trainer: Any, resume_from_checkpoint: str, model: nn.Module | None = None
) -> None:
    target = trainer.model if model is None else model
    if not _loads_whole_weights(trainer, target):
        return original(trainer, resume_from_checkpoint, model)
    with restoring(target, resume_from_checkpoint, key_renaming(target)):
        return original(trainer, resume_from_checkpoint, model)


@_wrapping(
    "transformers.trainer:Trainer._load_best_model",
    reason="the same for load_best_model_at_end",
)
def _load_best_model(original: Any, trainer: Any) -> None:
    if not _loads_whole_weights(trainer, trainer.model):
        return original(trainer)
    folder = trainer.state.best_model_checkpoint
    with restoring(trainer.model, folder, key_renaming(trainer.model)):
        return original(trainer)


@_wrapping(
    "transformers.trainer:Trainer._load_optimizer_and_scheduler", "checkpoint",
    reason='optim="adamw2" continues the schedule of a checkpoint that AdamW wrote',
)  # fmt: skip
def _load_optimizer_and_scheduler(original: Any, trainer: Any, checkpoint: str | None) -> None:
    original(trainer, checkpoint)
    optimizer = inner_optimizer(trainer.optimizer)
    part_schedule(trainer.lr_scheduler, optimizer)


def _loads_whole_weights(trainer: Any, model: nn.Module) -> bool:
    # FSDP keeps raw state dicts of its own, under the names in memory: exact as they are.
    return (
        isinstance(model, PreTrainedModel)
        and not trainer.is_fsdp_enabled
        and not trainer.is_deepspeed_enabled
        and not _has_adapters(model)
    )


def key_renaming(model: PreTrainedModel) -> Callable[[str], str]:
    """Return the function from a key on disk to its name in the model, as in from_pretrained."""
    conversions = getattr(model, "_weight_conversions", None)
    if conversions is None:
        conversions = get_model_conversion_mapping(model, add_legacy=False)
    renamings = [entry for entry in conversions if isinstance(entry, WeightRenaming)]
    prefix, names = model.base_model_prefix, model.state_dict()
    return lambda key: rename_source_key(key, renamings, [], prefix, names)[0]


@_wrapping(
    "transformers.trainer:Trainer._save_checkpoint", "trial",
    reason="a checkpoint that is saved again counts as whole only once all of it is written anew",
)  # fmt: skip
def _save_checkpoint(original: Any, trainer: Any, model: nn.Module, trial: Any) -> None:
    # The original writes trainer_state.json last, but leaves one that is there where it is.
    if trainer.args.should_save:
        folder = trainer._get_output_dir(trial=trial)
        mark_incomplete(checkpoint(folder, trainer.state.global_step))
    return original(trainer, model, trial)


@_wrapping(
    "transformers.trainer:get_last_checkpoint", "folder",
    reason="resume_from_checkpoint=True skips, with a warning, what was not saved to the end",
)  # fmt: skip
def _get_last_checkpoint(original: Any, folder: str) -> str | None:
    last = original(folder)
    if last is None or is_complete(last):
        return last
    complete = newest_complete(folder)
    warnings.warn(
        f"{last} was not saved to the end (its trainer_state.json or a weights file is missing or "
        f"cut short); resuming from {complete or 'nothing'} instead",
        UserWarning,
        stacklevel=3,
    )
    return complete


# Training


@_wrapping(
    "transformers.trainer:Trainer.get_decay_parameter_names", "model",
    reason="gamma of a sigma layer is never weight-decayed, under any optimizer",
)  # fmt: skip
def _get_decay_parameter_names(original: Any, trainer: Any, model: nn.Module) -> list[str]:
    # The Trainer asks by the names of parameters, in which wrappers of blocks are.
    layers = (name for name, module in model.named_modules() if isinstance(module, SigmaLayer))
    gammas = {f"{name}.gamma" for name in layers}
    return [name for name in original(trainer, model) if name not in gammas]


_wrapping(
    "transformers.trainer:Trainer.log", "logs",
    reason="values that a callback holds ready (take_pending_logs) join the record of the step",
)(log_with_pending)  # fmt: skip


@_wrapping(
    "transformers.trainer:Trainer.training_step", "model", "inputs",
    reason="a callback sees the loss of each step (observe_loss), which averages and filters hide",
)  # fmt: skip
def _training_step(
    original: Any, trainer: Any, model: nn.Module, inputs: Any, *args: Any, **kwargs: Any
) -> Tensor:
    def loss_again() -> Tensor:
        # The model inside DDP, which would wait for a backward.
        with trainer.compute_loss_context_manager():
            return trainer.compute_loss(trainer.model, trainer._prepare_inputs(inputs))

    return observing_step(original, loss_again, trainer, model, inputs, *args, **kwargs)


@_wrapping(
    "transformers.trainer:Trainer.train", "resume_from_checkpoint",
    reason="goes back where a callback asks for it (take_rollback); for a patched model refuses "
    "unfit sharding, notes its card",
)  # fmt: skip
def _train(original: Any, trainer: Any, *args: Any, **kwargs: Any) -> Any:
    state = trainer.accelerator.state
    if trainer.model is not None:  # a search for hyperparameters builds each trial's model later
        refuse_unfit_sharding(
            trainer.model,
            fsdp_plugin=getattr(state, "fsdp_plugin", None),
            deepspeed_plugin=getattr(state, "deepspeed_plugin", None),
            mixed_precision=state.mixed_precision,
        )
    with keeping_record(trainer):
        return train_with_rollbacks(original, trainer, *args, **kwargs)


@_wrapping(
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


@_wrapping(
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


@_wrapping(
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


# The optimizer


@_wrapping(
    "transformers.trainer:_parse_optim_args", "optim_args_str",
    reason="an entry of optim_args without '=' gets an error that says so",
)  # fmt: skip
def _parse_optim_args(original: Any, optim_args_str: str | None) -> dict[str, str]:
    for entry in (optim_args_str or "").replace(" ", "").split(","):
        if optim_args_str and entry.count("=") != 1:
            raise ValueError(
                f"optim_args={optim_args_str!r}: {entry!r} is not of the form key=value; separate "
                "several by commas, as in 'tau=0.004,power_iterations=2'"
            )
    return original(optim_args_str)


WRAPPED: tuple[Wrap, ...] = tuple(_wraps)
"""Everything that `register` and the first `patch` change in a process."""


def _add_optimizer_name() -> None:
    members: Any = OptimizerNames
    if OPTIMIZER_NAME in members._value2member_map_:
        return
    name = OPTIMIZER_NAME.upper()
    member: Any = str.__new__(members, OPTIMIZER_NAME)
    member._name_, member._value_ = name, OPTIMIZER_NAME
    member.__objclass__ = members
    member._sort_order_ = len(members._member_names_)
    # A pickle (training_args.bin) names this module, so that reading it imports and registers.
    member.__reduce_ex__ = lambda protocol: (_optimizer_name, (OPTIMIZER_NAME,))
    members._member_names_.append(name)
    members._member_map_[name] = member
    members._value2member_map_[OPTIMIZER_NAME] = member
    if hasattr(members, "_hashable_values_"):
        members._hashable_values_.append(OPTIMIZER_NAME)
    type.__setattr__(members, name, member)


def _optimizer_name(value: str) -> OptimizerNames:
    return OptimizerNames(value)


def _build_adamw2(context: OptimizerContext) -> tuple[type[AdamW2], dict[str, Any]]:
    """Return what the Trainer builds for `optim="adamw2"`: the class, and its arguments."""
    refuse_deepspeed(context.args)
    options = parse_options(context.optim_args)
    arguments = {**context.optimizer_kwargs, **context.adam_kwargs, **options}
    if context.model is None:
        return AdamW2, arguments
    return ModelAdamW2, {**arguments, "structure": context.model}
