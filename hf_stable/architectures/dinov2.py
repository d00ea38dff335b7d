"""DINOv2 and DINOv3: ViTs whose larger sizes have gated MLPs."""

from hf_stable.architectures.description import Architecture, MlpPaths, members
from hf_stable.architectures.llama import GATED
from hf_stable.architectures.registry import register_architecture
from hf_stable.architectures.vit import PLAIN_MLP, patch_block

_NORMS = ("norm1", "norm2")
_UP_DOWN: MlpPaths = {"mlp_in": ("mlp.up_proj",), "mlp_out": ("mlp.down_proj",)}

for _model_type, _prefix in {
    "dinov2": "Dinov2",
    "dinov2_with_registers": "Dinov2WithRegisters",
}.items():
    register_architecture(
        Architecture(
            _model_type,
            tuple(patch_block(f"{_prefix}Layer", mlp, _NORMS) for mlp in (PLAIN_MLP, GATED)),
            layers=members(_prefix, "PatchEmbeddings.projection"),
            heads=members(_prefix, "ForImageClassification.classifier"),
            norms=members(_prefix, "Model.layernorm", "Backbone.layernorm"),
            transformers=">=5.18",  # projections and gated MLPs have other names in older ones
        )
    )
register_architecture(
    Architecture(
        "dinov3_vit",
        tuple(patch_block("DINOv3ViTLayer", mlp, _NORMS) for mlp in (GATED, _UP_DOWN)),
        layers=members("DINOv3ViT", "Embeddings.patch_embeddings"),
        norms=members("DINOv3ViT", "Model.norm", "Backbone.norm"),
    )
)
