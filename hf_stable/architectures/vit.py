"""ViT and the encoders that are built like it: pre-LN, over patches of an image."""

from __future__ import annotations

from hf_stable.architectures.description import (
    Architecture,
    Attention,
    Block,
    Member,
    MlpPaths,
    attention_within,
    members,
)
from hf_stable.architectures.registry import register_architecture

__all__ = ["PLAIN_MLP", "patch_attention", "patch_block"]

PLAIN_MLP: MlpPaths = {"mlp_in": ("mlp.fc1",), "mlp_out": ("mlp.fc2",)}


def patch_attention() -> Attention:
    """Describe the attention of ViT."""
    return attention_within("attention", "q_proj", "k_proj", "v_proj", "o_proj")


def patch_block(
    class_name: str,
    mlp: MlpPaths = PLAIN_MLP,
    norms: tuple[str, ...] = ("layernorm_before", "layernorm_after"),
) -> Block:
    """Describe ViT's block."""
    return Block(class_name, (patch_attention(),), **mlp, pre_norms=norms)


register_architecture(
    Architecture(
        "vit",
        patch_block("ViTLayer"),
        layers=members("ViT", "PatchEmbeddings.projection", "Pooler.dense"),
        heads=members("ViTFor", "ImageClassification.classifier", "MaskedImageModeling.decoder.0"),
        norms=members("ViT", "Model.layernorm"),
    )
)
register_architecture(
    Architecture(
        "deit",
        patch_block("DeiTLayer"),
        layers=members("DeiT", "PatchEmbeddings.projection", "Pooler.dense"),
        heads=members(
            "DeiTFor",
            "ImageClassification.classifier",
            "MaskedImageModeling.decoder.0",
            "ImageClassificationWithTeacher.cls_classifier",
            "ImageClassificationWithTeacher.distillation_classifier",
        ),  # fmt: skip
        norms=members("DeiT", "Model.layernorm"),
    )
)
register_architecture(
    Architecture(
        "vit_mae",
        patch_block("ViTMAELayer"),
        layers=members("ViTMAE", "PatchEmbeddings.projection", "Decoder.decoder_embed"),
        heads=(Member("ViTMAEDecoder", "decoder_pred"),),
        norms=members("ViTMAE", "Model.layernorm", "Decoder.decoder_norm"),
    )
)
