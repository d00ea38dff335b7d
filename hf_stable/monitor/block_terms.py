"""The terms of a transformer block that its weights give: spectra and norms of Eq. 1.

Where a block keeps its weights is the registry's knowledge; what is measured is the effective
weight, so patched and plain blocks compare.
"""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Callable, Collection
from contextlib import AbstractContextManager
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

Bearing = Callable[..., AbstractContextManager[None]]
"""Called with the layer and the terms of a measure, the context in which it is taken."""

# Leading vectors of the last measurement by block. They save time; a value found without them
# agrees to the tolerance.
_vectors: WeakKeyDictionary[nn.Module, dict[str, Tensor]] = WeakKeyDictionary()


@torch.no_grad()
def weight_terms(
    found: FoundBlock, wanted: Collection[str], bearing: Bearing
) -> dict[str, dict[str, Tensor]]:
    """Measure the weights of one block.

    Args:
        found: the block, its parameters whole (FSDP2 has them whole within its forward).
        wanted: names of terms that need weights only.
        bearing: the context of each measure, by its layer and terms, which may take its error.

    Returns:
        By the name of each attention (the first goes by that of the block), float32 (float64 for a
        float64 model) tensors: (heads,) for `sigma_qk`, `sigma_ov`, `sec` and `stable_rank`, (n,)
        for `sec_curve`, () for all others. Of several matrices with one name (experts, gate and
        up) the largest value counts. Terms that the block has no parameter for (betas of an
        RMSNorm, norms that were removed, an MLP that is none) are missing. NaN for non-finite
        weights.
    """
    module = found.module
    terms: dict[str, dict[str, Tensor]] = {}
    with torch.autocast(next(module.parameters()).device.type, enabled=False):
        for name, attention in found.attentions():
            own = terms[name] = _attention_terms(module, name, attention, wanted, bearing)
            if name == found.name:
                products = _mlp_products(BlockWeights(found))
                own |= _tracked(module, name, products, wanted, bearing)
                with bearing(name, *(term for term in wanted if term.startswith("norm_"))):
                    gains = NormGains(module, found.block).vectors()
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
    module: nn.Module, name: str, attention: Attention, wanted: Collection[str], bearing: Bearing
) -> dict[str, Tensor]:
    weights = AttentionWeights(module, attention)
    products: Products = {
        "sigma_wq": lambda: [[weights.query]],
        "sigma_wk": lambda: [[weights.key]],
        "sigma_wv": lambda: [[weights.value]],
        "sigma_wo": lambda: [[weights.output]],
    }
    terms = _tracked(module, name, products, wanted, bearing)
    if not set(_OF_LOGITS).isdisjoint(wanted):
        with bearing(name, *_OF_LOGITS, "entropy_bound"):
            spectrum = qk_singular_values(weights.query, weights.key, weights.num_heads)
            dominant = min(SEC_VALUES, spectrum.shape[1])
            terms["sigma_qk"] = spectrum[:, 0]
            terms["sec"] = spectral_energy_concentration(spectrum, dominant)
            most = terms["sec"].nan_to_num(-1.0).argmax()
            terms["sec_curve"] = spectral_energy_curve(spectrum[most])
            terms["stable_rank"] = stable_rank(spectrum)
    if "sigma_ov" in wanted:
        with bearing(name, "sigma_ov"):
            spectrum = ov_singular_values(weights.output, weights.value, weights.num_heads)
            terms["sigma_ov"] = spectrum[:, 0]
    return terms


_OF_LOGITS = ("sigma_qk", "sec", "sec_curve", "stable_rank")
"""What the spectrum of Wq^T Wk gives."""


Products = dict[str, Callable[[], list[list[Tensor]]]]
"""Each name stands for matrices, as the factors of a product; most have one of one factor."""


def _mlp_products(weights: BlockWeights) -> Products:
    return {
        "sigma_w1": lambda: [[matrix] for matrix in weights.mlp_in],
        "sigma_w2": lambda: [[matrix] for matrix in weights.mlp_out],
        "sigma_w2w1": lambda: weights.mlp_products,
    }


def _tracked(
    module: nn.Module, layer: str, products: Products, wanted: Collection[str], bearing: Bearing
) -> dict[str, Tensor]:
    """Return sigma_1 of each named product, the largest where a name stands for several.

    Args:
        module: the block, which the vectors of the last measurement are kept by.
        layer: name of the attention that the products are of.
        products: all that can be measured.
        wanted: names of those that are.
        bearing: as in `weight_terms`.
    """
    sigmas: defaultdict[str, list[Tensor]] = defaultdict(list)
    alike: defaultdict[int, dict[tuple[str, int], list[Tensor]]] = defaultdict(dict)
    for name in [name for name in products if name in wanted]:
        with bearing(layer, name):
            for index, factors in enumerate(products[name]()):
                tall = _tall(factors)
                if tall[-1].shape[1] <= EXACT_SVD_MAX_DIM:
                    sigmas[name].append(_exact_sigma(tall))
                else:
                    alike[tall[-1].shape[1]][name, index] = tall
    for together in alike.values():
        with bearing(layer, *{name for name, _ in together}):
            for (name, _), sigma in _track(module, layer, together).items():
                sigmas[name].append(sigma)
    return {name: torch.stack(found).amax() for name, found in sigmas.items() if found}


def _tall(factors: list[Tensor]) -> list[Tensor]:
    """Return the factors of a product or of its transpose, which has no more columns than rows."""
    factors = [factor.to(spectral_dtype(factors[0].dtype)) for factor in factors]
    if factors[0].shape[0] < factors[-1].shape[1]:
        factors = [factor.mT for factor in reversed(factors)]
    return factors


def _track(
    module: nn.Module, layer: str, products: dict[tuple[str, int], list[Tensor]]
) -> dict[tuple[str, int], Tensor]:
    """Return sigma_1 of large products with equally many columns, from where the last one was."""
    known = _vectors.setdefault(module, {})
    keys = [f"{layer}.{name}.{index}" for name, index in products]
    matrices = list(products.values())
    generic = start_vectors(matrices[0][-1].shape[1], matrices[0][0])
    starts = [known.get(key, generic).to(generic) for key in keys]
    found, vectors = leading_sigmas(
        matrices,
        torch.stack([s if s.shape == generic.shape else generic for s in starts]),
        tolerance=TRACKING_TOLERANCE,
    )
    known |= zip(keys, vectors.unbind(), strict=True)
    return dict(zip(products, found.unbind(), strict=True))


def _exact_sigma(factors: list[Tensor]) -> Tensor:
    """Return sigma_1 of a small product: NaN for what is not finite, infinity beyond the dtype."""
    product, scale = None, torch.ones_like(factors[0][0, 0])
    for factor in factors:
        product = factor if product is None else product @ factor
        largest = product.abs().amax()
        if not largest.isfinite():
            return torch.full_like(largest, math.nan)
        # Each product of finite factors would be finite no more from 1e19 on.
        largest = torch.where(largest > 0, largest, 1)
        product, scale = product / largest, scale * largest
    return torch.linalg.svdvals(product)[0] * scale
