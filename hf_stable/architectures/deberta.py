"""DeBERTa v2 and v3: BERT whose logits have terms of relative positions."""

from hf_stable.architectures.bert import bert_attention, bert_block
from hf_stable.architectures.description import Architecture, Member, members
from hf_stable.architectures.registry import register_architecture

register_architecture(
    Architecture(
        "deberta-v2",
        bert_block(
            "DebertaV2Layer",
            bert_attention(
                "attention", ("query_proj", "key_proj", "value_proj"), biased=True,
                returns_maps=True,
            ),
        ),
        layers=(
            # With share_att_key the projections of contents serve positions too.
            Member("DisentangledSelfAttention", "pos_key_proj", optional=True),
            Member("DisentangledSelfAttention", "pos_query_proj", optional=True),
            Member("ConvLayer", "conv"),
            Member("LegacyDebertaV2PredictionHeadTransform", "dense"),
            Member("DebertaV2LMPredictionHead", "dense"),
            Member("ContextPooler", "dense"),
            Member("DebertaV2Embeddings", "embed_proj", optional=True),
        ),
        heads=(
            Member("LegacyDebertaV2LMPredictionHead", "decoder"),
            *members(
                "DebertaV2For", "SequenceClassification.classifier",
                "TokenClassification.classifier", "QuestionAnswering.qa_outputs",
                "MultipleChoice.classifier",
            ),
        ),
        norms=(
            Member("DebertaV2Embeddings", "LayerNorm"),
            Member("DebertaV2Encoder", "LayerNorm", optional=True),
            Member("ConvLayer", "LayerNorm"),
            Member("LegacyDebertaV2PredictionHeadTransform", "LayerNorm"),
            Member("DebertaV2LMPredictionHead", "LayerNorm"),
        ),
    )
)  # fmt: skip
