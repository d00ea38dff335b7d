"""The real trackio, in a process of its own: what it stored of a watched run."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from hf_stable.monitor.trackers import alert_trackers

SCRIPT = """
import json, sys, warnings
sys.path.insert(0, sys.argv[1])
warnings.simplefilter("ignore")
from tiny_models import tiny_model
from tiny_training import make_trainer
import hf_stable
from hf_stable.monitor.alarms import Thresholds

# Whatever rises is alarming here, so that there is an alert to look for.
touchy = Thresholds(spike=0.0, spike_score=0.0, rise=0.0, rise_score=0.0)
monitor = hf_stable.StabilityCallback(every=2, thresholds=touchy)
trainer = make_trainer(
    tiny_model("gpt2"), "out", callbacks=[monitor], report_to="trackio", project="watched",
    run_name="first", max_steps=6, learning_rate=0.5, save_strategy="no",
)
trainer.train()
from trackio.sqlite_storage import SQLiteStorage
logs = SQLiteStorage.get_logs("watched", "first")
alerts = SQLiteStorage.get_alerts("watched", "first")
alarms = [line for line in hf_stable.monitor.log_file.read_log("out") if line["event"] == "alarm"]
print("RESULT", json.dumps({"logs": logs, "alerts": alerts, "alarms": alarms,
                            "history": trainer.state.log_history}, default=str))
"""


@pytest.mark.slow
def test_values_and_alerts_are_stored_at_the_step_of_the_loss(tmp_path):
    pytest.importorskip("trackio")
    done = subprocess.run(
        [sys.executable, "-c", SCRIPT, str(Path(__file__).parents[1] / "support")],
        capture_output=True,
        text=True,
        cwd=tmp_path,
        env=os.environ | {"TRACKIO_DIR": str(tmp_path / "trackio"), "HF_HUB_OFFLINE": "1"},
        timeout=300,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    (line,) = (line for line in done.stdout.splitlines() if line.startswith("RESULT "))
    found = json.loads(line.removeprefix("RESULT "))
    stored = {
        row["train/loss"]: row["train/stability/entropy/min"]
        for row in found["logs"]
        if "train/stability/entropy/min" in row
    }
    logged = {
        row["loss"]: row["stability/entropy/min"]
        for row in found["history"]
        if "stability/entropy/min" in row
    }
    assert len(logged) >= 4 and stored == pytest.approx(logged)
    assert found["alarms"]
    titles = [alert["title"] for alert in found["alerts"]]
    assert sorted(titles) == sorted(f"{a['kind']} at step {a['step']}" for a in found["alarms"])
    assert all("To try:" in alert["text"] for alert in found["alerts"])


def test_an_alert_without_a_run_is_a_warning():
    pytest.importorskip("trackio")
    with pytest.warns(UserWarning, match="trackio took no alert .*training goes on"):
        alert_trackers(["trackio"], "title", "text")


def test_without_trackio_among_the_trackers_nothing_is_imported(monkeypatch):
    monkeypatch.setitem(sys.modules, "trackio", None)
    alert_trackers(["tensorboard"], "title", "text")
    with pytest.warns(UserWarning, match="trackio took no alert"):
        alert_trackers(["trackio"], "title", "text")
