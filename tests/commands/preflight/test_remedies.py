"""Remedies from text: what they change, and what is refused in words that say what to do."""

from __future__ import annotations

import pytest

from hf_stable.commands.preflight.remedies import NONE, parse_remedies, parse_remedy
from hf_stable.methods.sigma_reparam.method import SigmaReparamConfig


def test_every_form_is_read():
    remedies = parse_remedies(
        "none, warmup, warmup:500, clip:0.5, adamw2:tau=0.01:lora=merged, optim:adafactor, "
        "sigma_reparam:init=one+adamw2"
    )
    none, warmup, steps, clip, adamw2, other, both = remedies
    assert none == NONE and not none.needs_the_optimizer and not none.needs_the_schedule
    assert (warmup.warmup, steps.warmup, clip.clip) == (0.1, 500.0, 0.5)
    assert (adamw2.optim, adamw2.optim_args) == ("adamw2", "tau=0.01,lora=merged")
    assert (other.optim, other.optim_args) == ("adafactor", "")
    assert both.methods == (SigmaReparamConfig(init="one"),)
    assert (both.optim, both.optim_args) == ("adamw2", "tau=auto")
    assert warmup.needs_the_schedule and not warmup.needs_the_optimizer
    assert not clip.needs_the_schedule and both.needs_the_optimizer


def test_a_remedy_says_itself_on_a_command_line():
    remedy = parse_remedy("adamw2:tau=0.01+sigma_reparam+warmup:0.2+clip")
    assert remedy.command_options() == (
        ["--patch", "sigma_reparam"],
        ["--optim", "adamw2", "--optim_args", "tau=0.01", "--warmup_steps", "0.2",
         "--max_grad_norm", "1"],
    )  # fmt: skip
    assert NONE.command_options() == ([], [])


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("adamw3", r"unknown remedy 'adamw3' \(did you mean 'adamw2'\?\)"),
        ("", "unknown remedy ''"),
        ("warmup:-1", "'warmup:-1' is not a remedy: write warmup, warmup:0.2"),
        ("warmup:soon", "'warmup:soon' is not a remedy"),
        ("clip:0", "'clip:0' is not a remedy"),
        ("clip:nan", "'clip:nan' is not a remedy"),
        ("clip:1:2", "'clip:1:2' is not a remedy"),
        ("none:1", "none takes no options"),
        ("none+clip", "none stands alone"),
        ("adamw2+optim:sgd", "'optim' changes the optimizer a second time"),
        ("clip+clip:2", "'clip' changes the clip a second time"),
        ("optim", "optim needs the name of an optimizer"),
        ("adamw2:tau", "option 'tau' of adamw2 has no value"),
        ("sigma_reparam:one", "option 'one' of sigma_reparam has no value"),
        ("sigma_reparam:init=[", "option 'init=\\[' of sigma_reparam is not YAML"),
        ("sigma_reparam:init=two", "init='two' is not allowed"),
        ("clip,none,clip", "remedy 'clip' is named more than once"),
    ],
)
def test_what_is_no_remedy_is_refused(text, message):
    with pytest.raises(ValueError, match=message):
        parse_remedies(text)
