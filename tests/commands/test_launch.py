"""The launcher against real, unmodified Trainer scripts, in this process and in real ones."""

from __future__ import annotations

import functools
import json
import os
import runpy
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from accelerate.commands.launch import launch_command_parser
from torch.distributed.run import get_args_parser
from transformers import GPT2LMHeadModel, Trainer, ViTForImageClassification
from typer.main import get_command

import hf_stable
from hf_stable._file_names import SIDECAR_FILE
from hf_stable.commands import registering
from hf_stable.commands.conventions import BAD_INPUT, SUCCESS
from hf_stable.commands.launch.command import Launch
from hf_stable.commands.launch.options import RunOptions
from hf_stable.commands.main import app, main
from hf_stable.commands.registering import register_from
from hf_stable.methods.sigma_reparam.method import SigmaReparamConfig
from hf_stable.monitor.log_file import read_log

SCRIPTS = Path(__file__).parents[1] / "support" / "scripts"
PACKAGE = Path(hf_stable.__file__).parent
LANGUAGE = SCRIPTS / "train_language_model.py"
IMAGES = SCRIPTS / "train_image_classifier.py"
ARGS = ("--do_train", "--do_eval", "--max_steps", "4", "--report_to", "none", "--use_cpu",
        "--disable_tqdm", "true", "--learning_rate", "1e-2", "--save_steps", "2")  # fmt: skip

TINY = """
import json, sys
import torch
from transformers import GPT2Config, GPT2LMHeadModel, Seq2SeqTrainer, Seq2SeqTrainingArguments
from transformers import Trainer, TrainingArguments
def tiny():
    torch.manual_seed(0)
    return GPT2LMHeadModel(GPT2Config(vocab_size=17, n_positions=8, n_embd=8, n_layer=1, n_head=1))
ids = torch.arange(8) % 17
DATA = [{"input_ids": ids, "labels": ids}] * 8
def arguments(cls=TrainingArguments, **options):
    return cls("out", max_steps=2, report_to=[], use_cpu=True, save_strategy="no",
               disable_tqdm=True, **options)
def gammas(model):
    return [name for name, _ in model.named_parameters() if name.endswith("gamma")]
"""


