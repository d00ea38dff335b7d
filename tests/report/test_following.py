"""A run that goes on: its page is written anew, and a terminal shows it."""

from __future__ import annotations

import json
import math
import os
import subprocess
import sys
import threading

import pytest
from report_runs import FALLING, alarm, calm, collapsing, write_run
from tiny_models import tiny_model
from tiny_training import make_trainer

import hf_stable
from hf_stable.commands.conventions import BAD_INPUT, INTERRUPTED, NO, SUCCESS
from hf_stable.commands.main import main
from hf_stable.monitor.folder_lock import FolderLock
from hf_stable.monitor.log_file import StabilityLog
from hf_stable.report import log_lines
from hf_stable.report.following import FollowedRuns, follow_report
from hf_stable.report.glance import glance_at, sparkline
from hf_stable.report.log_lines import GrowingLog, read_log_lines
from hf_stable.report.reading import read_run


def probe(log, step, attempt=0, **head):
    log.write("probe", attempt, step, {"loss": 2.0 - step / 100, "quantities": calm(step, **head)})


def is_live(page):
    return "data-refresh=" in page.read_text().split("<head>")[0]


def test_a_log_that_grows_is_read_line_by_line_once(tmp_path, monkeypatch):
    log, growing = StabilityLog(tmp_path), GrowingLog(tmp_path / "stability.jsonl")
    assert growing.read().probes == []
    taken = []
    take = log_lines._take
    monkeypatch.setattr(log_lines, "_take", lambda *args: (taken.append(args[2]), take(*args)))
    for step in (1, 2):
        probe(log, step)
    assert [p.step for p in growing.read().probes] == [1, 2]
    # A line that the training is at is left until it is whole.
    text = log.path.read_text()
    third = text.splitlines()[0].replace('"step": 1', '"step": 3')
    with log.path.open("a") as file:
        file.write(third[:40])
    assert [p.step for p in growing.read().probes] == [1, 2]
    with log.path.open("a") as file:
        file.write(third[40:] + "\n")
    assert [p.step for p in growing.read().probes] == [1, 2, 3] and len(set(taken)) == len(taken)
    assert growing.read().damaged_lines == 0
    # A resume writes another file, of which all is read.
    log.resume(0, 1)
    assert [p.step for p in growing.read().probes] == [1]
    log.path.unlink()
    assert growing.read().probes == []


def test_a_line_that_is_too_long_does_not_hold_a_growing_log_up(tmp_path, monkeypatch):
    monkeypatch.setattr(log_lines, "LONGEST_LINE", 4096)
    log, growing = StabilityLog(tmp_path), GrowingLog(tmp_path / "stability.jsonl")
    probe(log, 1)
    with log.path.open("a") as file:
        file.write("x" * 10_000 + "\n")
    probe(log, 2)
    found = growing.read()
    assert [p.step for p in found.probes] == [1, 2] and found.damaged_lines == 3
    assert found == read_log_lines(log.path, None)


def test_the_page_is_written_whenever_the_run_has_gone_on(tmp_path):
    folder = tmp_path / "run"
    folder.mkdir()
    log, pages, waits = StabilityLog(folder), [], []

    def goes_on(seconds):
        """What happens while the follower sleeps: nothing, two probes, nothing, one, the end."""
        waits.append(seconds)
        number = len(waits)
        for step in {2: (10, 20), 4: (30,)}.get(number, ()):
            probe(log, step)
        if number == 5:
            log.write("end", 0, 30, {"seconds": 1.0})

    def on_written(written):
        pages.append((written.summaries[0].num_steps, is_live(folder / "report.html")))

    written = follow_report([folder], every=7.0, on_written=on_written, sleep=goes_on)
    assert pages == [(20, True), (30, True), (30, False)] and waits == [7.0] * 5
    assert written.files == (folder / "report.html",)
    assert "loaded anew every 7.0 s" not in (folder / "report.html").read_text()


def test_an_interrupted_follower_leaves_a_page_that_stands(tmp_path):
    folder = write_run(tmp_path / "run", FALLING[:50], {1: calm(1)}, interrupted_at=100)

    def interrupted(seconds):
        assert is_live(tmp_path / "r.html")
        assert "loaded anew every 10.0 s" in (tmp_path / "r.html").read_text()
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        follow_report([folder], tmp_path / "r.html", sleep=interrupted)
    assert not is_live(tmp_path / "r.html")


