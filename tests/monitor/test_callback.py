"""StabilityCallback in real Trainers: what it records, that it changes nothing, what it does."""

from __future__ import annotations

import json
import math
import shutil
import warnings

import pytest
import tiny_training
import torch
from tiny_models import tiny_batch, tiny_model
from tiny_training import Interrupt, dropout_model, losses, make_trainer, same_state
from transformers import Trainer, TrainerCallback
from transformers.integrations import TensorBoardCallback

import hf_stable
from hf_stable import StabilityCallback
from hf_stable.monitor.alarms import Thresholds
from hf_stable.monitor.log_file import FILE_NAME, read_log


@pytest.fixture
def said(capsys):
    """What the monitor has said since it was last asked, line by line."""
    return lambda: [line for line in capsys.readouterr().err.splitlines() if "hf-stable:" in line]


def test_nothing_is_said_of_a_run_in_which_nothing_happens(said, tmp_path):
    trained(tiny_model("vit"), tmp_path)
    assert said() == []


def events(folder, event):
    return [line for line in read_log(folder) if line["event"] == event]


def monitored(model, folder, *, every=1, callbacks=(), **options):
    """A trainer with a monitor; options of the monitor go by the prefix `monitor_`."""
    own = {k.removeprefix("monitor_"): v for k, v in options.items() if k.startswith("monitor_")}
    rest = {k: v for k, v in options.items() if not k.startswith("monitor_")}
    monitor = StabilityCallback(every=every, **own)
    return make_trainer(model, folder, callbacks=[monitor, *callbacks], **rest), monitor


def trained(model, folder, **options):
    trainer, monitor = monitored(model, folder, **options)
    trainer.train()
    return trainer, monitor


class Diverges(Trainer):
    """A loss that turns NaN from a step on while the rate is above a bound."""

    first_bad_step = 5
    bearable_rate = 0.0

    def __init__(self, *args, **kwargs):
        super().__init__(*args, **kwargs)
        self.seen = []

    def compute_loss(self, model, inputs, *args, **kwargs):
        step = self.state.global_step + 1
        self.seen.append((step, float(sum(value.double().sum() for value in inputs.values()))))
        loss = super().compute_loss(model, inputs, *args, **kwargs)
        rate = self.optimizer.param_groups[0]["lr"]
        if step >= self.first_bad_step and rate > self.bearable_rate:
            return loss * math.nan
        return loss


def diverging(model, folder, monitor, monkeypatch, **options):
    import tiny_training

    monkeypatch.setattr(tiny_training, "Trainer", Diverges)
    settings = dict(max_steps=8, lr_scheduler_type="constant", save_total_limit=None)
    return make_trainer(model, folder, callbacks=[monitor], **(settings | options))


# What is recorded


def test_values_stand_in_the_record_of_their_step(model_type, tmp_path):
    trainer, _ = trained(tiny_model(model_type), tmp_path, every=3, save_strategy="no")
    records = {r["step"]: r for r in trainer.state.log_history if "loss" in r}
    with_values = {s for s, r in records.items() if "stability/entropy/min" in r}
    assert with_values == {1, 2, 3, 6}  # every 3, and 1, 2, 4, ... before the first of these
    assert [line["step"] for line in events(tmp_path, "probe")] == [1, 2, 3, 6]
    for line in events(tmp_path, "probe"):
        record = records[line["step"]]
        heads = [h for layer in line["quantities"]["entropy"].values() for h in layer]
        assert record["stability/entropy/min"] == min(heads)
        assert line["loss"] == pytest.approx(record["loss"], abs=1e-4)  # logged rounded
        assert record["stability/alarms"] == record["stability/nonfinite_steps"] == 0


def test_what_is_recorded_is_what_a_probe_of_that_step_measures(tmp_path):
    model = tiny_model("vit")
    batch = tiny_batch(model, size=40, seed=1)
    with hf_stable.probe(model, queries="all", terms="default") as records:
        model(**batch).loss.backward()
    model.zero_grad()
    trained(
        model, tmp_path, monitor_queries="all", per_device_train_batch_size=40, max_steps=1,
        save_strategy="no",
    )  # fmt: skip
    (line,) = events(tmp_path, "probe")
    expected = records.to_dict()
    assert line["quantities"].keys() == expected.keys()
    for layer, heads in expected["entropy"].items():  # over the whole data, whatever the order
        assert line["quantities"]["entropy"][layer] == pytest.approx(heads, rel=1e-5)
    assert line["quantities"]["sigma_qk"] == expected["sigma_qk"]


