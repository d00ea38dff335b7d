"""ViT: pre-LN encoder over image patches."""

from hf_stable.architectures.description import Architecture, Attention, Block, Member
from hf_stable.architectures.registry import register_architecture

register_architecture(
    Architecture(
        model_type="vit",
        block=Block(
            class_name="ViTLayer",
            attentions=(
                Attention(
                    module="attention",
                    query="attention.q_proj",
                    key="attention.k_proj",
                    value="attention.v_proj",
                    output="attention.o_proj",
                ),
            ),
            mlp_in=("mlp.fc1",),
            mlp_out=("mlp.fc2",),
            pre_norms=("layernorm_before", "layernorm_after"),
        ),
        layers=(
            Member("ViTPatchEmbeddings", "projection"),
            Member("ViTPooler", "dense"),
        ),
        heads=(
            Member("ViTForImageClassification", "classifier"),
            Member("ViTForMaskedImageModeling", "decoder.0"),
        ),
        norms=(Member("ViTModel", "layernorm"),),
    )
)
