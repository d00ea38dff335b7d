"""The weights' share of what to watch in a transformer block: spectra and norms of Eq. 1.

Where a block keeps its weights is the registry's knowledge; what is measured is the effective
weight, so patched and plain blocks compare.
"""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Callable, Collection
from functools import cached_property, reduce
from operator import attrgetter
from typing import Any
from weakref import WeakKeyDictionary

import torch
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from hf_stable._ranks import whole_tensor
from hf_stable.architectures.registry import Block
from hf_stable.measures.leading import EXACT_SVD_MAX_DIM
from hf_stable.measures.matrices import spectral_dtype
from hf_stable.measures.products import (
    ov_singular_values,
    qk_singular_values,
    spectral_energy_concentration,
    spectral_energy_curve,
    stable_rank,
)
from hf_stable.measures.tracking import leading_sigmas, start_vectors
from hf_stable.methods.sigma_reparam.function import scale_blocks
from hf_stable.methods.sigma_reparam.layers import SigmaLayer
from hf_stable.monitor.terms import SEC_VALUES

__all__ = ["query_bias_reach", "weight_terms"]

TRACKING_TOLERANCE = 1e-5
"""Iteration for sigma_1 of a large matrix ends when it raises it by no more than this share."""

# Leading vectors of the last measurement by block. They save time; a value found without them
# agrees to the tolerance.
_vectors: WeakKeyDictionary[nn.Module, dict[str, Tensor]] = WeakKeyDictionary()


@torch.no_grad()
def weight_terms(module: nn.Module, block: Block, wanted: Collection[str]) -> dict[str, Tensor]:
    """Measure the weights of one block.

    Args:
        module: the block, its parameters whole (FSDP2 has them whole within its forward).
        block: where it keeps its weights.
        wanted: names of terms that need weights only.

    Returns:
        float32 (float64 for a float64 model) tensors: (heads,) for `sigma_qk`, `sigma_ov`, `sec`
        and `stable_rank`, (n,) for `sec_curve`, () for all others. Terms that the block has no
        parameter for (betas of an RMSNorm, norms that were removed) are missing. NaN for
        non-finite weights.
    """
    weights = _BlockWeights(module, block)
    with torch.autocast(next(module.parameters()).device.type, enabled=False):
        terms = _norm_terms(module, block)
        terms |= _tracked(module, {k: v() for k, v in weights.products.items() if k in wanted})
        if not {"sigma_qk", "sec", "sec_curve", "stable_rank"}.isdisjoint(wanted):
            query, key, _ = weights.qkv
            spectrum = qk_singular_values(query, key, weights.num_heads)
            dominant = min(SEC_VALUES, spectrum.shape[1])
            terms["sigma_qk"] = spectrum[:, 0]
            terms["sec"] = spectral_energy_concentration(spectrum, dominant)
            most = terms["sec"].nan_to_num(-1.0).argmax()
            terms["sec_curve"] = spectral_energy_curve(spectrum[most])
            terms["stable_rank"] = stable_rank(spectrum)
        if "sigma_ov" in wanted:
            spectrum = ov_singular_values(weights.output, weights.qkv[2], weights.num_heads)
            terms["sigma_ov"] = spectrum[:, 0]
    return {name: term for name, term in terms.items() if name in wanted}


