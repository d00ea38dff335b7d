"""The batch that did it: kept, identified, measured by sample, skipped, at no cost to a run."""

from __future__ import annotations

import json
import math
import stat
from pathlib import Path

import pytest
import torch
from gloo_ranks import run_ranks
from safetensors import safe_open
from tiny_models import tiny_model
from tiny_training import Interrupt, dataset, dropout_model, make_trainer, same_state
from torch.utils.data import IterableDataset
from transformers import Trainer, TrainerCallback

from hf_stable import StabilityCallback
from hf_stable._file_names import BATCH_FOLDER, BATCH_KEY
from hf_stable.monitor.alarms import Alarm
from hf_stable.monitor.batches import files as batch_files
from hf_stable.monitor.batches.suspects import suspicious_steps
from hf_stable.monitor.log_file import read_log

SIZE, BAD = 96, 37


def poisoned(model, bad=(BAD,), size=SIZE):
    """Samples of which one has an infinite pixel: no loss is finite with it."""
    samples = dataset(model, size)
    for number in bad:
        samples[number]["pixel_values"][0, 0, 0] = math.inf
    return samples


def watched(folder, *, bad=(BAD,), callbacks=(), model=None, **options):
    own = {k.removeprefix("monitor_"): v for k, v in options.items() if k.startswith("monitor_")}
    rest = {k: v for k, v in options.items() if not k.startswith("monitor_")}
    monitor = StabilityCallback(every=50, **own)
    if own.get("on_collapse") == "stop":  # nothing is gone back to
        rest = {"save_strategy": "no"} | rest
    trainer = make_trainer(
        dropout_model("vit") if model is None else model, folder, callbacks=[monitor, *callbacks],
        **(dict(max_steps=12, lr_scheduler_type="constant", learning_rate=1e-3) | rest),
    )  # fmt: skip
    trainer.train_dataset = poisoned(trainer.model, bad)
    return trainer, monitor


def kept_in(folder):
    """What each file of a run says of itself, and its tensors, in the order of their names."""
    found = []
    for path in sorted(Path(folder, BATCH_FOLDER).iterdir()):
        with safe_open(path, "pt") as file:
            about = json.loads(file.metadata()[BATCH_KEY])
            found.append((about, {key: file.get_tensor(key) for key in file.keys()}))  # noqa: SIM118
    return found


def events(folder, event):
    return [line for line in read_log(folder) if line["event"] == event]


@pytest.mark.parametrize("keep", ["auto", 3])
def test_the_batch_of_an_alarm_is_kept_with_the_loss_of_each_sample(keep, tmp_path):
    trainer, _ = watched(
        tmp_path, monitor_keep_batches=keep, monitor_on_collapse="stop",
        gradient_accumulation_steps=2, per_device_train_batch_size=4,
    )  # fmt: skip
    trainer.train()
    (alarm,) = events(tmp_path, "alarm")
    (line,) = events(tmp_path, "batches")
    step = alarm["step"]
    assert line["kind"] == "nonfinite" and line["steps"] == [max(1, step - 1), step]
    found = kept_in(tmp_path)
    assert len(found) == len(line["files"]) == (3 if keep == 3 else 4)
    modes = {stat.S_IMODE(path.stat().st_mode) for path in (tmp_path / BATCH_FOLDER).iterdir()}
    assert modes == {0o600}
    guilty = [about for about, _ in found if BAD in about["positions"]]
    assert [(about["step"], about["rank"]) for about in guilty] == [(step, 0)]
    model = trainer.model.eval()  # its weights are still those of the alarm
    for about, tensors in found:
        samples = [trainer.train_dataset[position] for position in about["positions"]]
        for key, tensor in tensors.items():
            assert torch.equal(tensor, torch.stack([sample[key] for sample in samples]))
        for sample, loss in zip(samples, about["sample_losses"], strict=True):
            with torch.no_grad():
                expected = model(**{k: v[None] for k, v in sample.items()}).loss.item()
            assert loss == (expected if math.isfinite(expected) else None)
        assert about["sample_losses"].count(None) == about["positions"].count(BAD)


def test_nothing_is_written_unless_it_is_asked_for(tmp_path):
    trainer, _ = watched(tmp_path, monitor_on_collapse="stop")
    trainer.train()
    assert events(tmp_path, "alarm") and not events(tmp_path, "batches")
    assert not (tmp_path / BATCH_FOLDER).exists()


class DrawsRandomNumbers(TrainerCallback):
    """Moves the model's buffers and every random number at each forward, as some models do."""

    def on_train_begin(self, args, state, control, model=None, **kwargs):
        if not hasattr(model, "forwards"):
            model.register_buffer("forwards", torch.zeros(()), persistent=False)
        model.register_forward_pre_hook(self.move)

    @staticmethod
    def move(module, args):
        module.forwards += 1
        torch.rand(())


