"""Entropy against a float64 softmax, against eager attention of real models, and its bound."""

from __future__ import annotations

import math

import pytest
import torch
from tiny_models import MODEL_TYPES, tiny_batch, tiny_model
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from transformers import AttentionInterface, AttentionMaskInterface
from transformers.masking_utils import ALL_MASK_ATTENTION_FUNCTIONS
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from hf_stable.measures import entropy as entropy_module
from hf_stable.measures.entropy import (
    attention_entropy,
    attention_entropy_from_logits,
    attention_entropy_from_qk,
    count_visible_keys,
    entropy_lower_bound,
    normalise_entropy,
    sample_queries,
)

NEG = -math.inf


def reference(q, k, mask=None, scale=None, is_causal=False):
    """Slow and plain: float64 softmax of the whole map, -sum p log p, NaN rows left as they are."""
    q, k = q.double(), k.double().repeat_interleave(q.shape[1] // k.shape[1], dim=1)
    logits = q @ k.mT * (q.shape[-1] ** -0.5 if scale is None else scale)
    if is_causal:
        logits = logits.masked_fill(torch.ones(logits.shape[-2:]).triu(1).bool(), NEG)
    if mask is not None and mask.dtype == torch.bool:
        logits = logits.masked_fill(~mask, NEG)
    elif mask is not None:
        logits = logits + mask.double().masked_fill(mask <= -1e4, NEG)
    probs = logits.softmax(-1)
    return -(probs * probs.clamp_min(1e-300).log()).sum(-1)


def random_qk(seed=0, batch=2, heads=4, kv_heads=4, length=33, keys=None, d=8, dtype=torch.float32):
    g = torch.Generator().manual_seed(seed)
    q = torch.randn(batch, heads, length, d, generator=g, dtype=dtype)
    k = torch.randn(batch, kv_heads, keys or length, d, generator=g, dtype=dtype)
    return 2 * q, k


def padding_mask(batch, length, dtype=None):
    """Row 0 unpadded, row 1 padded on the left by 5; boolean or additive with the dtype's min."""
    visible = torch.ones(batch, 1, 1, length, dtype=torch.bool)
    visible[1, ..., :5] = False
    if dtype is None:
        return visible
    return torch.zeros(visible.shape, dtype=dtype).masked_fill(~visible, torch.finfo(dtype).min)


MASKS = {
    "none": lambda: None,
    "boolean padding": lambda: padding_mask(2, 33),
    "float padding": lambda: padding_mask(2, 33, torch.float32),
    "bias per head": lambda: torch.randn(1, 4, 33, 33, generator=torch.Generator().manual_seed(3)),
    "full boolean": lambda: (
        torch.rand(2, 1, 33, 33, generator=torch.Generator().manual_seed(4)) > 0.5
    ),
    "matrix": lambda: torch.zeros(33, 33).masked_fill(torch.ones(33, 33).triu(3).bool(), NEG),
}


@pytest.mark.parametrize("is_causal", [False, True], ids=["full", "causal"])
@pytest.mark.parametrize("mask", MASKS)
@pytest.mark.parametrize("kv_heads", [4, 2, 1])
def test_from_qk_equals_a_float64_softmax(mask, is_causal, kv_heads):
    q, k = random_qk(kv_heads=kv_heads)
    mask = MASKS[mask]()
    expected = reference(q, k, mask, is_causal=is_causal)
    got = attention_entropy_from_qk(q, k, mask, is_causal=is_causal)
    assert got.shape == (2, 4, 33)
    assert got.dtype == torch.float32
    assert torch.equal(got.isnan(), expected.isnan())
    torch.testing.assert_close(got.double(), expected, atol=1e-6, rtol=0, equal_nan=True)
    exact = attention_entropy_from_qk(q.double(), k.double(), mask, is_causal=is_causal)
    torch.testing.assert_close(exact, expected, atol=1e-12, rtol=0, equal_nan=True)


def test_masks_change_the_entropy():
    q, k = random_qk()
    plain = attention_entropy_from_qk(q, k)
    for mask in list(MASKS.values())[1:]:
        assert (attention_entropy_from_qk(q, k, mask()) - plain).abs().nan_to_num().max() > 0.1


@pytest.mark.parametrize("chunk", [1, 7 * 8 * 33, 10**9])
def test_chunks_do_not_change_the_result(chunk, monkeypatch):
    q, k = random_qk()
    mask = MASKS["full boolean"]()
    whole = attention_entropy_from_qk(q, k, mask, is_causal=True)
    monkeypatch.setattr(entropy_module, "CHUNK_ELEMENTS", chunk)
    chunked = attention_entropy_from_qk(q, k, mask, is_causal=True)
    # A product of fewer rows may sum in another order.
    torch.testing.assert_close(chunked, whole, atol=1e-6, rtol=0, equal_nan=True)


def test_left_padding_leaves_out_exactly_the_rows_without_a_key():
    q, k = random_qk()
    for mask in (padding_mask(2, 33), padding_mask(2, 33, torch.bfloat16)):
        got = attention_entropy_from_qk(q, k, mask, is_causal=True)
        assert got[1, :, :5].isnan().all()
        assert not got[0].isnan().any()
        assert not got[1, :, 5:].isnan().any()


def test_rectangular_maps_and_a_single_token():
    q, k = random_qk(length=5, keys=11)
    torch.testing.assert_close(
        attention_entropy_from_qk(q, k, scale=0.3).double(),
        reference(q, k, scale=0.3),
        atol=1e-6,
        rtol=0,
    )
    q, k = random_qk(length=1)
    assert torch.equal(attention_entropy_from_qk(q, k, is_causal=True), torch.zeros(2, 4, 1))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_inputs_are_measured_in_float32(dtype):
    q, k = random_qk(dtype=torch.float32)
    q, k = q.to(dtype), k.to(dtype)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        got = attention_entropy_from_qk(q, k)
    assert got.dtype == torch.float32
    torch.testing.assert_close(got.double(), reference(q, k), atol=2e-6, rtol=0)


def test_large_logits_neither_overflow_nor_cancel():
    q, k = random_qk()
    got = attention_entropy_from_qk(q * 1e6, k)
    assert torch.isfinite(got).all()
    assert (got >= 0).all()
    # Rounding of products near 1e7 moves single logits by about 1; most rows are one-hot anyway.
    assert got.median() == 0


def test_inputs_are_left_alone_and_nothing_is_differentiated():
    q, k = random_qk()
    q.requires_grad_()
    logits = torch.randn(3, 5, 5, requires_grad=True)
    before = q.detach().clone(), k.clone(), logits.detach().clone()
    assert not attention_entropy_from_qk(q, k).requires_grad
    assert not attention_entropy_from_logits(logits, torch.zeros(5, 5)).requires_grad
    for old, now in zip(before, (q, k, logits), strict=True):
        assert torch.equal(old, now)


def test_from_logits_and_from_probabilities_agree_with_from_qk():
    q, k = random_qk()
    mask = MASKS["full boolean"]()
    mask[0, 0, 3] = False
    logits = q @ k.mT * 8**-0.5
    expected = attention_entropy_from_qk(q, k, mask)
    from_logits = attention_entropy_from_logits(logits, mask)
    probs = logits.masked_fill(~mask, NEG).softmax(-1)
    assert expected[0, :, 3].isnan().all()
    torch.testing.assert_close(from_logits, expected, atol=1e-6, rtol=0, equal_nan=True)
    torch.testing.assert_close(
        attention_entropy(probs), expected, atol=1e-6, rtol=0, equal_nan=True
    )
    zeroed = probs.nan_to_num(0.0)
    assert torch.equal(attention_entropy(zeroed).isnan(), expected.isnan())


def test_uniform_is_log_t_and_one_hot_is_zero():
    for length in (1, 2, 7, 64):
        uniform = torch.full((length, length), 1 / length, dtype=torch.float64)
        torch.testing.assert_close(
            attention_entropy(uniform),
            torch.full((length,), math.log(length), dtype=torch.float64),
        )
        assert torch.equal(attention_entropy(torch.eye(length)), torch.zeros(length))
        assert torch.equal(
            attention_entropy_from_logits(torch.eye(length) * 1e4), torch.zeros(length)
        )


class LargestTensor(TorchDispatchMode):
    """Notes the number of elements of the largest tensor that any operation returns."""

    def __init__(self):
        super().__init__()
        self.size = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        result = func(*args, **(kwargs or {}))
        for tensor in tree_leaves(result):
            if isinstance(tensor, torch.Tensor):
                self.size = max(self.size, tensor.numel())
        return result


def test_no_t_by_t_tensor_exists_at_4096_tokens():
    q, k = random_qk(batch=1, heads=2, kv_heads=1, length=4096)
    with LargestTensor() as exact:
        attention_entropy_from_qk(q, k, is_causal=True)
    assert exact.size <= entropy_module.CHUNK_ELEMENTS < 4096**2 / 2
    with LargestTensor() as sampled:
        attention_entropy_from_qk(q, k, is_causal=True, queries=64)
    assert sampled.size <= 2 * 64 * 4096


# Samples of queries.


def test_a_sample_is_a_subset_of_the_rows():
    q, k = random_qk(length=64)
    everything = attention_entropy_from_qk(q, k, is_causal=True)
    rows = sample_queries(64, 10, generator=torch.Generator().manual_seed(7))
    sampled = attention_entropy_from_qk(
        q, k, is_causal=True, queries=10, generator=torch.Generator().manual_seed(7)
    )
    assert sampled.shape == (2, 4, 10)
    torch.testing.assert_close(sampled, everything[..., rows], atol=1e-6, rtol=0)
    assert attention_entropy_from_qk(q, k, queries=1000).shape == (2, 4, 64)


def test_sampling_leaves_the_global_generator_alone_and_follows_its_own():
    q, k = random_qk(length=64)
    state = torch.get_rng_state()
    first = attention_entropy_from_qk(q, k, queries=8)
    assert torch.equal(torch.get_rng_state(), state)
    assert torch.equal(first, attention_entropy_from_qk(q, k, queries=8))
    generator = torch.Generator().manual_seed(1)
    draws = {tuple(sample_queries(64, 8, generator=generator).tolist()) for _ in range(5)}
    assert len(draws) == 5


@pytest.mark.parametrize(("num_queries", "queries"), [(20, 6), (16, 4), (17, 16)])
def test_every_position_is_equally_likely(num_queries, queries):
    generator = torch.Generator().manual_seed(0)
    draws = 4000
    counts = torch.zeros(num_queries)
    for _ in range(draws):
        rows = sample_queries(num_queries, queries, generator=generator)
        assert torch.equal(rows, rows.sort().values)
        counts += torch.bincount(rows, minlength=num_queries)
    share = queries / num_queries
    # Five standard errors of a binomial share.
    assert (counts / draws - share).abs().max() < 5 * math.sqrt(share / draws)


def test_counts_of_visible_keys():
    rows = torch.tensor([0, 2, 4])
    assert count_visible_keys(5, rows).tolist() == [5, 5, 5]
    assert count_visible_keys(5, rows, is_causal=True).tolist() == [1, 3, 5]
    mask = torch.tensor([[[[False, True, True, True, True]]]])
    assert count_visible_keys(5, rows, mask, is_causal=True).tolist() == [[[0, 2, 4]]]
    minimum = torch.zeros(5, 5).masked_fill(torch.ones(5, 5).triu(1).bool(), -3e38)
    assert count_visible_keys(5, rows, minimum).tolist() == [1, 3, 5]
    assert count_visible_keys(5, rows, torch.full((5, 5), -65504.0)).tolist() == [0, 0, 0]
    swin = torch.tensor([[0.3, -99.8, -0.2, 0.1, -100.4]]).expand(5, 5)
    assert count_visible_keys(5, rows, swin).tolist() == [3, 3, 3]


def test_normalised_entropy_is_a_share_and_leaves_out_rows_with_one_key():
    q, k = random_qk()
    entropy = attention_entropy_from_qk(q * 0, k, is_causal=True)
    keys = count_visible_keys(33, torch.arange(33), is_causal=True)
    share = normalise_entropy(entropy, keys)
    assert share[..., 0].isnan().all()
    torch.testing.assert_close(share[..., 1:], torch.ones(2, 4, 32))
    assert share[..., 1:].max() <= 1


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (dict(q=torch.zeros(2, 3, 4)), "need q"),
        (dict(k=torch.zeros(2, 3, 33, 8)), "3 key heads do not divide 4"),
        (dict(mask=torch.zeros(2, 33)), "does not broadcast"),
        (dict(mask=torch.ones(33, 33, dtype=torch.long)), "boolean"),
        (dict(queries=0), '"all"'),
        (dict(queries="some"), '"all"'),
    ],
)
def test_bad_input_is_named(change, message):
    q, k = random_qk()
    with pytest.raises(ValueError, match=message):
        attention_entropy_from_qk(**(dict(q=q, k=k) | change))