def test_the_run_is_the_same_bit_for_bit_with_and_without_it(model_type, tmp_path):
    watched, _ = trained(
        dropout_model(model_type), tmp_path / "watched", monitor_queries=3,
        monitor_terms="all", monitor_maps=True, monitor_on_collapse="stop",
    )  # fmt: skip
    alone = make_trainer(dropout_model(model_type), tmp_path / "alone")
    alone.train()
    assert losses(watched) == losses(alone) and same_state(watched.model, alone.model)
    assert len(events(tmp_path / "watched", "probe")) == 6
    assert not events(tmp_path / "watched", "alarm")
    other = make_trainer(dropout_model(model_type), tmp_path / "other", seed=4)
    other.train()
    assert losses(other) != losses(alone)


def test_every_line_is_on_disk_before_the_next_step(tmp_path):
    class Reader(TrainerCallback):
        seen = []

        def on_step_begin(self, args, state, control, **kwargs):
            self.seen.append([line["step"] for line in read_log(args.output_dir)])

    trained(tiny_model("vit"), tmp_path, callbacks=[Reader()], max_steps=3)
    assert Reader.seen == [[], [1], [1, 2]]


@pytest.mark.parametrize("log_layers", [False, True])
def test_layers_are_logged_on_request_and_always_in_the_file(log_layers, tmp_path):
    trainer, _ = trained(tiny_model("gpt2"), tmp_path, monitor_log_layers=log_layers, max_steps=1)
    record = next(r for r in trainer.state.log_history if "loss" in r)
    assert ("stability/entropy/0" in record) == ("stability/entropy/1" in record) == log_layers
    (line,) = events(tmp_path, "probe")
    assert len(line["quantities"]["entropy"]) == 2
    if log_layers:
        for index, heads in enumerate(line["quantities"]["entropy"].values()):
            assert record[f"stability/entropy/{index}"] == min(heads)


def test_gamma_and_effective_rates_are_recorded(tmp_path):
    model = hf_stable.patch(tiny_model("vit"), "sigma_reparam")
    trainer, _ = trained(model, tmp_path, optim="adamw2", optim_args="tau=0.004", max_steps=3)
    (*_, last) = events(tmp_path, "probe")
    rates = trainer.optimizer.optimizer.effective_lr()
    assert last["effective_lr"] == rates and len(rates) == len(list(model.parameters()))
    record = [r for r in trainer.state.log_history if "loss" in r][-1]
    assert 0 < record["stability/clipped_share"] <= 1
    flat = [x for rate in rates.values() for x in (rate if isinstance(rate, list) else [rate])]
    assert record["stability/effective_lr/min"] == min(flat)
    gammas = {name: p.tolist() for name, p in model.named_parameters() if name.endswith("gamma")}
    assert list(last["quantities"]["gamma"].values()) == list(gammas.values())
    plain, _ = trained(tiny_model("vit"), tmp_path / "plain", max_steps=1)
    keys = {key for record in plain.state.log_history for key in record}
    assert not any("gamma/" in k and "norm" not in k or "effective_lr" in k for k in keys)


def test_one_probe_and_one_loss_for_all_micro_batches_of_a_step(tmp_path):
    trainer, _ = trained(
        tiny_model("gpt2"), tmp_path, per_device_train_batch_size=4,
        gradient_accumulation_steps=4, max_steps=2,
    )  # fmt: skip
    lines = events(tmp_path, "probe")
    assert [line["step"] for line in lines] == [1, 2]
    logged = [r["loss"] for r in trainer.state.log_history if "loss" in r]
    assert [line["loss"] for line in lines] == pytest.approx(logged, abs=1e-4)


def test_evaluation_and_generation_are_not_probed(tmp_path):
    class Generates(TrainerCallback):
        def on_evaluate(self, args, state, control, model=None, **kwargs):
            model.generate(torch.ones(1, 2, dtype=torch.long), max_new_tokens=2)

    watched, _ = trained(
        tiny_model("gpt2"), tmp_path / "with", callbacks=[Generates()],
        eval_strategy="steps", eval_steps=1, max_steps=3,
    )  # fmt: skip
    trained(tiny_model("gpt2"), tmp_path / "without", max_steps=3)
    with_eval, without = (events(tmp_path / name, "probe") for name in ("with", "without"))
    assert with_eval == without
    assert sum("eval_loss" in record for record in watched.state.log_history) == 3


def test_sharpness_is_measured_when_asked_for(tmp_path):
    trainer, _ = trained(
        tiny_model("vit"), tmp_path, every=4, monitor_sharpness_every=2, max_steps=4
    )
    lines = {line["step"]: line for line in events(tmp_path, "probe")}
    assert [step for step, line in lines.items() if "sharpness" in line] == [2, 4]
    assert lines[4]["sharpness"] > 0
    assert (
        lines[4]["sharpness_threshold"] > lines[2]["sharpness_threshold"] > 0
    )  # as the rate falls
    alone = make_trainer(tiny_model("vit"), tmp_path / "alone", max_steps=4)
    alone.train()
    assert losses(alone) == losses(trainer)


