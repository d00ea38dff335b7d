"""Decoders that differ from Llama by a name or a norm: StableLM, StarCoder 2, Cohere, GLM."""

from hf_stable.architectures.description import Block, MlpPaths
from hf_stable.architectures.llama import FUSED_GATED, GATED, decoder_attention, llama_like
from hf_stable.architectures.registry import register_architecture

_TWO_NORMS = ("input_layernorm", "post_attention_layernorm")
_ONE_NORM = ("input_layernorm",)


def _block(prefix: str, mlp: MlpPaths, norms: tuple[str, ...]) -> Block:
    return Block(f"{prefix}DecoderLayer", (decoder_attention(),), **mlp, pre_norms=norms)


register_architecture(
    llama_like(
        "stablelm",
        "StableLm",
        # With use_parallel_residual, attention and MLP stand side by side behind one norm.
        _block("StableLm", GATED, _TWO_NORMS),
        _block("StableLm", GATED, _ONE_NORM),
    )
)
register_architecture(
    llama_like(
        "starcoder2",
        "Starcoder2",
        _block("Starcoder2", {"mlp_in": ("mlp.c_fc",), "mlp_out": ("mlp.c_proj",)}, _TWO_NORMS),
    )
)
register_architecture(llama_like("cohere", "Cohere", _block("Cohere", GATED, _ONE_NORM)))
register_architecture(llama_like("glm", "Glm", _block("Glm", FUSED_GATED, _TWO_NORMS)))