# Real models: the same numbers as eager attention's probabilities.


@pytest.mark.parametrize(
    ("model_type", "padded"),
    # Images are not padded; Swin masks the windows that its shift makes of two edges.
    [(t, False) for t in MODEL_TYPES] + [("gpt2", True), ("bert", True)],
)
def test_equals_eager_probabilities(model_type, padded):
    model = tiny_model(model_type).eval()
    batch = tiny_batch(model)
    if padded:
        batch["attention_mask"] = torch.ones(4, 12, dtype=torch.long)
        batch["attention_mask"][0, :5] = 0
        batch["attention_mask"][1, 9:] = 0
    for name, parameter in model.named_parameters():
        if parameter.ndim == 2 and "embed" not in name:
            parameter.data *= 10  # attention that is not nearly uniform
    measured = []

    def measure(module, query, key, value, mask, scaling=None, **kwargs):
        causal = mask is None and module.is_causal
        measured.append(attention_entropy_from_qk(query, key, mask, scaling, is_causal=causal))
        return ALL_ATTENTION_FUNCTIONS["sdpa"](
            module, query, key, value, mask, scaling=scaling, **kwargs
        )

    AttentionInterface.register("measure", measure)
    AttentionMaskInterface.register("measure", ALL_MASK_ATTENTION_FUNCTIONS["sdpa"])
    model.set_attn_implementation("measure")
    model(**batch)

    eager = []
    model.set_attn_implementation("eager")
    for module in model.modules():
        if hasattr(module, "is_causal"):
            module.register_forward_hook(lambda m, args, out: eager.append(out[1]))
    model(**batch)

    assert len(measured) == len(eager) >= 2
    for got, probs in zip(measured, eager, strict=True):
        seeing = ~got.isnan()
        assert seeing.float().mean() > 0.5
        torch.testing.assert_close(got[seeing], attention_entropy(probs)[seeing], atol=1e-5, rtol=0)
    assert measured[-1].isnan().any() == (padded and model_type == "gpt2")
    assert measured[0].nan_to_num(9).min() < 0.95 * measured[0].nan_to_num(0).max()


