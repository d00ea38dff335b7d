"""Going back for good, with rates and count, in searches too; one training in a folder."""

from __future__ import annotations

import json
import math
import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest
import tiny_training
import transformers
from tiny_models import tiny_model
from tiny_training import Interrupt, make_trainer, same_state
from transformers import Trainer
from transformers.trainer_utils import get_last_checkpoint

import hf_stable
from hf_stable.monitor.abandoned import abandon_checkpoints, write_due
from hf_stable.monitor.folder_lock import FILE_NAME as LOCK
from hf_stable.monitor.folder_lock import FolderLock
from hf_stable.monitor.log_file import read_log
from hf_stable.monitor.rollbacks import Due, Rollbacks

SUPPORT = Path(__file__).parents[1] / "support"


class Diverges(Trainer):
    """A loss that turns NaN at a step while the rate is above a bound."""

    bad_step = 8
    bearable_rate = 0.6e-2

    def compute_loss(self, model, inputs, *args, **kwargs):
        loss = super().compute_loss(model, inputs, *args, **kwargs)
        rate = self.optimizer.param_groups[0]["lr"]
        is_bad = self.state.global_step + 1 == self.bad_step and rate > self.bearable_rate
        return loss * math.nan if is_bad else loss


def diverging(folder, *, callbacks=(), model=None, **options):
    """A run that turns bad at step 8 and has checkpoints of steps 2, 4 and 6 by then."""
    monitor = hf_stable.StabilityCallback(every=50, on_collapse="rollback")
    settings = dict(max_steps=12, save_steps=2, lr_scheduler_type="constant", learning_rate=1e-2)
    trainer = make_trainer(
        tiny_model("vit") if model is None else model, folder, callbacks=[monitor, *callbacks],
        **(settings | options),
    )  # fmt: skip
    return trainer, monitor


@pytest.fixture
def late_alarm(monkeypatch):
    """A Trainer that diverges, after checkpoints at which rules were suspicious: 4 is healthy."""
    from hf_stable.monitor.alarms import AlarmRules

    monkeypatch.setattr(tiny_training, "Trainer", Diverges)
    monkeypatch.setattr(
        AlarmRules,
        "is_suspicious",
        property(lambda self: self._open or len(self._losses) in (5, 6)),
    )


class DiesAfterRollback(transformers.TrainerCallback):
    """Ends a training after its rollback and before its next checkpoint."""

    def on_step_end(self, args, state, control, **kwargs):
        if state.global_step == 5 and self.monitor.rollbacks.count == 1:
            raise KeyboardInterrupt


def checkpoints(folder):
    return sorted(path.name for path in Path(folder).glob("checkpoint-*"))


def test_a_run_that_dies_after_a_rollback_goes_on_from_it(late_alarm, tmp_path):
    whole, _ = diverging(tmp_path / "whole")
    whole.train()
    assert whole.optimizer.param_groups[0]["lr"] == 0.5e-2

    dies = DiesAfterRollback()
    cut, dies.monitor = diverging(tmp_path / "cut", callbacks=[dies])
    with pytest.raises(KeyboardInterrupt):
        cut.train()
    # What it went back from is out of every resume's way, its own and those of scripts.
    assert checkpoints(tmp_path / "cut") == ["checkpoint-1", "checkpoint-2", "checkpoint-4"]
    assert checkpoints(tmp_path / "cut" / "_abandoned-1") == ["checkpoint-6"]
    assert get_last_checkpoint(tmp_path / "cut").endswith("checkpoint-4")

    again, monitor = diverging(tmp_path / "cut")
    again.train(resume_from_checkpoint=True)
    assert monitor.rollbacks.count == 1 and again.state.global_step == 12
    assert again.optimizer.param_groups[0]["lr"] == 0.5e-2
    assert same_state(again.model, whole.model)
    assert sum(line["event"] == "rollback" for line in read_log(tmp_path / "cut")) == 1
    attempts = [line["attempt"] for line in read_log(tmp_path / "cut")]
    assert attempts == sorted(attempts) and attempts[-1] == 1

    # A later checkpoint holds the lower rate itself: it is not applied again.
    for path in (tmp_path / "cut").glob("checkpoint-12"):
        path.rename(tmp_path / "last")
    last, monitor = diverging(tmp_path / "cut")
    last.train(resume_from_checkpoint=str(tmp_path / "cut" / "checkpoint-10"))
    assert monitor.rollbacks.count == 1
    assert last.optimizer.param_groups[0]["lr"] == 0.5e-2


