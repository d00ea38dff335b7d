"""Phi (attention and a plain MLP side by side behind one norm) and Phi-3 (two fused matrices)."""

from hf_stable.architectures.description import Attention, Block
from hf_stable.architectures.llama import FUSED_GATED, decoder_attention, llama_like
from hf_stable.architectures.registry import register_architecture

register_architecture(
    llama_like(
        "phi",
        "Phi",
        Block(
            "PhiDecoderLayer",
            (decoder_attention("dense"),),
            mlp_in=("mlp.fc1",),
            mlp_out=("mlp.fc2",),
            pre_norms=("input_layernorm",),
        ),
        final_norm="Model.final_layernorm",
    )
)
register_architecture(
    llama_like(
        "phi3",
        "Phi3",
        Block(
            "Phi3DecoderLayer",
            (
                Attention(
                    module="self_attn",
                    query="self_attn.qkv_proj",
                    key="self_attn.qkv_proj",
                    value="self_attn.qkv_proj",
                    output="self_attn.o_proj",
                ),
            ),
            **FUSED_GATED,
            pre_norms=("input_layernorm", "post_attention_layernorm"),
        ),
    )
)