@torch.no_grad()
def query_bias_reach(module: nn.Module, block: Block) -> Tensor:
    """Return |Wk^T bq| of each head: what the query bias adds to the logits' norm.

    For tokens X the centred logits of a row obey
    `|a_i| <= scale * (sigma_1(Wq^T Wk) |x_i| + |Wk^T bq|) * sigma_1(X)`: the key bias shifts a
    row as a whole, which a softmax ignores, and the query bias adds a fixed direction.

    Returns:
        (heads,), zero without a query bias.
    """
    weights = _BlockWeights(module, block)
    query, key, _ = weights.qkv
    bias = getattr(module.get_submodule(block.attentions[0].query), "bias", None)
    if bias is None:
        return torch.zeros(weights.num_heads, device=key.device)
    with torch.autocast(key.device.type, enabled=False):
        # A fused projection's bias begins with the queries' part, as its weight does.
        per_head = whole_tensor(bias)[: len(query)].float().view(weights.num_heads, -1, 1)
        keys = key.float().view(-1, per_head.shape[1], key.shape[1])
        keys = keys.repeat_interleave(weights.num_heads // len(keys), 0)
        return torch.linalg.vector_norm((keys * per_head).sum(1), dim=1)


class _BlockWeights:
    """The effective weights of one block as (out, in) matrices, each formed when first needed."""

    def __init__(self, module: nn.Module, block: Block) -> None:
        self._module = module
        self._block = block
        self._attention = block.attentions[0]
        owner = module.get_submodule(self._attention.module)
        self.num_heads: int = attrgetter(self._attention.num_heads)(owner)
        # Each name stands for matrices, as the factors of a product; most have one of one factor.
        self.products: dict[str, Callable[[], list[list[Tensor]]]] = {
            "sigma_wq": lambda: [[self.qkv[0]]],
            "sigma_wk": lambda: [[self.qkv[1]]],
            "sigma_wv": lambda: [[self.qkv[2]]],
            "sigma_wo": lambda: [[self.output]],
            "sigma_w1": lambda: [[matrix] for matrix in self.mlp_in],
            "sigma_w2": lambda: [[matrix] for matrix in self.mlp_out],
            "sigma_w2w1": lambda: [[b, a] for a in self.mlp_in for b in self.mlp_out],
        }

    @cached_property
    def qkv(self) -> list[Tensor]:
        """Wq, Wk, Wv: a fused projection holds its parts in that order."""
        paths = (self._attention.query, self._attention.key, self._attention.value)
        parts = {path: iter(self._matrix(path).chunk(paths.count(path))) for path in paths}
        return [next(parts[path]) for path in paths]

    @cached_property
    def output(self) -> Tensor:
        return self._matrix(self._attention.output)

    @cached_property
    def mlp_in(self) -> list[Tensor]:
        return [self._matrix(path) for path in self._block.mlp_in]

    @cached_property
    def mlp_out(self) -> list[Tensor]:
        return [self._matrix(path) for path in self._block.mlp_out]

    def _matrix(self, path: str) -> Tensor:
        # FSDP2 may shard below the block; every rank comes by here, so all may gather.
        layer: Any = self._module.get_submodule(path)
        weight = whole_tensor(layer.weight)
        if isinstance(layer, SigmaLayer):
            scale = whole_tensor(layer.gamma) / layer.sigma
            weight = scale_blocks(weight, scale, layer.block_dim)
        return weight.T if isinstance(layer, Conv1D) else weight


def _norm_terms(module: nn.Module, block: Block) -> dict[str, Tensor]:
    """Return l2 norms of gains and biases of the norms at attention (1) and MLP (2)."""
    paths = block.pre_norms or block.post_norms
    terms = {}
    for number, path in ((1, paths[0]), (2, paths[-1])):
        norm = module.get_submodule(path)
        for name, parameter in (("gamma", "weight"), ("beta", "bias")):
            vector = getattr(norm, parameter, None)
            if vector is not None:
                terms[f"norm_{name}{number}"] = torch.linalg.vector_norm(
                    whole_tensor(vector).float()
                )
    return terms


def _tracked(module: nn.Module, groups: dict[str, list[list[Tensor]]]) -> dict[str, Tensor]:
    """Return sigma_1 of each named product, the largest where a name stands for several."""
    known = _vectors.setdefault(module, {})
    sigmas: dict[str, Tensor] = {}
    alike: defaultdict[int, dict[str, list[Tensor]]] = defaultdict(dict)
    for name, products in groups.items():
        for index, factors in enumerate(products):
            dtype = spectral_dtype(factors[0].dtype)
            factors = [factor.to(dtype) for factor in factors]
            if factors[0].shape[0] < factors[-1].shape[1]:
                factors = [factor.mT for factor in reversed(factors)]
            num_columns, key = factors[-1].shape[1], f"{name}.{index}"
            if num_columns <= EXACT_SVD_MAX_DIM:
                sigmas[key] = _exact_sigma(factors)
            else:
                alike[num_columns][key] = factors
    for num_columns, matrices in alike.items():
        generic = start_vectors(num_columns, next(iter(matrices.values()))[0])
        starts = [known.get(key, generic).to(generic) for key in matrices]
        found, vectors = leading_sigmas(
            list(matrices.values()),
            torch.stack([s if s.shape == generic.shape else generic for s in starts]),
            tolerance=TRACKING_TOLERANCE,
        )
        sigmas |= zip(matrices, found.unbind(), strict=True)
        known |= zip(matrices, vectors.unbind(), strict=True)
    return {
        name: torch.stack([sigmas[f"{name}.{i}"] for i in range(len(products))]).amax()
        for name, products in groups.items()
    }


def _exact_sigma(factors: list[Tensor]) -> Tensor:
    matrix = reduce(torch.matmul, factors)
    if not matrix.isfinite().all():
        return torch.full_like(matrix[0, 0], math.nan)
    return torch.linalg.svdvals(matrix)[0]