@pytest.fixture
def launch(monkeypatch, tmp_path, capsys):
    """Run the launcher in this process, in an empty folder, and return what it said on stderr."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setitem(sys.modules, "__main__", sys.modules["__main__"])
    for name in ("argv", "path"):
        monkeypatch.setattr(sys, name, list(getattr(sys, name)))
    # torch.distributed leaves a hook of its own behind where a test has made a process group.
    monkeypatch.setattr(sys, "excepthook", sys.__excepthook__)

    def run(*argv: object) -> str:
        with pytest.MonkeyPatch.context() as trainers:
            for name in ("__init__", "train"):
                trainers.setattr(Trainer, name, getattr(Trainer, name))
            code = main(["run", *map(str, argv)])
        assert code in (None, SUCCESS), code
        return capsys.readouterr().err

    return run


def write(name: str, text: str) -> Path:
    path = Path(name)
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(text)
    return path


def tiny_script(body: str) -> Path:
    return write("script.py", TINY + body)


def eval_loss(folder: str) -> float:
    return json.loads(Path(folder, "eval_results.json").read_text())["eval_loss"]


# What it does to scripts as strangers write them


def test_the_scripts_know_nothing_of_this_project():
    for script in (LANGUAGE, IMAGES):
        assert "hf_stable" not in script.read_text()


def test_language_script_runs_as_if_it_had_called_patch(launch):
    source = LANGUAGE.read_text()
    build = "    model = GPT2LMHeadModel(config)\n"
    assert build in source
    call = '    import hf_stable; hf_stable.patch(model, "sigma_reparam", init="one")\n'
    edited = write("edited.py", source.replace(build, build + call))
    options = write("options.yaml", "init: one\n")

    launch(LANGUAGE, "--output_dir", "plain", *ARGS)
    launch(edited, "--output_dir", "edited", *ARGS)
    said = launch(
        "--patch", "sigma_reparam", "--patch-config", options,
        LANGUAGE, "--output_dir", "launched", *ARGS,
    )  # fmt: skip

    assert "sigma_reparam on GPT2LMHeadModel: 8 of 9 layers" in said
    assert eval_loss("launched") == eval_loss("edited")
    assert abs(eval_loss("launched") - eval_loss("plain")) > 1e-3
    assert Path("launched", "checkpoint-4", SIDECAR_FILE).is_file()
    assert not Path("plain", "checkpoint-4", SIDECAR_FILE).exists()


def test_without_options_a_script_runs_as_under_python(launch):
    said = launch(LANGUAGE, "--output_dir", "launched", *ARGS)
    sys.argv = [str(LANGUAGE), "--output_dir", "python", *ARGS]
    runpy.run_path(str(LANGUAGE), run_name="__main__")
    assert eval_loss("launched") == eval_loss("python")
    assert "hf-stable run:" not in said


def test_image_script_with_model_init_the_optimizer_and_a_resume(launch):
    options = ("--patch", "sigma_reparam", "--fold-at-end")
    arguments = (*ARGS, "--optim", "adamw2", "--optim_args", "tau=0.01", "--warmup_steps", "0",
                 "--lr_scheduler_type", "constant")  # fmt: skip
    said = launch(*options, IMAGES, "--output_dir", "whole", *arguments)
    assert said.count("sigma_reparam on ViTForImageClassification: 13 of 14 layers") == 2
    assert "folded ViTForImageClassification" in said
    model, report = ViTForImageClassification.from_pretrained("whole", output_loading_info=True)
    assert not any(report[kind] for kind in ("missing_keys", "unexpected_keys"))
    assert not Path("whole", SIDECAR_FILE).exists()

    launch(*options, IMAGES, "--output_dir", "resumed", *arguments,
           "--resume_from_checkpoint", "whole/checkpoint-2")  # fmt: skip
    resumed = ViTForImageClassification.from_pretrained("resumed")
    for (name, whole), again in zip(
        model.state_dict().items(), resumed.state_dict().values(), strict=True
    ):
        assert torch.equal(whole, again), name
    halfway = ViTForImageClassification.from_pretrained("whole/checkpoint-2")
    assert not torch.equal(halfway.classifier.weight, model.classifier.weight)


def test_a_monitor_watches_a_script_and_changes_nothing(launch):
    launch(LANGUAGE, "--output_dir", "plain", *ARGS)
    launch("--monitor", "2", LANGUAGE, "--output_dir", "watched", *ARGS)
    assert eval_loss("watched") == eval_loss("plain")
    log = read_log(Path("watched"))
    assert [entry["step"] for entry in log if entry["event"] == "probe"][:2] == [1, 2]
    assert not Path("plain", "stability.jsonl").exists()


def test_a_collapse_stops_a_script(launch):
    arguments = [*ARGS, "--max_steps", "30", "--max_grad_norm", "0", "--save_steps", "100"]
    arguments[arguments.index("1e-2")] = "1e30"
    launch(LANGUAGE, "--output_dir", "lost", *arguments)
    launch("--monitor", "5", "--on-collapse", "stop", LANGUAGE, "--output_dir", "out", *arguments)
    lost, stopped = (
        json.loads(Path(folder, "trainer_state.json").read_text())["global_step"]
        for folder in ("lost", "out")
    )
    assert lost == 30 and stopped < 10
    alarms = [entry for entry in read_log(Path("out")) if entry["event"] == "alarm"]
    assert [alarm["step"] for alarm in alarms] == [stopped]


# Every way to build a Trainer


def test_subclasses_are_patched_before_their_optimizer_exists(launch):
    script = tiny_script("""
class FromName(Trainer):
    def __init__(self, model, args, **options):
        assert model == "tiny"
        super().__init__(tiny(), args, **options)
class Twice(FromName):
    pass