@pytest.mark.parametrize("bad", [(), (BAD,)], ids=["no alarm", "alarm"])
def test_a_run_is_the_same_bit_for_bit_whether_batches_are_kept(bad, tmp_path):
    runs = []
    for keep in (0, "auto", 2):
        trainer, monitor = watched(
            tmp_path / str(keep), bad=bad, callbacks=[DrawsRandomNumbers()],
            monitor_keep_batches=keep, monitor_on_collapse="rollback", monitor_skip_batches=True,
        )  # fmt: skip
        trainer.train()
        losses = [record["loss"] for record in trainer.state.log_history if "loss" in record]
        runs.append((trainer.model, losses, float(trainer.model.forwards), torch.rand(3).tolist()))
        # Every run with an alarm went back, and only those that keep batches measured them.
        assert monitor.rollbacks.count == len(bad)
        assert len(events(tmp_path / str(keep), "batches")) == (len(bad) if keep else 0)
    for model, *rest in runs[1:]:
        assert same_state(model, runs[0][0]) and rest == list(runs[0][1:])
    assert runs[0][2] > 0


def bad_step(folder):
    return events(folder, "alarm")[0]["step"]


class LeavesOut(TrainerCallback):
    """Leaves the gradients of some steps out, by hand."""

    def __init__(self, steps):
        self.steps = steps

    def on_pre_optimizer_step(self, args, state, control, model=None, **kwargs):
        if state.global_step + 1 in self.steps:
            for parameter in model.parameters():
                parameter.grad = None


def skipping(folder, **options):
    """A run that goes back and skips; its model draws no random numbers, so steps compare."""
    return watched(
        folder, model=tiny_model("vit"), monitor_on_collapse="rollback", monitor_skip_batches=True,
        monitor_rollback_lr_factor=1.0, **options,
    )  # fmt: skip


def test_suspicious_batches_are_skipped_after_going_back(tmp_path, capsys):
    trainer, monitor = skipping(tmp_path / "skips", monitor_keep_batches="auto")
    trainer.train()
    step = bad_step(tmp_path / "skips")
    skipped = [max(1, step - 1), step]
    (back,) = events(tmp_path / "skips", "rollback")
    assert back["to_step"] < skipped[0] and back["skips"] == skipped
    assert [line["step"] for line in events(tmp_path / "skips", "skip")] == skipped
    assert trainer.state.global_step == 12 and monitor.rollbacks.count == 1
    said = capsys.readouterr().err
    assert f"without the batches of steps {skipped[0]}, {skipped[1]}" in said

    by_hand = make_trainer(
        tiny_model("vit"), tmp_path / "hand", max_steps=12, lr_scheduler_type="constant",
        learning_rate=1e-3,
        callbacks=[LeavesOut(skipped)],
    )  # fmt: skip
    by_hand.train_dataset = poisoned(by_hand.model)
    by_hand.train()
    assert same_state(trainer.model, by_hand.model)

    # Without skipping it comes to the same batch again and again.
    gives_up, monitor = watched(
        tmp_path / "again", model=tiny_model("vit"), monitor_on_collapse="rollback"
    )
    gives_up.train()
    assert monitor.rollbacks.count == 3 and gives_up.state.global_step < 12
    assert not events(tmp_path / "again", "skip")


class WeighsBrightImages(Trainer):
    """A loss that is five times as large where a batch holds an image that is too bright."""

    def compute_loss(self, model, inputs, *args, **kwargs):
        loss = super().compute_loss(model, inputs, *args, **kwargs)
        return loss * 5 if inputs["pixel_values"].max() > 100 else loss


def test_the_batches_of_a_spike_are_found_and_skipped(tmp_path):
    """Three batches, one after the other, with an image each that is too bright."""
    trainer, _ = skipping(
        tmp_path, bad=(), max_steps=45, save_steps=10, per_device_train_batch_size=4,
        train_sampling_strategy="sequential", learning_rate=1e-4, monitor_keep_batches="auto",
        trainer_class=WeighsBrightImages,
    )  # fmt: skip
    trainer.train_dataset = dataset(trainer.model, 200)
    bright = [31 * 4 + 2, 32 * 4 + 1, 33 * 4]  # in steps 32, 33 and 34
    for number in bright:
        trainer.train_dataset[number]["pixel_values"] *= 1000
    trainer.train()
    (alarm,) = events(tmp_path, "alarm")
    assert (alarm["kind"], alarm["step"]) == ("spike", 34)
    (line,) = events(tmp_path, "batches")
    assert line["steps"] == [31, 32, 33, 34] == [e["step"] for e in events(tmp_path, "skip")]
    samples = {
        position: loss
        for about, _ in kept_in(tmp_path)
        for position, loss in zip(about["positions"], about["sample_losses"], strict=True)
    }
    assert sorted(samples, key=samples.__getitem__)[-3:] == sorted(bright, key=samples.get)
    (back,) = events(tmp_path, "rollback")
    assert (back["to_step"], trainer.state.global_step) == (30, 45)


