"""GPT-NeoX, BLOOM and Falcon: q, k, v of one head after the other in one matrix."""

from hf_stable.architectures.description import Architecture, Attention, Block, members
from hf_stable.architectures.llama import DECODER_HEADS
from hf_stable.architectures.registry import register_architecture


def _attention(module: str, *, biased: bool = False, returns_maps: bool = False) -> Attention:
    fused = f"{module}.query_key_value"
    return Attention(
        module,
        fused,
        fused,
        fused,
        f"{module}.dense",
        per_head=True,
        biased=biased,
        returns_maps=returns_maps,
    )


def _block(class_name: str, attention: Attention, norms: tuple[str, ...]) -> Block:
    return Block(
        class_name,
        (attention,),
        mlp_in=("mlp.dense_h_to_4h",),
        mlp_out=("mlp.dense_4h_to_h",),
        pre_norms=norms,
    )


_TWO_NORMS = ("input_layernorm", "post_attention_layernorm")
# Of BLOOM and Falcon, which goes by ALiBi or by rotary positions.
_BIASED = _attention("self_attention", biased=True, returns_maps=True)
_HEADS = ("ForCausalLM.lm_head", "ForSequenceClassification.score",
          "ForTokenClassification.classifier", "ForQuestionAnswering.qa_outputs")  # fmt: skip

register_architecture(
    Architecture(
        "gpt_neox",
        _block("GPTNeoXLayer", _attention("attention"), _TWO_NORMS),
        heads=(*members("GPTNeoX", *_HEADS), *DECODER_HEADS),
        norms=members("GPTNeoX", "Model.final_layer_norm"),
        transformers=">=5.14",  # the head has another name in older ones
    )
)
register_architecture(
    Architecture(
        "bloom",
        # ALiBi is added to the logits within the attention.
        _block("BloomBlock", _BIASED, _TWO_NORMS),
        heads=members("Bloom", *_HEADS),
        norms=members("Bloom", "Model.word_embeddings_layernorm", "Model.ln_f"),
    )
)
register_architecture(
    Architecture(
        "falcon",
        (
            _block("FalconDecoderLayer", _BIASED, ("ln_attn", "ln_mlp")),
            _block("FalconDecoderLayer", _BIASED, _TWO_NORMS),
            _block("FalconDecoderLayer", _BIASED, ("input_layernorm",)),
        ),
        heads=members("Falcon", *_HEADS),
        norms=members("Falcon", "Model.ln_f"),
        plain_layers=("FalconLinear",),
    )
)
