"""Train Hugging Face Transformers that would not train."""

from hf_stable.architectures import (
    Architecture,
    Attention,
    Block,
    Member,
    UnsupportedModelError,
    register_architecture,
    supported_architectures,
)
from hf_stable.describing import describe
from hf_stable.patching import fold, is_patched, patch
from hf_stable.sigma_reparam import SigmaReparamConfig

__version__ = "0.1.0"

__all__ = [
    "Architecture",
    "Attention",
    "Block",
    "Member",
    "SigmaReparamConfig",
    "UnsupportedModelError",
    "describe",
    "fold",
    "is_patched",
    "patch",
    "register_architecture",
    "supported_architectures",
]
