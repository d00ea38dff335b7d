"""The command line as a user meets it: streams, exit codes, help, terminals and pipes."""

import json
import os
import platform
import pty
import re
import shlex
import shutil
import subprocess
import sys

import numpy
import pytest
import torch
import transformers
from report_runs import calm, collapsing, write_run
from safetensors.torch import save_file
from tiny_models import tiny_model
from trained_models import trained
from transformers import trainer_optimizer
from typer.main import get_command

import hf_stable
from hf_stable.commands.conventions import BAD_INPUT, BROKEN_PIPE, CRASH, NO, SUCCESS
from hf_stable.commands.doctor.diagnosis import changes_as_markdown, diagnose, list_changes
from hf_stable.commands.main import app, main
from hf_stable.trainer.changes import listed

COMMANDS = (
    "demo",
    "inspect",
    "fold",
    "export",
    "push",
    "report",
    "watch",
    "doctor",
    "bench sigma",
    "bench adamw2",
    "bench monitor",
    "bench scale",
    "run",
    "preflight",
)


def hf_stable_command(*arguments, **options):
    return subprocess.run(
        [sys.executable, "-m", "hf_stable.commands.main", *map(str, arguments)],
        capture_output=True,
        text=True,
        **options,
    )


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory):
    folder = tmp_path_factory.mktemp("checkpoint") / "model"
    trained("gpt2").save_pretrained(folder)
    return folder


def test_version(capsys):
    assert main(["--version"]) == SUCCESS
    assert capsys.readouterr() == (f"hf-stable {hf_stable.__version__}\n", "")


@pytest.mark.parametrize("arguments", [[], ["--help"], ["-h"]])
def test_help_lists_commands_examples_and_exit_codes(capsys, arguments):
    assert main(arguments) == SUCCESS
    out, err = capsys.readouterr()
    assert err == ""
    for command in COMMANDS:
        assert re.search(rf"^  {command.split()[0]} ", out, re.M)
    assert not re.search(r"^  .*\.\.\.$", out, re.M)  # every summary fits its line
    assert "Examples:\n    hf-stable demo\n" in out
    for code in (SUCCESS, NO, BAD_INPUT, CRASH):
        assert re.search(rf"^ +{code}  ", out, re.M)


@pytest.mark.parametrize("command", COMMANDS)
def test_each_command_has_help_with_an_example_that_parses(capsys, command):
    assert main([*command.split(), "--help"]) == SUCCESS
    out = capsys.readouterr().out
    examples = re.findall(r"^ +((?:hf-stable|torchrun) .*)$", out.partition("Example")[2], re.M)
    assert examples
    for example in examples:
        assert f"hf-stable {command}" in example or f"hf_stable.{command}" in example
        example = example.partition(" train.py")[0].partition(" -m my_package")[0]
        options = [word for word in shlex.split(example) if word.startswith("--")]
        assert all(option in out for option in options)


@pytest.mark.slow
def test_a_bad_file_ends_in_one_line_on_stderr(capsys, checkpoint, tmp_path):
    damaged = tmp_path / "model.safetensors"
    damaged.write_bytes((checkpoint / "model.safetensors").read_bytes()[:-10])
    done = hf_stable_command("inspect", damaged)
    assert done.returncode == BAD_INPUT
    assert done.stdout == ""
    assert done.stderr.count("\n") == 1
    assert done.stderr.startswith(f"hf-stable: error: {damaged} is truncated or damaged")
    assert main(["inspect", str(damaged), "--debug"]) == BAD_INPUT
    err = capsys.readouterr().err
    assert "Traceback" in err and "open_weights" in err
    assert err.splitlines()[-1] == done.stderr.strip()


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["demoo"], "demoo"),
        (["inspect"], "path"),
        (["inspect", "a", "b", "c"], "unexpected extra argument"),
        (["demo", "--seed", "x"], "seed"),
        (["demo", "--sed", "1"], "--sed"),
        (["bench", "sigma", "--rounds", "0"], "rounds"),
        (["bench", "sigma", "--only", "nothing like it"], "no case has 'nothing like it'"),
        (["bench", "adamw2", "--only", "nothing like it"], "no case has 'nothing like it'"),
        (["inspect", "nowhere"], "nowhere does not exist"),
        (["fold", "nowhere", "out"], "nowhere does not exist"),
        (["export", "nowhere", "out"], "nowhere is no folder of a model"),
        (["export", "nowhere", "out", "--dtype", "bf61"], "did you mean 'bf16'?"),
        (["push", "nowhere", "me/model"], "nowhere is no folder of a model"),
    ],
)
def test_wrong_usage_is_one_line_and_code_2(capsys, monkeypatch, tmp_path, arguments, message):
    monkeypatch.chdir(tmp_path)
    assert main(arguments) == BAD_INPUT
    out, err = capsys.readouterr()
    assert out == ""
    assert err.startswith("hf-stable: error: ") and err.count("\n") == 1
    assert message in err.lower() if message.islower() else message in err
    assert not list(tmp_path.iterdir())


