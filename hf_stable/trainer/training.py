"""What hf_stable changes where the Trainer trains."""

from __future__ import annotations

from typing import Any

from torch import Tensor, nn
from transformers import PreTrainedModel

from hf_stable.methods.agreement import refuse_different_patches
from hf_stable.methods.layernorms.removal import check_can_be_saved, removed_norms
from hf_stable.methods.sharding import refuse_unfit_sharding
from hf_stable.methods.sigma_reparam.layers import SigmaLayer
from hf_stable.methods.sigma_reparam.method import sigma_layers
from hf_stable.trainer.changes import wrapping
from hf_stable.trainer.deepspeed_settings import refuse_other_checkpoint, refuse_unfit_settings
from hf_stable.trainer.optimizer import OPTIMIZER_NAME
from hf_stable.trainer.resuming import watching_own_ways
from hf_stable.trainer.training_record import keeping_record
from hf_stable.trainer.watching import (
    log_with_pending,
    observing_step,
    printing,
    refuse_cut_sequences,
    train_with_rollbacks,
)

__all__: list[str] = []


@wrapping(
    "transformers.trainer:Trainer.get_decay_parameter_names", "model",
    reason="gamma of a sigma layer is never weight-decayed, under any optimizer",
)  # fmt: skip
def _get_decay_parameter_names(original: Any, trainer: Any, model: nn.Module) -> list[str]:
    # The Trainer asks by the names of parameters, in which wrappers of blocks are.
    layers = (name for name, module in model.named_modules() if isinstance(module, SigmaLayer))
    gammas = {f"{name}.gamma" for name in layers}
    return [name for name in original(trainer, model) if name not in gammas]


wrapping(
    "transformers.trainer:Trainer.log", "logs",
    reason="values that a callback holds ready (take_pending_logs) join the record of the step",
)(log_with_pending)  # fmt: skip


for _printer in ("PrinterCallback", "ProgressCallback"):
    wrapping(
        f"transformers.trainer_callback:{_printer}.on_log", "logs",
        reason="prints one short part in place of a monitor's thirty keys (shorten_record)",
    )(printing)  # fmt: skip


@wrapping(
    "transformers.trainer:Trainer.training_step", "model", "inputs",
    reason="a callback sees what each step takes and its loss (observe_batch, observe_loss), or "
    "skips it (loss_of_skipped)",
)  # fmt: skip
def _training_step(
    original: Any, trainer: Any, model: nn.Module, inputs: Any, *args: Any, **kwargs: Any
) -> Tensor:
    def loss_of(inputs: Any) -> Tensor:
        # The model inside DDP, which would wait for a backward.
        with trainer.compute_loss_context_manager():
            return trainer.compute_loss(trainer.model, trainer._prepare_inputs(inputs))

    return observing_step(original, loss_of, trainer, model, inputs, *args, **kwargs)


@wrapping(
    "transformers.trainer:Trainer.train", "resume_from_checkpoint",
    reason="goes back where a callback asks for it; refuses sharding that does not fit, and ranks "
    "that differ; notes its card",
)  # fmt: skip
def _train(original: Any, trainer: Any, *args: Any, **kwargs: Any) -> Any:
    state = trainer.accelerator.state
    if trainer.model is not None:  # a search for hyperparameters builds each trial's model later
        whole = trainer.accelerator.unwrap_model(trainer.model)
        if isinstance(whole, PreTrainedModel) and removed_norms(whole):
            check_can_be_saved(whole)
        refuse_different_patches(whole)
        refuse_unfit_sharding(
            trainer.model,
            fsdp_plugin=getattr(state, "fsdp_plugin", None),
            mixed_precision=state.mixed_precision,
        )
        refuse_unfit_settings(
            getattr(getattr(state, "deepspeed_plugin", None), "deepspeed_config", {}),
            is_patched=bool(sigma_layers(whole)),
            uses_adamw2=trainer.args.optim == OPTIMIZER_NAME,
        )
        if trainer.is_deepspeed_enabled:
            refuse_other_checkpoint(args[0] if args else kwargs.get("resume_from_checkpoint"))
    refuse_cut_sequences(trainer)
    with keeping_record(trainer), watching_own_ways(trainer):
        return train_with_rollbacks(original, trainer, *args, **kwargs)