def test_without_a_rollback_nothing_is_moved_and_no_rate_is_changed(late_alarm, tmp_path):
    trainer, monitor = diverging(tmp_path, learning_rate=0.5e-2)
    trainer.train()
    assert monitor.rollbacks.count == 0 and trainer.optimizer.param_groups[0]["lr"] == 0.5e-2
    assert "checkpoint-6" in checkpoints(tmp_path)
    assert not list(tmp_path.glob("_*"))


KILLED = """
import sys
sys.path.insert(0, sys.argv[1]); sys.path.insert(0, sys.argv[2])
import os, signal
import tiny_training, test_rollbacks as t
tiny_training.Trainer = t.Diverges
class Kill(t.transformers.TrainerCallback):
    def on_step_end(self, args, state, control, **kwargs):
        if monitor.rollbacks.count == 1 and state.global_step == 7:  # before the next checkpoint
            os.kill(os.getpid(), signal.SIGKILL)
trainer, monitor = t.diverging(sys.argv[3], callbacks=[Kill()] if sys.argv[4] == "kill" else [])
trainer.train(resume_from_checkpoint=sys.argv[4] != "kill")
print(monitor.rollbacks.count, trainer.optimizer.param_groups[0]["lr"], trainer.state.global_step)
"""


@pytest.mark.slow
def test_a_process_that_is_killed_after_a_rollback_goes_on_from_it(tmp_path):
    def run(what):
        command = [sys.executable, "-c", KILLED, SUPPORT, Path(__file__).parent, tmp_path, what]
        return subprocess.run(command, capture_output=True, text=True)

    killed = run("kill")
    assert killed.returncode == -signal.SIGKILL, killed.stderr[-2000:]
    resumed = run("resume")
    assert resumed.returncode == 0, resumed.stderr[-2000:]
    assert resumed.stdout.splitlines()[-1] == "1 0.005 12"
    assert "back at step" in resumed.stderr and "0.5 times the learning rate" in resumed.stderr


def test_a_second_rollback_to_the_same_checkpoint_counts_on(tmp_path):
    rollbacks = Rollbacks(3, 0.5)
    rollbacks.note(4)
    written = rollbacks.state()
    for count, factor in ((1, 0.5), (2, 0.25)):
        rollbacks.due = rollbacks.next
        rollbacks.begin()  # training resumes: all else is read from the checkpoint
        rollbacks.load_state(written)
        assert rollbacks.take() == factor and rollbacks.count == count
        assert rollbacks.take() is None
    resumed = Rollbacks(3, 0.5)
    resumed.load_state(written | {"due": [2, 0.25]})
    assert resumed.take() == 0.25 and resumed.next == Due(3, 0.125)


def test_only_what_the_abandoned_attempt_wrote_is_moved(tmp_path):
    for name in ("checkpoint-2", "checkpoint-4", "checkpoint-6", "checkpoint-100", "checkpoint-x"):
        (tmp_path / name).mkdir()
    (tmp_path / "checkpoint-5").write_text("a file")
    (tmp_path / "_abandoned-1").mkdir()
    assert abandon_checkpoints(str(tmp_path), after=2, until=6) == tmp_path / "_abandoned-2"
    assert checkpoints(tmp_path / "_abandoned-2") == ["checkpoint-4", "checkpoint-6"]
    assert checkpoints(tmp_path) == [
        "checkpoint-100", "checkpoint-2", "checkpoint-5", "checkpoint-x",
    ]  # fmt: skip
    assert abandon_checkpoints(str(tmp_path), after=2, until=6) is None