def sharpness_at(folder, step=2):
    return next(line for line in events(folder, "probe") if line["step"] == step)


@pytest.mark.parametrize("how", ["reentrant", "new", "smoothed"])
def test_sharpness_is_of_the_loss_that_is_trained_on(how, tmp_path):
    options = {
        "reentrant": dict(gradient_checkpointing=True,
                          gradient_checkpointing_kwargs={"use_reentrant": True}),
        "new": dict(gradient_checkpointing=True),
        "smoothed": dict(label_smoothing_factor=0.5),
    }[how]  # fmt: skip
    settings = dict(every=2, monitor_sharpness_every=2, max_steps=2, save_strategy="no")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", FutureWarning)  # the old name of checkpointing
        trainer, _ = trained(tiny_model("gpt2"), tmp_path / how, **settings, **options)
    trained(tiny_model("gpt2"), tmp_path / "plain", **settings)
    got, plain = (sharpness_at(tmp_path / name)["sharpness"] for name in (how, "plain"))
    if how == "smoothed":
        assert abs(got / plain - 1) > 0.05
    else:
        assert got == pytest.approx(plain, rel=1e-3)
        assert any(getattr(m, "gradient_checkpointing", False) for m in trainer.model.modules())


def test_sharpness_is_preconditioned_though_a_parameter_is_not_used(tmp_path):
    settings = dict(every=2, monitor_sharpness_every=2, max_steps=2, save_strategy="no")
    trained(tiny_model("vit"), tmp_path / "all", **settings)
    model = tiny_model("vit")
    model.register_parameter("unused", torch.nn.Parameter(torch.ones(3)))
    trainer, _ = trained(model, tmp_path / "unused", **settings)
    found, expected = (sharpness_at(tmp_path / name) for name in ("unused", "all"))
    assert found["sharpness"] == expected["sharpness"]
    assert found["sharpness_threshold"] == expected["sharpness_threshold"]
    assert found["sharpness_preconditioned"] is True
    trained(tiny_model("vit"), tmp_path / "sgd", optim="sgd", **settings)
    plain = sharpness_at(tmp_path / "sgd")
    assert plain["sharpness_preconditioned"] is False
    assert plain["sharpness_threshold"] == pytest.approx(expected["sharpness_threshold"] / 19)
    record = next(r for r in trainer.state.log_history if "stability/sharpness" in r)
    assert record["stability/sharpness_preconditioned"] == 1


def test_sharpness_of_sharded_weights_is_refused_at_the_start(tmp_path):
    trainer, monitor = monitored(tiny_model("vit"), tmp_path, monitor_sharpness_every=2)
    trainer.args.fsdp = True  # as it would be; nothing is sharded on one process
    with pytest.raises(ValueError, match="FSDP and DeepSpeed shard them"):
        monitor.on_train_begin(trainer.args, trainer.state, trainer.control, model=trainer.model)


# Trackers


def test_tensorboard_gets_the_values_at_the_step_of_the_loss(tmp_path, monkeypatch):
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    monkeypatch.setenv("TENSORBOARD_LOGGING_DIR", str(tmp_path / "board"))
    trainer, _ = trained(
        tiny_model("vit"), tmp_path / "out", every=2, report_to="tensorboard", max_steps=4
    )
    board = EventAccumulator(str(tmp_path / "board")).Reload()
    steps = {tag: [e.step for e in board.Scalars(tag)] for tag in board.Tags()["scalars"]}
    assert steps["train/loss"] == [1, 2, 3, 4]
    assert steps["train/stability/entropy/min"] == [1, 2, 4]
    logged = [r["stability/entropy/min"] for r in trainer.state.log_history if
              "stability/entropy/min" in r]  # fmt: skip
    stored = [e.value for e in board.Scalars("train/stability/entropy/min")]
    assert stored == pytest.approx(logged, rel=1e-6)


