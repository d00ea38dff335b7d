"""What can be said of an architecture, as frozen data: where its matrices and its norms are.

Modules are found by the name of their class, and weights by their path in it: a Linear that a user
adds to a model is never mistaken for one of the model's own, and every head class of an
architecture is covered by the same entry.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TypedDict

__all__ = [
    "Architecture",
    "Attention",
    "Block",
    "LeftOut",
    "Member",
    "MlpPaths",
    "attention_within",
    "members",
]


@dataclass(frozen=True)
class Attention:
    """One attention of a block; paths are relative to the block.

    A fused projection is named once for each of its parts: GPT-2 has
    `query = key = value = "attn.c_attn"`, whose three parts lie in that order. How many heads and
    key heads there are is asked of the attention module and then of its config, so a fused
    projection with fewer key heads (Phi-3) is cut where it has to be.

    Attributes:
        module: the module that calls the attention function.
        query: projection of the queries; likewise key, value and output.
        num_heads: attribute of `module`, or of its config, that holds the number of query heads;
            where neither has it, the usual names of that number are tried.
        is_cross: whether its keys come from another sequence. A block may lack it; every other
            attention that is named has to be there.
        per_head: whether a fused projection holds the parts of one key head after the other
            (GPT-NeoX, BLOOM, Falcon) instead of all queries, all keys, all values.
        rotary: whether queries and keys are rotated by position; None asks whether the model has a
            module for rotary embeddings.
        normed: whether queries and keys are normalised after their projection; None asks whether
            the attention has a module for that.
        biased: whether the model adds to the logits, within the attention and unseen from outside,
            or does anything else to them that Wq, Wk and the scale do not tell.
        bypassed: whether it uses the weights of its projections without their forward (WavLM), in
            which gamma would have no effect: they are left as they are.
        returns_maps: whether `module` goes past transformers' attention interface, and returns its
            maps, one for each head, where its forward is given `output_attentions=True`.
        query_scale: attribute of `module` by which it multiplies the queries before it hands them
            to the attention function, where that gets a scale of 1 instead (OPT).
    """

    module: str
    query: str
    key: str
    value: str
    output: str
    num_heads: str = "num_attention_heads"
    is_cross: bool = False
    per_head: bool = False
    rotary: bool | None = None
    normed: bool | None = None
    biased: bool = False
    bypassed: bool = False
    returns_maps: bool = False
    query_scale: str | None = None


def attention_within(module: str, query: str, key: str, value: str, output: str) -> Attention:
    """Describe an attention whose projections are children of the module that calls it.

    Args:
        module: path of the module.
        query: name of the projection of queries in it.
        key: the same of keys.
        value: the same of values.
        output: the same of what leaves the attention.
    """
    return Attention(
        module,
        query=f"{module}.{query}",
        key=f"{module}.{key}",
        value=f"{module}.{value}",
        output=f"{module}.{output}",
    )


@dataclass(frozen=True)
class Block:
    """A repeated block of an architecture; paths are relative to it.

    A path names a layer with a `weight`, or a parameter of three dimensions: the experts of a
    mixture, each a matrix of its own.

    Attributes:
        class_name: name of the block's class in transformers.
        attentions: its attentions, self-attention first.
        mlp_in: matrices that enter the MLP (two for a gated one); `W1` of the papers. Where gate
            and up are one matrix, it is named twice.
        mlp_out: matrices that leave it; `W2`.
        pre_norms: norms in front of attention and MLP, in the order of the forward.
        post_norms: norms behind the residual additions (post-LN).
        branch_norms: norms at the end of a branch, before it is added (OLMo 2, Gemma 2).
        gain_offset: what the norms add to their weight to get the gain: 1 for Gemma.
        transposed_experts: whether experts are (n, in, out) instead of (n, out, in).
        is_shared: whether one block runs several times in a forward (ALBERT); what a probe sees of
            it has a name for each call.
        condition: attribute of the block and the value that it has in a block of this kind, where
            kinds have the same modules (the two placements of norms in OPT).
    """

    class_name: str
    attentions: tuple[Attention, ...]
    mlp_in: tuple[str, ...] = ()
    mlp_out: tuple[str, ...] = ()
    pre_norms: tuple[str, ...] = ()
    post_norms: tuple[str, ...] = ()
    branch_norms: tuple[str, ...] = ()
    gain_offset: float = 0.0
    transposed_experts: bool = False
    is_shared: bool = False
    condition: tuple[str, object] | None = None


class MlpPaths(TypedDict):
    """The paths of an MLP, as keywords of `Block`."""

    mlp_in: tuple[str, ...]
    mlp_out: tuple[str, ...]


@dataclass(frozen=True)
class Member:
    """A layer (dotted path) in every module of a class; in some only, where `optional`.

    A `*` in the path stands for every child of a list: "conv_layers.*".
    """

    class_name: str
    path: str
    optional: bool = False


def members(prefix: str, *places: str, optional: bool = False) -> tuple[Member, ...]:
    """Return the members at places such as "Pooler.dense", in classes whose names have a prefix.

    Args:
        prefix: of the class names: "Bert".
        places: rest of the class name, a dot, and the path in it.
        optional: whether modules may lack them.
    """
    named = (place.partition(".") for place in places)
    return tuple(Member(prefix + rest, path, optional) for rest, _, path in named)


@dataclass(frozen=True)
class LeftOut:
    """A matrix (dotted path) in every module of a class that no method touches, and why."""

    class_name: str
    path: str
    reason: str


@dataclass(frozen=True)
class Architecture:
    """A transformers architecture.

    Attributes:
        model_type: `config.model_type`.
        block: its repeated block, or several: those of encoder and decoder, and variants. Of
            several with one class name, the first whose paths are all there describes a module.
        layers: weight matrices outside the blocks: patch embeddings, poolers, downsampling.
        heads: the last projection of each head class.
        norms: norms outside the blocks' residual branches: final norm, embedding norm.
        left_out: matrices that are left as they are by decision.
        plain_layers: names of classes derived from `nn.Linear` that compute the plain product
            (`FalconLinear`), so that gamma / sigma can scale their weight.
        is_unseen: whether its attention is computed by code of its own, past the attention
            interface of transformers. A probe sees none of it, and warns, unless it
            `returns_maps`.
        transformers: versions of transformers that the entry fits, as in requirements (">=5.12").
    """

    model_type: str
    block: Block | tuple[Block, ...] = ()
    layers: tuple[Member, ...] = ()
    heads: tuple[Member, ...] = ()
    norms: tuple[Member, ...] = ()
    left_out: tuple[LeftOut, ...] = ()
    plain_layers: tuple[str, ...] = ()
    is_unseen: bool = False
    transformers: str = ""

    @property
    def blocks(self) -> tuple[Block, ...]:
        """Every repeated block."""
        return (self.block,) if isinstance(self.block, Block) else self.block
