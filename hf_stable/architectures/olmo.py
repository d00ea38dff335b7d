"""OLMo 2 and 3: norms at the end of each branch, queries and keys normalised."""

from hf_stable.architectures.description import Block
from hf_stable.architectures.llama import GATED, decoder_attention, llama_like
from hf_stable.architectures.registry import register_architecture

for _version in ("2", "3"):
    register_architecture(
        llama_like(
            f"olmo{_version}",
            f"Olmo{_version}",
            Block(
                f"Olmo{_version}DecoderLayer",
                (decoder_attention(),),
                **GATED,
                branch_norms=("post_attention_layernorm", "post_feedforward_layernorm"),
            ),
        )
    )