def test_a_checkpoint_without_the_callback_is_not_written_into(tmp_path):
    path = tmp_path / "trainer_state.json"
    for content in ({}, {"stateful_callbacks": {}}, {"stateful_callbacks": {"A": []}}):
        path.write_text(json.dumps(content))
        with pytest.raises(ValueError, match="has no state of A"):
            write_due(str(tmp_path), "A", Due(1, 0.5))
        assert json.loads(path.read_text()) == content


def test_a_rollback_that_cannot_be_made_last_is_taken_all_the_same(
    late_alarm, tmp_path, monkeypatch
):
    from hf_stable.monitor import acting

    def full(*args, **kwargs):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(acting, "write_due", full)
    trainer, monitor = diverging(tmp_path)
    with pytest.warns(UserWarning, match="resume it from there by hand, at 0.5 times the rate"):
        trainer.train()
    assert monitor.rollbacks.count == 1 and trainer.state.global_step == 12
    assert trainer.optimizer.param_groups[0]["lr"] == 0.5e-2


# Searches for hyperparameters


def test_a_trial_of_a_search_goes_back_within_its_own_folder(late_alarm, tmp_path):
    optuna = pytest.importorskip("optuna")
    optuna.logging.set_verbosity(optuna.logging.WARNING)
    ends = []

    class Ends(transformers.TrainerCallback):
        def on_train_end(self, args, state, control, **kwargs):
            ends.append((state.global_step, monitor.rollbacks.count))

    monitor = hf_stable.StabilityCallback(every=50, on_collapse="rollback")
    trainer = make_trainer(
        None, tmp_path, model_init=lambda: tiny_model("vit"), callbacks=[Ends(), monitor],
        max_steps=10, save_steps=2, lr_scheduler_type="constant",
    )  # fmt: skip
    trainer.hyperparameter_search(
        hp_space=lambda trial: {"learning_rate": trial.suggest_float("learning_rate", 9e-3, 1e-2)},
        n_trials=2, backend="optuna", compute_objective=lambda metrics: metrics["eval_loss"],
    )  # fmt: skip
    # Each trial was cut short once, went back, and came to its end.
    assert ends == [(8, 0), (10, 1), (8, 0), (10, 1)]
    for trial in ("run-0", "run-1"):
        lines = read_log(tmp_path / trial)
        assert [line["to_step"] for line in lines if line["event"] == "rollback"] == [4]
        assert checkpoints(tmp_path / trial / "_abandoned-1") == ["checkpoint-6"]
    assert not checkpoints(tmp_path)


@pytest.mark.parametrize("action", ["rollback", "stop"])
def test_a_trial_that_is_stopped_for_good_is_pruned(action, late_alarm, tmp_path, monkeypatch):
    optuna = pytest.importorskip("optuna")
    optuna.logging.set_verbosity(optuna.logging.WARNING)
    monitor = hf_stable.StabilityCallback(every=50, on_collapse=action, max_rollbacks=0)
    trainer = make_trainer(
        None, tmp_path, model_init=lambda: tiny_model("vit"), callbacks=[monitor], max_steps=9,
        save_steps=4, lr_scheduler_type="constant",
    )  # fmt: skip
    studies, create = [], optuna.create_study

    def remember(**options):
        studies.append(create(**options))
        return studies[-1]

    monkeypatch.setattr(optuna, "create_study", remember)
    rates = (9e-3, 1e-2), (1e-4, 1e-3)  # above the one that is bearable, then below
    best = trainer.hyperparameter_search(
        hp_space=lambda trial: {"learning_rate": trial.suggest_float("r", *rates[trial.number])},
        n_trials=2, backend="optuna", compute_objective=lambda metrics: metrics["eval_loss"],
    )  # fmt: skip
    states = [trial.state.name for trial in studies[0].trials]
    assert states == ["PRUNED", "COMPLETE"] and best.run_id == "1"
    (stop,) = [line for line in read_log(tmp_path / "run-0") if line["event"] == "stop"]
    assert stop["step"] == 8 and monitor.why_it_stopped() is None


