"""The rules that turn records into sentences."""

from __future__ import annotations

import json
import math

import pytest
import tiny_training
from report_runs import FALLING, calm, collapsing, write_run
from tiny_models import tiny_model
from transformers import Trainer

import hf_stable
from hf_stable.monitor.log_file import StabilityLog
from hf_stable.report.reading import read_run
from hf_stable.report.verdict import judge


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
    found = verdict(write_run(tmp_path, [2.3 - 0.0001 * s for s in range(100)], probes))
    assert found.headline == (
        "Failed: the loss never came down; attention was found collapsed at step 11"
    )
    assert found.divergence_step is None and "stood still before it and after" in text(found)
    # Without the collapse it may have been low from the start, which is not to have trained.
    quiet = {step: calm(step) for step in range(1, 100, 10)}
    found = verdict(write_run(tmp_path / "q", [2.3 - 0.0001 * s for s in range(100)], quiet))
    assert found.state == "warned" and found.divergence_step is None
    assert found.headline == "The loss hardly moved; attention did not collapse"


SPARSE = dict(entropy=0.1, entropy_normalised=0.03, rank=0.02, sigma_qk=60.0, sec=0.999)


def everywhere(quantities):
    """The values of layer 0, head 0 in every head."""
    return {
        name: {layer: [by_layer["vit.layers.0"][0]] * 2 for layer in by_layer}
        for name, by_layer in quantities.items()
    }


def test_an_alarm_long_before_a_stall_was_found_is_named(tmp_path):
    probes = {s: calm(s, **(SPARSE if s > 60 else {})) for s in range(1, 100, 10)}
    alarm = {"kind": "collapse", "layer": "vit.layers.0", "head": 0, "reason": "all heads"}
    folder = write_run(tmp_path, [2.3] * 100, probes, [("alarm", 15, alarm)])
    assert verdict(folder).headline == (
        "Failed: the loss never came down; an alarm was raised at step 15, attention was found "
        "collapsed at step 61"
    )


def test_heads_collapsed_at_the_first_probe_are_not_passed_over(tmp_path):
    steps = range(1, 100, 10)
    probes = {step: everywhere(calm(step, **SPARSE)) for step in steps}
    found = verdict(write_run(tmp_path / "all", [2.3] * 100, probes))
    assert found.headline == (
        "Failed: the loss never came down; attention was collapsed at the first probe, step 1"
    )
    assert "at the first probe already (step 1) in layer 0, head 0: malignant" in text(found)
    assert "in the end 4 of 4 heads" in text(found)
    found = verdict(write_run(tmp_path / "fine", FALLING, probes))
    assert found.state == "warned" and "malignant collapse of attention, there from" in (
        found.headline
    )
    # One head of four, as pretrained models have it, is said, but convicts nothing.
    few = {step: calm(step, **SPARSE) for step in steps}
    habit = "1 of 4 heads sparse from the first probe on"
    found = verdict(write_run(tmp_path / "few", FALLING, few))
    assert (found.state, found.headline) == ("trained", f"Trained; {habit}")
    found = verdict(write_run(tmp_path / "low", [0.1] * 100, few))
    assert (found.state, found.headline) == ("warned", f"The loss hardly moved; {habit}")


def test_what_collapses_in_the_run_goes_before_what_was_there(tmp_path):
    def probe(step):
        content = calm(step, **SPARSE)
        if step > 50:
            for name, value in SPARSE.items():
                content[name]["vit.layers.1"][1] = value
        return content

    found = verdict(write_run(tmp_path, FALLING, {s: probe(s) for s in range(1, 100, 10)}))
    assert found.state == "warned"
    assert "began at step 51 in layer 1, head 1" in text(found)
    assert "in the end 2 of 4 heads" in text(found)


