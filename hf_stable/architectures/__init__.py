"""The registry of supported architectures; importing it registers those that ship with it."""

from hf_stable.architectures import (  # noqa: F401  (each registers itself)
    bart,
    beit,
    bert,
    clip,
    composites,
    deberta,
    dinov2,
    distilbert,
    gemma,
    gpt2,
    gpt_neox,
    llama,
    mixtral,
    modernbert,
    more_decoders,
    olmo,
    opt,
    phi,
    segformer,
    swin,
    t5,
    videomae,
    vit,
    wav2vec2,
)
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
