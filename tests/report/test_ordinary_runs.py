"""Verdicts on runs as people have them: each kind by its right name."""

from __future__ import annotations

import json
import math
import random

import pytest
import tiny_training
from report_runs import calm, write_run
from tiny_models import tiny_model
from transformers import Trainer

import hf_stable
from hf_stable.commands.conventions import NO, SUCCESS
from hf_stable.commands.main import main
from hf_stable.report.course import course_of, find_loss_of_course
from hf_stable.report.reading import read_run
from hf_stable.report.summary import summarise
from hf_stable.report.verdict import judge

COLLAPSED = dict(entropy=0.1, entropy_normalised=0.03, rank=0.02, sigma_qk=60.0, sec=0.999)


def text(found):
    return " ".join((found.headline, *found.sentences))


def way(first, last, steps, noise=0.0, seed=0):
    """Losses that come down from one level to another, ever more slowly, with noise."""
    draw = random.Random(seed)
    return [
        last + (first - last) * math.exp(-5 * step / steps) + draw.gauss(0, noise)
        for step in range(steps)
    ]


def with_every_head(quantities):
    """The values of layer 0, head 0 in every head."""
    return {
        name: {layer: [by_layer["vit.layers.0"][0]] * len(by_layer[layer]) for layer in by_layer}
        for name, by_layer in quantities.items()
    }


def write_config(folder, **config):
    (folder / "config.json").write_text(json.dumps(config))


ORDINARY = {
    "next tokens of text": (6.59, 4.78, 300, 0.15),
    "tokens that were masked": (10.4, 7.3, 200, 0.2),
    "fine-tuned on text": (3.42, 3.31, 400, 0.06),
    "two classes": (0.69, 0.55, 300, 0.05),
    "answers in a text": (5.9, 3.2, 200, 0.3),
    "names in a text": (0.62, 0.11, 200, 0.08),
    "ten classes of images": (2.3, 1.97, 200, 0.1),
    "summaries": (4.1, 3.6, 150, 0.2),
    "speech": (29.0, 2.9, 300, 1.0),
}


@pytest.mark.parametrize("every", [1, 10, 50])
@pytest.mark.parametrize("kind", ORDINARY)
def test_an_ordinary_run_has_trained_however_often_it_was_logged(kind, every, tmp_path):
    first, last, steps, noise = ORDINARY[kind]
    losses = way(first, last, steps, noise / math.sqrt(every))
    probes = {step: calm(step) for step in range(10, steps, 20)} if every == 1 else None
    found = judge(read_run(write_run(tmp_path / "run", losses, probes, every=every)))
    assert found.state == "trained", text(found)
    assert "hardly" not in text(found) and "The loss fell from" in text(found)
    if every == 50:
        return  # three records say nothing of noise
    # And one of that noise that goes nowhere has not.
    flat = [first + loss - expected for loss, expected in zip(losses, way(first, last, steps),
                                                               strict=True)]  # fmt: skip
    found = judge(read_run(write_run(tmp_path / "flat", flat, probes, every=every)))
    assert found.state == "warned" and found.headline.startswith("The loss hardly moved")
    assert "no more than noise apart" in text(found)


def test_a_loss_that_broke_out_and_did_not_come_back_has_failed(tmp_path):
    """6.8 to 134 and back to 6.19, with all heads collapsed."""
    losses = [*way(6.8, 6.5, 60), *way(134, 5.3, 240, 0.05)]
    assert 6 < losses[-1] < 6.4
    probes = {
        step: with_every_head(calm(step, **COLLAPSED)) if step > 60 else calm(step)
        for step in range(10, 300, 10)
    }
    found = judge(read_run(write_run(tmp_path / "all", losses, probes)))
    assert found.state == "failed"
    assert found.headline.startswith("Failed: the loss broke out and never came down after that")
    assert "it broke out to 134 (step 61), 20 times its first level" in text(found)
    assert "stood still" not in text(found) and "in the end 4 of 4 heads" in text(found)
    # The same with attention as it was is something to look at; and one that learns is none.
    quiet = {step: calm(step) for step in probes}
    found = judge(read_run(write_run(tmp_path / "quiet", losses, quiet)))
    assert found.state == "trained" and "broke out to 134" in text(found)
    learns = [*losses[:60], *way(134, 3.0, 240, 0.05)]
    assert judge(read_run(write_run(tmp_path / "learns", learns, probes))).state == "warned"
    # One that ends a little above its beginning is said to.
    above = [*losses[:60], *way(134, 6.2, 240, 0.05)]
    found = judge(read_run(write_run(tmp_path / "above", above, quiet)))
    assert found.headline == "The loss rose; attention did not collapse"
    assert "hardly" not in text(found) and "in the end." in text(found)