def test_a_tracker_that_fails_is_left_out_with_one_warning(tmp_path, monkeypatch):
    monkeypatch.setenv("TENSORBOARD_LOGGING_DIR", str(tmp_path / "board"))

    class After(TrainerCallback):
        seen = []

        def on_log(self, args, state, control, logs=None, **kwargs):
            self.seen.append("stability/entropy/min" in logs)

    trainer, _ = monitored(
        tiny_model("vit"), tmp_path / "out", report_to="tensorboard", max_steps=3,
        callbacks=[After()],
    )  # fmt: skip
    callbacks = trainer.callback_handler.callbacks
    tracker = next(callback for callback in callbacks if isinstance(callback, TensorBoardCallback))
    monkeypatch.setattr(TensorBoardCallback, "on_log", _failing_on_log)
    with pytest.warns(UserWarning, match="TensorBoardCallback failed at step 1.*disk full") as seen:
        trainer.train()
    assert sum("failed at step" in str(w.message) for w in seen) == 1
    assert trainer.state.global_step == 3 and After.seen[:3] == [True] * 3
    assert tracker not in trainer.callback_handler.callbacks


def test_every_tracker_that_fails_is_left_out_at_any_step(tmp_path, monkeypatch):
    monkeypatch.setenv("TENSORBOARD_LOGGING_DIR", str(tmp_path / "board"))

    class SecondTracker(TensorBoardCallback):
        __module__ = TensorBoardCallback.__module__

    def failing_from_step_3(self, args, state, control, logs=None, **kwargs):
        if state.global_step >= 3:
            raise OSError("disk full")

    monkeypatch.setattr(TensorBoardCallback, "on_log", failing_from_step_3)
    trainer, _ = monitored(
        tiny_model("vit"), tmp_path / "out", every=50, report_to="tensorboard", max_steps=5,
        callbacks=[SecondTracker()], save_strategy="no",
    )  # fmt: skip
    with pytest.warns(UserWarning, match="SecondTracker failed at step 3") as seen:
        trainer.train()
    assert sum("failed at step 3" in str(w.message) for w in seen) == 2
    assert sorted(losses(trainer)) == [1, 2, 3, 4, 5]
    records = [r for r in trainer.state.log_history if "stability/entropy/min" in r]
    assert 3 not in [record["step"] for record in records]  # it failed where nothing was probed
    alone = make_trainer(tiny_model("vit"), tmp_path / "alone", report_to="tensorboard")
    with pytest.raises(OSError, match="disk full"):
        alone.train()  # no business of ours without a monitor


def _failing_on_log(self, args, state, control, logs=None, **kwargs):
    raise OSError("disk full")


# Resuming


def test_a_resumed_run_writes_and_alarms_like_one_that_never_stopped(said, tmp_path):
    # Whatever the loss does is a spike here once there is a window to tell it from.
    touchy = Thresholds(spike=-1.0, spike_score=-1e9, rise=0.0, rise_score=0.0)
    options = dict(monitor_thresholds=touchy, every=2, save_steps=10, max_steps=30,
                   learning_rate=0.5)  # fmt: skip
    model = dropout_model("gpt2")
    _, whole = trained(model, tmp_path / "whole", **options)
    assert any("spike at step" in line for line in said())
    trained(dropout_model("gpt2"), tmp_path / "parts", callbacks=[Interrupt(23)], **options)
    before = len(read_log(tmp_path / "parts"))
    resumed, monitor = monitored(dropout_model("gpt2"), tmp_path / "parts", **options)
    resumed.train(resume_from_checkpoint=str(tmp_path / "parts" / "checkpoint-20"))
    first, second = (
        (tmp_path / name / FILE_NAME).read_text().splitlines() for name in ("parts", "whole")
    )
    assert first[:-1] == second[:-1]
    ends = [json.loads(lines[-1]) for lines in (first, second)]  # each has taken a time of its own
    assert all(end["event"] == "end" and end.pop("seconds") >= 0 for end in ends)
    assert ends[0] == ends[1]
    assert monitor.state()["attributes"] == whole.state()["attributes"]
    assert 0 < before < len(read_log(tmp_path / "parts"))
    assert max(alarm["step"] for alarm in events(tmp_path / "parts", "alarm")) > 20


def test_a_new_run_keeps_what_the_last_one_wrote(tmp_path):
    trained(tiny_model("vit"), tmp_path, max_steps=1)
    old = (tmp_path / FILE_NAME).read_text()
    trained(tiny_model("vit"), tmp_path, max_steps=2)
    assert (tmp_path / "stability-1.jsonl").read_text() == old
    assert len(events(tmp_path, "probe")) == 2


# Alarms and what is done about them


def test_steps_that_are_not_finite_are_counted_though_the_trainer_hides_them(
    said, tmp_path, monkeypatch
):
    trainer = diverging(tiny_model("vit"), tmp_path, StabilityCallback(every=1), monkeypatch)
    trainer.train()
    (line,) = said()  # once per event, as a line and no more
    assert line.startswith("hf-stable: nonfinite at step 5: the loss is not finite (loss nan")
    logged = [r["loss"] for r in trainer.state.log_history if "loss" in r]
    assert all(map(math.isfinite, logged))  # logging_nan_inf_filter
    counts = [line["nonfinite_steps"] for line in events(tmp_path, "probe")]
    assert counts == [0, 0, 0, 0, 1, 2, 3, 4]
    (alarm,) = events(tmp_path, "alarm")
    assert alarm["kind"] == "nonfinite" and "resume" in alarm["advice"]