@pytest.mark.filterwarnings("ignore:StabilityCallback")
def test_a_real_training_is_followed_to_its_end(tmp_path):
    monitor = hf_stable.StabilityCallback(every=2)
    trainer = make_trainer(
        tiny_model("vit"), tmp_path / "run", max_steps=8, save_steps=4, callbacks=[monitor]
    )
    (tmp_path / "run").mkdir(exist_ok=True)
    seen, result = [], []

    def follow():
        result.append(
            follow_report([tmp_path / "run"], tmp_path / "r.html", every=0.02,
                          on_written=lambda w: seen.append(w.summaries[0]))
        )  # fmt: skip

    follower = threading.Thread(target=follow, daemon=True)
    follower.start()
    trainer.train()
    trainer.save_state()
    follower.join(60)
    assert not follower.is_alive() and result[0].summaries[0].num_steps == 8
    assert [s.num_steps for s in seen] == sorted(s.num_steps for s in seen)
    assert seen[0].verdict.state == "unfinished" or len(seen) == 1


def test_a_state_of_an_earlier_run_does_not_end_a_new_one(tmp_path):
    folder = write_run(tmp_path / "run", FALLING, {1: calm(1)}, [("end", 100, {"seconds": 1.0})])
    assert read_run(folder).has_ended
    past = (folder / "trainer_state.json").stat().st_mtime - 60
    os.utime(folder / "trainer_state.json", (past, past))
    log = StabilityLog(folder)
    log.start()
    for step in (1, 2):
        probe(log, step)
    run = read_run(folder)
    assert not run.has_ended and run.num_steps == 2 and run.history == ()
    assert any("is of an earlier run in this folder" in note for note in run.notes)
    log.write("end", 0, 2, {"seconds": 1.0})
    assert read_run(folder).has_ended


HOLDER = """
import sys, time
from hf_stable.monitor.folder_lock import FolderLock
lock = FolderLock(sys.argv[1])
print(lock.acquire(), flush=True)
time.sleep(100)
"""


def test_a_run_that_is_resumed_has_not_ended_though_its_files_say_so(tmp_path):
    folder = write_run(tmp_path / "run", FALLING, {1: calm(1)}, [("end", 100, {"seconds": 1.0})])
    holder = subprocess.Popen([sys.executable, "-c", HOLDER, folder], stdout=subprocess.PIPE)
    try:
        assert holder.stdout.readline() == b"None\n"
        assert not read_run(folder).has_ended
    finally:
        holder.kill()
        holder.wait()
    assert read_run(folder).has_ended  # the file of a process that was killed holds nothing
    own = FolderLock(folder)
    assert own.acquire() is None and not read_run(folder).has_ended
    # To look has not let go of it.
    again = [sys.executable, "-c", HOLDER.replace("time.sleep(100)", ""), folder]
    assert b"process" in subprocess.run(again, capture_output=True).stdout
    own.release()


def test_a_leg_that_ends_before_a_rollback_is_no_end(tmp_path):
    back = [("rollback", 0, 50, {"to_step": 40, "lr_scale": 0.5}), ("end", 0, 50, {"seconds": 1.0})]
    log = StabilityLog(tmp_path)
    for event, attempt, step, values in back:
        log.write(event, attempt, step, values)
    assert not read_run(tmp_path).has_ended
    log.write("end", 1, 60, {"seconds": 1.0})
    assert read_run(tmp_path).has_ended


def test_two_runs_are_followed_until_both_have_ended(tmp_path):
    first = write_run(tmp_path / "a", FALLING[:20], {1: calm(1)})
    second = write_run(tmp_path / "b", FALLING[:20], {1: calm(1)}, interrupted_at=40)
    followed = FollowedRuns([first, second])
    assert [run.has_ended for run in followed.read_if_changed()] == [True, False]
    assert followed.read_if_changed() is None
    StabilityLog(second).write("end", 0, 20, {"seconds": 1.0})
    assert [run.has_ended for run in followed.read_if_changed()] == [True, True]


def test_a_glance_shows_the_worst_heads_and_the_last_alarms(tmp_path):
    events = [("alarm", step, alarm(f"number {step}")) for step in range(10, 80, 10)]
    probes = {5: calm(5, 4), 80: calm(80, 4, entropy_normalised=0.2, sigma_qk=9.0)}
    seen = glance_at(read_run(write_run(tmp_path / "run", FALLING[:80], probes, events)))
    worst = seen.heads[0]
    assert (worst.place, worst.share, worst.sigma_qk) == ("layer 0, head 0", 0.2, 9.0)
    assert worst.mode == "normal" and seen.probe_step == 80 and len(seen.heads) == 6
    assert [event.step for event in seen.alarms] == [40, 50, 60, 70] and seen.num_alarms == 7
    empty = glance_at(read_run(write_run(tmp_path / "e", [])))
    assert empty.heads == () and empty.probe_step is None and empty.losses == ()


