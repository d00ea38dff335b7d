"""Llama and the decoders that are built like it: rotary, RMSNorm in front, gated MLP."""

from __future__ import annotations

from hf_stable.architectures.description import (
    Architecture,
    Attention,
    Block,
    Member,
    MlpPaths,
    attention_within,
    members,
)
from hf_stable.architectures.registry import register_architecture

__all__ = ["DECODER_HEADS", "FUSED_GATED", "GATED", "decoder_attention", "llama_like"]

GATED: MlpPaths = {"mlp_in": ("mlp.gate_proj", "mlp.up_proj"), "mlp_out": ("mlp.down_proj",)}
FUSED_GATED: MlpPaths = {
    "mlp_in": ("mlp.gate_up_proj", "mlp.gate_up_proj"),
    "mlp_out": ("mlp.down_proj",),
}

DECODER_HEADS = (
    *members("GenericFor", "SequenceClassification.score", "TokenClassification.score"),
    Member("GenericForQuestionAnswering", "qa_outputs"),
)
"""Heads that transformers adds to any decoder by classes of its own."""


def decoder_attention(output: str = "o_proj") -> Attention:
    """Describe the attention of Llama, whose number of heads is in its config."""
    return attention_within("self_attn", "q_proj", "k_proj", "v_proj", output)


def llama_like(
    model_type: str,
    prefix: str,
    *blocks: Block,
    final_norm: str = "Model.norm",
    transformers: str = "",
) -> Architecture:
    """Describe a decoder whose classes begin with a prefix; by Llama's block if none is given.

    Args:
        model_type: its model type.
        prefix: of its class names.
        blocks: its blocks, where they differ from Llama's.
        final_norm: rest of the class name and path of the norm behind the blocks.
        transformers: versions that the entry fits.
    """
    block = Block(
        f"{prefix}DecoderLayer",
        (decoder_attention(),),
        **GATED,
        pre_norms=("input_layernorm", "post_attention_layernorm"),
    )
    return Architecture(
        model_type,
        blocks or block,
        heads=(Member(f"{prefix}ForCausalLM", "lm_head"), *DECODER_HEADS),
        norms=members(prefix, final_norm),
        transformers=transformers,
    )


for _model_type, _prefix in {
    "llama": "Llama",
    "mistral": "Mistral",
    "qwen2": "Qwen2",
    "qwen3": "Qwen3",
    "smollm3": "SmolLM3",
    "granite": "Granite",
}.items():
    register_architecture(llama_like(_model_type, _prefix))
