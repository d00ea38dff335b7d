"""ModernBERT: pre-LN and rotary, with fused projections of attention and gated MLP."""

from hf_stable.architectures.description import Architecture, Attention, Block, Member, members
from hf_stable.architectures.registry import register_architecture

register_architecture(
    Architecture(
        "modernbert",
        Block(
            "ModernBertEncoderLayer",
            (Attention("attn", "attn.Wqkv", "attn.Wqkv", "attn.Wqkv", "attn.Wo"),),
            mlp_in=("mlp.Wi", "mlp.Wi"),
            mlp_out=("mlp.Wo",),
            pre_norms=("attn_norm", "mlp_norm"),
        ),
        layers=(Member("ModernBertPredictionHead", "dense"),),
        heads=members(
            "ModernBertFor",
            "MaskedLM.decoder",
            "SequenceClassification.classifier",
            "TokenClassification.classifier",
            "QuestionAnswering.classifier",
            "MultipleChoice.classifier",
        ),  # fmt: skip
        norms=members("ModernBert", "Embeddings.norm", "Model.final_norm", "PredictionHead.norm"),
    )
)
