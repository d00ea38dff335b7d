"""T5 and mT5: encoder and decoder of one class, RMSNorm in front, MLP plain or gated."""

from __future__ import annotations

from dataclasses import replace

from hf_stable.architectures.description import (
    Architecture,
    Attention,
    Block,
    attention_within,
    members,
)
from hf_stable.architectures.registry import register_architecture


def _attention(module: str, is_cross: bool = False) -> Attention:
    plain = attention_within(module, "q", "k", "v", "o")
    return replace(plain, num_heads="n_heads", is_cross=is_cross)


def _block(class_name: str, is_decoder: bool, is_gated: bool) -> Block:
    mlp = f"layer.{1 + is_decoder}.DenseReluDense"
    attentions = [_attention("layer.0.SelfAttention")]
    if is_decoder:
        attentions.append(_attention("layer.1.EncDecAttention", is_cross=True))
    return Block(
        class_name,
        tuple(attentions),
        mlp_in=(f"{mlp}.wi_0", f"{mlp}.wi_1") if is_gated else (f"{mlp}.wi",),
        mlp_out=(f"{mlp}.wo",),
        pre_norms=tuple(f"layer.{i}.layer_norm" for i in range(2 + is_decoder)),
    )


for _model_type, _prefix in {"t5": "T5", "mt5": "MT5"}.items():
    register_architecture(
        Architecture(
            _model_type,
            tuple(
                _block(f"{_prefix}Block", is_decoder, is_gated)
                for is_decoder in (False, True)
                for is_gated in (False, True)
            ),
            layers=members(_prefix, "ClassificationHead.dense"),
            heads=members(
                _prefix, "ForConditionalGeneration.lm_head", "ClassificationHead.out_proj",
                "ForTokenClassification.classifier", "ForQuestionAnswering.qa_outputs",
            ),
            norms=members(_prefix, "Stack.final_layer_norm"),
        )
    )  # fmt: skip
