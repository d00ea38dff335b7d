"""Public measures of attention maps: entropy, its bound, modes of collapse."""

from hf_stable.measures.collapse import collapse_mode, rank_share
from hf_stable.measures.entropy import (
    attention_entropy,
    attention_entropy_from_logits,
    attention_entropy_from_qk,
    count_visible_keys,
    entropy_lower_bound,
    normalise_entropy,
    sample_queries,
)

__all__ = [
    "attention_entropy",
    "attention_entropy_from_logits",
    "attention_entropy_from_qk",
    "collapse_mode",
    "count_visible_keys",
    "entropy_lower_bound",
    "normalise_entropy",
    "rank_share",
    "sample_queries",
]
