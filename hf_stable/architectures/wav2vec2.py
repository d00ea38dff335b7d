"""wav2vec 2.0, HuBERT and WavLM: encoders of speech, whose larger sizes are pre-LN."""

from __future__ import annotations

from dataclasses import replace

from hf_stable.architectures.description import (
    Architecture,
    Block,
    LeftOut,
    attention_within,
    members,
)
from hf_stable.architectures.registry import register_architecture

_CONVOLUTIONS = ("NoLayerNormConvLayer.conv", "LayerNormConvLayer.conv", "GroupNormConvLayer.conv")
_NORMS = ("layer_norm", "final_layer_norm")
_ATTENTION = attention_within("attention", "q_proj", "k_proj", "v_proj", "out_proj")


def _block(class_name: str, is_pre: bool, biased: bool) -> Block:
    return Block(
        class_name,
        (replace(_ATTENTION, biased=biased, bypassed=biased),),
        mlp_in=("feed_forward.intermediate_dense",),
        mlp_out=("feed_forward.output_dense",),
        pre_norms=_NORMS if is_pre else (),
        post_norms=() if is_pre else _NORMS,
    )


def _register(model_type: str, prefix: str, left_out: tuple[LeftOut, ...] = ()) -> None:
    biased = bool(left_out)
    register_architecture(
        Architecture(
            model_type,
            (
                _block(f"{prefix}EncoderLayer", False, biased),
                _block(f"{prefix}EncoderLayerStableLayerNorm", True, biased),
            ),
            layers=(
                *members(
                    prefix, *_CONVOLUTIONS, "FeatureProjection.projection", "AdapterLayer.conv",
                    "AttnAdapterLayer.linear_1", "AttnAdapterLayer.linear_2",
                    "ForPreTraining.project_hid", "ForPreTraining.project_q",
                    "GumbelVectorQuantizer.weight_proj", "ForSequenceClassification.projector",
                    "ForXVector.projector", "ForXVector.feature_extractor",
                ),
                *members("", "TDNNLayer.kernel"),
                *members(prefix, "Adapter.proj", optional=True),
            ),
            heads=members(
                prefix, "ForCTC.lm_head", "ForSequenceClassification.classifier",
                "ForAudioFrameClassification.classifier", "ForXVector.classifier",
            ),
            norms=members(
                prefix, "FeatureProjection.layer_norm", "Encoder.layer_norm",
                "EncoderStableLayerNorm.layer_norm", optional=True,
            ),
            # WavLM's attention returns one map, the mean of those of its heads.
            is_unseen=biased,
            left_out=(
                LeftOut(
                    f"{prefix}PositionalConvEmbedding",
                    "conv",
                    "the convolution of positions is weight-normed: it has a gain of its own",
                ),
                *left_out,
            ),
        )
    )  # fmt: skip


_register("wav2vec2", "Wav2Vec2")
_register("hubert", "Hubert")
_register(
    "wavlm",
    "WavLM",
    (LeftOut("WavLMAttention", "gru_rel_pos_linear", "gates the biases of relative positions"),),
)