@pytest.mark.parametrize("ends_before", [pytest.param(0, marks=pytest.mark.slow), 2])
def test_a_resumed_run_skips_the_same_batches(ends_before, tmp_path):
    """It ends after going back, before the first or after the last step that is skipped."""
    whole, _ = skipping(tmp_path / "whole")
    whole.train()
    first = events(tmp_path / "whole", "skip")[0]["step"]

    class Dies(TrainerCallback):
        def on_step_begin(self, args, state, control, **kwargs):
            if monitor.rollbacks.count and state.global_step + 1 == first + ends_before:
                raise KeyboardInterrupt

    cut, monitor = skipping(tmp_path / "cut", callbacks=[Dies()])
    with pytest.raises(KeyboardInterrupt):
        cut.train()
    again, monitor = skipping(tmp_path / "cut")
    again.train(resume_from_checkpoint=True)
    assert monitor.rollbacks.skips == (first, first + 1)
    assert same_state(again.model, whole.model)
    assert [e["step"] for e in events(tmp_path / "cut", "skip")] == [first, first + 1]


class Stream(IterableDataset):
    """Samples of which nobody knows how many there are."""

    def __init__(self, samples):
        self.samples = samples

    def __iter__(self):
        return iter(self.samples)


def test_positions_of_a_stream_are_said_to_be_unknown(tmp_path):
    trainer, _ = watched(tmp_path, monitor_keep_batches="auto", monitor_on_collapse="stop")
    trainer.train_dataset = Stream(trainer.train_dataset)
    trainer.train()
    for about, tensors in kept_in(tmp_path):
        assert about["positions"] is None
        assert about["positions_unknown"] == "an IterableDataset has no positions"
        assert about["step"] and len(tensors["labels"]) == 8
    assert bad_step(tmp_path) == BAD // 8 + 1


@pytest.mark.parametrize("workers", [0, pytest.param(2, marks=pytest.mark.slow)])
def test_positions_after_a_resume_are_those_of_the_data(workers, tmp_path):
    """In the middle of an epoch, where the Trainer passes by what it has seen."""
    options = dict(
        per_device_train_batch_size=4, max_steps=30, save_steps=2, monitor_on_collapse="stop",
        dataloader_num_workers=workers, save_strategy="steps",
    )  # fmt: skip
    cut, _ = watched(tmp_path, bad=(), callbacks=[Interrupt(2)], **options)
    cut.train()
    order = torch.randperm(SIZE, generator=torch.Generator().manual_seed(cut.args.seed)).tolist()
    bad = order[4 * 4 + 1]  # the second sample of the fifth batch of the first epoch
    trainer, _ = watched(tmp_path, bad=(bad,), monitor_keep_batches="auto", **options)
    trainer.train(resume_from_checkpoint=True)
    assert bad_step(tmp_path) == 5
    found = {about["step"]: about["positions"] for about, _ in kept_in(tmp_path)}
    assert found == {4: order[12:16], 5: order[16:20]}


