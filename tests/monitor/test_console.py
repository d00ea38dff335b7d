"""What stands on the console: one short part of a record, and alarms as lines of a tool."""

from __future__ import annotations

import ast
import io
import re
import sys

import pytest
from tiny_models import tiny_model
from tiny_training import make_trainer
from transformers import PrinterCallback, ProgressCallback, TrainerCallback

from hf_stable import StabilityCallback
from hf_stable.monitor.console import MOST_CHARACTERS, say, shorten, summarise
from hf_stable.monitor.log_file import read_log

QUANTITIES = {
    "entropy_normalised": {"h.0": [0.9, 0.5], "h.1": [None, 0.125]},
    "sigma_qk": {"h.0": [3.0, 12.34567], "h.1": [1.0, None]},
}


class Keeps(TrainerCallback):
    """A tracker: all that it is given."""

    def __init__(self):
        self.records = []

    def on_log(self, args, state, control, logs=None, **kwargs):
        self.records.append(dict(logs))


def records_in(text):
    """The records that were printed as dicts."""
    lines = [
        line[line.index("{") :] for line in text.replace("\r", "\n").splitlines() if "{'" in line
    ]
    return [ast.literal_eval(line) for line in lines]


def printed(folder, capfd, *, console="short", printer=PrinterCallback, **options):
    """Train three steps; return what a printer has printed, and what trackers were given."""
    keeps = Keeps()
    monitor = StabilityCallback(every=2, console=console)
    trainer = make_trainer(
        tiny_model("gpt2"), folder, max_steps=3, save_strategy="no", callbacks=[keeps, monitor],
        **options,
    )  # fmt: skip
    for own in (PrinterCallback, ProgressCallback):
        trainer.remove_callback(own)
    trainer.add_callback(printer)
    capfd.readouterr()
    trainer.train()
    captured = capfd.readouterr()
    return records_in(captured.out + captured.err), keeps.records, trainer


class OwnProgress(ProgressCallback):
    """A user's own, which leans on the Trainer's, with positional arguments."""

    def on_log(self, args, state, control, logs=None, **kwargs):
        super().on_log(args, state, control, logs, **kwargs)


@pytest.mark.parametrize("printer", [PrinterCallback, ProgressCallback, OwnProgress])
def test_a_record_has_one_short_part(printer, capfd, tmp_path):
    shown, given, trainer = printed(tmp_path, capfd, printer=printer)
    assert len(shown) == len(given) == 4  # three steps and the end
    for record, whole in zip(shown, given, strict=True):
        assert not any(key.startswith("stability/") for key in record)
        assert ("stability" in record) == ("stability/entropy/min" in whole)
        assert {key for key in whole if "/" not in key} - {"total_flos"} <= record.keys()
    probed = [record["stability"] for record in shown if "stability" in record]
    assert len(probed) == 2  # steps 1 and 2
    last = [line for line in read_log(tmp_path) if line["event"] == "probe"][-1]["quantities"]
    assert probed[-1] == summarise(last, 0)
    assert probed[-1].startswith("entropy ") and probed[-1].endswith(", 0 alarms")
    assert re.search(r"^entropy \d+% \(layer [01] head [01]\), sigma_qk \S+ \(layer ", probed[-1])
    # All of it is where it was: trackers, log_history, the file.
    history = [r for r in trainer.state.log_history if "stability/entropy/min" in r]
    assert [r["step"] for r in history] == [1, 2]
    assert all(len([k for k in r if k.startswith("stability/")]) > 20 for r in history)
    assert "total_flos" in given[-1] or printer is PrinterCallback


def test_full_has_all_keys_and_off_has_none(capfd, tmp_path):
    full, given, _ = printed(tmp_path / "full", capfd, console="full")
    assert [set(record) for record in full] == [set(record) - {"total_flos"} for record in given]
    assert any("stability/sigma_qk/max" in record for record in full)
    off, again, _ = printed(tmp_path / "off", capfd, console="off")
    assert not any("stability" in key for record in off for key in record)
    assert [set(record) for record in again] == [set(record) for record in given]


def test_without_a_monitor_records_are_printed_as_they_are(capfd, tmp_path):
    trainer = make_trainer(tiny_model("gpt2"), tmp_path, max_steps=1, save_strategy="no")
    trainer.train()
    (first, _) = records_in(capfd.readouterr().out)
    assert set(first) == {"loss", "grad_norm", "learning_rate", "epoch"}


