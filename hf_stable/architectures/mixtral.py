"""Mixtral and Qwen3-MoE: experts that are one parameter of three dimensions."""

from hf_stable.architectures.description import Architecture, Block, LeftOut, Member, MlpPaths
from hf_stable.architectures.llama import DECODER_HEADS, GATED, decoder_attention
from hf_stable.architectures.registry import register_architecture

_NORMS = ("input_layernorm", "post_attention_layernorm")
_EXPERTS: MlpPaths = {
    "mlp_in": ("mlp.experts.gate_up_proj", "mlp.experts.gate_up_proj"),
    "mlp_out": ("mlp.experts.down_proj",),
}

for _model_type, _prefix in {"mixtral": "Mixtral", "qwen3_moe": "Qwen3Moe"}.items():
    _sparse, _dense = (
        Block(f"{_prefix}DecoderLayer", (decoder_attention(),), **mlp, pre_norms=_NORMS)
        for mlp in (_EXPERTS, GATED)
    )
    register_architecture(
        Architecture(
            _model_type,
            (_sparse, _dense),
            heads=(Member(f"{_prefix}ForCausalLM", "lm_head"), *DECODER_HEADS),
            norms=(Member(f"{_prefix}Model", "norm"),),
            left_out=(
                LeftOut(
                    f"{_prefix}TopKRouter",
                    "weight",
                    "the router: its logits choose experts, and are no product that feeds the "
                    "residual stream",
                ),
            ),
        )
    )
