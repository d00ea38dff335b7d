"""All that users import by name from `hf_stable`, which takes torch and transformers to import."""

from hf_stable.adamw2.groups import lora_groups, parameter_groups
from hf_stable.adamw2.optimizer import AdamW2
from hf_stable.architectures import (
    Architecture,
    Attention,
    Block,
    Member,
    UnsupportedModelError,
    register_architecture,
    supported_architectures,
)
from hf_stable.checkpoints.exporting import export, push_to_hub
from hf_stable.checkpoints.loading import load
from hf_stable.commands.preflight.flying import preflight
from hf_stable.methods.describing import describe
from hf_stable.methods.layernorms.removal import (
    RemoveLayerNormConfig,
    RemovePreLayerNormConfig,
    restore_layernorms,
)
from hf_stable.methods.patching import fold, is_patched, patch
from hf_stable.methods.sigma_reparam.method import SigmaReparamConfig, refresh
from hf_stable.monitor.callback import StabilityCallback
from hf_stable.monitor.probing import probe
