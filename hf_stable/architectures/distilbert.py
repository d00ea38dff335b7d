"""DistilBERT and ALBERT: BERT halved, and BERT with one layer for all depths."""

from hf_stable.architectures.description import (
    Architecture,
    Attention,
    Block,
    Member,
    attention_within,
    members,
)
from hf_stable.architectures.registry import register_architecture

register_architecture(
    Architecture(
        "distilbert",
        Block(
            "TransformerBlock",
            (
                Attention(
                    module="attention",
                    query="attention.q_lin",
                    key="attention.k_lin",
                    value="attention.v_lin",
                    output="attention.out_lin",
                    num_heads="n_heads",
                ),
            ),
            mlp_in=("ffn.lin1",),
            mlp_out=("ffn.lin2",),
            post_norms=("sa_layer_norm", "output_layer_norm"),
        ),
        layers=members(
            "DistilBertFor",
            "MaskedLM.vocab_transform",
            "SequenceClassification.pre_classifier",
            "MultipleChoice.pre_classifier",
        ),  # fmt: skip
        heads=members(
            "DistilBertFor",
            "MaskedLM.vocab_projector",
            "SequenceClassification.classifier",
            "TokenClassification.classifier",
            "QuestionAnswering.qa_outputs",
            "MultipleChoice.classifier",
        ),  # fmt: skip
        norms=(
            Member("Embeddings", "LayerNorm"),
            Member("DistilBertForMaskedLM", "vocab_layer_norm"),
        ),
    )
)
register_architecture(
    Architecture(
        "albert",
        Block(
            "AlbertLayer",
            (attention_within("attention", "query", "key", "value", "dense"),),
            mlp_in=("ffn",),
            mlp_out=("ffn_output",),
            post_norms=("attention.LayerNorm", "full_layer_layer_norm"),
            is_shared=True,
        ),
        layers=(
            *members("Albert", "Transformer.embedding_hidden_mapping_in", "MLMHead.dense"),
            Member("AlbertModel", "pooler", optional=True),
        ),
        heads=members(
            "Albert",
            "MLMHead.decoder",
            "SOPHead.classifier",
            "ForSequenceClassification.classifier",
            "ForTokenClassification.classifier",
            "ForQuestionAnswering.qa_outputs",
            "ForMultipleChoice.classifier",
        ),  # fmt: skip
        norms=members("Albert", "Embeddings.LayerNorm", "MLMHead.LayerNorm"),
    )
)