def test_an_unexpected_failure_has_its_own_code_and_names_debug(capsys, monkeypatch):
    def fail():
        raise ZeroDivisionError("a bug")

    monkeypatch.setattr("hf_stable.commands.doctor.diagnosis.diagnose", fail)
    assert main(["doctor"]) == CRASH
    line = "hf-stable: error: ZeroDivisionError: a bug (--debug shows the trace)\n"
    assert capsys.readouterr().err == line
    assert main(["--debug", "doctor"]) == CRASH
    assert "Traceback" in capsys.readouterr().err


def test_inspect_prints_plain_text_into_a_pipe(checkpoint):
    done = hf_stable_command("inspect", checkpoint, env={**os.environ, "COLUMNS": "40"})
    assert done.returncode == SUCCESS
    assert done.stderr == ""
    assert done.stdout.isascii() and "\x1b" not in done.stdout
    lines = done.stdout.splitlines()
    assert lines[0] == f"{checkpoint} (folded)"
    assert re.split("  +", lines[1].rstrip()) == [
        "layer", "shape", "dtype", "sigma", "stable rank", "gamma", "raw sigma"
    ]  # fmt: skip
    row = next(line for line in lines if "h.0.mlp.c_proj" in line)
    assert re.fullmatch(r"\S+ +64x16 +float32 +[\d.]+ +[\d.]+ +[\d.]+ +[\d.]+ *", row)


def on_terminal(*arguments, columns):
    """Exit code of a command, and what it shows of its results on a real terminal."""
    parent, child = pty.openpty()
    with subprocess.Popen(
        [sys.executable, "-m", "hf_stable.commands.main", *map(str, arguments)],
        stdout=child,
        stderr=subprocess.DEVNULL,
        env={**os.environ, "TERM": "xterm", "COLUMNS": str(columns)},
    ) as process:
        os.close(child)
        output = b""
        while chunk := _read(parent):
            output += chunk
    os.close(parent)
    return process.returncode, output.decode()


@pytest.mark.slow
def test_inspect_draws_a_table_on_a_terminal(checkpoint):
    code, output = on_terminal("inspect", checkpoint, columns=100)
    assert code == SUCCESS
    assert "\u2503" in output  # a line between columns
    assert "\x1b[" in output


def _read(terminal):
    try:
        return os.read(terminal, 4096)
    except OSError:  # the other side is closed
        return b""


def test_inspect_as_json(capsys, checkpoint):
    assert main(["inspect", str(checkpoint), "--json"]) == SUCCESS
    report = json.loads(capsys.readouterr().out)
    assert report["is_healthy"] and report["kind"] == "folded"
    fused = next(layer for layer in report["layers"] if layer["name"].endswith("h.0.attn.c_attn"))
    assert fused["shape"] == [16, 48] and len(fused["gamma"]) == len(fused["sigma"]) == 3


def test_inspect_says_no_to_a_matrix_with_nan(capsys, tmp_path):
    save_file({"a.weight": torch.full((2, 2), float("nan"))}, tmp_path / "model.safetensors")
    assert main(["inspect", str(tmp_path)]) == NO
    assert "NaN" in capsys.readouterr().out


def test_fold_leaves_behind_what_only_serves_to_go_on(capsys, checkpoint, tmp_path):
    source = shutil.copytree(checkpoint, tmp_path / "source")
    for name in ("random_states_0.pkl", "optimizer.bin", "scheduler.pt", ".env"):
        (source / name).write_bytes(b"private")
    (source / "generation_config.json").write_text("{}")
    assert main(["fold", str(source), str(tmp_path / "plain"), "--json"]) == SUCCESS
    assert json.loads(capsys.readouterr().out)["files"] == [
        "config.json", "generation_config.json", "model.safetensors"
    ]  # fmt: skip


def test_fold_writes_a_plain_folder(capsys, checkpoint, tmp_path):
    output = tmp_path / "plain"
    assert main(["fold", str(checkpoint), str(output)]) == SUCCESS
    assert "model.safetensors" in capsys.readouterr().out
    assert main(["inspect", str(output), "--json"]) == SUCCESS
    assert json.loads(capsys.readouterr().out)["kind"] == "plain"
    assert main(["fold", str(output), str(tmp_path / "again")]) == BAD_INPUT
    assert "nothing to fold" in capsys.readouterr().err
    assert main(["fold", str(checkpoint), str(tmp_path / "json"), "--json"]) == SUCCESS
    assert json.loads(capsys.readouterr().out)["num_layers"] == 8


