"""The alarm rules on plain numbers: what raises, what does not, and that a replay is the same."""

from __future__ import annotations

import json
import math
import random

import pytest

from hf_stable.alarms import ADVICE, Alarm, AlarmRules, Thresholds, lost_step, smooth

HEALTHY_HEAD = dict(entropy_normalised=0.9, rank=0.9, sigma_qk=1.0, sec=0.5)


def probe(**changes):
    """What a probe records of one layer with two heads, the first with these values."""
    head = HEALTHY_HEAD | changes
    return {name: {"layer": [value, HEALTHY_HEAD[name]]} for name, value in head.items()}


def falling(step: int) -> float:
    return 2.0 * 0.99**step + 0.01 * random.Random(step).uniform(-1, 1)


def feed(rules, losses, probes=None, start=1):
    """Feed losses step by step and probes by step; return all alarms."""
    alarms = []
    for step, loss in enumerate(losses, start=start):
        alarms += rules.observe_loss(step, loss)
        if probes and step in probes:
            alarms += rules.observe_probe(step, probes[step])
    return alarms


def kinds(alarms):
    return [alarm.kind for alarm in alarms]


def test_a_loss_that_falls_raises_nothing_whatever_attention_does_if_it_was_so_from_the_start():
    sparse = probe(entropy_normalised=0.05, rank=0.05, sec=0.999)
    losses = [falling(step) for step in range(200)]
    assert feed(AlarmRules(), losses, {step: sparse for step in range(1, 200, 10)}) == []


def test_low_entropy_and_sec_alone_raise_nothing_while_the_loss_improves():
    """The run of the counter-example: entropy .13 and SEC .998 in layer 0, and it trains."""
    probes = {1: probe()} | {
        step: probe(entropy_normalised=0.13, rank=0.1, sec=0.998, sigma_qk=47.0)
        for step in range(11, 200, 10)
    }
    assert feed(AlarmRules(), [falling(step) for step in range(200)], probes) == []


def test_signs_while_the_loss_rises_are_a_collapse_named_once():
    rise = [falling(50) * 1.02 ** (step - 50) for step in range(50, 120)]
    losses = [falling(step) for step in range(50)] + rise
    probes = {1: probe(), 40: probe()} | {
        step: probe(sigma_qk=1.3 ** (step - 50)) for step in range(52, 120, 4)
    }
    alarms = feed(AlarmRules(), losses, probes)
    assert kinds(alarms)[0] == "collapse" and kinds(alarms).count("collapse") == 1
    first = alarms[0]
    assert (first.layer, first.head, first.quantity) == ("layer", 0, "growth of sigma_qk")
    assert first.value > first.threshold == Thresholds().sigma_growth
    assert lost_step(losses) is not None and first.step < len(losses)
    # The same signs with a loss that goes on falling are none.
    assert feed(AlarmRules(), [falling(step) for step in range(120)], probes) == []


def test_a_loss_that_rises_without_signs_is_a_spike_beyond_its_noise_only():
    losses = [falling(step) for step in range(100)]
    assert kinds(feed(AlarmRules(), losses + [2 * losses[-1]] * 10)) == ["spike"]
    assert feed(AlarmRules(), losses + [1.1 * losses[-1]] * 10) == []
    noisy = [2.0 + random.Random(step).uniform(-1, 1) for step in range(300)]
    assert feed(AlarmRules(), noisy) == []


def test_two_wild_batches_are_no_spike():
    losses = [falling(step) for step in range(100)]
    losses[50:52] = [50.0, 50.0]
    assert feed(AlarmRules(), losses) == []


def test_a_spike_that_comes_back_is_a_second_event():
    calm = [1.0] * 40
    assert kinds(feed(AlarmRules(), calm + [9.0] * 10 + calm + [9.0] * 10)) == ["spike"] * 2


def test_a_stall_with_malignant_heads_is_a_collapse():
    sparse = probe(entropy_normalised=0.1, rank=0.05)
    stalled = [2.3 + 0.01 * random.Random(step).uniform(-1, 1) for step in range(200)]
    probes = {1: probe()} | {step: sparse for step in range(10, 200, 10)}
    (alarm,) = feed(AlarmRules(), stalled, probes)
    assert alarm.kind == "collapse" and alarm.quantity == "entropy_normalised"
    assert 10 + Thresholds().stall_steps <= alarm.step < 120
    # Attention close to the identity loses nothing, and a run that has learnt is past it.
    benign = probe(entropy_normalised=0.1, rank=0.95)
    assert feed(AlarmRules(), stalled, {1: probe()} | {s: benign for s in range(10, 200, 10)}) == []
    learnt = [5.0] * 10 + stalled
    assert feed(AlarmRules(), learnt, {s + 10: p for s, p in probes.items()}) == []


