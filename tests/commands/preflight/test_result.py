"""Margins, costs and advice from the outcomes of legs: plain data in, sentences out."""

from __future__ import annotations

import json

from hf_stable.commands.preflight.judging import Outcome
from hf_stable.commands.preflight.legs import Ending, Leg, Settings
from hf_stable.commands.preflight.remedies import NONE, parse_remedy
from hf_stable.commands.preflight.result import conclude

SETTINGS = Settings(("train.py", "--output_dir", "my runs"), 60, 3)
ADAMW2 = parse_remedy("adamw2:tau=0.01")
SIGMA = parse_remedy("sigma_reparam")


def outcome(remedy, factor, kind, loss=1.0, seconds=0.1, seed=0, **more):
    ending = None
    if kind != "skipped":
        ending = Ending("key", "steps", steps=60, seconds_per_step=seconds,
                        facts={"first_rate": 1e-3, "max_steps": 300, "tau": 0.0233})  # fmt: skip
    return Outcome(Leg(remedy, factor, seed), kind, loss=loss, ending=ending, **more)


def test_a_planned_rate_with_a_margin_needs_nothing():
    found = [outcome(NONE, 0.3, "trains"), outcome(NONE, 1.0, "trains"),
             outcome(NONE, 3.0, "spikes"), outcome(NONE, 10.0, "nan", None)]  # fmt: skip
    result = conclude(found, SETTINGS)
    assert result.passed and (result.remedies[0].survives_to, result.remedies[0].fails_at) == (
        3,
        10,
    )
    assert result.sentences == (
        "The run as planned, at a rate of 0.001, trains in its first 60 steps; it fails at 10 "
        "times the rate.",
        "Nothing is needed: the planned rate has a margin of two or more.",
    )
    assert result.command == "hf-stable run train.py --output_dir 'my runs'"
    json.dumps(result.to_dict(), allow_nan=False)


def test_a_margin_that_was_not_tried_is_said_to_be_unknown():
    found = [outcome(NONE, 1.0, "trains"), outcome(NONE, 1.5, "trains")]
    result = conclude(found, SETTINGS)
    assert not result.passed
    assert result.sentences[-1] == (
        "Whether the planned rate has a margin of two is not known: no rate of twice it or more "
        "was tried. Give one in --rates, such as 3."
    )
    alone = conclude(found[:1], SETTINGS)
    assert alone.sentences[0].endswith("trains in its first 60 steps.")
    lost = conclude([*found, outcome(NONE, 1.8, "diverges", 9.0)], SETTINGS)
    assert "not known" not in lost.sentences[-1]


def test_the_remedy_that_buys_enough_at_the_lowest_loss_is_advised_with_its_cost():
    found = [
        outcome(NONE, 0.3, "trains"), outcome(NONE, 1.0, "diverges", 9.0),
        outcome(NONE, 3.0, "skipped", None),
        outcome(ADAMW2, 1.0, "trains", 0.5, 0.15), outcome(ADAMW2, 3.0, "trains", 0.6),
        outcome(SIGMA, 1.0, "trains", 0.4), outcome(SIGMA, 3.0, "stalls", 2.3),
    ]  # fmt: skip
    result = conclude(found, SETTINGS)
    assert not result.passed
    plain, adamw2, sigma = result.remedies
    assert (plain.survives_to, plain.fails_at) == (0.3, 1.0)
    assert (adamw2.survives_to, adamw2.fails_at, adamw2.time) == (3.0, None, 0.15 / 0.1)
    assert (sigma.survives_to, sigma.fails_at) == (1.0, 3.0)
    assert "loses its loss" in result.sentences[0]
    assert "survives 3 times the rate, no rate tried fails; loss at the planned rate 0.5 against 9"\
        ", at 1.50 times the time per step" in result.sentences[1]  # fmt: skip
    assert result.tau == result.to_dict()["tau"] == 0.0233
    suggestion = "For the 300 steps of this run, AdamW2's tau=auto is tau=0.0233."
    assert suggestion == result.sentences[-2]
    assert suggestion not in conclude(found[:3] + found[-2:], SETTINGS).sentences
    assert result.sentences[-1] == (
        "Use adamw2:tau=0.01: with it the planned rate has a margin of two. Without it, a rate of "
        "0.00015 would have a margin of two."
    )
    assert result.command.endswith("--optim adamw2 --optim_args tau=0.01")


def test_one_seed_that_fails_is_enough():
    found = [outcome(NONE, f, "trains", seed=s) for f in (1.0, 3.0) for s in (0, 1)]
    assert conclude(found, SETTINGS).passed
    found[-1] = outcome(NONE, 3.0, "diverges", seed=1)
    assert not conclude(found, SETTINGS).passed


def test_a_survivor_above_a_rate_that_fails_is_no_margin():
    found = [outcome(NONE, 1.0, "trains"), outcome(NONE, 1.7, "nan", None),
             outcome(NONE, 3.0, "trains")]  # fmt: skip
    row = conclude(found, SETTINGS).remedies[0]
    assert (row.survives_to, row.fails_at) == (1.0, 1.7)


def test_losses_that_move_nowhere_are_not_judged_and_that_is_said():
    found = [outcome(NONE, 1.0, "stalls"), outcome(NONE, 3.0, "stalls")]
    result = conclude(found, SETTINGS)
    assert result.sentences[-1].startswith("No leg's loss has moved yet")
    found[0] = outcome(NONE, 1.0, "trains")  # one that moves shows what the other could have done
    assert conclude(found, SETTINGS).remedies[0].fails_at == 3.0


def test_a_remedy_that_cannot_be_used_says_why_and_is_not_advised():
    found = [outcome(NONE, 1.0, "nan", None),
             outcome(ADAMW2, 1.0, "refused", None, reason="it has its own optimizer")]  # fmt: skip
    result = conclude(found, SETTINGS)
    assert "not usable here: it has its own optimizer" in result.sentences[1]
    assert result.sentences[-1] == "No remedy that was tried helps; try lower --rates."


def test_processes_of_a_launcher_are_in_the_command():
    many = Settings(("train.py",), 60, 3, ("torchrun", "--nproc-per-node", "8"))
    result = conclude([outcome(NONE, 1.0, "trains"), outcome(NONE, 3.0, "trains")], many)
    assert result.command == "torchrun --nproc-per-node 8 -m hf_stable.run train.py"