@pytest.fixture
def three_runs(tmp_path):
    """A run that failed, one that is warned of, and one that trained well."""
    losses = [2.0 * 0.98**step for step in range(60)]
    probes = {step: calm(step) for step in range(10, 61, 10)}
    return [
        collapsing(tmp_path / "bad"),
        collapsing(tmp_path / "odd", lost=False),
        write_run(tmp_path / "good", losses, probes),
    ]


def test_report_as_json_has_numbers_and_the_verdict_of_each_run(capsys, three_runs, tmp_path):
    losses = [2.0, 1.5, 1.0] + [float("nan")] * 40
    spoilt = write_run(tmp_path / "spoilt", losses)
    with (spoilt / "stability.jsonl").open("a") as log:
        log.write("no json\n")
    output = str(tmp_path / "report.csv")
    arguments = ["report", *map(str, [*three_runs, spoilt]), "--format", "csv", "--output", output]
    assert main([*arguments, "--json"]) == NO
    content = json.loads(capsys.readouterr().out, parse_constant=pytest.fail)
    assert content.keys() == {"files", "runs"} and content["files"] == [output]
    rows = {row["run"]: row for row in content["runs"]}
    assert list(rows) == ["bad", "odd", "good", "spoilt"]
    assert [row["verdict"]["state"] for row in rows.values()][:3] == ["failed", "warned", "trained"]
    bad = rows["bad"]
    assert (bad["num_steps"], bad["max_steps"], bad["accuracy"], bad["seconds"]) == (
        140, 140, 0.5, 83.0
    )  # fmt: skip
    assert bad["last_loss"] == 4.0 and bad["largest_sigma_qk"] == 40.0 and bad["alarms"] == 1
    assert bad["verdict"]["divergence_step"] == 81
    assert rows["good"]["verdict"]["divergence_step"] is None
    assert any(each.startswith("To try: ") for each in bad["verdict"]["sentences"])
    assert rows["spoilt"]["last_loss"] is None and rows["spoilt"]["best_loss"] == 1.0
    assert rows["spoilt"]["notes"] and rows["good"]["notes"] == []


def test_report_gives_the_reasons_of_runs_that_failed_or_warned(capsys, three_runs, tmp_path):
    bad, odd, good = map(str, three_runs)
    arguments = ["report", bad, good, odd, "--format", "csv", "--output", str(tmp_path / "r.csv")]
    assert main(arguments) == NO
    lines = capsys.readouterr().out.splitlines()
    headlines = [i for i, line in enumerate(lines) if re.match("(bad|good|odd): ", line)]
    of_bad, of_good, of_odd = (
        lines[start + 1 : end]
        for start, end in zip(headlines, [*headlines[1:], len(lines) - 1], strict=True)
    )
    assert of_good == []
    for sentences in (of_bad, of_odd):
        assert len(sentences) > 2 and all(re.match(r"  \S.*\.$", each) for each in sentences)
    assert of_bad[-1].startswith("  To try: ") and "The loss did not suffer" in of_odd[-1]


@pytest.mark.slow
def test_report_indents_what_a_terminal_wraps(three_runs, tmp_path):
    arguments = ("report", three_runs[0], "--format", "csv", "--output", tmp_path / "r.csv")
    code, output = on_terminal(*arguments, columns=60)
    assert code == NO
    lines = output.splitlines()
    first = next(i for i, line in enumerate(lines) if "From step 81 on" in line)
    last = next(i for i, line in enumerate(lines) if "slow the growth down" in line)
    assert last > first + 5 and all(line.startswith("  ") for line in lines[first : last + 1])


def test_doctor_lists_versions_support_and_every_change(capsys):
    assert main(["doctor"]) == SUCCESS
    out = capsys.readouterr().out
    for wrap in listed():
        assert wrap.target in out and wrap.reason in out
    assert torch.__version__ in out and ", ".join(hf_stable.supported_architectures()) in out
    assert main(["doctor", "--json"]) == SUCCESS
    report = json.loads(capsys.readouterr().out)
    assert report["is_healthy"]
    assert [change["target"] for change in report["changes"]] == [w.target for w in listed()]
    # The hook comes with the first patch, which another test may have made.
    certain = [
        change
        for change in report["changes"]
        if change["made_by"] == "import hf_stable"
        and not re.search("peft|step_post_hook", change["target"])
    ]
    assert len(certain) > 8 and all(change["active"] for change in certain)
    launched = [change for change in report["changes"] if change["made_by"] == "hf-stable run"]
    assert len(launched) == 3
    assert "adamw2" in report["supported"]["optimizers"]


def test_doctor_says_what_a_report_of_a_bug_needs(capsys):
    assert main(["doctor", "--json"]) == SUCCESS
    report = json.loads(capsys.readouterr().out)
    versions = {row["name"]: row["installed"] for row in report["packages"]}
    assert versions["torch"] == torch.__version__ and versions["python"] == sys.version.split()[0]
    assert versions["numpy"] == numpy.__version__  # not asked for, but there
    assert report["machine"]["system"] == platform.platform()
    assert str(torch.get_num_threads()) in report["machine"]["cores"]
    assert os.path.expanduser("~") not in json.dumps(report)