@pytest.mark.parametrize("slips", [{130}, {90}, {90, 130}])
def test_a_single_normal_probe_hides_no_collapse(slips, tmp_path):
    def probes(normal):
        return {
            s: calm(s, **(SPARSE if s >= 60 and s not in normal else {}))
            for s in range(10, 140, 10)
        }

    losses = [2.0 * 0.98**s for s in range(80)] + [4.0] * 60
    found = verdict(write_run(tmp_path / "slip", losses, probes(slips)))
    assert found.headline.endswith("after attention collapsed at step 60")
    # Two in a row end it.
    found = verdict(write_run(tmp_path / "two", losses, probes({120, 130})))
    assert found.headline == "Failed: the loss was lost at step 81"


def rolled_back(folder, first, second, losses):
    """Probes at 10, 20 ... 60 of a first attempt, at 30, 40 ... 120 after going back to 20."""
    write_run(folder, losses)
    log = StabilityLog(folder)
    for step in range(10, 61, 10):
        log.write("probe", 0, step, {"quantities": calm(step, **first(step))})
    log.write("rollback", 0, 60, {"to_step": 20, "lr_scale": 0.5})
    for step in range(30, 121, 10):
        log.write("probe", 1, step, {"quantities": calm(step, **second(step))})
    return folder


def test_growth_is_told_within_an_attempt(tmp_path):
    found = verdict(
        rolled_back(
            tmp_path,
            lambda step: dict(sigma_qk=0.1),
            lambda step: SPARSE if step >= 50 else dict(sigma_qk=2.0),
            [2.0 * 0.98**s for s in range(60)] + [5.0] * 60,
        )
    )
    assert "grew 30 x in 10 steps, from 2 (step 40) to 60 (step 50)" in text(found)


def test_a_collapse_that_a_rollback_undid_is_past(tmp_path):
    def first(step):
        return SPARSE if step >= 40 else {}

    losses = [2.0 * 0.98**s for s in range(120)]
    found = verdict(rolled_back(tmp_path / "well", first, lambda step: {}, losses))
    assert found.headline == "Trained, after 1 rollback; attention did not collapse"
    assert found.state == "trained" and "went back to step 20" in text(found)
    again = verdict(rolled_back(tmp_path / "again", first, lambda s: first(s - 50), losses))
    assert "Collapse of attention began at step 90" in text(again)


def test_a_loss_that_the_trainer_hides_is_not_finite(tmp_path):
    """It logs the mean of what is finite, and zero where nothing is."""
    losses = FALLING[:80] + [0.0] * 40
    probes = {s: calm(s) for s in (1, 50, 100)}
    folder = write_run(tmp_path / "watched", losses, every=10)
    assert verdict(folder).state == "trained"  # of the records alone there is no telling
    log = StabilityLog(folder)
    alarm = {"kind": "nonfinite", "layer": None, "head": None, "reason": "NaN"}
    log.write("alarm", 0, 79, alarm)
    for step, quantities in probes.items():
        loss, count = (None, step - 78) if step > 78 else (losses[step - 1], 0)
        values = {"loss": loss, "quantities": quantities, "nonfinite_steps": count}
        log.write("probe", 0, step, values)
    found = verdict(folder)
    assert found.state == "failed" and found.divergence_step == 80
    assert "from 2.1 (step 10)" not in text(found) and "to 0.5" in text(found)
    run = read_run(folder)
    assert [step for step, loss in run.losses if math.isnan(loss)] == [80, 90, 100, 110, 120]
    # A step that was skipped on the way hides nothing.
    once = write_run(tmp_path / "once", FALLING, every=10)
    log = StabilityLog(once)
    for step, count in ((1, 0), (50, 1), (100, 1)):
        values = {"loss": FALLING[step - 1], "quantities": calm(step), "nonfinite_steps": count}
        log.write("probe", 0, step, values)
    assert all(math.isfinite(loss) for _, loss in read_run(once).losses)


def test_a_zero_beside_a_gradient_that_is_not_finite_is_no_loss(tmp_path):
    folder = write_run(tmp_path, FALLING[:50] + [0.0] * 50)
    state = json.loads((folder / "trainer_state.json").read_text())
    for record in state["log_history"]:
        if record.get("loss") == 0:
            record["grad_norm"] = math.nan
    assert verdict(folder).state == "trained"  # a loss may be zero
    (folder / "trainer_state.json").write_text(json.dumps(state))
    assert verdict(folder).headline == "Failed: the loss is not finite from step 51 on"


