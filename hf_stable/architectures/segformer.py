"""SegFormer: a hierarchy of encoders whose keys are fewer than their queries."""

from hf_stable.architectures.description import Architecture, members
from hf_stable.architectures.registry import register_architecture
from hf_stable.architectures.vit import patch_block

register_architecture(
    Architecture(
        "segformer",
        patch_block("SegformerLayer"),
        layers=members(
            "Segformer",
            "OverlapPatchEmbeddings.proj",
            "SequenceReduction.sequence_reduction",
            "DepthWiseConv.dwconv",
            "MLP.proj",
            "DecodeHead.linear_fuse",
        ),  # fmt: skip
        heads=members("Segformer", "ForImageClassification.classifier", "DecodeHead.classifier"),
        norms=members(
            "Segformer",
            "OverlapPatchEmbeddings.layer_norm",
            "SequenceReduction.layer_norm",
            "Stage.layer_norm",
        ),  # fmt: skip
    )
)
