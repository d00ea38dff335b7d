"""`hf-stable preflight` on scripts as users write them: each leg is a process of its own.

The command itself runs in the process of the tests, which has imported what it needs, and all its
legs are forked from one server. One test starts it as a shell does, and interrupts it.
"""

from __future__ import annotations

import functools
import json
import os
import signal
import subprocess
import sys
import threading
import time
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from hf_stable.commands.conventions import BAD_INPUT, NO, SUCCESS
from hf_stable.commands.main import main
from hf_stable.commands.preflight.legs import Leg, Settings
from hf_stable.commands.preflight.processes import can_fork, run_process
from hf_stable.commands.preflight.remedies import parse_remedy

SCRIPT = """
import sys
from pathlib import Path
from transformers import HfArgumentParser, Trainer, TrainingArguments, set_seed

sys.path.insert(0, {support!r})
from tiny_models import tiny_batch, tiny_model

(args,) = HfArgumentParser(TrainingArguments).parse_args_into_dataclasses()
set_seed(args.seed)
model = tiny_model("gpt2", seed=args.seed)
batch = tiny_batch(model)
data = [{{name: rows[i % 4] for name, rows in batch.items()}} for i in range(32)]
trainer = Trainer(model, args, train_dataset=data, eval_dataset=data)
trainer.train()
trainer.save_model()
Path("the-script-went-on").touch()
"""
ARGUMENTS = (
    "--output_dir", "own", "--max_steps", "200", "--per_device_train_batch_size", "4",
    "--learning_rate", "1e-2", "--use_cpu", "True", "--eval_strategy", "steps", "--eval_steps", "1",
    "--save_steps", "2", "--report_to", "tensorboard", "--load_best_model_at_end", "True",
)  # fmt: skip
OWN_ENTRY = """
from hf_stable import Architecture, Attention, Block, register_architecture
attention = Attention("attn", query="q", key="k", value="v", output="o")
register_architecture(Architecture("made-up", Block("MadeUpBlock", (attention,))))
"""
pytestmark = pytest.mark.xdist_group("preflight")


