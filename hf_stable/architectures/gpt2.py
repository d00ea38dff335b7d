"""GPT-2: pre-LN decoder, fused QKV in transposed `Conv1D` layers, head tied to the embedding."""

from hf_stable.architectures.description import Architecture, Attention, Block, Member
from hf_stable.architectures.registry import register_architecture

register_architecture(
    Architecture(
        model_type="gpt2",
        block=Block(
            class_name="GPT2Block",
            attentions=(
                Attention(
                    module="attn",
                    query="attn.c_attn",
                    key="attn.c_attn",
                    value="attn.c_attn",
                    output="attn.c_proj",
                    num_heads="num_heads",
                ),
                Attention(
                    module="crossattention",
                    query="crossattention.q_attn",
                    key="crossattention.c_attn",
                    value="crossattention.c_attn",
                    output="crossattention.c_proj",
                    num_heads="num_heads",
                    is_cross=True,
                ),
            ),
            mlp_in=("mlp.c_fc",),
            mlp_out=("mlp.c_proj",),
            pre_norms=("ln_1", "ln_cross_attn", "ln_2"),
        ),
        heads=(
            Member("GPT2LMHeadModel", "lm_head"),
            Member("GPT2DoubleHeadsModel", "lm_head"),
            Member("GPT2SequenceSummary", "summary"),
            Member("GPT2ForSequenceClassification", "score"),
            Member("GPT2ForTokenClassification", "classifier"),
            Member("GPT2ForQuestionAnswering", "qa_outputs"),
        ),
        norms=(Member("GPT2Model", "ln_f"),),
    )
)