@pytest.mark.parametrize("losses", [[6.804, 50.0, 339.0], [6.804, 6.7, 120.0, 339.0]])
def test_a_loss_that_ends_far_above_its_beginning_is_lost(losses, tmp_path):
    folder = write_run(tmp_path / "run", losses, {1: with_every_head(calm(1, **COLLAPSED))})
    found = judge(read_run(folder))
    assert found.state == "failed" and found.headline.startswith("Failed: the loss was lost")
    assert "it ended at 339" in text(found)
    assert "hardly" not in text(found) and "stood still" not in text(found)
    assert main(["report", str(folder), "--output", str(tmp_path / "r.html")]) == NO


def test_a_run_that_was_interrupted_is_unfinished(tmp_path, capsys):
    losses = way(6.6, 5.1, 295, 0.1)
    folder = write_run(tmp_path / "run", losses, interrupted_at=4000)
    found = judge(read_run(folder))
    assert (found.state, found.headline) == (
        "unfinished", "Unfinished: step 295 of 4000; the loss came down so far",
    )  # fmt: skip
    page = str(tmp_path / "r.html")
    assert main(["report", str(folder), "--output", page]) == SUCCESS
    assert "Unfinished" in (tmp_path / "r.html").read_text()
    assert "295 of 4000" in capsys.readouterr().out
    # One that was lost by then has failed, and one that stopped early by itself has trained.
    lost = write_run(tmp_path / "lost", [*losses, *[9.0] * 30], interrupted_at=4000)
    assert judge(read_run(lost)).state == "failed"
    early = write_run(tmp_path / "early", losses, interrupted_at=4000)
    state = json.loads((early / "trainer_state.json").read_text())
    state["log_history"].append({"step": 295, "train_runtime": 9.0})
    (early / "trainer_state.json").write_text(json.dumps(state))
    assert judge(read_run(early)).state == "trained"


def test_a_run_of_which_little_is_known_is_not_judged(tmp_path):
    found = judge(read_run(write_run(tmp_path / "one", [2.0] * 10, every=10)))
    assert (found.state, found.headline) == (
        "unknown", "Too little to judge by: a single loss was recorded",
    )  # fmt: skip


LABELS = {str(number): f"label {number}" for number in range(10)}

CONFIGS = {
    "classes": dict(architectures=["ViTForImageClassification"], id2label=LABELS),
    "tokens": dict(architectures=["GPT2LMHeadModel"], vocab_size=10),
}


@pytest.mark.parametrize("kind", CONFIGS)
def test_a_loss_that_came_down_to_that_of_guessing_knows_nothing(kind, tmp_path):
    losses = way(3.4, 2.31, 200, 0.03)
    folder = write_run(tmp_path / "run", losses)
    assert judge(read_run(folder)).state == "trained"  # nothing says what guessing costs
    write_config(folder, **CONFIGS[kind])
    found = judge(read_run(folder))
    assert found.state == "warned" and found.headline.startswith("The loss hardly moved")
    assert "Guessing among all labels would cost 2.303: the model knows no more." in text(found)
    for changed in (
        dict(architectures=["ViTForSomething"]),
        dict(problem_type="regression", id2label={}, vocab_size=0),
        dict(id2label={"0": "a", "1": "b"}, vocab_size=2),
    ):
        write_config(folder, **CONFIGS[kind] | changed)
        assert judge(read_run(folder)).state == "trained", changed
    (folder / "config.json").unlink()
    (folder / "checkpoint-100").mkdir()
    write_config(folder / "checkpoint-100", **CONFIGS[kind])
    assert judge(read_run(folder)).state == "warned"