def test_the_list_of_changes_is_a_table_for_the_guide():
    first = listed()[0]
    lines = changes_as_markdown(list_changes()).splitlines()
    assert len(lines) == len(listed()) + 2 and all(line.count("|") == 4 for line in lines)
    assert f"| `{first.target}` | {first.made_by} | {first.reason} |" in lines


def test_doctor_sees_what_is_in_place_and_what_is_not(monkeypatch):
    def rows():
        return {change.target: change.active for change in diagnose().changes}

    saving = "transformers.modeling_utils:PreTrainedModel.save_pretrained"
    handlers = "transformers.trainer_optimizer:_OPTIMIZER_HANDLERS"
    hook = "torch.optim.optimizer:register_optimizer_step_post_hook"
    hf_stable.patch(tiny_model("bert"), "sigma_reparam")
    assert rows()[saving] and rows()[handlers] and rows()[hook]
    original = transformers.PreTrainedModel.save_pretrained.__wrapped__
    monkeypatch.setattr(transformers.PreTrainedModel, "save_pretrained", original)
    monkeypatch.delitem(trainer_optimizer._OPTIMIZER_HANDLERS, "adamw2")
    assert not rows()[saving] and not rows()[handlers] and rows()[hook]


@pytest.mark.slow
def test_a_fresh_process_has_neither_the_hook_of_a_patch_nor_what_run_changes():
    done = hf_stable_command("doctor", "--json")
    changes = json.loads(done.stdout)["changes"]
    on_import = {c["target"]: c["active"] for c in changes if c["made_by"] == "import hf_stable"}
    assert not on_import["torch.optim.optimizer:register_optimizer_step_post_hook"]
    assert on_import["transformers.trainer:Trainer.log"]
    launched = [change["active"] for change in changes if change["made_by"] == "hf-stable run"]
    assert launched == [False, False, False]


def test_a_terminal_without_unicode_gets_text(tmp_path):
    folder = collapsing(tmp_path / "l\u00e4uft")
    environment = {**os.environ, "PYTHONIOENCODING": "ascii"}
    arguments = ("report", folder, "--format", "csv", "--output", tmp_path / "r.csv")
    done = hf_stable_command(*arguments, env=environment)
    assert done.returncode == NO and done.stderr == ""
    assert "l\\xe4uft" in done.stdout and "sigma1(Wq^T Wk)" in done.stdout


@pytest.mark.slow
def test_a_reader_that_goes_away_is_no_failure(checkpoint):
    command = [sys.executable, "-m", "hf_stable.commands.main", "inspect", str(checkpoint)]
    read, write = os.pipe()
    os.close(read)
    done = subprocess.run(command, stdout=write, stderr=subprocess.PIPE, text=True)
    os.close(write)
    assert done.returncode == BROKEN_PIPE and done.stderr == ""


@pytest.mark.slow
def test_long_work_shows_a_bar_on_a_real_terminal(tmp_path):
    source, out = collapsing(tmp_path / "run"), tmp_path / "r.csv"
    parent, child = pty.openpty()
    with subprocess.Popen(
        [
            sys.executable,
            "-m",
            "hf_stable.commands.main",
            "report",
            source,
            "--format",
            "csv",
            "--output",
            out,
        ],
        stdout=subprocess.PIPE,
        stderr=child,
        env={**os.environ, "TERM": "xterm", "COLUMNS": "100"},
    ) as process:
        os.close(child)
        shown = b""
        while chunk := _read(parent):
            shown += chunk
        assert b"\x1b" not in process.stdout.read()
    os.close(parent)
    assert process.returncode == NO and b"Reading runs" in shown


def test_doctor_says_no_to_a_version_that_does_not_fit(capsys, monkeypatch):
    def requires(name):
        return ["torch>=99", "no-such-package>=1", 'no-such-extra; extra == "recipes"']

    monkeypatch.setattr("hf_stable.commands.doctor.diagnosis.requires", requires)
    assert main(["doctor", "--json"]) == NO
    packages = json.loads(capsys.readouterr().out)["packages"]
    verdicts = {row["name"]: row["verdict"] for row in packages}
    assert verdicts["torch"] == "does not fit"
    assert verdicts["no-such-package"] == "missing"
    assert verdicts["no-such-extra"] == "optional"


def test_every_command_is_covered_here():
    commands = []
    for name, command in get_command(app).commands.items():
        commands += [f"{name} {below}" for below in getattr(command, "commands", ())] or [name]
    assert sorted(commands) == sorted(COMMANDS)