for trainer in (
    Twice("tiny", arguments(), train_dataset=DATA),
    Seq2SeqTrainer(model=tiny(), args=arguments(Seq2SeqTrainingArguments), train_dataset=DATA),
):
    found = gammas(trainer.model)
    trainer.create_optimizer()
    owned = {id(p) for group in trainer.optimizer.param_groups for p in group["params"]}
    assert all(id(p) in owned for p in trainer.model.parameters())
    trainer.train()
    print(json.dumps([len(found), gammas(trainer.model) == found]), file=open("seen", "a"))
""")
    said = launch("--patch", "sigma_reparam", script)
    assert Path("seen").read_text() == "[4, true]\n" * 2
    assert said.count("4 of 5 layers") == 2


def test_a_model_patched_by_the_script_stays_as_it_is(launch):
    script = tiny_script("""
import hf_stable
model = hf_stable.patch(tiny(), "sigma_reparam")
before = gammas(model)
Trainer(model, arguments())
Trainer(model, arguments())
assert gammas(model) == before
""")
    launch("--patch", "sigma_reparam", script)


def test_an_optimizer_of_the_script_is_refused(launch, capsys):
    script = tiny_script("""
model = tiny()
Trainer(model, arguments(), optimizers=(torch.optim.SGD(model.parameters()), None))
""")
    with pytest.raises(SystemExit) as end:
        launch("--patch", "sigma_reparam", script)
    assert end.value.code == BAD_INPUT
    assert "optimizer exists already" in capsys.readouterr().err
    launch(script)


def test_an_unsupported_model_is_refused_in_one_line(launch, capsys):
    script = tiny_script("""
from transformers import MambaConfig, MambaForCausalLM
config = MambaConfig(hidden_size=8, num_hidden_layers=1, vocab_size=9)
Trainer(MambaForCausalLM(config), arguments())
""")
    with pytest.raises(SystemExit) as end:
        launch("--patch", "sigma_reparam", script)
    assert end.value.code == BAD_INPUT
    said = [line for line in capsys.readouterr().err.splitlines() if "mamba" in line]
    assert len(said) == 1 and said[0].startswith("hf-stable: error: ")
    with pytest.raises(ValueError, match="mamba"):
        launch("--debug", "--patch", "sigma_reparam", script)


def test_fold_at_end_leaves_a_plain_model_that_cannot_be_trained_on(launch):
    script = tiny_script("""
trainer = Trainer(tiny(), arguments(), train_dataset=DATA)
assert gammas(trainer.model)
trainer.train()
assert not gammas(trainer.model)
trainer.save_model("plain")
trainer.create_model_card()
again = Trainer(model_init=tiny, args=arguments(), train_dataset=DATA)
again.train()
again.train()
assert not gammas(again.model)
trainer.train()
""")
    with pytest.raises(RuntimeError, match="--fold-at-end folded this model"):
        launch("--patch", "sigma_reparam", "--fold-at-end", script)
    assert not Path("plain", SIDECAR_FILE).exists()
    GPT2LMHeadModel.from_pretrained("plain")
    (card,) = Path().rglob("README.md")
    assert "Trained with `SigmaReparamConfig(" in card.read_text()


def test_a_train_that_reenters_folds_once_at_its_end(launch):
    script = tiny_script("""
class Reenters(Trainer):
    def train(self, again=True, **options):
        result = super().train(**options)
        return self.train(again=False) if again else result
class Inside(Trainer):
    def _inner_training_loop(self, *args, **kwargs):
        if self.state.global_step == 0 and not hasattr(self, "entered"):
            self.entered = True
            self.train()
            assert gammas(self.model)
        return super()._inner_training_loop(*args, **kwargs)