# Theorem 3.1.


def extremal_logits(norm, num_keys):
    logits = torch.full((num_keys,), -norm / math.sqrt(num_keys * (num_keys - 1)))
    logits[0] = norm * math.sqrt((num_keys - 1) / num_keys)
    return logits


@pytest.mark.parametrize("num_keys", [2, 5, 197])
@pytest.mark.parametrize("norm", [0.0, 0.3, 2.0, 10.0])
def test_bound_is_reached_by_the_extremal_logits(norm, num_keys):
    logits = extremal_logits(norm, num_keys).double()
    logits *= norm / logits.norm() if norm else 0
    bound = entropy_lower_bound(norm, num_keys)
    torch.testing.assert_close(
        attention_entropy_from_logits(logits[None])[0], bound, atol=1e-12, rtol=0
    )


def test_bound_holds_for_other_logits_and_is_not_reached():
    logits = torch.randn(500, 12, dtype=torch.float64) * torch.rand(500, 1) * 4
    bound = entropy_lower_bound(logits.norm(dim=1), 12)
    measured = attention_entropy_from_logits(logits)
    assert (measured > bound).all()
    # The centred norm is a sharper r, for a softmax ignores a shift.
    sharper = entropy_lower_bound((logits - logits.mean(1, keepdim=True)).norm(dim=1), 12)
    assert (measured >= sharper).all()
    assert (sharper >= bound).all()


def test_bound_at_its_ends():
    assert entropy_lower_bound(0.0, 7).item() == pytest.approx(math.log(7), abs=1e-12)
    assert entropy_lower_bound(3.0, 1).item() == 0
    assert entropy_lower_bound(math.inf, 7).item() == 0
    assert entropy_lower_bound(1e30, 7).item() == 0
    grid = entropy_lower_bound(torch.linspace(0, 20, 50), torch.tensor([[4], [64]]))
    assert grid.shape == (2, 50)
    assert (grid.diff(dim=1) < 0).all()
