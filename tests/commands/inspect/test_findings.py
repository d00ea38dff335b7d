"""What counts as a sign in a checkpoint's heads, on numbers."""

from __future__ import annotations

import math

import pytest
from tiny_models import sgd_steps, tiny_model

import hf_stable
from hf_stable.commands.inspect.blocks import BlockSpectrum
from hf_stable.commands.inspect.findings import COLLAPSED_SEC, STRONG_SIGMA, find_signs
from hf_stable.commands.inspect.inspection import inspect_checkpoint

EIGHT = (900.0, 950.0, 910.0, 940.0, 920.0, 930.0, 905.0, 945.0)


def signs(*blocks, head_size=16):
    """The signs of blocks given as (sigma_qk, sec)."""
    spectra = [
        BlockSpectrum(f"h.{i}", head_size, tuple(sigma), tuple(sec), (1.0,) * len(sigma))
        for i, (sigma, sec) in enumerate(blocks)
    ]
    return find_signs([], spectra)


def test_heads_that_have_all_collapsed_are_seen_though_none_stands_out():
    (sign,) = signs((EIGHT, [0.9995] * 8))
    assert sign == (
        "h.0: 8 of 8 heads look collapsed: more than 99% of their energy lies in four directions, "
        "and sigma1(Wq^T Wk) is 900 or more, 225 times sqrt(d_q)"
    )
    calm = ([1.0] * 8, [0.5] * 8)
    assert signs(calm) == ()
    assert [sign[:3] for sign in signs(*[(EIGHT, [0.9995] * 8)] * 3, calm)] == ["h.0", "h.1", "h.2"]


@pytest.mark.parametrize(
    ("sigma", "sec", "said"),
    [
        (EIGHT, [0.9995] * 4 + [0.5] * 4, True),
        (EIGHT, [0.9995] * 3 + [0.5] * 5, False),
        (EIGHT, [COLLAPSED_SEC + 1e-3] * 8, True),
        (EIGHT, [COLLAPSED_SEC] * 8, False),
        ([STRONG_SIGMA * 4 + 0.1] * 8, [0.9995] * 8, True),
        ([STRONG_SIGMA * 4] * 8, [0.9995] * 8, False),
        ([9.0] * 4 + [0.1] * 4, [0.9995] * 8, True),
        ([9.0] * 3 + [0.1] * 5, [0.9995] * 8, False),
    ],
)
def test_half_of_the_heads_of_a_block_have_to_be_concentrated_and_strong(sigma, sec, said):
    assert bool([sign for sign in signs((sigma, sec)) if "heads look collapsed" in sign]) == said


def test_what_counts_as_strong_grows_with_the_head():
    heads = ([STRONG_SIGMA * math.sqrt(64)] * 8, [0.9995] * 8)
    assert signs(heads, head_size=32) and not signs(heads, head_size=64)


def test_a_head_that_stands_out_is_named_once():
    calm = ([1.0, 1.0], [0.5, 0.5])
    (sign,) = signs(calm, ([1.0, 1000.0], [0.5, 0.9995]), calm)
    assert sign.startswith("h.1, head 1 looks collapsed: sigma1(Wq^T Wk) is 1e+03, 1000 times")
    # With another one that does not, the block is named too.
    both = signs(calm, ([9.0, 1000.0], [0.9995, 0.9995]), calm)
    assert ["heads look" in sign for sign in both] == [False, True] and "2 of 2" in both[1]


@pytest.mark.parametrize("head_size", [2, 4, 5, 8])
def test_of_heads_with_four_directions_at_most_concentration_says_nothing(head_size):
    calm = ([1.0, 1.0], [1.0, 1.0])
    alone = signs(calm, calm, ([1.0, 1000.0], [1.0, 1.0]), head_size=head_size)
    everywhere = signs((EIGHT, [1.0] * 8), head_size=head_size)
    assert bool(alone) == bool(everywhere) == (head_size > 4)


@pytest.mark.parametrize("steps", [0, 30])
@pytest.mark.parametrize("methods", [None, "sigma_reparam"])
def test_models_that_are_new_or_trained_well_show_no_collapsed_head(
    model_type, methods, steps, tmp_path
):
    model = tiny_model(model_type)
    if methods:
        hf_stable.patch(model, methods)
    sgd_steps(model, steps=steps)
    model.save_pretrained(tmp_path)
    report = inspect_checkpoint(tmp_path)
    assert report.blocks and all(block.head_size > 4 for block in report.blocks)
    assert not [sign for sign in report.signs if "collapsed" in sign]
