"""Swin: pre-LN encoder with shifted windows and patch merging between its stages."""

from hf_stable.architectures.description import Architecture, Attention, Block, Member
from hf_stable.architectures.registry import register_architecture

register_architecture(
    Architecture(
        model_type="swin",
        block=Block(
            class_name="SwinLayer",
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
            Member("SwinPatchEmbeddings", "projection"),
            Member("SwinPatchMerging", "reduction"),
        ),
        heads=(
            Member("SwinForImageClassification", "classifier"),
            Member("SwinForMaskedImageModeling", "decoder.0"),
        ),
        norms=(
            Member("SwinEmbeddings", "norm"),
            Member("SwinPatchMerging", "norm"),
            Member("SwinModel", "layernorm"),
        ),
    )
)
