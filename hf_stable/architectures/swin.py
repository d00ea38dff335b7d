"""Swin (pre-LN) and Swin v2 (norms at the end of each branch): shifted windows, merged patches."""

from hf_stable.architectures.bert import bert_attention
from hf_stable.architectures.description import Architecture, Block, LeftOut, members
from hf_stable.architectures.registry import register_architecture
from hf_stable.architectures.vit import patch_block

_LAYERS = ("PatchEmbeddings.projection", "PatchMerging.reduction")
_HEADS = ("ForImageClassification.classifier", "ForMaskedImageModeling.decoder.0")
_NORMS = ("Embeddings.norm", "PatchMerging.norm", "Model.layernorm")

register_architecture(
    Architecture(
        "swin",
        patch_block("SwinLayer"),
        layers=members("Swin", *_LAYERS),
        heads=members("Swin", *_HEADS),
        norms=members("Swin", *_NORMS),
    )
)
register_architecture(
    Architecture(
        "swinv2",
        Block(
            "Swinv2Layer",
            # Cosines of queries and keys, by a learnt scale, and biases of positions.
            (bert_attention("attention", biased=True, returns_maps=True),),
            mlp_in=("intermediate.dense",),
            mlp_out=("output.dense",),
            branch_norms=("layernorm_before", "layernorm_after"),
        ),
        layers=members("Swinv2", *_LAYERS),
        heads=members("Swinv2", *_HEADS),
        norms=members("Swinv2", *_NORMS),
        left_out=(
            LeftOut(
                "Swinv2SelfAttention",
                "continuous_position_bias_mlp",
                "makes biases of positions, from coordinates",
            ),
        ),
    )
)
