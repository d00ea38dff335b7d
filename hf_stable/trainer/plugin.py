"""Everything that importing hf_stable changes in a process, in one list and made in one call."""

from __future__ import annotations

from transformers import CONFIG_MAPPING

from hf_stable.methods.layernorms.standalone import register_auto_classes
from hf_stable.methods.sigma_reparam.steps import hooks_are_installed
from hf_stable.modeling_hf_stable import MODEL_TYPE_PREFIX
from hf_stable.trainer import (  # noqa: F401  (each puts its changes on the list)
    model_surgery,
    raw_weights,
    resuming,
    saving,
    schedules,
    sharded_models,
    training,
)
from hf_stable.trainer.changes import adding, make
from hf_stable.trainer.deepspeed_engine import follow_deepspeed
from hf_stable.trainer.optimizer import add_optimizer

__all__ = ["register"]

adding(
    "transformers:AutoConfig.register",
    reason="knows the model types of models without LayerNorms, as do the auto classes of models",
    is_added=lambda: any(name.startswith(MODEL_TYPE_PREFIX) for name in CONFIG_MAPPING),
)
adding(
    "torch.optim.optimizer:register_optimizer_step_post_hook",
    reason="gains, at the first patch, the hook that refreshes sigma after each optimizer step",
    is_added=hooks_are_installed,
)


def register() -> None:
    """Make every change on the list that an import makes, once; later calls change nothing.

    Raises:
        ImportError: if a name on the list is not there or has other parameters, naming the
            version. Nothing has been changed then.
    """
    make()
    follow_deepspeed()
    register_auto_classes()
    add_optimizer()
