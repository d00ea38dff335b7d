"""Where parts of a fused weight lie, against weights that are put together by hand."""

from __future__ import annotations

import pytest
import torch

from hf_stable.measures.parts import WHOLE, Parts


def numbered(*shapes):
    """Matrices in which every entry tells its matrix: i + a fraction of its own."""
    generator = torch.Generator().manual_seed(0)
    return [i + torch.rand(shape, generator=generator) / 2 for i, shape in enumerate(shapes)]


def thirds():
    q, k, v = numbered((6, 4), (6, 4), (6, 4))
    return Parts((1, 1, 1)), torch.cat([q, k, v]), [q, k, v]


def columns():
    q, k, v = numbered((4, 6), (4, 6), (4, 6))
    return Parts((2, 2, 2), dim=1), torch.cat([q, k, v], 1), [q, k, v]


def unequal():
    q, k, v = numbered((16, 4), (4, 4), (4, 4))
    return Parts((4, 1, 1)), torch.cat([q, k, v]), [q, k, v]


def per_head():
    q, k, v = numbered((6, 4), (6, 4), (6, 4))
    heads = [
        piece for head in zip(q.split(2), k.split(2), v.split(2), strict=True) for piece in head
    ]
    return Parts((1, 1, 1), repeats=3), torch.cat(heads), [q, k, v]


def per_group_of_columns():
    q, k, v = numbered((5, 8), (5, 4), (5, 4))
    groups = zip(q.split(4, 1), k.split(2, 1), v.split(2, 1), strict=True)
    weight = torch.cat([piece for group in groups for piece in group], 1)
    return Parts((2, 1, 1), repeats=2, dim=1), weight, [q, k, v]


def stacked():
    parts = numbered(*[(6, 4)] * 6)
    weight = torch.stack([torch.cat(parts[i : i + 2]) for i in (0, 2, 4)])
    return Parts((1, 1), stacked=True), weight, parts


def stacked_columns():
    parts = numbered(*[(4, 6)] * 4)
    weight = torch.stack([torch.cat(parts[i : i + 2], 1) for i in (0, 2)])
    return Parts((1, 1), dim=1, stacked=True), weight, parts


def experts():
    parts = numbered(*[(4, 6)] * 3)
    return Parts(stacked=True), torch.stack(parts), parts


def one():
    (whole,) = numbered((4, 6))
    return WHOLE, whole.clone(), [whole]


CASES = (
    thirds, columns, unequal, per_head, per_group_of_columns, stacked, stacked_columns, experts, one
)  # fmt: skip


@pytest.fixture(params=CASES, ids=lambda make: make.__name__)
def case(request):
    return request.param()


def test_every_part_is_found(case):
    parts, weight, expected = case
    found = parts.matrices(weight)
    assert len(found) == parts.count(weight.shape) == len(expected)
    assert all(torch.equal(a, b) for a, b in zip(found, expected, strict=True))
    assert parts.shapes(weight.shape) == [tuple(each.shape) for each in expected]


def test_views_write_into_the_weight(case):
    parts, weight, expected = case
    kept = weight.clone()
    for factor, view in enumerate(parts.views(weight), start=2):
        view.mul_(factor)
    assert not torch.equal(weight, kept)
    scaled = [each * factor for factor, each in enumerate(expected, start=2)]
    assert all(torch.equal(a, b) for a, b in zip(parts.matrices(weight), scaled, strict=True))


def test_spread_values_scale_each_part_by_its_own(case):
    parts, weight, expected = case
    values = torch.arange(2.0, 2 + len(expected))
    scaled = weight * parts.spread(values, weight.shape)
    assert scaled.shape == weight.shape
    for part, before, value in zip(parts.matrices(scaled), expected, values, strict=True):
        assert torch.equal(part, before * value)


def test_runs_cover_the_dimension_and_name_their_part(case):
    parts, weight, expected = case
    matrix = weight[0] if parts.stacked else weight
    runs = parts.runs(matrix.shape[parts.dim])
    assert [run[0] for run in runs] == [0, *(run[1] for run in runs[:-1])]
    assert runs[-1][1] == matrix.shape[parts.dim]
    for part, whole in enumerate(parts.matrices(weight)[: len(parts.shares)]):
        pieces = [matrix.narrow(parts.dim, a, b - a) for a, b, p in runs if p == part]
        assert torch.equal(torch.cat(pieces, parts.dim), whole)


def test_a_bias_is_cut_as_the_outputs_are():
    for make in (thirds, unequal, per_head):
        parts, weight, expected = make()
        assert all(
            torch.equal(found, each[:, 0])
            for found, each in zip(parts.vectors(weight[:, 0]), expected, strict=True)
        )
    parts, weight, expected = columns()
    assert torch.equal(parts.vectors(weight[0])[2], expected[2][0])


def test_a_kernel_is_scaled_along_its_outputs():
    kernel = torch.ones(6, 2, 3, 3)
    scale = Parts((2, 1)).spread(torch.tensor([2.0, 5.0]), kernel.shape)
    assert (kernel * scale)[:, 0, 0, 0].tolist() == [2, 2, 2, 2, 5, 5]


def test_equal_layouts_are_equal():
    assert Parts((8, 2, 2)) == Parts((4, 1, 1)) != Parts((4, 1, 1), dim=1)
    assert Parts((7,), repeats=3) == WHOLE and WHOLE.is_whole and Parts(dim=1).is_whole
    assert len({Parts((1, 1)), Parts((2, 2)), Parts((1, 1), stacked=True)}) == 2
    assert not Parts(stacked=True).is_whole and Parts((1, 1), repeats=2).is_interleaved


def test_plain_data_and_back(case):
    parts, *_ = case
    assert Parts.of(parts.to_plain()) == parts == Parts.of(parts)
    assert Parts.of([list(parts.shares), *parts.to_plain()[1:]]) == parts


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: Parts(()), "say no layout: give positive integers"),
        (lambda: Parts((1, 0)), "say no layout"),
        (lambda: Parts((1, 1), repeats=True), "say no layout"),
        (lambda: Parts((1, 1), dim=2), "dimension 0 or 1"),
        (lambda: Parts.of(3), "3 says no layout of parts; give a Parts"),
        (
            lambda: Parts((1, 1, 1)).views(torch.ones(64, 32)),
            r"cannot split dimension 0 of a weight of shape \(64, 32\) into 1 x \(1, 1, 1\): give "
            "a matrix with a multiple of 3 there",
        ),
        (
            lambda: Parts(stacked=True).matrices(torch.ones(4, 4)),
            r"shape \(4, 4\).*give a stack of matrices",
        ),
    ],
)
def test_what_cannot_be_is_refused(make, message):
    with pytest.raises(ValueError, match=message):
        make()
