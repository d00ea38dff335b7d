"""Gemma: Llama with gains of the form 1 + w; since Gemma 2 with norms at both ends of a branch."""

from hf_stable.architectures.description import Architecture, Block, LeftOut, Member, members
from hf_stable.architectures.llama import GATED, decoder_attention, llama_like
from hf_stable.architectures.registry import register_architecture


def _sandwich(prefix: str) -> Block:
    return Block(
        f"{prefix}DecoderLayer",
        (decoder_attention(),),
        **GATED,
        pre_norms=("input_layernorm", "pre_feedforward_layernorm"),
        branch_norms=("post_attention_layernorm", "post_feedforward_layernorm"),
        gain_offset=1.0,
    )


register_architecture(
    llama_like(
        "gemma",
        "Gemma",
        Block(
            "GemmaDecoderLayer",
            (decoder_attention(),),
            **GATED,
            pre_norms=("input_layernorm", "post_attention_layernorm"),
            gain_offset=1.0,
        ),
    )
)
register_architecture(llama_like("gemma2", "Gemma2", _sandwich("Gemma2")))
register_architecture(
    llama_like("gemma3_text", "Gemma3", _sandwich("Gemma3"), final_norm="TextModel.norm")
)
# The towers are models of their own: siglip_vision_model and gemma3_text.
register_architecture(
    Architecture(
        "gemma3",
        heads=members(
            "Gemma3", "ForConditionalGeneration.lm_head", "ForSequenceClassification.score"
        ),
        norms=(Member("Gemma3MultiModalProjector", "mm_soft_emb_norm"),),
        left_out=(
            LeftOut(
                "Gemma3MultiModalProjector",
                "mm_input_projection_weight",
                "a bare parameter between the towers, no layer of either",
            ),
        ),
    )
)
