"""CLIP and SigLIP: a tower for images and one for texts, each a model of its own."""

from hf_stable.architectures.description import (
    Architecture,
    Block,
    LeftOut,
    attention_within,
    members,
)
from hf_stable.architectures.registry import register_architecture


def _block(class_name: str) -> Block:
    return Block(
        class_name,
        (attention_within("self_attn", "q_proj", "k_proj", "v_proj", "out_proj"),),
        mlp_in=("mlp.fc1",),
        mlp_out=("mlp.fc2",),
        pre_norms=("layer_norm1", "layer_norm2"),
    )


register_architecture(
    Architecture(
        "clip",
        heads=members(
            "CLIP",
            "Model.visual_projection",
            "Model.text_projection",
            "ForImageClassification.classifier",
        ),  # fmt: skip
    )
)
register_architecture(
    Architecture(
        "clip_text_model",
        _block("CLIPEncoderLayer"),
        heads=members("CLIP", "TextModelWithProjection.text_projection"),
        norms=members("CLIP", "TextModel.final_layer_norm"),
    )
)
register_architecture(
    Architecture(
        "clip_vision_model",
        _block("CLIPEncoderLayer"),
        layers=members("CLIP", "VisionEmbeddings.patch_embedding"),
        heads=members("CLIP", "VisionModelWithProjection.visual_projection"),
        norms=members("CLIP", "VisionModel.pre_layrnorm", "VisionModel.post_layernorm"),
    )
)
register_architecture(
    Architecture("siglip", heads=members("Siglip", "ForImageClassification.classifier"))
)
register_architecture(
    Architecture(
        "siglip_text_model",
        _block("SiglipEncoderLayer"),
        heads=members("Siglip", "TextModel.head"),
        norms=members("Siglip", "TextModel.final_layer_norm"),
    )
)
register_architecture(
    Architecture(
        "siglip_vision_model",
        _block("SiglipEncoderLayer"),
        layers=members(
            "Siglip",
            "VisionEmbeddings.patch_embedding",
            "MultiheadAttentionPoolingHead.mlp.fc1",
            "MultiheadAttentionPoolingHead.mlp.fc2",
        ),  # fmt: skip
        norms=members(
            "Siglip", "VisionModel.post_layernorm", "MultiheadAttentionPoolingHead.layernorm"
        ),
        left_out=(
            LeftOut(
                "SiglipMultiheadAttentionPoolingHead",
                "attention",
                "torch's own attention uses its weights without its layers' forward",
            ),
        ),
    )
)