def test_stop_ends_training_before_the_weights_are_spoilt(said, tmp_path, monkeypatch):
    monitor = StabilityCallback(every=50, on_collapse="stop")
    trainer = diverging(tiny_model("vit"), tmp_path, monitor, monkeypatch)
    trainer.train()
    assert "nonfinite at step 5" in said()[0]
    assert trainer.state.global_step == 5
    (stop,) = events(tmp_path, "stop")
    assert stop["step"] == 5 and stop["reason"] == "on_collapse='stop', nonfinite"
    assert all(p.isfinite().all() for p in trainer.model.parameters())
    warned = diverging(tiny_model("vit"), tmp_path / "w", StabilityCallback(every=50), monkeypatch)
    warned.train()
    assert not all(p.isfinite().all() for p in warned.model.parameters())


@pytest.mark.parametrize("max_grad_norm", [1.0, 0.0])
def test_one_infinite_gradient_is_seen_in_its_step(max_grad_norm, said, tmp_path):
    def trained_with_overflow(on_collapse):
        model = tiny_model("vit")
        trainer, _ = monitored(
            model, tmp_path / on_collapse, every=50, monitor_on_collapse=on_collapse,
            save_strategy="no", max_grad_norm=max_grad_norm,
        )  # fmt: skip

        def overflow(gradient):
            gradient = gradient.clone()
            if trainer.state.global_step + 1 == 5:  # a step that is not probed
                gradient[0, 0] = math.inf
            return gradient

        model.vit.layers[0].mlp.fc1.weight.register_hook(overflow)
        trainer.train()
        assert "nonfinite at step 5: the gradient is not finite" in said()[0]
        return trainer

    stopped = trained_with_overflow("stop")
    assert stopped.state.global_step == 5
    assert all(p.isfinite().all() for p in stopped.model.parameters())
    warned = trained_with_overflow("warn")
    assert not all(p.isfinite().all() for p in warned.model.parameters())


def test_an_exception_within_a_probed_step_leaves_the_model_as_it_was(tmp_path):
    model = tiny_model("vit")
    trainer, _ = monitored(model, tmp_path / "cut", every=3, max_steps=1)
    original = trainer.compute_loss
    before = hooks_of(model)
    inside = []

    def interrupted(*args, **kwargs):
        inside.append((model.config._attn_implementation, hooks_of(model)))
        raise KeyboardInterrupt

    trainer.compute_loss = interrupted
    with pytest.raises(KeyboardInterrupt):
        trainer.train()
    ((attention, hooks),) = inside
    assert attention.startswith("hf_stable_probe") and hooks > before  # it was being probed
    assert model.config._attn_implementation == "sdpa" and hooks_of(model) == before
    assert compiles()
    trainer.compute_loss = original
    trainer.train()
    trained(model, tmp_path / "next", max_steps=1)


def hooks_of(model):
    return sum(len(m._forward_hooks) + len(m._forward_pre_hooks) for m in model.modules())


def compiles():
    """Whether torch.compile does anything: not under the stance that a probe takes."""
    graphs = []

    def backend(graph, inputs):
        graphs.append(graph)
        return graph.forward

    torch.compile(lambda x: x + 1, backend=backend)(torch.ones(1))
    return bool(graphs)


def test_checkpoint_saves_at_once(tmp_path, monkeypatch):
    monitor = StabilityCallback(on_collapse="checkpoint")
    trainer = diverging(tiny_model("vit"), tmp_path, monitor, monkeypatch, save_steps=100)
    trainer.train()
    assert (tmp_path / "checkpoint-5" / "trainer_state.json").exists()


def test_a_function_is_called_with_alarm_and_control(tmp_path, monkeypatch):
    calls = []

    def act(alarm, control):
        calls.append(alarm)
        control.should_training_stop = True

    trainer = diverging(
        tiny_model("vit"), tmp_path, StabilityCallback(on_collapse=act), monkeypatch
    )
    trainer.train()
    assert [(a.kind, a.step) for a in calls] == [("nonfinite", 5)]
    assert trainer.state.global_step == 5


