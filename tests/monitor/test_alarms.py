"""The alarm rules on plain numbers: what raises, what does not, and that a replay is the same."""

from __future__ import annotations

import json
import math
import random
import sys
from dataclasses import asdict
from pathlib import Path

import pytest

from hf_stable.measures.loss_curves import lost_step, noise
from hf_stable.monitor.advice import advise
from hf_stable.monitor.alarms import Alarm, AlarmRules, Thresholds

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

from recipes.evidence import alarms as evidence  # noqa: E402

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


def test_heavy_tails_that_go_nowhere_are_no_spike_and_a_spike_among_them_is():
    def heavy(seed):
        draw = random.Random(seed)
        return [draw.lognormvariate(0, 1) for _ in range(500)]

    for seed in (1, 3, 4, 7, 8):
        assert feed(AlarmRules(), heavy(seed)) == []
        spike = [loss * (30 if 400 <= step < 410 else 1) for step, loss in enumerate(heavy(seed))]
        (alarm,) = feed(AlarmRules(), spike)
        assert alarm.kind == "spike" and 400 < alarm.step <= 410


def test_a_spike_names_the_threshold_that_it_crossed():
    """The median of the window before and ten times its noise, or half the median if more."""
    draw = random.Random(0)
    losses = [2.0 + draw.gauss(0, 0.5) for _ in range(60)] + [50.0] * 5
    (alarm,) = feed(AlarmRules(), losses)
    before = losses[alarm.step - 55 : alarm.step - 5]
    middle = sorted(before)[24:26]
    assert alarm.threshold == pytest.approx(sum(middle) / 2 + 10 * noise(before))
    (alarm,) = feed(AlarmRules(), [2.0] * 60 + [50.0] * 5)
    assert alarm.threshold == 3.0 and alarm.value == 50.0


def test_a_spike_needs_a_window_to_be_told_from():
    assert feed(AlarmRules(), [1.0] * 19 + [9.0] * 3) == []
    assert kinds(feed(AlarmRules(), [1.0] * 25 + [9.0] * 3)) == ["spike"]


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
    # It has to be seen on enough heads, and after the first probe.
    one = {n: {"layer": [v["layer"][0]] + [HEALTHY_HEAD[n]] * 19} for n, v in sparse.items()}
    calm = {n: {"layer": [value] * 20} for n, value in HEALTHY_HEAD.items()}
    assert feed(AlarmRules(), stalled, {1: calm} | {s: one for s in range(10, 200, 10)}) == []
    assert feed(AlarmRules(), stalled, {s: sparse for s in range(1, 200, 10)}) == []


def test_a_stall_after_learning_how_frequent_labels_are_is_one():
    """The loss of GPT-2 whose first layer collapses: to the unigram level, and no further."""
    sparse = probe(entropy_normalised=0.1, rank=0.05)
    probes = {1: probe()} | {step: sparse for step in range(10, 200, 10)}

    def losses(slope):
        draw = random.Random(0)
        return [6.0 + 0.9 * 0.9**s - slope * s + 0.1 * draw.gauss(0, 1) for s in range(200)]

    (alarm,) = feed(AlarmRules(), losses(0.0), probes)
    assert alarm.kind == "collapse" and 80 < alarm.step < 150
    # The same attention, and a loss that comes down slowly: that of the twin with warmup.
    assert feed(AlarmRules(), losses(0.003), probes) == []


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
    content = Alarm("nonfinite", 1, "loss", math.nan, math.inf, "r").to_dict()
    assert json.loads(json.dumps(content, allow_nan=False))["value"] is None


@pytest.mark.parametrize(
    ("in_place", "advised"),
    [
        ((), ("optim='adamw2'", "hf_stable.patch")),
        (("sigma_reparam",), ("optim='adamw2'",)),
        (("adamw2",), ("AdamW2's tau", "hf_stable.patch")),
        (("adamw2", "sigma_reparam"), ("AdamW2's tau",)),
    ],
)
def test_what_a_run_has_already_is_not_advised(in_place, advised):
    advice = Alarm("collapse", 1, "sec", 1.0, 1.0, "r", in_place=in_place).advice
    every = ("optim='adamw2'", "AdamW2's tau", "hf_stable.patch")
    assert [part for part in every if part in advice] == list(advised)
    assert "lower the learning rate" in advice
    for kind in ("spike", "nonfinite"):
        assert advise(kind, in_place) == advise(kind)
    with pytest.raises(ValueError, match="remedies are sigma_reparam, adamw2"):
        advise("collapse", ["warmup"])
    with pytest.raises(ValueError, match="collapse, spike and nonfinite, got 'stall'"):
        advise("stall")


def test_a_probe_that_measured_less_than_the_last_raises_nothing():
    rules = AlarmRules()
    rules.observe_probe(1, {"entropy_normalised": {"h": [0.9, 0.9]}, "rank": {"h": [0.9, 0.9]}})
    for step, values in enumerate(({"h": [None]}, {"h": [0.2, 0.2, 0.2]}, {"g": [0.1]}, {}), 2):
        rules.observe_loss(step, 1.0)
        assert rules.observe_probe(step, {"entropy_normalised": values, "rank": {"h": []}}) == []


def test_the_rates_are_those_of_enough_runs_of_all_architectures():
    found = json.loads(evidence.RESULTS.read_text())
    runs = found["runs"]
    names = [variant.name for variant in evidence.SETUPS]
    seeds = evidence.FIXED_ON + evidence.REPORTED_ON
    assert [(r["run"], r["seed"]) for r in runs] == [(n, s) for n in names for s in seeds]
    assert not set(evidence.FIXED_ON) & set(evidence.REPORTED_ON)
    for half in ("fixed_on", "reported"):
        assert found[half]["healthy"] >= 10 and found[half]["collapsed"] >= 10
    for kind in ("healthy", "collapsed"):
        assert sum(run["kind"] == kind for run in runs) >= 20
        assert {r["model"] for r in runs if r["kind"] == kind} == {"bert", "gpt2", "swin", "vit"}
    again = evidence.summary(runs)
    assert {key: found[key] for key in again} == again
    assert found["thresholds"] == asdict(Thresholds()), "run recipes/evidence/alarms.py again"


def test_what_a_run_was_is_said_by_its_end_and_its_attention_alone():
    assert evidence.kind_of(False, 0.05) == evidence.kind_of(False, 0.9) == "healthy"
    assert evidence.kind_of(True, 0.05) == "collapsed"
    assert evidence.kind_of(True, 0.9) == "failed otherwise"
    rows = [
        dict(kind="healthy", alarm=None, lost=None, steps=100),
        dict(kind="healthy", alarm=9, lost=None, steps=100),
        dict(kind="collapsed", alarm=20, lost=30, steps=100),
        dict(kind="collapsed", alarm=40, lost=35, steps=100),
        dict(kind="collapsed", alarm=None, lost=30, steps=100),
        dict(kind="failed otherwise", alarm=None, lost=None, steps=100),
    ]
    assert evidence.rates(rows) == {
        "healthy": 2, "false_alarms": 1, "collapsed": 3, "missed": 1, "lost": 3,
        "leads": [-5, 10], "in_time": 1, "still_to_come_median": 0.7,
    }  # fmt: skip