def test_a_curve_of_characters():
    assert sparkline([1, 2, 3, 4, 5, 6, 7, 8], 8) == "▁▂▃▄▅▆▇█"
    assert sparkline([8, 8, 1, 1], 2) == "█▁" and sparkline([5, 5], 60) == "▁▁"
    assert sparkline([1.0, math.nan, 2.0], 3) == "▁x█" and sparkline([math.nan], 3) == "x"
    assert sparkline([], 9) == "" and len(sparkline(FALLING, 60)) == 60


def test_watch_prints_what_there_is(tmp_path, capsys):
    folder = collapsing(tmp_path / "run")
    assert main(["watch", str(folder), "--once"]) == NO
    printed = capsys.readouterr().out
    assert printed.startswith("run: step 140 of 140. Failed: the loss was lost at step 81")
    assert "2.1 at step 1, best 0.5054 at step 80, now 4 at step 140" in printed
    assert "layer 0, head 0" in printed and " 7%" in printed and "malig" not in printed
    assert "alarms: 1" in printed and "step 80, collapse: vit.layers.0, head 0: because" in printed
    assert main(["watch", str(folder), "--json"]) == NO
    content = json.loads(capsys.readouterr().out)
    assert (content["step"], content["state"], content["alarms"]) == (140, "failed", 1)
    assert content["heads"][0]["share"] == 0.07
    # It ends with the run; one that goes on is not waited for with --once.
    assert main(["watch", str(folder)]) == NO
    goes_on = write_run(tmp_path / "on", FALLING[:50], interrupted_at=100)
    assert main(["watch", str(goes_on), "--once"]) == SUCCESS
    assert "Unfinished: step 50 of 100; the loss came down so far." in capsys.readouterr().out
    # What is damaged is said here as on the page.
    with (goes_on / "stability.jsonl").open("a") as log:
        log.write("no line of a log\n")
    assert main(["watch", str(goes_on), "--once"]) == SUCCESS
    assert "1 line of stability.jsonl could not be read" in capsys.readouterr().out
    assert main(["watch", str(goes_on), "--json"]) == SUCCESS
    assert "could not be read" in json.loads(capsys.readouterr().out)["notes"][0]


@pytest.mark.parametrize("command", [["report", "--follow"], ["watch"]], ids=" ".join)
def test_what_is_waited_for_is_said_once(command, tmp_path, monkeypatch, capsys):
    folder, waits = tmp_path / "run", []
    folder.mkdir()

    def goes_on(seconds):
        waits.append(capsys.readouterr().err)
        if len(waits) == 2:
            write_run(folder, FALLING[:50], {1: calm(1)})

    monkeypatch.setattr("time.sleep", goes_on)
    monkeypatch.setattr(follow_report, "__kwdefaults__",
                        {**follow_report.__kwdefaults__, "sleep": goes_on})  # fmt: skip
    assert main([*command, str(folder)]) == SUCCESS
    assert waits[0] == (
        f"Waiting: {folder} holds neither trainer_state.json nor stability.jsonl yet "
        "(Ctrl-C ends this)\n"
    )
    assert waits[1:] == [""]


def test_bad_input_of_following_is_one_line(tmp_path, monkeypatch, capsys):
    (tmp_path / "empty").mkdir()
    folder = str(write_run(tmp_path / "run", FALLING[:50], interrupted_at=100))
    cases = [
        (["watch", str(tmp_path / "nowhere")], BAD_INPUT, "does not exist"),
        (["watch", str(tmp_path / "empty"), "--once"], BAD_INPUT, "holds no log and no state"),
        (["watch", folder, "--every", "0"], BAD_INPUT, "seconds above zero, 86400 at most, got 0"),
        (["report", "--follow", folder, "--every", "-1"], BAD_INPUT, "most, got -1"),
        (["watch", folder, "--every", "inf"], BAD_INPUT, "86400 at most, got inf"),
        (["report", "--follow", folder, "--every", "inf"], BAD_INPUT, "at most, got inf"),
        (["report", "--follow", folder, "--format", "png"], BAD_INPUT, "leave out --format png"),
        (["report", "--follow", str(tmp_path / "nowhere")], BAD_INPUT, "does not exist"),
    ]

    def interrupted(seconds):
        raise KeyboardInterrupt

    monkeypatch.setattr("hf_stable.commands.watching.time.sleep", interrupted)
    assert main(["watch", folder]) == INTERRUPTED
    assert "step 50 of 100" in capsys.readouterr().out
    for arguments, code, message in cases:
        assert main(arguments) == code
        error = capsys.readouterr().err
        assert message in error and error.count("\n") == 1, error
