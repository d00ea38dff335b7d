"""`stability.jsonl`: strict JSON, whatever is in it is read, and it never ends a training."""

from __future__ import annotations

import json
import math
import os
import random
import resource
import signal
import subprocess
import sys

import pytest
from tiny_models import tiny_model
from tiny_training import make_trainer, same_state

import hf_stable
from hf_stable.monitor.alarms import Alarm, AlarmRules
from hf_stable.monitor.log_file import FILE_NAME, StabilityLog, read_log

OLD = (
    '{"event": "probe", "attempt": 0, "step": 1, "loss": NaN, "sharpness": -Infinity}\n'
    '{"event": "alarm", "attempt": 0, "step": 2, "value": "nan", "threshold": "inf"}\n'
    '{"event": "alarm", "attempt": 0, "step": 3, "value": 1e999, "threshold": 2.5}\n'
)


def refuse(name):
    raise AssertionError(f"{name} is no JSON")


def strictly(line):
    return json.loads(line, parse_constant=refuse)


def test_what_is_not_finite_is_null(tmp_path):
    log = StabilityLog(tmp_path)
    alarm = Alarm("nonfinite", 2, "loss", math.nan, math.inf, "the loss is not finite")
    log.write("alarm", 0, 2, alarm.to_dict())
    values = {"loss": -math.inf, "quantities": {"entropy": {"h.0": [math.nan, 1.5]}}}
    log.write("probe", 0, 2, values)
    written = [strictly(line) for line in (tmp_path / FILE_NAME).read_text().splitlines()]
    assert written == read_log(tmp_path)
    assert written[0]["value"] is None and written[0]["threshold"] is None
    assert written[1]["loss"] is None
    assert written[1]["quantities"] == {"entropy": {"h.0": [None, 1.5]}}


def test_what_older_versions_wrote_instead_is_read_as_null(tmp_path):
    (tmp_path / FILE_NAME).write_text(OLD)
    probe, alarm, large = read_log(tmp_path)
    assert probe["loss"] is probe["sharpness"] is None
    assert alarm["value"] is alarm["threshold"] is None
    assert large["value"] is None and large["threshold"] == 2.5


def test_the_rules_state_is_strict_json_and_the_old_spelling_is_taken_up():
    rules = AlarmRules()
    state = rules.state()
    json.dumps(state, allow_nan=False)
    old = state | {"first": "nan", "best": "inf", "lowest": "inf"}
    for written in (state, old):
        again = AlarmRules()
        again.load_state(written)
        assert again.state() == state
    for step in range(1, 40):
        rules.observe_loss(step, 2.0)
    again = AlarmRules()
    again.load_state(json.loads(json.dumps(rules.state(), allow_nan=False)))
    assert again.state() == rules.state() != state


GOOD = {"event": "probe", "attempt": 0, "step": 3, "loss": 1.0}

DAMAGED = (
    b"\xff\xfe\x00{", b"null", b"[1, 2]", b"{}", b'"text"', b"17", b"[" * 100_000, b"1" * 5_000,
    b'{"event": "probe"}', b'{"event": 3, "attempt": 0, "step": 1}',
    b'{"event": "probe", "attempt": 0, "step": "3"}',
    b'{"event": "probe", "attempt": null, "step": 1}',
    b'{"event": "probe", "attempt": 0, "step": 1.5}',
    b'{"event": "probe", "attempt": 0, "step": true}', b"\x00" * 64,
    '{"event": "probe", "attempt": 0, "step": 1}'.encode("utf-16"),
)  # fmt: skip


@pytest.mark.parametrize("bad", DAMAGED, ids=range(len(DAMAGED)))
def test_a_damaged_line_is_left_out_and_said(bad, tmp_path):
    good = json.dumps(GOOD).encode()
    (tmp_path / FILE_NAME).write_bytes(b"\n".join([good, bad, good, b""]))
    with pytest.warns(UserWarning, match="damaged lines were left out, the first is line 2"):
        assert read_log(tmp_path) == [GOOD, GOOD]
    StabilityLog(tmp_path).resume(0, 3)
    assert (tmp_path / FILE_NAME).read_bytes() == good + b"\n" + good + b"\n"


def test_a_line_that_a_crash_cut_short_is_left_out(tmp_path):
    good = json.dumps(GOOD)
    (tmp_path / FILE_NAME).write_text(good + "\n" + good[:20])
    assert read_log(tmp_path) == [GOOD]