@pytest.mark.filterwarnings("ignore:StabilityCallback")
@pytest.mark.parametrize("action", ["rollback", "warn"])
def test_a_real_run_that_its_rollback_saved_has_trained(action, tmp_path, monkeypatch):
    class FailsOnce(Trainer):
        """Its gradients are not finite from step 9 on, until it goes back."""

        def compute_loss(self, model, inputs, *args, **kwargs):
            loss = super().compute_loss(model, inputs, *args, **kwargs)
            broken = self.state.global_step >= 8 and not monitor.rollbacks.count
            return loss * math.inf if broken else loss

    monitor = hf_stable.StabilityCallback(every=1, on_collapse=action)
    monkeypatch.setattr(tiny_training, "Trainer", FailsOnce)
    trainer = tiny_training.make_trainer(
        tiny_model("vit"), tmp_path, max_steps=14, save_steps=2, learning_rate=3e-3,
        logging_steps=1, callbacks=[monitor],
    )  # fmt: skip
    trainer.train()
    trainer.save_state()
    found = judge(read_run(tmp_path))
    if action == "warn":
        assert found.state == "failed" and found.divergence_step == 9
        return
    assert found.state != "failed" and "after 1 rollback" in found.headline, found.headline
    assert "Alarm at step 9" in text(found) and "went back to step 8" in text(found)
    # An attempt that was left does not count, though its checkpoints went further.
    (tmp_path / "trainer_state.json").unlink()
    left = json.loads((tmp_path / "checkpoint-8" / "trainer_state.json").read_text())
    (tmp_path / "checkpoint-99").mkdir()
    lost = [{"step": step, "loss": 99.0} for step in range(9, 100)]
    left |= {"global_step": 99, "log_history": [*left["log_history"], *lost]}
    (tmp_path / "checkpoint-99" / "trainer_state.json").write_text(json.dumps(left))
    assert judge(read_run(tmp_path)).state != "failed" and read_run(tmp_path).num_steps == 14


def test_accuracies_of_evaluations_that_came_after_the_state_was_saved(tmp_path):
    folder = write_run(tmp_path / "run", way(2.3, 0.5, 100))
    state = json.loads((folder / "trainer_state.json").read_text())
    state["log_history"] = [r for r in state["log_history"] if "eval_loss" not in r]
    (folder / "trainer_state.json").write_text(json.dumps(state))
    assert summarise(read_run(folder)).accuracy is None
    results = {"eval_accuracy": 0.875, "eval_loss": 0.4, "epoch": 3.0}
    (folder / "all_results.json").write_text(json.dumps(results | {"train_loss": 1.0}))
    run = read_run(folder)
    assert summarise(run).accuracy == 0.875 and run.logged("eval_loss") == [(100, 0.4)]
    assert not run.logged("train_loss")
    # The evaluation's own file goes first; what is damaged is said.
    (folder / "eval_results.json").write_text(json.dumps({"eval_accuracy": 0.9}))
    assert summarise(read_run(folder)).accuracy == 0.9
    (folder / "eval_results.json").write_text("{")
    run = read_run(folder)
    assert summarise(run).accuracy == 0.875
    assert any("eval_results.json is damaged" in note for note in run.notes)


def test_levels_are_told_from_noise():
    draw = random.Random(1)
    losses = [2.3 + draw.gauss(0, 0.2) for _ in range(400)]
    flat = course_of(losses)
    assert not flat.moved and not flat.moves_late and not flat.broke_out
    assert flat.noise == pytest.approx(0.2, rel=0.2)
    falling = course_of([loss - 0.003 * i for i, loss in enumerate(losses)])
    assert falling.moved and falling.moves_late
    early = course_of([loss - min(1.0, 0.05 * i) for i, loss in enumerate(losses)])
    assert early.moved and not early.moves_late
    assert course_of([*losses[:200], *[9.0] * 10, *losses[210:]]).broke_out
    assert course_of([1.0]) is None and course_of([1.0, math.nan]) is None
    # Of a few records the noise is that around their neighbours.
    assert course_of([5, 4, 3, 2, 1]).noise == 0
    assert 0.05 < course_of(losses[:12]).noise < 0.6


def test_where_a_few_records_are_lost():
    assert find_loss_of_course([6.8, 5.0, 4.0, 3.9]) is None
    assert find_loss_of_course([6.8, 5.0, 4.0, 6.9]) == 3
    assert find_loss_of_course([6.8, 5.0, 4.0, 4.5]) is None  # a part of it is not all
    assert find_loss_of_course([2.0]) is None
