"""Attention maps and spectra of a tiny model, by ways that hf_stable takes no part in."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedConfig
from transformers.pytorch_utils import Conv1D

from hf_stable.architectures.finding import find_blocks

ENTROPY = dict(rtol=1e-5, atol=1e-5)
"""Rounding of an entropy in float32.

A logit of up to ten is a sum of at most 16 products, each rounded to 6e-8: an error of 1e-5, which
is also the relative error of its probability. A row sums up at most 64 terms: 4e-6 of the entropy.
"""


@torch.no_grad()
def attention_maps(model, inputs: dict[str, Tensor]) -> dict[str, list[Tensor]]:
    """The maps that the attentions of a model return under eager, (batch, heads, queries, keys).

    One for every call: an attention that layers share is called by each.
    """
    for part in model.modules():  # parts that are no models may have copies of the config
        if isinstance(getattr(part, "config", None), PreTrainedConfig):
            part.config._attn_implementation = "eager"
    maps: dict[str, list[Tensor]] = {}

    def keeping(layer: str) -> Any:
        def keep(module: Any, args: Any, output: Any) -> None:
            found = [each for each in flat(output) if is_map(each)]
            assert len(found) == 1, (layer, [each.shape for each in flat(output)])
            maps.setdefault(layer, []).append(found[0])

        return keep

    handles = [
        block.module.get_submodule(attention.module).register_forward_hook(keeping(layer))
        for block in find_blocks(model)
        for layer, attention in block.attentions()
    ]
    model(**inputs, output_attentions=True)
    for handle in handles:
        handle.remove()
    return maps


def flat(output: Any) -> list[Tensor]:
    """The tensors of nested tuples."""
    if isinstance(output, Tensor):
        return [output]
    return [t for part in output for t in flat(part)] if isinstance(output, tuple | list) else []


def is_map(tensor: Tensor) -> bool:
    """Whether rows of four dimensions are probabilities."""
    ones = torch.ones(())
    return (
        tensor.ndim == 4
        and bool((tensor >= 0).all())
        and bool(torch.isclose(tensor.sum(-1), ones, atol=1e-4).all())
    )


FUSED = {
    # model type -> attribute of the attention, and how its rows are cut: thirds of all, or of each
    # head; or heads of queries, then key heads, then values
    "gpt2": ("c_attn", "thirds"),
    "modernbert": ("Wqkv", "thirds"),
    "gpt_neox": ("query_key_value", "thirds of heads"),
    "bloom": ("query_key_value", "thirds of heads"),
    "phi3": ("qkv_proj", "heads"),
    "falcon": ("query_key_value", "heads"),
}


def reference_sigma_qk(model, maps: dict[str, list[Tensor]]) -> dict[str, Tensor]:
    """The largest singular value of Wq^T Wk for every query head, from an SVD in float64."""
    found = {}
    for block in find_blocks(model):
        for layer, attention in block.attentions():
            heads = maps[layer][0].shape[1]
            module = block.module.get_submodule(attention.module)
            if model.config.model_type in FUSED:
                q, k = _cut(module, *FUSED[model.config.model_type], heads)
            else:
                assert _names(attention.query, "q") and _names(attention.key, "k"), attention
                q, k = (
                    block.module.get_submodule(path).weight.detach().double()
                    for path in (attention.query, attention.key)
                )
            size = len(q) // heads
            q, k = q.view(heads, size, -1), k.view(-1, size, k.shape[1])
            k = k.repeat_interleave(heads // len(k), 0)
            found[layer] = torch.linalg.svdvals(q.mT @ k)[:, 0].float()
    return found


def _names(path: str, letter: str) -> bool:
    """Whether a layer is named for queries or keys: the entry that says so may be wrong."""
    return letter in path.rpartition(".")[2]


def _cut(module: Any, attribute: str, way: str, heads: int) -> tuple[Tensor, Tensor]:
    projection = getattr(module, attribute)
    rows = projection.weight.detach().double()
    rows = rows.T if isinstance(projection, Conv1D) else rows
    if way == "thirds":
        q, k, _ = rows.chunk(3)
    elif way == "thirds of heads":
        q, k, _ = (part.flatten(0, 1) for part in rows.view(heads, 3, -1, rows.shape[1]).unbind(1))
    else:
        size = rows.shape[1] // heads  # as wide as the model in all
        key_heads = (len(rows) // size - heads) // 2
        q, k, _ = rows.split([heads * size, key_heads * size, key_heads * size])
    return q, k
