"""Levels, noise and the step at which a loss is lost, on plain numbers."""

from __future__ import annotations

import math
import random

import pytest

from hf_stable.measures.loss_curves import lost_step, noise, smooth


def test_the_running_median_ignores_single_batches():
    assert smooth([1.0, 9.0, 1.0, math.nan, 1.0]) == [1.0, 5.0, 1.0, 5.0, 1.0]
    assert smooth([1.0, 9.0, 1.0, math.nan, 1.0], centred=True) == [1.0, 5.0, 1.0, 5.0, 1.0]


@pytest.mark.parametrize("slope", [0.0, 0.3, -0.3])
def test_noise_is_the_standard_deviation_around_a_trend(slope):
    draw = random.Random(0)
    found = [noise([slope * i + draw.gauss(0, 2) for i in range(50)]) for _ in range(200)]
    assert sum(found) / len(found) == pytest.approx(2, rel=0.1)


def test_noise_is_that_above_the_median_and_no_single_batch_moves_it():
    draw = random.Random(0)
    skewed = [[draw.lognormvariate(0, 1) for _ in range(50)] for _ in range(50)]
    below = [noise([-loss for loss in losses]) for losses in skewed]
    assert sum(map(noise, skewed)) > 1.2 * sum(below)
    for losses in skewed[:5]:
        wild = losses[:25] + [1e6] + losses[26:]
        assert noise(wild) == pytest.approx(noise(losses), rel=0.5)
    assert noise([1.0, 5.0] * 9) == 0.0 < noise([1.0, 5.0] * 10)  # too few to say anything
    assert noise([]) == noise([2.0 * 0.97**step for step in range(50)]) == 0.0


def test_lost_is_never_again_within_a_tenth_of_the_best():
    assert lost_step([]) is None
    assert lost_step([1.0] * 20) is None
    assert lost_step([1.0] * 20 + [1.09] * 20) is None
    assert lost_step([1.0] * 20 + [1.2] * 20) == 21
    assert lost_step([1.0] * 20 + [1.2] * 20 + [1.0] * 20) is None
    assert lost_step([1.0] * 20 + [math.nan] * 20) == 21
    assert lost_step([1.0] * 20 + [9.0, 9.0] + [1.0] * 20) is None  # two wild batches


def test_a_few_high_losses_at_the_end_do_not_say_never_again_but_nan_does():
    assert lost_step([1.0] * 20 + [1.5] * 4) is None
    assert lost_step([1.0] * 20 + [1.5] * 5) == 21
    assert lost_step([1.0] * 20 + [math.nan] * 3) == 21


def noisy(seed: int) -> list[float]:
    """A loss that falls to a level below the noise of its batches."""
    draw = random.Random(seed)
    return [2 * 0.985**step + 0.2 * draw.lognormvariate(0, 0.5) for step in range(250)]


def test_noise_of_batches_over_a_small_best_is_no_loss():
    assert [lost_step(noisy(seed)) for seed in range(50)] == [None] * 50
    for seed in range(10):  # the same noise, and it does leave
        gone = [loss + 2.0 * (step >= 200) for step, loss in enumerate(noisy(seed))]
        assert 199 <= lost_step(gone) <= 203
