"""The terms of a transformer block that its weights give: spectra and norms of Eq. 1.

Where a block keeps its weights is the registry's knowledge; what is measured is the effective
weight, so patched and plain blocks compare.
"""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Callable, Collection
from functools import reduce
from weakref import WeakKeyDictionary

import torch
from torch import Tensor, nn

from hf_stable.architectures.description import Attention
from hf_stable.architectures.finding import FoundBlock
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
from hf_stable.monitor.block_weights import AttentionWeights, BlockWeights, NormGains
from hf_stable.monitor.terms import SEC_VALUES

__all__ = ["query_bias_reach", "weight_terms"]

TRACKING_TOLERANCE = 1e-5
"""Iteration for sigma_1 of a large matrix ends when it raises it by no more than this share."""

# Leading vectors of the last measurement by block. They save time; a value found without them
# agrees to the tolerance.
_vectors: WeakKeyDictionary[nn.Module, dict[str, Tensor]] = WeakKeyDictionary()


@torch.no_grad()
def weight_terms(found: FoundBlock, wanted: Collection[str]) -> dict[str, dict[str, Tensor]]:
    """Measure the weights of one block.

    Args:
        found: the block, its parameters whole (FSDP2 has them whole within its forward).
        wanted: names of terms that need weights only.

    Returns:
        By the name of each attention (the first goes by that of the block), float32 (float64 for a
        float64 model) tensors: (heads,) for `sigma_qk`, `sigma_ov`, `sec` and `stable_rank`, (n,)
        for `sec_curve`, () for all others. Of several matrices with one name (experts, gate and
        up) the largest value counts. Terms that the block has no parameter for (betas of an
        RMSNorm, norms that were removed, an MLP that is none) are missing. NaN for non-finite
        weights.
    """
    module = found.module
    gains = NormGains(module, found.block).vectors()
    terms: dict[str, dict[str, Tensor]] = {}
    with torch.autocast(next(module.parameters()).device.type, enabled=False):
        for name, attention in found.attentions():
            own = terms[name] = _attention_terms(module, name, attention, wanted)
            if name == found.name:
                products = _mlp_products(BlockWeights(found))
                own |= _tracked(module, name, products, wanted)
                own |= {f"norm_{key}": torch.linalg.vector_norm(v) for key, v in gains.items()}
    return {
        name: {term: value for term, value in own.items() if term in wanted}
        for name, own in terms.items()
    }


@torch.no_grad()
def query_bias_reach(found: FoundBlock, attention: Attention) -> Tensor:
    """Return |Wk^T bq| of each head: what the query bias adds to the logits' norm.

    For tokens X the centred logits of a row obey
    `|a_i| <= scale * (sigma_1(Wq^T Wk) |x_i| + |Wk^T bq|) * sigma_1(X)`: the key bias shifts a
    row as a whole, which a softmax ignores, and the query bias adds a fixed direction.

    Returns:
        (heads,), zero without a query bias.
    """
    weights = AttentionWeights(found.module, attention)
    bias, key = weights.query_bias, weights.key
    if bias is None:
        return torch.zeros(weights.num_heads, device=key.device)
    with torch.autocast(key.device.type, enabled=False):
        per_head = bias.float().view(weights.num_heads, -1, 1)
        keys = key.float().view(-1, per_head.shape[1], key.shape[1])
        keys = keys.repeat_interleave(weights.num_heads // len(keys), 0)
        return torch.linalg.vector_norm((keys * per_head).sum(1), dim=1)


def _attention_terms(
    module: nn.Module, name: str, attention: Attention, wanted: Collection[str]
) -> dict[str, Tensor]:
    weights = AttentionWeights(module, attention)
    products: Products = {
        "sigma_wq": lambda: [[weights.query]],
        "sigma_wk": lambda: [[weights.key]],
        "sigma_wv": lambda: [[weights.value]],
        "sigma_wo": lambda: [[weights.output]],
    }
    terms = _tracked(module, name, products, wanted)
    if not {"sigma_qk", "sec", "sec_curve", "stable_rank"}.isdisjoint(wanted):
        spectrum = qk_singular_values(weights.query, weights.key, weights.num_heads)
        dominant = min(SEC_VALUES, spectrum.shape[1])
        terms["sigma_qk"] = spectrum[:, 0]
        terms["sec"] = spectral_energy_concentration(spectrum, dominant)
        most = terms["sec"].nan_to_num(-1.0).argmax()
        terms["sec_curve"] = spectral_energy_curve(spectrum[most])
        terms["stable_rank"] = stable_rank(spectrum)
    if "sigma_ov" in wanted:
        spectrum = ov_singular_values(weights.output, weights.value, weights.num_heads)
        terms["sigma_ov"] = spectrum[:, 0]
    return terms


Products = dict[str, Callable[[], list[list[Tensor]]]]
"""Each name stands for matrices, as the factors of a product; most have one of one factor."""


def _mlp_products(weights: BlockWeights) -> Products:
    return {
        "sigma_w1": lambda: [[matrix] for matrix in weights.mlp_in],
        "sigma_w2": lambda: [[matrix] for matrix in weights.mlp_out],
        "sigma_w2w1": lambda: weights.mlp_products,
    }


def _tracked(
    module: nn.Module, layer: str, products: Products, wanted: Collection[str]
) -> dict[str, Tensor]:
    """Return sigma_1 of each named product, the largest where a name stands for several.

    Args:
        module: the block, which the vectors of the last measurement are kept by.
        layer: name of the attention that the products are of.
        products: all that can be measured.
        wanted: names of those that are.
    """
    known = _vectors.setdefault(module, {})
    groups = {name: make() for name, make in products.items() if name in wanted}
    groups = {name: matrices for name, matrices in groups.items() if matrices}
    sigmas: dict[str, Tensor] = {}
    alike: defaultdict[int, dict[str, list[Tensor]]] = defaultdict(dict)
    for name, matrices in groups.items():
        for index, factors in enumerate(matrices):
            dtype = spectral_dtype(factors[0].dtype)
            factors = [factor.to(dtype) for factor in factors]
            if factors[0].shape[0] < factors[-1].shape[1]:
                factors = [factor.mT for factor in reversed(factors)]
            num_columns, key = factors[-1].shape[1], f"{layer}.{name}.{index}"
            if num_columns <= EXACT_SVD_MAX_DIM:
                sigmas[key] = _exact_sigma(factors)
            else:
                alike[num_columns][key] = factors
    for num_columns, together in alike.items():
        generic = start_vectors(num_columns, next(iter(together.values()))[0])
        starts = [known.get(key, generic).to(generic) for key in together]
        found, vectors = leading_sigmas(
            list(together.values()),
            torch.stack([s if s.shape == generic.shape else generic for s in starts]),
            tolerance=TRACKING_TOLERANCE,
        )
        sigmas |= zip(together, found.unbind(), strict=True)
        known |= zip(together, vectors.unbind(), strict=True)
    return {
        name: torch.stack([sigmas[f"{layer}.{name}.{i}"] for i in range(len(matrices))]).amax()
        for name, matrices in groups.items()
    }


def _exact_sigma(factors: list[Tensor]) -> Tensor:
    matrix = reduce(torch.matmul, factors)
    if not matrix.isfinite().all():
        return torch.full_like(matrix[0, 0], math.nan)
    return torch.linalg.svdvals(matrix)[0]