trainer = Inside(tiny(), arguments(), train_dataset=DATA)
trainer.train()
assert not gammas(trainer.model)
""")
    launch("--patch", "sigma_reparam", "--fold-at-end", script)


def test_no_trainer_in_the_script_is_said(launch):
    script = write("loop.py", "print('no trainer here')\n")
    assert "nothing is patched or watched: loop.py built no" in launch(
        "--patch", "sigma_reparam", script, "--lr", "1"
    )
    assert "nothing" not in launch(script)


def test_no_trainer_is_said_also_where_the_script_exits_cleanly(launch, capsys):
    script = write("loop.py", "raise SystemExit(0)\n")
    with pytest.raises(SystemExit):
        launch("--patch", "sigma_reparam", script)
    assert "nothing is patched" in capsys.readouterr().err


def test_no_trainer_is_said_once_and_before_the_first_step(launch):
    write(
        "loop.py",
        "import sys, torch\n"
        "weight = torch.ones(2, requires_grad=True)\n"
        "optimizer = torch.optim.SGD([weight])\n"
        "for step in range(2):\n"
        "    weight.grad = torch.ones(2)\n"
        "    optimizer.step()\n"
        "    print('stepped', file=sys.stderr)\n",
    )
    lines = launch("--monitor", "5", "-m", "loop", "--lr", "1").splitlines()
    assert "-m loop built no transformers Trainer" in lines[0]
    assert lines[1:] == ["stepped", "stepped"]


def test_a_tau_that_leaves_no_room_to_grow_is_said(launch):
    arguments = [*ARGS, "--optim", "adamw2", "--optim_args"]
    said = launch(LANGUAGE, "--output_dir", "slow", *arguments, "tau=0.01")
    assert "in 4 steps at tau=0.01 a weight grows to 1.04 times its size at most" in said
    said = launch(LANGUAGE, "--output_dir", "fast", *arguments, "tau=1.0")
    assert "a weight grows to" not in said
    said = launch(LANGUAGE, "--output_dir", "planned", *arguments, "tau=auto")
    assert "tau=auto is 0.09487, for 2.5 steps at the full rate" in said


OWN_ENTRY = """
import hf_stable
from hf_stable import Architecture, Attention, Block
hf_stable.register_architecture(hf_stable.Architecture(
    "made-up",
    Block("MadeUpBlock", (Attention("attn", query="q", key="k", value="v", output="o"),)),
))
"""


def test_an_own_architecture_is_registered_before_the_script_runs(launch, own_registry):
    entry = write("entry.py", OWN_ENTRY)
    script = write(
        "lists.py",
        "import hf_stable\nassert 'made-up' in hf_stable.supported_architectures()\n",
    )
    launch("--register", entry, script)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        (None, "no such file"),
        ("print(1)", "it registers nothing"),
        ("import hf_stable\nhf_stable.register_architecture(5)", "failed: TypeError"),
        ("register_architecture(", "failed: SyntaxError"),
        ("# register_architecture\nraise SystemExit(0)", "ended the program (exit code 0)"),
        ("if __name__ == '__main__':\n    register_architecture()", "ran and registered nothing"),
    ],
)
def test_a_file_that_does_not_register_is_refused(tmp_path, capsys, text, message):
    entry = tmp_path / "entry.py"
    if text is not None:
        entry.write_text(text)
    assert main(["run", "--register", str(entry), __file__]) == BAD_INPUT
    (line,) = capsys.readouterr().err.splitlines()
    assert f"--register {entry}" in line and message in line


def test_a_file_that_runs_on_is_named(tmp_path, capsys, own_registry, monkeypatch):
    monkeypatch.setattr(registering, "PATIENCE", 0.05)
    quick, slow = tmp_path / "quick.py", tmp_path / "slow.py"
    quick.write_text(OWN_ENTRY)
    register_from([str(quick)])
    slow.write_text(OWN_ENTRY.replace("made-up", "slow") + "import time\ntime.sleep(0.3)\n")
    register_from([str(slow)])
    said = capsys.readouterr().err
    assert f"--register {slow} has been running for 0.05 s" in said and str(quick) not in said


# What the script sees of its surroundings

LOOK = """
import json, os, sys
import neighbour
json.dump([sys.argv, __name__, __file__, os.getcwd(), sys.path[0], __spec__ and __spec__.name,
           sys.modules["__main__"].__dict__ is globals()], open(sys.argv[1], "w"))