def test_a_notebooks_table_has_its_losses(capfd, tmp_path):
    pytest.importorskip("IPython")
    from transformers.utils.notebook import NotebookProgressCallback

    _, given, trainer = printed(tmp_path, capfd, printer=NotebookProgressCallback)
    (callback,) = (
        c for c in trainer.callback_handler.callbacks if isinstance(c, NotebookProgressCallback)
    )
    assert len([r for r in given if "stability/entropy/min" in r]) == 2
    assert callback.first_column == "Step"


def test_the_worst_head_and_where_it_is():
    text = "entropy 12% (layer 1 head 1), sigma_qk 12.3 (layer 0 head 1), 2 alarms"
    assert summarise(QUANTITIES, 2) == text
    assert summarise({}, 1) == "1 alarm"
    assert summarise({"sigma_qk": {"h.0": [None]}}, 0) == "0 alarms"
    one = {name: {"h.0": by_layer["h.0"]} for name, by_layer in QUANTITIES.items()}
    assert "entropy 50% (layer 0 head 1)" in summarise(one, 0)


def test_long_names_are_left_out_so_that_the_progress_bar_shows_the_rest():
    names = [f"{part}_tower_with_a_very_long_name.attention" for part in ("first", "second")]
    long = {
        name: dict(zip(names, by_layer.values(), strict=True))
        for name, by_layer in QUANTITIES.items()
    }
    assert summarise(long, 3) == "entropy 12%, sigma_qk 12.3, 3 alarms"
    assert len(summarise(QUANTITIES, 10**6)) <= MOST_CHARACTERS


def test_what_is_no_record_of_a_probe_is_left_as_it_is():
    record = {"loss": 1.0, "epoch": 0.5}
    assert shorten(record, "short", "text") == record
    assert shorten(record | {"stability/alarms": 1.0}, "short", None) == record


class Terminal(io.StringIO):
    def isatty(self):
        return True


@pytest.mark.parametrize(
    ("stream", "environment", "is_red"),
    [
        (Terminal, {}, True),
        (Terminal, {"NO_COLOR": "1"}, False),
        (Terminal, {"TERM": "dumb"}, False),
        (io.StringIO, {}, False),
    ],
)
def test_an_alarm_is_one_line_in_red_where_a_terminal_has_colours(
    stream, environment, is_red, monkeypatch
):
    monkeypatch.setenv("TERM", "xterm")
    monkeypatch.delenv("NO_COLOR", raising=False)
    for name, value in environment.items():
        monkeypatch.setenv(name, value)
    monkeypatch.setattr(sys, "stderr", stream())
    say("collapse at step 3", is_alarm=True)
    say("rollback 1")
    first, second = sys.stderr.getvalue().splitlines()
    assert first == ("\033[1;31mhf-stable: collapse at step 3\033[0m" if is_red else
                     "hf-stable: collapse at step 3")  # fmt: skip
    assert second == "hf-stable: rollback 1"


def test_names_do_not_command_the_terminal(capsys):
    say("collapse in a\033]0;title\007b\nc")
    assert capsys.readouterr().err == "hf-stable: collapse in a?]0;title?b?c\n"


def test_an_alarm_has_no_source_line_and_leaves_the_progress_bar_whole(capfd, tmp_path):
    monitor = StabilityCallback(thresholds=dict(spike=-1.0, spike_score=-1e9))
    trainer = make_trainer(
        tiny_model("gpt2"), tmp_path, max_steps=30, save_strategy="no", disable_tqdm=False,
        callbacks=[monitor],
    )  # fmt: skip
    capfd.readouterr()
    trainer.train()
    lines = [x.strip() for x in capfd.readouterr().err.replace("\r", "\n").splitlines()]
    said = [line for line in lines if "hf-stable" in line]
    alarms = [line for line in read_log(tmp_path) if line["event"] == "alarm"]
    assert len(said) == len(alarms) > 0 and alarms[0]["kind"] == "spike"
    assert said[0].startswith("hf-stable: spike at step ")
    assert "To try: look at the batches" in said[0]
    assert not any("Warning" in line or "callback.py" in line for line in lines)