def test_rollback_resumes_twice_with_lower_rates_and_the_same_data(said, tmp_path, monkeypatch):
    monkeypatch.setattr(Diverges, "bearable_rate", 0.3e-2)
    monitor = StabilityCallback(every=1, on_collapse="rollback")
    trainer = diverging(
        dropout_model("vit"), tmp_path, monitor, monkeypatch, save_steps=2, learning_rate=1e-2
    )
    trainer.train()
    assert any("rollback 2 of at most 3: resuming from step 4 with 0.25" in x for x in said())
    assert trainer.state.global_step == 8
    assert all(p.isfinite().all() for p in trainer.model.parameters())
    # Step 5 is taken three times, on the same data; 1e-2, then half, then a quarter of it.
    inputs = [content for step, content in trainer.seen if step == 5]
    assert len(inputs) == 3 and len(set(inputs)) == 1
    assert len({content for _, content in trainer.seen}) > 3
    rates = {r["step"]: r["learning_rate"] for r in trainer.state.log_history if "loss" in r}
    assert rates[4] == pytest.approx(1e-2) and rates[8] == pytest.approx(0.25e-2)
    assert [(e["attempt"], e["step"], e["to_step"], e["lr_scale"])
            for e in events(tmp_path, "rollback")] == [(0, 5, 4, 0.5), (1, 5, 4, 0.25)]  # fmt: skip
    assert [e["attempt"] for e in events(tmp_path, "alarm")] == [0, 1]
    steps = [(e["attempt"], e["step"]) for e in events(tmp_path, "probe")]
    assert steps == [(0, s) for s in range(1, 6)] + [(1, 5)] + [(2, s) for s in range(5, 9)]
    last = [r for r in trainer.state.log_history if "loss" in r][-1]
    assert last["stability/rollbacks"] == 2

    # What followed is what a resume at that rate gives: dropout, optimizer and data included.
    monkeypatch.setattr(Diverges, "bearable_rate", math.inf)
    again = diverging(
        dropout_model("vit"), tmp_path, StabilityCallback(every=1), monkeypatch, save_steps=100
    )

    class Quarter(TrainerCallback):
        def on_train_begin(self, args, state, control, optimizer=None, lr_scheduler=None, **kwargs):
            lr_scheduler.base_lrs = [rate * 0.25 for rate in lr_scheduler.base_lrs]
            for group in optimizer.param_groups:
                group["lr"] *= 0.25

    again.add_callback(Quarter())
    drop_due(tmp_path / "checkpoint-4")  # by hand here, what it asks for
    again.train(resume_from_checkpoint=str(tmp_path / "checkpoint-4"))
    assert same_state(again.model, trainer.model)


def test_a_state_of_the_monitor_that_cannot_be_read_is_said(tmp_path):
    trained(tiny_model("gpt2"), tmp_path, max_steps=2, save_steps=2)
    path = tmp_path / "checkpoint-2" / "trainer_state.json"
    state = json.loads(path.read_text())

    def resume():
        path.write_text(json.dumps(state))
        trainer, _ = monitored(tiny_model("gpt2"), tmp_path, max_steps=4, save_strategy="no")
        trainer.train(resume_from_checkpoint=str(path.parent))
        return trainer.state.global_step

    for attributes in (7, {}, {"progress": []}, {"progress": {"rules": {}}}):
        state["stateful_callbacks"]["StabilityCallback"]["attributes"] = attributes
        with pytest.raises(ValueError, match="state of StabilityCallback .* cannot be read"):
            resume()
    del state["stateful_callbacks"]["StabilityCallback"]  # what the error says
    assert resume() == 4


def drop_due(checkpoint):
    """Take from a checkpoint what a rollback to it asks for."""
    path = checkpoint / "trainer_state.json"
    state = json.loads(path.read_text())
    progress = state["stateful_callbacks"]["StabilityCallback"]["attributes"]["progress"]
    assert progress["rollbacks"].pop("due") == [2, 0.25, []]
    path.write_text(json.dumps(state))


def test_rollbacks_end(said, tmp_path, monkeypatch):
    monitor = StabilityCallback(every=1, on_collapse="rollback", max_rollbacks=1)
    trainer = diverging(tiny_model("vit"), tmp_path, monitor, monkeypatch, save_steps=2)
    trainer.train()
    assert said()[-1].endswith("training stops at step 5: 1 rollback did not help")
    assert trainer.state.global_step == 5
    (end,) = events(tmp_path, "stop")
    assert end["step"] == 5 and "did not help" in end["reason"]


def test_a_checkpoint_written_while_something_was_wrong_is_not_gone_back_to(
    said, tmp_path, monkeypatch
):
    monkeypatch.setattr(Diverges, "first_bad_step", 1)
    monitor = StabilityCallback(every=1, on_collapse="rollback")
    trainer = diverging(tiny_model("vit"), tmp_path, monitor, monkeypatch, save_steps=1)
    trainer.train()
    assert "there is no healthy checkpoint on disk" in said()[-1]
    assert trainer.state.global_step == 1


