"""BART and the encoder-decoders that are built like it, for text and for speech."""

from __future__ import annotations

from dataclasses import replace

from hf_stable.architectures.description import (
    Architecture,
    Attention,
    Block,
    Member,
    attention_within,
    members,
)
from hf_stable.architectures.registry import register_architecture


def _attention(module: str, is_cross: bool = False) -> Attention:
    plain = attention_within(module, "q_proj", "k_proj", "v_proj", "out_proj")
    return replace(plain, is_cross=is_cross)


def _blocks(prefix: str, is_pre: bool) -> tuple[Block, Block]:
    kinds = (("Encoder", ("self_attn",)), ("Decoder", ("self_attn", "encoder_attn")))
    blocks = []
    for kind, attentions in kinds:
        norms = (*(f"{attention}_layer_norm" for attention in attentions), "final_layer_norm")
        blocks.append(
            Block(
                f"{prefix}{kind}Layer",
                tuple(_attention(each, each == "encoder_attn") for each in attentions),
                mlp_in=("fc1",),
                mlp_out=("fc2",),
                pre_norms=norms if is_pre else (),
                post_norms=() if is_pre else norms,
            )
        )
    return blocks[0], blocks[1]


def bart_like(
    model_type: str,
    prefix: str,
    *,
    is_pre: bool = True,
    layers: tuple[Member, ...] = (),
    norms: tuple[str, ...] = ("Encoder.layer_norm", "Decoder.layer_norm"),
    head: str = "ForConditionalGeneration.lm_head",
) -> None:
    """Register an encoder-decoder whose classes begin with a prefix.

    Args:
        model_type: its model type.
        prefix: of its class names.
        is_pre: whether norms stand in front of attention and MLP, or behind the additions.
        layers: matrices outside the blocks, beside those of its classification head.
        norms: rest of the class name and path of the norms outside the blocks.
        head: the same of the projection to words.
    """
    causal = head.partition(".")[2]
    register_architecture(
        Architecture(
            model_type,
            _blocks(prefix, is_pre),
            layers=(*layers, *members(prefix, "ClassificationHead.dense")),
            heads=members(
                prefix, head, f"ForCausalLM.{causal}", "ClassificationHead.out_proj",
                "ForQuestionAnswering.qa_outputs", "ForAudioClassification.classifier",
            ),
            norms=members(prefix, *norms),
        )
    )  # fmt: skip


_EMBEDDING_NORMS = ("Encoder.layernorm_embedding", "Decoder.layernorm_embedding")
_FINAL_NORMS = ("Encoder.layer_norm", "Decoder.layer_norm")

bart_like("bart", "Bart", is_pre=False, norms=_EMBEDDING_NORMS)
bart_like("marian", "Marian", is_pre=False, norms=(), head="MTModel.lm_head")
bart_like("mbart", "MBart", norms=(*_EMBEDDING_NORMS, *_FINAL_NORMS))
bart_like("pegasus", "Pegasus")
bart_like("m2m_100", "M2M100")
bart_like(
    "whisper",
    "Whisper",
    layers=members("Whisper", "Encoder.conv1", "Encoder.conv2", "ForAudioClassification.projector"),
    head="ForConditionalGeneration.proj_out",
)
bart_like("speech_to_text", "Speech2Text", layers=(Member("Conv1dSubsampler", "conv_layers.*"),))