@pytest.mark.filterwarnings("ignore:StabilityCallback")
def test_a_real_run_that_ends_in_nan_has_failed(tmp_path, monkeypatch):
    class Diverges(Trainer):
        def compute_loss(self, model, inputs, *args, **kwargs):
            loss = super().compute_loss(model, inputs, *args, **kwargs)
            return loss * math.nan if self.state.global_step >= 5 else loss

    monkeypatch.setattr(tiny_training, "Trainer", Diverges)
    monitor = hf_stable.StabilityCallback(every=4)
    options = dict(max_steps=12, logging_steps=2, save_strategy="no", callbacks=[monitor])
    trainer = tiny_training.make_trainer(tiny_model("vit"), tmp_path, **options)
    trainer.train()
    assert trainer.state.log_history[-2]["loss"] == 0  # as transformers has it
    trainer.save_state()
    found = verdict(tmp_path)
    assert found.state == "failed" and found.divergence_step == 6
    assert read_run(tmp_path).seconds > 0


def test_a_run_that_an_alarm_stopped_has_failed(tmp_path):
    alarm = {"kind": "collapse", "layer": "vit.layers.0", "head": 1, "reason": "it rises"}
    probes = {step: calm(step, **(SPARSE if step > 40 else {})) for step in range(10, 81, 10)}
    events = [("alarm", 80, alarm), ("stop", 80, {"reason": "on_collapse='stop', collapse"})]
    found = verdict(write_run(tmp_path / "stopped", FALLING[:80], probes, events))
    assert found.headline == "Failed: stopped at step 80 by an alarm: collapse in layer 0, head 1"
    assert found.state == "failed" and found.divergence_step == 80
    assert "did not suffer" not in text(found) and "stopped at step 80: on_coll" in text(found)
    # One that went on from there has not.
    on = verdict(write_run(tmp_path / "on", FALLING, probes, events))
    assert on.state == "warned" and on.headline == "Trained on after 1 alarm"


def test_alarms_of_a_kind_are_told_once(tmp_path):
    alarm = {"kind": "spike", "layer": None, "head": None, "reason": "it rose"}
    events = [("alarm", step, alarm) for step in range(10, 41, 10)]
    events.insert(1, ("alarm", 15, alarm | {"kind": "collapse"}))
    said = verdict(write_run(tmp_path, FALLING, {}, events)).sentences
    assert "Alarm at step 10, spike: it rose (3 more of its kind, the last at step 40)." in said
    assert "Alarm at step 15, collapse: it rose." in said
    assert sum(sentence.startswith("Alarm") for sentence in said) == 2


def test_losses_that_a_rollback_undid_are_past(tmp_path):
    folder = write_run(tmp_path, [])
    log = StabilityLog(folder)
    for step in range(10, 61, 10):
        loss = None if step == 60 else 2.0 - step / 100
        log.write("probe", 0, step, {"loss": loss, "quantities": calm(step)})
    log.write("rollback", 0, 60, {"to_step": 20, "lr_scale": 0.5})
    for step in (30, 40):
        log.write("probe", 1, step, {"loss": 2.0 - step / 50, "quantities": calm(step)})
    assert [step for step, _ in read_run(folder).losses] == [10, 20, 30, 40]
    assert verdict(folder).state == "trained"


def test_heads_that_were_always_sparse_explain_no_failure(tmp_path):
    few = {step: calm(step, **SPARSE) for step in range(1, 100, 10)}
    found = verdict(write_run(tmp_path / "few", FALLING[:50] + [math.nan] * 50, few))
    assert found.headline == "Failed: the loss is not finite from step 51 on"
    assert "resume from an earlier checkpoint" in text(found) and "would cap" not in text(found)
    # Nor do maps that are the identity: they are benign.
    folder = collapsing(tmp_path / "benign", malignant=False)
    assert "would cap" not in text(verdict(folder))
    assert "would cap" in text(verdict(collapsing(tmp_path / "malignant")))


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
