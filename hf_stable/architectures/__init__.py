"""The registry of supported architectures; importing it registers those that ship with it."""

from hf_stable.architectures import bert, gpt2, swin, vit  # noqa: F401  (each registers itself)
from hf_stable.architectures.description import Architecture, Attention, Block, LeftOut, Member
from hf_stable.architectures.registry import (
    UnsupportedModelError,
    register_architecture,
    supported_architectures,
)

__all__ = [
    "Architecture",
    "Attention",
    "Block",
    "LeftOut",
    "Member",
    "UnsupportedModelError",
    "register_architecture",
    "supported_architectures",
]