# One training at a time


HOLDER = """
import sys, time
from hf_stable.monitor.folder_lock import FolderLock
lock = FolderLock(sys.argv[1])
print(lock.acquire(), flush=True)
time.sleep(100)
"""


def test_a_second_training_in_a_folder_is_refused_while_the_first_lives(tmp_path):
    process = subprocess.Popen(
        [sys.executable, "-c", HOLDER, tmp_path], stdout=subprocess.PIPE, text=True
    )
    try:
        assert process.stdout.readline() == "None\n"
        trainer = make_trainer(
            tiny_model("vit"), tmp_path, callbacks=[hf_stable.StabilityCallback()], max_steps=2
        )
        with pytest.raises(RuntimeError, match=f"another training .*process {process.pid} on"):
            trainer.train()
        assert trainer.state.global_step == 0 and not (tmp_path / "stability.jsonl").exists()
    finally:
        process.kill()
        process.wait()
    trainer.train()  # a killed process holds nothing
    assert trainer.state.global_step == 2 and not (tmp_path / LOCK).exists()


def test_a_second_trainer_of_the_same_process_is_refused_too(tmp_path):
    first = make_trainer(
        tiny_model("vit"), tmp_path, callbacks=[hf_stable.StabilityCallback()], max_steps=2
    )
    second = make_trainer(
        tiny_model("vit"), tmp_path, callbacks=[hf_stable.StabilityCallback()], max_steps=2
    )

    class Starts(transformers.TrainerCallback):
        def on_step_begin(self, args, state, control, **kwargs):
            with pytest.raises(RuntimeError, match="another Trainer of this process"):
                second.train()

    first.add_callback(Starts())
    first.train()
    assert len(read_log(tmp_path)) == 3  # two probes and the end, of the first alone
    second.train()


@pytest.mark.parametrize("error", [KeyboardInterrupt, RuntimeError])
def test_a_training_that_breaks_off_holds_nothing(error, tmp_path):
    class Breaks(transformers.TrainerCallback):
        def on_step_end(self, args, state, control, **kwargs):
            assert (tmp_path / LOCK).exists()
            raise error

    trainer = make_trainer(
        tiny_model("vit"), tmp_path, callbacks=[hf_stable.StabilityCallback(), Breaks()]
    )
    with pytest.raises(error):
        trainer.train()
    other = FolderLock(tmp_path)
    assert other.acquire() is None
    other.release()


def test_a_link_or_a_folder_without_rights_refuses_nobody(tmp_path):
    (tmp_path / "own").mkdir()
    (tmp_path / "own" / LOCK).symlink_to(tmp_path / "elsewhere")
    lock = FolderLock(tmp_path / "own")
    assert lock.acquire() is None and not (tmp_path / "elsewhere").exists()
    assert FolderLock(tmp_path / "missing").acquire() is None


def test_an_interrupted_run_is_resumed_in_its_folder(tmp_path):
    for steps, resume in ((3, None), (6, True)):
        trainer = make_trainer(
            tiny_model("vit"), tmp_path, max_steps=6,
            callbacks=[hf_stable.StabilityCallback(every=1), Interrupt(steps)],
        )  # fmt: skip
        trainer.train(resume_from_checkpoint=resume)
    probes = [line["step"] for line in read_log(tmp_path) if line["event"] == "probe"]
    assert probes == [1, 2, 3, 4, 5, 6]
    assert os.listdir(tmp_path / "checkpoint-6")
