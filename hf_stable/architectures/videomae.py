"""VideoMAE: ViT over tubes of frames."""

from hf_stable.architectures.description import Architecture, Attention, Block, members
from hf_stable.architectures.registry import register_architecture

register_architecture(
    Architecture(
        "videomae",
        Block(
            "VideoMAELayer",
            (
                Attention(
                    module="attention.attention",
                    query="attention.attention.query",
                    key="attention.attention.key",
                    value="attention.attention.value",
                    output="attention.output.dense",
                ),
            ),
            mlp_in=("intermediate.dense",),
            mlp_out=("output.dense",),
            pre_norms=("layernorm_before", "layernorm_after"),
        ),
        layers=members(
            "VideoMAE", "PatchEmbeddings.projection", "ForPreTraining.encoder_to_decoder"
        ),
        heads=members("VideoMAE", "ForVideoClassification.classifier", "Decoder.head"),
        norms=(
            *members(
                "VideoMAE", "Model.layernorm", "ForVideoClassification.fc_norm", optional=True
            ),
            *members("VideoMAE", "Decoder.norm"),
        ),
    )
)
