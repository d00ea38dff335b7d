"""Ranges of a weight's flat entries: together they are the matrices that the weight stands for."""

from __future__ import annotations

import pytest
import torch

from hf_stable.measures.flat_ranges import FlatRange
from hf_stable.measures.matrices import local_matrices, matrices_of, shapes_of
from hf_stable.measures.parts import WHOLE, Parts


def cut(weight, cuts):
    """What each process holds of a weight that is cut at some of its flat entries."""
    flat, ends = weight.flatten(), [*cuts, weight.numel()]
    starts = [0, *cuts]
    return [
        FlatRange(flat[start:end], start, tuple(cuts), weight.shape, None)
        for start, end in zip(starts, ends, strict=True)
    ]


@pytest.mark.parametrize(
    ("shape", "parts"),
    [
        ((6, 5), WHOLE),
        ((7,), WHOLE),
        ((4, 2, 3), WHOLE),
        ((4, 9), Parts((1, 1, 1), dim=1)),
        ((9, 4), Parts((1, 1, 1))),
        ((8, 3), Parts((2, 1, 1))),
        ((12, 3), Parts((1, 1, 1), repeats=2)),
        ((3, 12), Parts((1, 1, 1), repeats=2, dim=1)),
        ((3, 4, 5), Parts(stacked=True)),
        ((2, 4, 6), Parts((1, 1), dim=1, stacked=True)),
        ((2, 6, 4), Parts((1, 2), stacked=True)),
    ],
)  # fmt: skip
@pytest.mark.parametrize("cuts", [(6,), (5, 6), (1, 2, 3, 4, 6), (0, 6)])
def test_the_ranges_of_all_processes_are_the_matrices(shape, parts, cuts):
    weight = torch.arange(1.0, torch.Size(shape).numel() + 1).view(shape)
    expected = local_matrices(weight, parts)
    held = [matrices_of(each, parts) for each in cut(weight, cuts)]
    width = torch.Size(shape[2:] if parts.stacked else shape[1:]).numel()
    for index, matrix in enumerate(expected):
        total = torch.zeros_like(matrix)
        for shards in held:
            shard = shards[index]
            assert shard.shape == shapes_of(shape, parts)[index]
            assert shard.splits_columns == any(position % width for position in cuts)
            block = torch.zeros_like(matrix)
            block[shard.rows, shard.columns] = shard.local
            total += block
        assert torch.equal(total, matrix)


def test_a_range_that_is_all_of_a_weight_is_the_weight():
    weight = torch.randn(4, 3)
    (matrix,) = matrices_of(FlatRange(weight.flatten(), 0, (), weight.shape, None))
    assert torch.equal(matrix, weight) and matrix.data_ptr() == weight.data_ptr()


def test_a_weight_that_cannot_be_cut_is_refused():
    weight = torch.randn(4, 4)
    with pytest.raises(ValueError, match="cannot split dimension 1"):
        matrices_of(cut(weight, (5,))[0], Parts((1, 1, 1), dim=1))