@pytest.mark.parametrize(("heads", "steps"), [(10, [46]), (9, [])])
def test_one_bad_loss_is_enough_where_half_of_the_heads_show_a_sign(heads, steps):
    bad = HEALTHY_HEAD | dict(entropy_normalised=0.1, rank=0.05)
    wide = {n: {"layer": [bad[n]] * heads + [HEALTHY_HEAD[n]] * (20 - heads)} for n in bad}
    losses = [1.0] * 45 + [1.2, 1.0, 1.2, 1.0, 1.0]
    calm = {n: {"layer": [HEALTHY_HEAD[n]] * 20} for n in bad}
    alarms = feed(AlarmRules(), losses, {1: calm, 41: wide})
    assert [(alarm.kind, alarm.step) for alarm in alarms] == [("collapse", step) for step in steps]


def test_one_head_of_many_is_not_enough():
    def wide(**changes):
        one = HEALTHY_HEAD | changes
        return {n: {"layer": [one[n]] + [HEALTHY_HEAD[n]] * 19} for n in HEALTHY_HEAD}

    rise = [falling(50) * 1.005 ** (step - 50) for step in range(50, 90)]
    losses = [falling(step) for step in range(50)] + rise
    probes = {1: wide(), 40: wide()} | {s: wide(sigma_qk=1.3 ** (s - 50)) for s in range(52, 90, 4)}
    assert feed(AlarmRules(), losses, probes) == []
    assert kinds(feed(AlarmRules(Thresholds(heads=0.05)), losses, probes)) == ["collapse"]


@pytest.mark.parametrize("loss, finite", [(math.nan, True), (math.inf, True), (1.0, False)])
def test_what_is_not_finite_alarms_once_for_each_event(loss, finite):
    rules = AlarmRules()
    assert rules.observe_loss(1, 1.0) == []
    (alarm,) = rules.observe_loss(2, loss, finite)
    assert alarm.kind == "nonfinite" and ("loss" if finite else "gradient") in alarm.reason
    assert rules.observe_loss(3, loss, finite) == [] and rules.is_suspicious
    assert rules.observe_loss(4, 1.0) == [] and not rules.is_suspicious
    assert kinds(rules.observe_loss(5, loss, finite)) == ["nonfinite"]


def test_quantities_that_were_not_recorded_give_no_signs():
    rise = [1.0] * 20 + [1.3] * 20
    probes = {step: {"sigma_w1": {"layer": 3.0}} for step in range(1, 40, 3)}
    assert feed(AlarmRules(), rise, probes) == []
    nothing = {name: {"layer": [None, None]} for name in HEALTHY_HEAD}
    assert feed(AlarmRules(), rise, {step: nothing for step in range(1, 40, 3)}) == []


@pytest.mark.parametrize("cut", [1, 7, 55, 70])
def test_rules_that_were_saved_as_json_go_on_as_if_never_stopped(cut):
    rise = [falling(50) * 1.05 ** (step - 50) for step in range(50, 90)]
    losses = [falling(step) for step in range(50)] + rise
    probes = {s: probe(sigma_qk=1.2 ** max(0, s - 50)) for s in range(2, 90, 3)}
    whole = AlarmRules()
    expected = feed(whole, losses, probes)
    assert expected
    first = AlarmRules()
    found = feed(first, losses[:cut], probes)
    second = AlarmRules()
    second.load_state(json.loads(json.dumps(first.state(), allow_nan=False)))
    found += feed(second, losses[cut:], probes, start=cut + 1)
    assert found == expected and second.state() == whole.state()
    assert AlarmRules().state() != whole.state()


def test_an_alarm_names_place_value_threshold_and_what_to_try():
    alarm = Alarm("collapse", 7, "sec", 0.995, 0.99, "because", "h.0", 3)
    for part in ("collapse", "step 7", "h.0, head 3", "sec", "0.995", "0.99", "because"):
        assert part in str(alarm)
    assert all(Alarm(kind, 1, "x", 1.0, 1.0, "r").advice == text for kind, text in ADVICE.items())
    content = Alarm("nonfinite", 1, "loss", math.nan, math.inf, "r").to_dict()
    assert json.loads(json.dumps(content, allow_nan=False))["value"] == "nan"


def test_lost_is_defined_once():
    assert lost_step([1.0] * 20) is None
    assert lost_step([1.0] * 20 + [1.09] * 20) is None
    assert lost_step([1.0] * 20 + [1.2] * 20) == 21
    assert lost_step([1.0] * 20 + [1.2] * 20 + [1.0] * 20) is None
    assert lost_step([1.0] * 20 + [math.nan] * 20) == 21
    assert lost_step([1.0] * 20 + [9.0] + [1.0] * 20) is None  # one wild batch
    assert lost_step([1.0] * 20 + [9.0, 9.0] + [1.0] * 20) is None
    assert smooth([1.0, 9.0, 1.0, math.nan, 1.0]) == [1.0, 5.0, 1.0, 5.0, 1.0]
