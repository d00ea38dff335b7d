"""The rules that turn records into sentences."""

from __future__ import annotations

import math

import pytest
from report_runs import calm, collapsing, write_run

from hf_stable.report.reading import read_run
from hf_stable.report.verdict import judge

FALLING = [2.0 * 0.98**s + 0.1 for s in range(100)]


def verdict(folder):
    return judge(read_run(folder))


def text(found):
    return " ".join((found.headline, *found.sentences))


def test_a_collapse_is_told_with_place_growth_and_what_the_loss_did(tmp_path):
    found = verdict(collapsing(tmp_path))
    assert found.state == "failed" and found.divergence_step == 81
    assert found.headline == (
        "Failed: the loss was lost at step 81, after attention collapsed at step 60"
    )
    said = text(found)
    assert "began at step 60 in layer 0, head 0: malignant (sparse and of low rank)" in said
    assert "sigma1(Wq^T Wk) grew 40 x in 10 steps, from 1 (step 50) to 40 (step 60)" in said
    assert "The loss followed 21 steps later" in said
    assert "1 of 4 heads" in said and "AdamW2" in said and "sigma_reparam" in said
    assert "Alarm at step 80, collapse in layer 0, head 0: because." in said


def test_the_same_attention_with_a_loss_that_comes_down_is_no_failure(tmp_path):
    found = verdict(collapsing(tmp_path, lost=False))
    assert found.state == "warned" and found.divergence_step is None
    assert "The loss did not suffer" in text(found) and "To try" not in text(found)


def test_a_map_of_high_rank_is_benign(tmp_path):
    found = verdict(collapsing(tmp_path, malignant=False, lost=False))
    assert found.headline == "Trained, with a benign collapse of attention to look at"


def test_a_calm_run_is_called_trained(tmp_path):
    probes = {step: calm(step) for step in range(1, 100, 10)}
    found = verdict(write_run(tmp_path, FALLING, probes))
    assert (found.state, found.headline) == ("trained", "Trained; attention did not collapse")
    assert found.sentences == ("The loss fell from 2.1 (step 1) to 0.3707 (step 100).",)


def test_without_a_monitor_nothing_is_claimed_of_attention(tmp_path):
    found = verdict(write_run(tmp_path, FALLING))
    assert found.headline == "Trained; attention was not watched"


def test_a_loss_that_ends_in_nan(tmp_path):
    found = verdict(write_run(tmp_path, FALLING[:50] + [math.nan] * 50))
    assert found.state == "failed" and found.divergence_step == 51
    assert found.headline == "Failed: the loss is not finite from step 51 on"
    assert "To try: resume from an earlier checkpoint" in text(found)
    # A NaN on the way that the run got over is none.
    assert verdict(write_run(tmp_path, [*FALLING[:50], math.nan, *FALLING[50:]])).state == "trained"


def test_a_run_that_stands_still_with_collapsed_heads_has_stalled(tmp_path):
    sparse = dict(entropy_normalised=0.05, rank=0.02, sigma_qk=30.0)
    probes = {step: calm(step, **(sparse if step > 1 else {})) for step in range(1, 100, 10)}
    found = verdict(write_run(tmp_path, [2.3 - 0.001 * s for s in range(100)], probes))
    assert found.headline.startswith("Failed: the loss hardly came down, after attention collapsed")
    # Without the collapse it may have been low from the start.
    quiet = {step: calm(step) for step in range(1, 100, 10)}
    assert verdict(write_run(tmp_path, [2.3 - 0.001 * s for s in range(100)], quiet)).state == (
        "trained"
    )


def test_uniform_heads_are_called_unused_and_not_healthy(tmp_path):
    probes = {step: calm(step, entropy_normalised=0.999) for step in range(1, 100, 10)}
    said = text(verdict(write_run(tmp_path, FALLING, probes)))
    assert "1 of 4 heads still looked everywhere alike" in said
    assert "unused, which is not a sign of health" in said


def test_what_is_in_use_already_is_not_advised(tmp_path):
    folder = collapsing(tmp_path)
    log = (folder / "stability.jsonl").read_text()
    (folder / "stability.jsonl").write_text(
        log.replace('"nonfinite_steps"', '"effective_lr": {"w": 0.1}, "nonfinite_steps"').replace(
            '"mode"', '"gamma": {"w": [1.0]}, "mode"'
        )
    )
    said = text(verdict(folder))
    assert "With AdamW2 and sigmaReparam in use already" in said and "would cap" not in said


@pytest.mark.parametrize("losses", [[], [math.nan] * 3])
def test_nothing_to_judge_by(losses, tmp_path):
    found = verdict(write_run(tmp_path, losses))
    assert found.state == ("failed" if losses else "unknown")