def test_files_are_bounded_and_it_is_said(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(batch_files, "MOST_FILES", 1)
    trainer, _ = watched(tmp_path, monitor_keep_batches=4, monitor_on_collapse="stop")
    trainer.train()
    (line,) = events(tmp_path, "batches")
    (kept,) = kept_in(tmp_path)
    assert BAD in kept[0]["positions"]  # the worst comes first
    assert len(line["files"]) == 1 and line["left_out"] == min(4, bad_step(tmp_path)) - 1
    assert f"{line['left_out']} more are left out" in capsys.readouterr().err


def test_a_new_run_keeps_what_the_last_one_wrote(tmp_path):
    for _ in range(2):
        trainer, _ = watched(tmp_path, monitor_keep_batches="auto", monitor_on_collapse="stop")
        trainer.train()
    names = sorted(path.name for path in tmp_path.glob(f"{BATCH_FOLDER}*"))
    assert names == [BATCH_FOLDER, f"{BATCH_FOLDER}-1"]


def test_a_loss_that_cannot_be_computed_by_sample_is_missing_with_a_reason(tmp_path):
    class NeedsWholeBatches(TrainerCallback):
        def on_train_begin(self, args, state, control, model=None, **kwargs):
            def refuse(module, given, options):
                if len(options["pixel_values"]) < 8:
                    raise ValueError("a batch of eight is needed")

            model.register_forward_pre_hook(refuse, with_kwargs=True)

    trainer, _ = watched(
        tmp_path, callbacks=[NeedsWholeBatches()], monitor_keep_batches="auto",
        monitor_on_collapse="stop",
    )  # fmt: skip
    trainer.train()
    assert trainer.model.training  # as it was, though a forward failed
    for about, tensors in kept_in(tmp_path):
        assert about["sample_losses"] is None and len(tensors["labels"]) == 8
        assert about["no_sample_losses"] == "ValueError: a batch of eight is needed"


def train_on_ranks(folder):
    trainer, monitor = watched(
        folder / "out", max_steps=6, per_device_train_batch_size=4, gradient_accumulation_steps=2,
        monitor_keep_batches="auto", monitor_on_collapse="rollback", monitor_skip_batches=True,
    )  # fmt: skip
    trainer.train()
    return {
        "step": trainer.state.global_step,
        "skips": list(monitor.rollbacks.skips),
        "rollbacks": monitor.rollbacks.count,
        "weights": dict(trainer.model.state_dict()),
    }


@pytest.mark.slow
def test_each_process_keeps_its_own_and_all_skip_the_same(tmp_path):
    first, second = run_ranks(train_on_ranks, 2, tmp_path)
    mine, theirs = first.pop("weights"), second.pop("weights")
    assert all(torch.equal(theirs[name], weight) for name, weight in mine.items())
    assert first == second and (first["step"], first["rollbacks"]) == (6, 1)
    (line,) = events(tmp_path / "out", "batches")
    assert first["skips"] == line["steps"] and line["left_out"] == 0
    found = kept_in(tmp_path / "out")
    assert len(line["files"]) == len(found) == 2 * 2 * len(line["steps"])
    samples = poisoned(tiny_model("vit"))
    guilty = []
    for about, tensors in found:
        own = torch.stack([samples[position]["pixel_values"] for position in about["positions"]])
        assert torch.equal(tensors["pixel_values"], own)
        if BAD in about["positions"]:
            guilty.append(about["step"])
            assert about["sample_losses"][about["positions"].index(BAD)] is None
    assert guilty == [line["steps"][-1]]
    everything = [position for about, _ in found for position in about["positions"]]
    assert len(set(everything)) == len(everything)  # no two processes have the same sample


def alarm(kind, step, threshold=math.inf):
    return Alarm(kind, step, "loss", 1.0, threshold, "")


def test_suspicious_are_the_bad_steps_and_the_one_before():
    recent = {5: 1.0, 6: 1.0, 7: 9.0, 8: 1.0, 9: 9.0, 10: 9.0}
    assert suspicious_steps([alarm("spike", 10, 3.0)], recent) == [6, 7, 8, 9, 10]
    assert suspicious_steps([alarm("nonfinite", 10)], {9: 1.0, 10: math.nan}) == [9, 10]
    assert suspicious_steps([alarm("nonfinite", 1)], {1: math.inf}) == [1]
    assert suspicious_steps([alarm("collapse", 10, 3.0)], recent) == []
    assert suspicious_steps([], recent) == []


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"keep_batches": -1}, "keep_batches is a number of micro-batches, 0 for none"),
        ({"keep_batches": True}, "keep_batches is a number of micro-batches"),
        ({"keep_batches": "all"}, "got 'all'"),
        ({"skip_batches": "yes"}, "skip_batches is True or False, got 'yes'"),
        ({"skip_batches": True}, "it needs on_collapse=\"rollback\", got 'warn'"),
        ({"on_collapse": "rollback", "rollback_lr_factor": 1.0}, "with skip_batches=True it may"),
    ],
)
def test_bad_values_are_refused_at_once(options, message):
    with pytest.raises(ValueError, match=message):
        StabilityCallback(**options)


@pytest.mark.parametrize(
    ("argument", "message"),
    [
        ("ignore_data_skip", "knows batches by their steps"),
        ("fp16", "which fp16's scaler cannot: leave skip_batches out, or train in bf16"),
        ("deepspeed", "which DeepSpeed, which steps within its backward, cannot: leave"),
    ],
)
def test_skipping_is_refused_where_steps_cannot_be_left_out(argument, message, tmp_path):
    trainer, monitor = skipping(tmp_path)
    setattr(trainer.args, argument, True)  # as it would be: not every machine can have it
    with pytest.raises(ValueError, match=message):
        monitor.on_train_begin(trainer.args, trainer.state, trainer.control, model=trainer.model)