def test_a_checkpoint_that_is_gone_when_training_has_stopped_is_not_resumed_from(
    said, tmp_path, monkeypatch
):
    class Cleaner(TrainerCallback):
        def on_train_end(self, args, state, control, **kwargs):
            for folder in tmp_path.glob("checkpoint-*"):
                shutil.rmtree(folder)

    monitor = StabilityCallback(every=1, on_collapse="rollback")
    trainer = diverging(tiny_model("vit"), tmp_path, monitor, monkeypatch, save_steps=2)
    trainer.add_callback(Cleaner())
    trainer.train()
    assert "checkpoint-4 was deleted before training could resume" in said()[-1]
    assert trainer.state.global_step == 5
    assert [e["step"] for e in events(tmp_path, "rollback")] == [5]
    (end,) = events(tmp_path, "stop")
    assert end["step"] == 5 and "was deleted" in end["reason"]


# Bad input


@pytest.mark.parametrize(
    "options, message",
    [
        (dict(every=0), "every is a number of steps, 1 or more, got 0"),
        (dict(every=-5), "got -5"),
        (dict(every=2.5), "got 2.5"),
        (dict(sharpness_every=0), "sharpness_every"),
        (dict(queries=0), "queries"),
        (dict(terms=["entropy", "entropi"]), "unknown term 'entropi'.*entropy"),
        (dict(terms="entropy"), "terms must be .*, got 'entropy'"),
        (dict(on_collapse="panic"), "warn, stop, checkpoint, rollback or a function, got 'panic'"),
        (dict(rollback_lr_factor=1.5), "between 0 and 1 .*, got 1.5"),
        (dict(rollback_lr_factor="half"), "between 0 and 1 .*, got 'half'"),
        (dict(every=True), "got True"),
        (dict(queries=True), "queries must be .*, got True"),
        (dict(terms=None), "terms must be .*, got None"),
        (dict(terms=1), "terms must be .*, got 1"),
        (dict(maps="first"), "maps is .all. or a list of heads, counted from 0, got 'first'"),
        (dict(maps=[-1]), r"got \[-1\]"),
        (dict(maps=0), "got 0"),
        (dict(max_rollbacks=-1), "max_rollbacks is a number of rollbacks, 0 or more, got -1"),
        (dict(thresholds={"spikes": 1}), "names among entropy_share, .*got {'spikes': 1}"),
        (dict(thresholds={"spike": "x"}), r"spike is a number \(0.5 by default\), got 'x'"),
        (dict(thresholds={"stall_steps": math.nan}), "stall_steps is a number .*got nan"),
        (dict(thresholds=0.5), "thresholds is a .*got 0.5"),
        (dict(console="loud"), "console is one of short, full, off, got 'loud'"),
    ],
)
def test_bad_options_are_refused_at_once(options, message):
    with pytest.raises(ValueError, match=message):
        StabilityCallback(**options)


def test_what_was_asked_for_by_name_and_cannot_be_measured_is_refused_at_the_start(tmp_path):
    model = tiny_model("gpt2", reorder_and_upcast_attn=True, attn_implementation="eager")
    trainer, _ = monitored(model, tmp_path, monitor_terms=["entropy"])
    with pytest.raises(ValueError, match="reorder_and_upcast_attn"):
        trainer.train()
    assert trainer.state.global_step == 0
    # The default is what can be measured, which is said.
    with pytest.warns(UserWarning, match="sigma_qk.*recorded; entropy.*are left out"):
        trained(model, tmp_path, max_steps=2)
    assert "sigma_qk" in events(tmp_path, "probe")[0]["quantities"]


class Plain(torch.nn.Module):
    """No transformers model at all."""

    def __init__(self):
        super().__init__()
        self.layer = torch.nn.Linear(64, 3)

    def forward(self, pixel_values, labels):
        logits = self.layer(pixel_values.flatten(1))
        return {"loss": torch.nn.functional.cross_entropy(logits, labels), "logits": logits}


def test_of_a_model_without_attention_losses_are_watched(said, tmp_path, monkeypatch):
    monkeypatch.setattr(tiny_training, "Trainer", Diverges)
    examples = tiny_training.dataset(tiny_model("vit"))
    monkeypatch.setattr(tiny_training, "dataset", lambda *args, **kwargs: examples)
    trainer = make_trainer(Plain(), tmp_path, callbacks=[StabilityCallback()], save_strategy="no")
    with pytest.warns(UserWarning, match="only losses and gradients are watched.*holds no trans"):
        trainer.train()
    assert trainer.state.global_step == 6 and "nonfinite at step 5" in said()[0]
    named = make_trainer(Plain(), tmp_path, callbacks=[StabilityCallback(terms=["entropy"])])
    with pytest.raises(ValueError, match="holds no transformers model"):
        named.train()