"""


@pytest.mark.parametrize(
    "command",
    [["folder/look.py"], ["link.py"], ["folder"], ["app.zip"], ["-m", "package.look"],
     ["-m", "package"]],
)  # fmt: skip
def test_a_script_sees_what_python_shows_it(launch, tmp_path, command):
    for name in ("folder/look.py", "folder/__main__.py", "package/look.py", "package/__main__.py"):
        write(name, LOOK)
    write("folder/neighbour.py", "")
    write("neighbour.py", "")
    os.symlink("folder/look.py", "link.py")
    shutil.make_archive("app", "zip", "folder")
    arguments = ["--patch", "x", "--", "-m", "--optim=adamw2", "a b", ""]
    launch("--patch", "sigma_reparam", *command, "seen", *arguments)
    launched = json.loads(Path("seen").read_text())
    python(*command, "seen", *arguments)
    assert launched == json.loads(Path("seen").read_text())
    assert launched[0][2:] == arguments


AT_EXIT = """
import atexit, pickle
class Kept: pass
atexit.register(lambda: print(pickle.loads(pickle.dumps(Kept())).__class__.__name__))
"""


@pytest.mark.parametrize("command", [["ends.py"], ["folder"], ["-m", "package.ends"]])
def test_what_runs_at_exit_finds_its_main(monkeypatch, tmp_path, command):
    monkeypatch.chdir(tmp_path)
    for name in ("ends.py", "folder/__main__.py", "package/ends.py"):
        write(name, AT_EXIT)
    # A process of its own, without the seconds that importing transformers takes.
    run = (
        "import sys; from hf_stable.commands.launch import scripts as s; s.run_script(sys.argv[1:])"
    )
    alone = "import sys, types; sys.modules['hf_stable'] = m = types.ModuleType('hf_stable'); "
    alone += f"m.__path__ = [{str(PACKAGE)!r}]; "
    done = python("-c", alone + run, *command)
    assert (done.stdout, done.stderr) == ("Kept\n", "")


@pytest.mark.parametrize("code", [0, 3, "a message"])
def test_exit_codes_pass_through(launch, code):
    script = write("ends.py", f"import sys; sys.exit({code!r})\n")
    with pytest.raises(SystemExit) as end:
        launch(script)
    assert end.value.code == code


@pytest.mark.parametrize("command", [["fails.py"], ["-m", "fails"]])
def test_an_error_shows_the_trace_that_python_shows(launch, capsys, command):
    write("fails.py", "def inner():\n    raise KeyError('of the script')\n\ninner()\n")
    with pytest.raises(KeyError) as failure:
        launch(*command)
    sys.excepthook(failure.type, failure.value, failure.tb)
    shown = capsys.readouterr().err
    alone = python(*command, check=False)
    assert alone.returncode == 1
    # Under -m, python shows the frames of its own runpy first; here they are left out.
    trace = alone.stderr.splitlines(keepends=True)
    own = "".join(line for line in trace if "runpy" not in line)
    assert shown == own and "hf_stable" not in shown


@pytest.mark.parametrize("text", ["def broken(:\n", "import absent_module\n"])
def test_an_error_before_the_first_line_shows_as_in_python(launch, capsys, text):
    write("fails.py", text)
    with pytest.raises((SyntaxError, ImportError)) as failure:
        launch("fails.py")
    sys.excepthook(failure.type, failure.value, failure.tb)
    assert capsys.readouterr().err == python("fails.py", check=False).stderr


@pytest.mark.slow
def test_interrupting_ends_the_process_as_python_does(tmp_path):
    script = tmp_path / "waits.py"
    # Libraries that the Trainer imports may change how Python itself ends.
    script.write_text(
        "import transformers.trainer, time\nprint('ready', flush=True)\ntime.sleep(60)\n"
    )

    def interrupted(*command):
        with subprocess.Popen(
            [sys.executable, *command, str(script)],
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
            # A shell that starts the tests in the background has its children ignore interrupts.
            preexec_fn=functools.partial(signal.signal, signal.SIGINT, signal.SIG_DFL),
        ) as process:
            assert process.stdout.readline() == "ready\n"
            time.sleep(0.5)
            process.send_signal(signal.SIGINT)
            _, errors = process.communicate(timeout=60)
        return process.returncode, errors.rstrip().splitlines()[-1], "hf_stable" in errors

    code, last, is_ours = interrupted()
    assert code != 0 and last == "KeyboardInterrupt" and not is_ours
    assert interrupted("-m", "hf_stable.run") == (code, last, is_ours)


# Options


def parse_options(*options: object) -> RunOptions:
    """What a command line asks for, whose files of architectures need not be there."""
    with pytest.MonkeyPatch.context() as patched:
        patched.setattr("hf_stable.commands.registering.register_from", lambda files: None)
        return parse(*options)


def parse(*options: object) -> RunOptions:
    """What a command line asks for."""
    command = [*map(str, options), __file__]
    launch = app(["run", *command], standalone_mode=False)
    assert isinstance(launch, Launch) and launch.command == (__file__,)
    return launch.options


def test_options_from_a_file_give_way_to_the_command_line(tmp_path):
    config = tmp_path / "hf_stable.yaml"
    config.write_text(
        "patch: [sigma_reparam]\n"
        "patch_config:\n  sigma_reparam: {init: one, exclude: ['*.mlp.*']}\n"
        "monitor: 50\non-collapse: stop\nfold_at_end: true\n"
    )
    sigma = SigmaReparamConfig(init="one", exclude=("*.mlp.*",))
    expected = RunOptions((sigma,), 50, on_collapse="stop", fold_at_end=True)
    assert parse("--config", config) == expected
    assert parse("--config", config, "--monitor=7").monitor == 7
    assert parse() == RunOptions()


def test_the_monitor_is_set_from_either(tmp_path):
    config = tmp_path / "hf_stable.yaml"
    config.write_text(
        "monitor-every: 7\nterms: [entropy, sigma_qk]\nconsole: 'off'\n"
        "thresholds: {entropy_share: 0.1}\nregister: entry.py\n"
        "on_collapse: rollback\nkeep_batches: 4\nskip_batches: true\n"
    )
    from_file = parse_options("--config", config)
    given = ("--monitor", "7", "--terms", "entropy,sigma_qk", "--console", "off")
    given += ("--on-collapse", "rollback", "--keep-batches", "4", "--skip-batches")
    from_line = parse_options(*given, "--thresholds", "entropy_share=0.1", "--register", "entry.py")
    assert from_file == from_line == RunOptions(
        monitor=7, terms=("entropy", "sigma_qk"), console="off",
        thresholds={"entropy_share": 0.1}, register=("entry.py",), on_collapse="rollback",
        keep_batches=4, skip_batches=True,
    )  # fmt: skip
    assert parse("--terms", "all").monitor_options == {"terms": "all"}
    assert parse("--keep-batches", "auto").monitor_options == {"keep_batches": "auto"}


@pytest.mark.parametrize(
    "text",
    [
        "a: &a [x]\n" + "".join(f"b{i}: *a\n" for i in range(21)),
        "a: " + "[" * 21 + "]" * 21,
        "a: " + "x" * (1 << 16),
    ],
)
def test_a_file_of_options_is_bounded(tmp_path, capsys, text):
    config = tmp_path / "bomb.yaml"
    config.write_text(text)
    for option in ("--config", "--patch-config"):
        assert main(["run", "--patch", "sigma_reparam", option, str(config), __file__]) == BAD_INPUT
        error = capsys.readouterr().err
        assert "nested deeper than" in error or "too long" in error


def test_what_is_within_the_bounds_is_read_and_long_values_are_shortened(tmp_path, capsys):
    config = tmp_path / "deep.yaml"
    config.write_text("patch: " + "[" * 18 + "]" * 18)
    assert main(["run", "--config", str(config), __file__]) == BAD_INPUT
    assert "got [[[[...]]]]" in capsys.readouterr().err
    config.write_text("patch: [" + ",".join(f"'{'x' * 90}{i}'" for i in range(90)) + "]")
    assert main(["run", "--config", str(config), __file__]) == BAD_INPUT
    error = capsys.readouterr().err
    assert "unknown method 'xxx" in error and len(error) < 400


@pytest.mark.parametrize(
    ("options", "file", "message"),
    [
        (["--terms", "entropi"], "", "--terms: unknown term 'entropi'"),
        (["--console", "loud"], "", "--console: console is one of short, full, off"),
        (["--keep-batches", "all"], "", "--keep-batches: keep_batches is a number of micro-"),
        (["--skip-batches"], "", "needs on_collapse=\"rollback\", got 'warn'"),
        (["--config", "FILE"], "skip_batches: 3", "skip_batches in FILE: skip_batches is True or"),
        (["--thresholds", "a"], "", "--thresholds takes NAME=NUMBER"),
        (["--thresholds", "no_such=1"], "", "--thresholds: thresholds is a"),
        (["--config", "FILE"], "monitor: 5\nmonitor-every: 6", "FILE gives monitor twice"),
        (
            ["--config", "FILE"],
            "monitor: 5\nmonitor: 6",
            "FILE is not YAML (it gives 'monitor' twice",
        ),
        (["--config", os.curdir], "", ". is no regular file; give a YAML file of options"),
        (["--config", "FILE"], "thresholds: {spike: .nan}", "spike is a number (0.5 by default)"),
        (["--config", "FILE"], "terms: 5", "terms in FILE takes names, got 5"),
        (["--patch", "sigma_reparm"], "", "did you mean 'sigma_reparam'?"),
        (["--monitor", "0"], "", "--monitor takes a number of steps, 1 or more, got '0'"),
        (["--monitor", "often"], "", "got 'often'"),
        (["--on-collapse", "stopp"], "", "did you mean 'stop'?"),
        (["--unknown"], "", "No such option: --unknown"),
        (["--mon", "5"], "", "No such option: --mon"),
        (["--patch"], "", "Option '--patch' requires an argument"),
        (["--config", "FILE"], "monitr: 5", "did you mean 'monitor'?"),
        (["--config", "FILE"], "[1, 2]", "must hold options by name"),
        (["--config", "FILE"], "a: b: c", "mapping values are not allowed"),
        (["--config", "FILE"], "\0", "FILE is not YAML"),
        (["--config", "FILE"], "patch: 5", "patch in FILE takes the name of a method or a list"),
        (["--config", "FILE"], "patch: [{a: 1}]", "patch in FILE takes the name of a method or a"),
        (["--config", "FILE"], "monitor: true", "monitor in FILE takes a number of steps"),
        (["--config", "FILE"], "on_collapse: [stop]", "on_collapse in FILE takes one of warn"),
        (["--patch", "sigma_reparam,sigma_reparam"], "", "--patch names 'sigma_reparam' more than"),
        (
            ["--patch", "sigma_reparam", "--config", "FILE"],
            "patch_config: 5",
            "patch_config in FILE takes options by name ({name: value}), got 5",
        ),
        (
            ["--patch", "sigma_reparam", "--patch-config", "FILE"],
            "sigma_reparam: 5",
            "--patch-config FILE: sigma_reparam takes options by name ({name: value}), got 5",
        ),
        (
            ["--patch", "sigma_reparam", "--patch-config", "FILE"],
            "sigma_reparam: {exclude: 3}",
            "--patch-config FILE: exclude takes a sequence of glob patterns, got 3",
        ),
        (["--config", "FILE"], "fold_at_end: maybe", "fold_at_end in FILE is true or false, got"),
        (["--config", "absent.yaml"], "", "No such file or directory: 'absent.yaml'"),
        (["--patch", "sigma_reparam", "--patch-config", "FILE"], "int: one", "'init'"),
        (["--patch", "sigma_reparam", "--patch-config", "FILE"], "init: two", "init='two'"),
        (["--patch-config", "FILE"], "init: one", "belong under the name of their method"),
        (["--patch-config", "FILE"], "sigma_reparam: {}", "which --patch does not name"),
    ],
)
def test_bad_options_end_in_one_line(tmp_path, capsys, options, file, message):
    path = tmp_path / "file.yaml"
    path.write_text(file)
    script = [] if options == ["--patch"] else [__file__]
    given = [str(path) if option == "FILE" else option for option in options]
    assert main(["run", *given, *script]) == BAD_INPUT
    (error,) = capsys.readouterr().err.splitlines()
    assert error.startswith("hf-stable: error:")
    assert message in error.replace(str(path), "FILE")


def test_null_in_a_file_is_an_option_left_out(tmp_path):
    config = tmp_path / "hf_stable.yaml"
    names = ("patch", "patch_config", "monitor", "on_collapse", "fold_at_end")
    config.write_text("".join(f"{name}: null\n" for name in names))
    assert parse("--config", config) == RunOptions()
    config.write_text("patch: sigma_reparam\npatch_config: {sigma_reparam: null}\n")
    assert parse("--config", config) == RunOptions((SigmaReparamConfig(),))


def test_methods_by_commas_are_applied_together(launch):
    script = tiny_script("""
