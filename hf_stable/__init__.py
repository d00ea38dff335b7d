"""Train Hugging Face Transformers that would not train."""

from hf_stable import trainer_plugin
from hf_stable.adamw2 import AdamW2
from hf_stable.adamw2_groups import lora_groups, parameter_groups
from hf_stable.architectures import (
    Architecture,
    Attention,
    Block,
    Member,
    UnsupportedModelError,
    register_architecture,
    supported_architectures,
)
from hf_stable.callback import StabilityCallback
from hf_stable.checkpoints import load
from hf_stable.describing import describe
from hf_stable.exporting import export, push_to_hub
from hf_stable.norm_removal import (
    RemoveLayerNormConfig,
    RemovePreLayerNormConfig,
    restore_layernorms,
)
from hf_stable.patching import fold, is_patched, patch
from hf_stable.probes import probe
from hf_stable.sigma_reparam import SigmaReparamConfig, refresh

__version__ = "0.1.0"

__all__ = [
    "AdamW2",
    "Architecture",
    "Attention",
    "Block",
    "Member",
    "RemoveLayerNormConfig",
    "RemovePreLayerNormConfig",
    "SigmaReparamConfig",
    "StabilityCallback",
    "UnsupportedModelError",
    "describe",
    "export",
    "fold",
    "is_patched",
    "load",
    "lora_groups",
    "parameter_groups",
    "patch",
    "probe",
    "push_to_hub",
    "refresh",
    "register_architecture",
    "restore_layernorms",
    "supported_architectures",
]

trainer_plugin.register()
