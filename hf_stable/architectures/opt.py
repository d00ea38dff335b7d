"""OPT, GPT-Neo and GPT-J: decoders with plain MLPs."""

from dataclasses import replace

from hf_stable.architectures.description import (
    Architecture,
    Attention,
    Block,
    Member,
    attention_within,
    members,
)
from hf_stable.architectures.llama import DECODER_HEADS
from hf_stable.architectures.registry import register_architecture


def _attention(module: str) -> Attention:
    return attention_within(module, "q_proj", "k_proj", "v_proj", "out_proj")


_OPT_NORMS = ("self_attn_layer_norm", "final_layer_norm")


def _opt_block(is_pre: bool) -> Block:
    return Block(
        "OPTDecoderLayer",
        (replace(_attention("self_attn"), query_scale="scaling"),),
        mlp_in=("fc1",),
        mlp_out=("fc2",),
        pre_norms=_OPT_NORMS if is_pre else (),
        post_norms=() if is_pre else _OPT_NORMS,
        condition=("do_layer_norm_before", is_pre),
    )


register_architecture(
    Architecture(
        "opt",
        (_opt_block(True), _opt_block(False)),  # opt-350m is post-LN
        layers=members("OPT", "Decoder.project_in", "Decoder.project_out", optional=True),
        heads=members(
            "OPT",
            "ForCausalLM.lm_head",
            "ForSequenceClassification.score",
            "ForQuestionAnswering.qa_outputs",
        ),  # fmt: skip
        norms=members("OPT", "Decoder.final_layer_norm", optional=True),
    )
)
register_architecture(
    Architecture(
        "gpt_neo",
        Block(
            "GPTNeoBlock",
            # Its logits have no scale.
            (replace(_attention("attn.attention"), biased=True, returns_maps=True),),
            mlp_in=("mlp.c_fc",),
            mlp_out=("mlp.c_proj",),
            pre_norms=("ln_1", "ln_2"),
        ),
        heads=members(
            "GPTNeo",
            "ForCausalLM.lm_head",
            "ForSequenceClassification.score",
            "ForTokenClassification.classifier",
            "ForQuestionAnswering.qa_outputs",
        ),  # fmt: skip
        norms=(Member("GPTNeoModel", "ln_f"),),
    )
)
register_architecture(
    Architecture(
        "gptj",
        Block(
            "GPTJBlock",
            (replace(_attention("attn"), rotary=True),),
            mlp_in=("mlp.fc_in",),
            mlp_out=("mlp.fc_out",),
            pre_norms=("ln_1",),
        ),
        heads=(Member("GPTJForCausalLM", "lm_head"), *DECODER_HEADS),
        norms=(Member("GPTJModel", "ln_f"),),
    )
)