model = Trainer(tiny(), arguments()).model
assert gammas(model) and isinstance(model.transformer.h[0].ln_1, torch.nn.Identity)
""")
    said = launch("--patch", "sigma_reparam,remove_pre_layernorm", script)
    assert "sigma_reparam, remove_pre_layernorm on GPT2LMHeadModel: 4 of 5 layers" in said


@pytest.mark.parametrize(
    ("argv", "message"),
    [
        ([], "no script given"),
        (["--monitor", "5"], "no script given"),
        (["-m"], "no script given"),
        (["absent.py"], "can't open 'absent.py': no such file"),
        (["."], "can't find '__main__' module in '.'"),
    ],
)
def test_a_missing_script_is_said(monkeypatch, tmp_path, capsys, argv, message):
    monkeypatch.chdir(tmp_path)
    assert main(["run", *argv]) == BAD_INPUT
    assert message in capsys.readouterr().err


# Under other launchers


def our_options() -> list[str]:
    parameters = get_command(app).commands["run"].params
    return [name for each in parameters for name in each.opts if name.startswith("--")]


@pytest.mark.parametrize(
    "parser", [get_args_parser(), launch_command_parser()], ids=["torchrun", "accelerate"]
)
def test_other_launchers_leave_our_options_alone(parser):
    theirs = [name for action in parser._actions for name in action.option_strings]
    clashes = []
    for name in our_options():
        ours = [name, "value", "train.py", name]
        if parser.allow_abbrev and any(
            other != name and other.startswith(name) for other in theirs
        ):
            clashes.append(name)  # newer Pythons let some of these pass
            continue
        read = parser.parse_args(["-m", "hf_stable.run", *ours])
        assert read.training_script == "hf_stable.run" and read.training_script_args == ours
    # What --monitor-every is there for.
    assert clashes == (["--monitor"] if parser.allow_abbrev else [])
    assert {"--monitor", "--monitor-every"} < set(our_options())


@pytest.mark.slow
@pytest.mark.parametrize(
    ("launcher", "num_processes"),
    [
        (("torch.distributed.run", "--standalone", "--nproc_per_node", "2"), 2),
        (("accelerate.commands.launch", "--cpu", "--num_processes", "1"), 1),
    ],
)
def test_under_torchrun_and_accelerate(launch, launcher, num_processes):
    options = ("--patch", "sigma_reparam", "--monitor-every", "2", "--fold-at-end", LANGUAGE)
    arguments = (*ARGS, "--dropout", 0, "--logging_steps", 1, "--per_device_train_batch_size")
    result = python(
        "-m", *launcher, "-m", "hf_stable.run", *options,
        "--output_dir", "out", *arguments, 8 // num_processes,
    )  # fmt: skip
    assert result.stderr.count("8 of 9 layers") == 1  # rank 0 speaks for all
    assert [e["step"] for e in read_log(Path("out")) if e["event"] == "probe"] == [1, 2, 4]
    launch(*options, "--output_dir", "one", *arguments, 8)
    out, one = (
        [entry["loss"] for entry in json.loads(path.read_text())["log_history"] if "loss" in entry]
        for path in (Path("out", "trainer_state.json"), Path("one", "trainer_state.json"))
    )
    # Both see the same global batches; gradients are summed in another order.
    assert len(out) == 4 and out == pytest.approx(one, rel=1e-5)


def python(*arguments: object, check: bool = True) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, *map(str, arguments)]
    return subprocess.run(command, check=check, capture_output=True, text=True)
