"""Where parts lie in memory: each entry belongs to one part, and rows and columns are in order."""

from __future__ import annotations

import pytest
import torch
from kernel_cases import CASES, random_case

from hf_stable.kernels import tables as t
from hf_stable.kernels.layouts import lay_out
from hf_stable.kernels.plans import make_plan
from hf_stable.measures.parts import Parts

RANDOM = [random_case(seed) for seed in range(60)]


def parts_by_layout(layout, tensor):
    """The matrices of a tensor, put together from the bands and pieces of a layout."""
    rows = tensor.reshape(layout.height, layout.width)
    found = [torch.full(shape, -1.0) for shape in layout.shapes]
    for band in layout.bands:
        for part, start, stop in band.pieces:
            block = rows[band.start : band.stop, start:stop]
            found[part][band.part_row : band.part_row + len(block)] = block
    return found


@pytest.mark.parametrize("shape, parts", [*CASES.values(), *RANDOM], ids=str)
def test_a_layout_says_what_the_parts_say(shape, parts):
    tensor = torch.arange(torch.Size(shape).numel(), dtype=torch.float32).view(shape)
    layout = lay_out(torch.Size(shape), parts)
    matrix = tensor if parts.stacked else tensor.view(len(tensor) if shape else 1, -1)
    for ours, theirs in zip(parts_by_layout(layout, tensor), parts.matrices(matrix), strict=True):
        assert torch.equal(ours, theirs)


@pytest.mark.parametrize("shape, parts", [((0, 3), Parts()), ((4, 12), Parts((1, 1), 3, dim=1))])
def test_what_the_passes_cannot_follow_has_no_layout(shape, parts):
    assert lay_out(torch.Size(shape), parts) is None


def test_a_plan_covers_every_row_once():
    layouts = tuple(
        lay_out(torch.Size(shape), parts) for shape, parts in [*CASES.values(), *RANDOM]
    )
    plan = make_plan(layouts)
    assert make_plan(layouts) is plan
    for owner, layout in enumerate(layouts):
        own = plan.chunks[plan.chunks[:, t.OWNER] == owner]
        covered = [row for chunk in own for row in range(chunk[t.ROW], chunk[t.END_ROW])]
        assert covered == list(range(layout.height))
        for chunk in own:
            pieces = plan.pieces[chunk[t.PIECE] : chunk[t.END_PIECE]]
            assert sum(pieces[:, t.END_COLUMN] - pieces[:, t.COLUMN]) == layout.width
    batches = plan.batches
    assert list(batches[:, t.FIRST_WEIGHT]) == [0, *batches[:-1, t.END_WEIGHT]]
    assert batches[-1, t.END_WEIGHT] == len(layouts)
    assert len(batches) > 1  # some weights are apart, and some together
    assert (batches[:, t.END_WEIGHT] - batches[:, t.FIRST_WEIGHT]).max() > 1