def test_any_bytes_are_read_and_resumed_from(tmp_path):
    random.seed(0)
    lines = [GOOD | {"step": step, "text": "\ud800 \u2028 {"} for step in range(1, 6)]
    whole = "".join(json.dumps(line) + "\n" for line in lines).encode()
    lost = 0
    for _ in range(400):
        mutated = bytearray(whole)
        for _ in range(random.randint(1, 5)):
            at = random.randrange(len(mutated))
            mutated[at : at + random.randint(0, 3)] = random.randbytes(random.randint(0, 3))
        (tmp_path / FILE_NAME).write_bytes(mutated)
        StabilityLog(tmp_path).resume(0, 3)
        kept = read_log(tmp_path)  # all whole now: a warning would be an error
        assert all(line["attempt"] < 0 or line["step"] <= 3 for line in kept if not line["attempt"])
        lost += len(kept) < 3
    assert 0 < lost < 400


@pytest.fixture
def full_disk():
    """Files of this process may not grow beyond a few bytes, as on a disk that is full."""
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    handler = signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    yield lambda size: resource.setrlimit(resource.RLIMIT_FSIZE, (size, before[1]))
    resource.setrlimit(resource.RLIMIT_FSIZE, before)
    signal.signal(signal.SIGXFSZ, handler)


def test_a_full_disk_is_one_warning_and_no_line_is_torn(full_disk, tmp_path):
    log = StabilityLog(tmp_path)
    log.write("probe", 0, 1, {})
    full_disk((tmp_path / FILE_NAME).stat().st_size + 10)
    with pytest.warns(UserWarning, match=f"cannot write .*{FILE_NAME}.*training goes on") as seen:
        log.write("probe", 0, 2, {})
        log.write("probe", 0, 3, {})
    assert len(seen) == 1
    full_disk(resource.getrlimit(resource.RLIMIT_FSIZE)[1])  # space again
    log.write("probe", 0, 4, {})
    assert [line["step"] for line in read_log(tmp_path)] == [1, 4]


def test_what_is_no_file_is_not_opened(tmp_path):
    os.mkfifo(tmp_path / FILE_NAME)  # opening it would wait for ever
    with pytest.warns(UserWarning, match="no regular file"):
        StabilityLog(tmp_path).start()
    with pytest.raises(OSError, match="no regular file"):
        read_log(tmp_path)


@pytest.mark.parametrize("resumed", [False, True])
def test_a_log_that_cannot_be_written_does_not_end_the_training(resumed, tmp_path):
    plain = make_trainer(tiny_model("vit"), tmp_path / "plain", max_steps=4)
    plain.train()
    folder = tmp_path / "watched"
    (folder / FILE_NAME).mkdir(parents=True)
    monitor = hf_stable.StabilityCallback(every=1)
    trainer = make_trainer(tiny_model("vit"), folder, callbacks=[monitor], max_steps=4)
    checkpoint = str(tmp_path / "plain" / "checkpoint-2") if resumed else None
    with pytest.warns(UserWarning, match=f"cannot write .*{FILE_NAME}") as seen:
        trainer.train(resume_from_checkpoint=checkpoint)
    assert sum("cannot write" in str(w.message) for w in seen) == 1
    assert trainer.state.global_step == 4 and same_state(trainer.model, plain.model)
    recorded = [r["step"] for r in trainer.state.log_history if "stability/entropy/min" in r]
    assert recorded == ([3, 4] if resumed else [1, 2, 3, 4])
    assert (folder / "checkpoint-4").is_dir()  # also where the first half had no monitor


def test_every_file_of_the_package_is_written_as_strict_json():
    # A second way to write JSON would be a second spelling of NaN.
    command = [sys.executable, "-c", "import ast, pathlib, sys, hf_stable\n" + SEARCH]
    found = subprocess.run(command, capture_output=True, text=True, check=True).stdout.split()
    assert found == ["_json.py"]


SEARCH = """
root = pathlib.Path(hf_stable.__file__).parent
for path in sorted(root.rglob("*.py")):
    calls = [n for n in ast.walk(ast.parse(path.read_text())) if isinstance(n, ast.Call)]
    names = {ast.unparse(call.func) for call in calls}
    if names & {"json.dump", "json.dumps", "dumps"} and path.name not in ALONE:
        print(path.relative_to(root))
"""
SEARCH = 'ALONE = ("reload.py", "modeling_hf_stable.py")\n' + SEARCH