@pytest.fixture(autouse=True)
def place(tmp_path, monkeypatch):
    """A folder of the user's own with the script in it."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    support = str(Path(__file__).parents[2] / "support")
    (tmp_path / "train.py").write_text(SCRIPT.format(support=support))
    return tmp_path


@pytest.fixture
def fly(capsys):
    """The command with some words: its exit code, and what it printed on stdout and stderr."""

    def run(*words):
        code = main(["preflight", *map(str, words)])
        return code, *capsys.readouterr()

    return run


def legs(folder="preflight-output"):
    return {
        path.parent.name: json.loads(path.read_text()) for path in Path(folder).rglob("leg.json")
    }


@pytest.mark.slow
def test_a_script_as_it_is_has_its_margin_measured(fly):
    options = ("--steps", 20, "--rates", "3,1e6", "--remedies", "none", "--jobs", 2)
    code, out, err = fly(*options, "train.py", *ARGUMENTS)
    assert code == SUCCESS, err
    assert "Nothing is needed: the planned rate has a margin of two or more." in out
    assert "x 1e+06" in out and "none x3: trains, loss" in err
    result = json.loads(Path("preflight-output/preflight.json").read_text())
    assert result["passed"] and result["learning_rate"] == 0.01
    assert result["remedies"][0]["fails_at"] == 1e6
    ends = legs()
    assert ends["none x3"]["ending"]["steps"] == 20
    assert ends["none x1"]["ending"]["facts"]["max_steps"] == 200
    # Nothing of the script's own was written, and the script ended with its training.
    assert sorted(p.name for p in Path().iterdir()) == ["preflight-output", "train.py"]
    assert not list(Path("preflight-output").rglob("checkpoint-*"))
    assert not list(Path("preflight-output").rglob("events.out*"))

    before = Path("preflight-output/legs/none x3/leg.json").stat().st_mtime_ns
    code, out, err = fly(*options[:-2], "--seeds", 2, "--json", "train.py", *ARGUMENTS)
    assert code == SUCCESS, err
    found = {leg["leg"]: leg for leg in json.loads(out)["legs"]}
    assert found["none x1 seed 1"]["loss"] != found["none x1"]["loss"]
    assert Path("preflight-output/legs/none x3/leg.json").stat().st_mtime_ns == before


@pytest.mark.slow
def test_a_planned_rate_that_is_lost_ends_with_one(fly, own_registry):
    Path("entry.py").write_text(OWN_ENTRY)  # which every leg has
    script = Path("train.py")
    own = "import hf_stable\nassert 'made-up' in hf_stable.supported_architectures()\n"
    script.write_text(own + script.read_text())
    arguments = [word if word != "1e-2" else "1e4" for word in ARGUMENTS]
    options = ("--steps", 20, "--rates", "1", "--remedies", "none", "--register", "entry.py")
    code, out, err = fly(*options, "train.py", *arguments)
    assert code == NO, err
    assert "No remedy that was tried helps" in out


@pytest.mark.slow
def test_it_runs_under_a_launcher(fly):
    words = f"{sys.executable} -m torch.distributed.run --standalone --nproc-per-node 2"
    options = ("--steps", 20, "--rates", "1", "--remedies", "none")
    code, _, err = fly(*options, "--launcher", words, "train.py", *ARGUMENTS)
    assert code in (SUCCESS, NO), err
    ends = legs()
    assert {end["ending"]["steps"] for end in ends.values()} == {20} and len(ends) == 1


def _target(link):
    try:
        return os.readlink(link)
    except OSError:  # the process, or the file, is closed
        return ""


@pytest.mark.slow
def test_a_forked_leg_is_the_one_that_is_started_bit_for_bit(tmp_path, monkeypatch):
    settings = Settings(("train.py", *ARGUMENTS), 20, 5)
    assert can_fork(settings) != torch.accelerator.is_available()
    assert not can_fork(replace(settings, launcher=("torchrun",)))

    def flown(name, leg, forks):
        folder = tmp_path / name
        run_process(settings, forks=forks)(leg, folder, threading.Event())
        state = json.loads((folder / "trainer_state.json").read_text())
        probes = [json.loads(line) for line in (folder / "stability.jsonl").open()]
        return (
            [(r["loss"], r["grad_norm"]) for r in state["log_history"] if "loss" in r],
            [probe["quantities"] for probe in probes if probe["event"] == "probe"],
        )

    leg = Leg(parse_remedy("adamw2+sigma_reparam"), 1.0)
    # A program that calls the command need not guard its main module against being run again.
    (tmp_path / "program.py").write_text("raise SystemExit('the main module ran once more')")
    program = str(tmp_path / "program.py")
    monkeypatch.setattr(sys.modules["__main__"], "__file__", program, raising=False)
    monkeypatch.setattr(sys.modules["__main__"], "__spec__", None)
    started, forked = (flown(str(forks), leg, forks) for forks in (False, True))
    assert forked == started and len(started[0]) == 20 and len(started[1]) > 4
    assert flown("other", Leg(leg.remedy, 1.0, seed=1), True) != started
    # The server itself has not been changed by the legs that came from it.
    assert flown("again", leg, True) == started


@pytest.mark.slow
def test_an_interrupt_keeps_what_is_done_and_stops_what_runs():
    options = ("--steps", "20", "--rates", "1,2,3,4,5,6,7", "--remedies", "none")
    process = subprocess.Popen(
        [sys.executable, "-m", "hf_stable.commands.main", "preflight", *options, "train.py",
         *ARGUMENTS],
        stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
        # A shell that starts the tests in the background has its children ignore interrupts.
        preexec_fn=functools.partial(signal.signal, signal.SIGINT, signal.SIG_DFL),
    )  # fmt: skip
    end = time.monotonic() + 200
    while not legs() and time.monotonic() < end:
        time.sleep(0.1)
    process.send_signal(signal.SIGINT)
    _, said = process.communicate(timeout=60)
    assert process.returncode == 130, said
    kept = legs()
    assert 1 <= len(kept) < 7
    folder = str(Path("preflight-output").resolve())
    opened = map(_target, Path("/proc").glob("[0-9]*/fd/*"))
    assert not [path for path in opened if path.startswith(folder)]  # each leg has its log open


@pytest.mark.slow
@pytest.mark.parametrize(
    ("script", "options", "message"),
    [
        ("print('no Trainer here')", (), "ended without training a transformers Trainer"),
        ("raise SystemExit('my own mistake')", (), "my own mistake"),
        ("import no_such_module", (), "No module named 'no_such_module'"),
        (None, ("--launcher", "no-such-launcher --x"), "cannot start 'no-such-launcher'"),
        (None, ("--launcher", f"{sys.executable} -c 'raise ValueError(3)'"), "ValueError: 3"),
    ],
)
def test_what_cannot_be_flown_is_said(fly, script, options, message):
    if script is not None:
        Path("train.py").write_text(script)
    code, _, err = fly("--remedies", "none", *options, "train.py", *ARGUMENTS)
    assert code == BAD_INPUT and message in err, err
    assert not Path("preflight-output/preflight.json").exists()


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (("--rates", "1,-2", "train.py"), "a rate is a positive multiple"),
        (("--rates", "1;2", "train.py"), "--rates takes numbers with commas between them"),
        (("--remedies", "adamw3", "train.py"), "did you mean 'adamw2'?"),
        (("--steps", "3", "train.py"), "3 steps are too few"),
        (("--register", "nowhere.py", "train.py"), "nowhere.py: no such file"),
        (("nowhere.py",), "can't open 'nowhere.py': no such file"),
        ((), "no script given"),
    ],
)
def test_bad_input_is_refused_before_anything_is_started(capsys, words, message):
    assert main(["preflight", *words]) == BAD_INPUT
    assert message in capsys.readouterr().err
    assert not Path("preflight-output").exists()