def test_eager_attention_is_probed_like_any_other(tmp_path):
    for kind in ("eager", "sdpa"):
        model = tiny_model("vit")
        model.set_attn_implementation(kind)
        trained(model, tmp_path / kind, max_steps=1)
    eager, sdpa = (events(tmp_path / kind, "probe")[0]["quantities"] for kind in ("eager", "sdpa"))
    for layer, heads in eager["entropy"].items():
        assert heads == pytest.approx(sdpa["entropy"][layer], rel=1e-5)


def test_rollback_needs_checkpoints(tmp_path):
    trainer, _ = monitored(
        tiny_model("vit"), tmp_path, monitor_on_collapse="rollback", save_strategy="no"
    )
    with pytest.raises(ValueError, match='set save_strategy to "steps"'):
        trainer.train()


def test_rollback_of_what_fsdp_has_wrapped_is_refused_at_the_start(tmp_path):
    trainer, monitor = monitored(tiny_model("vit"), tmp_path, monitor_on_collapse="rollback")
    trainer.args.fsdp = True  # as it would be; nothing is sharded on one process
    with pytest.raises(ValueError, match="a model that FSDP has wrapped: take .stop."):
        monitor.on_train_begin(trainer.args, trainer.state, trainer.control, model=trainer.model)


def test_rollback_refuses_a_limit_by_which_the_trainer_deletes_what_it_needs(tmp_path):
    best = dict(load_best_model_at_end=True, eval_strategy="steps", eval_steps=2, save_steps=2)
    limited, _ = monitored(
        tiny_model("vit"), tmp_path, monitor_on_collapse="rollback", save_total_limit=1, **best
    )
    with pytest.raises(ValueError, match="set save_total_limit to 2 or more"):
        limited.train()
    enough, _ = trained(
        tiny_model("vit"), tmp_path, monitor_on_collapse="rollback", save_total_limit=2,
        max_steps=2, **best,
    )  # fmt: skip
    assert enough.state.global_step == 2


def test_a_head_that_no_layer_has_is_refused_at_the_start(tmp_path):
    trainer, _ = monitored(tiny_model("swin"), tmp_path, monitor_maps=[1, 4])
    with pytest.raises(
        ValueError, match=r"maps=\[1, 4\]: the model has 4 heads in a layer, 0 to 3"
    ):
        trainer.train()
    assert trainer.state.global_step == 0
    trained(tiny_model("swin"), tmp_path, monitor_maps=[1, 3], max_steps=1)
    (line,) = events(tmp_path, "probe")
    assert [len(maps) for maps in line["quantities"]["maps"].values()] == [1, 1, 2, 2]


def test_thresholds_come_back_with_the_state_and_a_function_is_refused(tmp_path):
    options = dict(
        monitor_thresholds=Thresholds(spike=3.0), restore_callback_states_from_checkpoint=True
    )
    trained(tiny_model("vit"), tmp_path, max_steps=2, **options)
    resumed = make_trainer(
        tiny_model("vit"), tmp_path, callbacks=[StabilityCallback()], max_steps=3,
        restore_callback_states_from_checkpoint=True,
    )  # fmt: skip
    resumed.train(resume_from_checkpoint=str(tmp_path / "checkpoint-2"))
    (monitor,) = (c for c in resumed.callback_handler.callbacks if isinstance(c, StabilityCallback))
    assert monitor.options.thresholds == monitor.rules.thresholds == Thresholds(spike=3.0)

    options["monitor_on_collapse"] = events
    trainer, monitor = monitored(tiny_model("vit"), tmp_path / "function", **options)
    with pytest.raises(ValueError, match="cannot hold on_collapse as a function"):
        trainer.train()
    with pytest.raises(ValueError, match="was the function events, which a checkpoint does not"):
        StabilityCallback(**monitor.state()["args"])


def test_two_monitors_are_refused(tmp_path):
    trainer, _ = monitored(tiny_model("vit"), tmp_path, callbacks=[StabilityCallback()])
    with pytest.raises(ValueError, match="two StabilityCallbacks"):
        trainer.train()


def test_its_state_is_json(tmp_path):
    trainer, monitor = trained(tiny_model("vit"), tmp_path, max_steps=2)
    saved = json.loads((tmp_path / "checkpoint-2" / "trainer_state.json").read_text())
    content = saved["stateful_callbacks"]["StabilityCallback"]
    assert content["args"]["every"] == 1
    assert StabilityCallback(**content["args"]).state()["args"] == content["args"]
