"""A training that is killed twenty times while it saves, and comes out as if nothing had been."""

from __future__ import annotations

import json
import os
import random
import signal
import sys
import warnings

import pytest
from gloo_ranks import run_processes
from tiny_training import dropout_model, losses, make_trainer, same_state

import hf_stable
from hf_stable.monitor.log_file import read_log
from hf_stable.report.reading import read_run

KILLS, STEPS = 20, 30

CHANGES = ("open", "os.rename", "os.remove", "os.mkdir", "os.rmdir", "os.link", "shutil.copyfile")
"""What Python tells of that changes files."""


def train(folder, *, resumes):
    """Train on from the last whole checkpoint, or from the beginning where there is none."""
    model = hf_stable.patch(dropout_model("vit"), "sigma_reparam")
    trainer = make_trainer(
        model, folder, max_steps=STEPS, save_steps=1, save_total_limit=2, optim="adamw2",
        callbacks=[hf_stable.StabilityCallback(every=1)],
    )  # fmt: skip
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        try:
            trainer.train(resume_from_checkpoint=resumes or None)
        except ValueError as error:
            if "No valid checkpoint found" not in str(error):
                raise
            trainer.train()
    return trainer


def train_and_die(folder, countdown):
    """Train on, and be killed at a change of a file in a checkpoint, the countdown's last."""
    left = [countdown]

    def watch(event, arguments):
        if event not in CHANGES or not any("checkpoint-" in str(each) for each in arguments[:2]):
            return
        writing = os.O_WRONLY | os.O_RDWR
        if event == "open" and not arguments[2] & writing:
            return
        left[0] -= 1
        if not left[0]:
            os.kill(os.getpid(), signal.SIGKILL)

    sys.addaudithook(watch)
    train(folder, resumes=os.path.isdir(folder))


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore")
def test_twenty_kills_while_saving_change_nothing(tmp_path):
    draw, reached = random.Random(0), []
    for killed in range(1, KILLS + 1):
        # Of the dozen changes that a save makes, any; and the save after the next one too.
        countdown = draw.randrange(1, 25)
        ((code, printed),) = run_processes(
            [(train_and_die, (tmp_path / "run", countdown))], tmp_path
        )
        assert code == -signal.SIGKILL, (killed, printed[-2000:])
        folders = sorted((tmp_path / "run").glob("checkpoint-*"), key=lambda p: p.stat().st_mtime)
        reached.append(folders[-1].name if folders else "")
    assert len(set(reached)) > 5  # it got on, from kill to kill
    resumed = train(tmp_path / "run", resumes=True)
    whole = train(tmp_path / "whole", resumes=False)
    assert losses(resumed) == losses(whole)
    assert same_state(resumed.model, whole.model)
    # The log has each step once, as the one of the run that nobody killed.
    steps = [line["step"] for line in read_log(tmp_path / "run") if line["event"] == "probe"]
    assert steps == list(range(1, STEPS + 1))
    assert read_run(tmp_path / "run").losses == read_run(tmp_path / "whole").losses
    assert not list((tmp_path / "run").rglob("*.tmp"))
    for state in (tmp_path / "run").glob("checkpoint-*/trainer_state.json"):
        assert json.loads(state.read_text())["global_step"] == int(state.parent.name.split("-")[1])
