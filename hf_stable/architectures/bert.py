"""BERT: post-LN encoder; it has no pre-LayerNorm to remove."""

from hf_stable.architectures.description import Architecture, Attention, Block, Member
from hf_stable.architectures.registry import register_architecture

register_architecture(
    Architecture(
        model_type="bert",
        block=Block(
            class_name="BertLayer",
            attentions=(
                Attention(
                    module="attention.self",
                    query="attention.self.query",
                    key="attention.self.key",
                    value="attention.self.value",
                    output="attention.output.dense",
                ),
                Attention(
                    module="crossattention.self",
                    query="crossattention.self.query",
                    key="crossattention.self.key",
                    value="crossattention.self.value",
                    output="crossattention.output.dense",
                    is_cross=True,
                ),
            ),
            mlp_in=("intermediate.dense",),
            mlp_out=("output.dense",),
            post_norms=(
                "attention.output.LayerNorm",
                "crossattention.output.LayerNorm",
                "output.LayerNorm",
            ),
        ),
        layers=(
            Member("BertPooler", "dense"),
            Member("BertPredictionHeadTransform", "dense"),
        ),
        heads=(
            Member("BertLMPredictionHead", "decoder"),
            Member("BertPreTrainingHeads", "seq_relationship"),
            Member("BertOnlyNSPHead", "seq_relationship"),
            Member("BertForSequenceClassification", "classifier"),
            Member("BertForMultipleChoice", "classifier"),
            Member("BertForTokenClassification", "classifier"),
            Member("BertForQuestionAnswering", "qa_outputs"),
        ),
        norms=(
            Member("BertEmbeddings", "LayerNorm"),
            Member("BertPredictionHeadTransform", "LayerNorm"),
        ),
    )
)
