"""How attention maps collapse: known maps, and the paper's own simulation."""

from __future__ import annotations

import math

import pytest
import torch

from hf_stable.measures.collapse import BENIGN_RANK, MALIGNANT_RANK, collapse_mode, rank_share


def simulated_maps(seed):
    """One normal, one malignant, one benign map as Qi et al. 2025 describe them (Appendix G)."""
    g = torch.Generator().manual_seed(seed)
    d_q, d, tokens = 64, 768, 197
    w_q, w_k, x = (torch.randn(*s, generator=g) for s in ((d_q, d), (d_q, d), (d, tokens)))
    # The SVD of Wq^T Wk from d_q x d_q pieces: the product of two thin QR factorisations.
    (q_q, r_q), (q_k, r_k) = torch.linalg.qr(w_q.T), torch.linalg.qr(w_k.T)
    u, s, vh = torch.linalg.svd(r_q @ r_k.T)
    left, right = x.T @ (q_q @ u), (q_k @ vh.T).T @ x
    few = torch.zeros_like(s)
    few[:3] = s[:3] * torch.tensor([3.0, 2.0, 1.0])
    normal, malignant = (left * s) @ right, (left * few) @ right
    benign = (left * s) @ left.T
    return torch.stack([normal, malignant, benign]).softmax(-1)


def test_thresholds_stand_where_seeds_0_to_9_put_them():
    shares = torch.stack([rank_share(simulated_maps(seed)) for seed in range(10)])
    low, high = shares.min(0).values, shares.max(0).values
    assert high[1] < MALIGNANT_RANK < low[0]
    assert high[0] < BENIGN_RANK < low[2]
    middle = math.sqrt(high[1] * low[0])
    assert MALIGNANT_RANK == pytest.approx(middle, rel=0.1)


def test_modes_of_the_papers_simulation_on_other_seeds():
    for seed in range(10, 60):
        assert collapse_mode(simulated_maps(seed)) == ["normal", "malignant", "benign"], seed


def one_hot(columns, length):
    return torch.eye(length)[torch.as_tensor(columns)]


@pytest.mark.parametrize("length", [5, 16, 64, 197])
def test_modes_of_known_maps(length):
    uniform = torch.full((length, length), 1 / length)
    causal = torch.ones(length, length).tril()
    blocks = torch.block_diag(*[torch.full((4, 4), 0.25)] * 4)
    previous = one_hot([0, *range(length - 1)], length)
    cases = {
        "diagonal": (torch.eye(length), "benign"),
        "permutation": (one_hot(torch.randperm(length), length), "benign"),
        "previous token": (previous, "benign"),
        "uniform": (uniform, "normal"),
        "causal": (causal / causal.sum(1, keepdim=True), "normal"),
        "one column": (one_hot([length // 2] * length, length), "malignant"),
        "first token, causal": (one_hot([0] * length, length), "malignant"),
        "blocks": (blocks, "normal"),
        "noisy one column": (
            0.99 * one_hot([1] * length, length) + 0.01 * uniform,
            "malignant",
        ),
    }
    for name, (attention_map, mode) in cases.items():
        assert collapse_mode(attention_map) == [mode], name


def test_random_one_hot_maps_are_normal():
    g = torch.Generator().manual_seed(0)
    for _ in range(20):
        columns = torch.randint(0, 197, (197,), generator=g)
        assert collapse_mode(one_hot(columns, 197)) == ["normal"]


def test_modes_come_flat_for_a_batch_and_skip_padded_rows():
    maps = torch.stack([torch.eye(8), torch.full((8, 8), 1 / 8), one_hot([2] * 8, 8)])
    batch = maps.expand(2, 3, 8, 8)
    assert collapse_mode(batch) == ["benign", "normal", "malignant"] * 2
    padded = torch.zeros(3, 12, 12)
    padded[:, 4:, 4:] = maps
    padded[:, :4] = math.nan
    assert collapse_mode(padded) == ["benign", "normal", "malignant"]
    assert collapse_mode(torch.ones(1, 1)) == ["normal"]


def test_rank_share_is_zero_for_one_direction_and_one_for_a_permutation():
    for length in (2, 9, 50):
        assert rank_share(torch.eye(length)).item() == pytest.approx(1.0)
        assert rank_share(one_hot([0] * length, length)).item() == pytest.approx(0.0, abs=1e-6)
    maps = torch.rand(4, 30, 30, dtype=torch.float64).softmax(-1)
    s = torch.linalg.svdvals(maps).square()
    expected = (s.sum(-1).square() / s.square().sum(-1) - 1) / 29
    torch.testing.assert_close(rank_share(maps), expected)


@pytest.mark.parametrize(
    ("maps", "message"),
    [(torch.rand(3, 4), "square"), (torch.full((4, 4), math.nan), "no finite row")],
)
def test_maps_that_are_none_are_refused(maps, message):
    with pytest.raises(ValueError, match=message.replace("square", r"\(\.\.\., T, T\)")):
        collapse_mode(maps)
