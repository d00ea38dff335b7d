"""BEiT: ViT with biases of relative positions."""

from hf_stable.architectures.description import Architecture, members
from hf_stable.architectures.registry import register_architecture
from hf_stable.architectures.vit import patch_block

register_architecture(
    Architecture(
        "beit",
        patch_block("BeitLayer"),
        layers=members("Beit", "PatchEmbeddings.projection"),
        heads=members("BeitFor", "ImageClassification.classifier", "MaskedImageModeling.lm_head"),
        # The model's own is an identity where its pooler normalises.
        norms=(
            *members("Beit", "Model.layernorm", "ForMaskedImageModeling.layernorm"),
            *members("Beit", "Pooler.layernorm", optional=True),
        ),
    )
)
