"""Recipes: every file is valid, small ones run and resume."""

from __future__ import annotations

import json
import math
import re
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from transformers import Trainer, TrainerCallback

import hf_stable

ROOT = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(ROOT))

from recipes import data  # noqa: E402
from recipes.arguments import training_arguments  # noqa: E402
from recipes.models import build  # noqa: E402
from recipes.results import first_step  # noqa: E402
from recipes.run import main, parse, run  # noqa: E402
from recipes.settings import Settings, read_yaml  # noqa: E402

SMALL = sorted((ROOT / "recipes" / "small").glob("*.yaml"))
SLOW_DATA = {"django", "espeak"}
"""What takes seconds to read or to speak, once in a process: so the same one has it twice."""


def short(tmp_path, recipe="vit_digits", **changes):
    known = read_yaml(ROOT / "recipes" / "small" / f"{recipe}.yaml")
    settings = Settings(**(known | dict(steps=6, batch_size=8, output=str(tmp_path / "out"))))
    return replace(settings, **changes)


def test_a_recipe_trains_tests_and_writes_what_it_saw(tmp_path):
    result = run(short(tmp_path, monitor_every=3))
    assert result == json.loads((tmp_path / "out" / "results.json").read_text())
    assert len(result["losses"]) == 6 and result["test_loss"] > 0
    # A loss that rises asks for probes in between, so there may be more.
    assert {1, 2, 3, 6} <= {probe["step"] for probe in result["probes"]}
    assert len(result["probes"][0]["entropy_normalised"]) == 8
    rates = result["probes"][0]["rates"]
    assert {"block 0", "mlp.fc1.weight"} <= set(rates)
    assert "layernorm_before.weight" not in rates  # nor in the means: gains move much faster
    again = run(short(tmp_path, output=str(tmp_path / "again"), monitor_every=3))
    assert again["losses"] == result["losses"]
    other = run(short(tmp_path, output=str(tmp_path / "other"), monitor_every=3, seed=1))
    assert other["losses"] != result["losses"]


class Interrupted(Exception):
    """What ends a run before its end."""


class InterruptsAt4(TrainerCallback):
    def on_step_end(self, args, state, control, **kwargs):
        if state.global_step == 4:
            raise Interrupted


def test_an_interrupted_recipe_goes_on_from_its_checkpoint(tmp_path):
    whole = run(short(tmp_path, output=str(tmp_path / "whole"), save_steps=3))
    assert len(set(whole["losses"])) == 6
    settings = short(tmp_path, save_steps=3)
    with pytest.raises(Interrupted):
        run(settings, callbacks=[InterruptsAt4()])
    assert not (tmp_path / "out" / "results.json").exists()
    assert not (tmp_path / "out" / "checkpoint-6").exists()
    resumed = run(settings)
    assert resumed["losses"] == whole["losses"]
    assert resumed["test_loss"] == whole["test_loss"] and resumed["probes"] == whole["probes"]


def test_a_recipe_that_was_trained_to_the_end_is_only_tested_again(tmp_path):
    settings = short(tmp_path, save_steps=3, monitor_every=3, patch="sigma_reparam")
    first = run(settings)
    weights = tmp_path / "out" / "checkpoint-6" / "model.safetensors"
    written = weights.stat().st_mtime_ns
    again = run(settings)
    assert again | {"seconds": 0} == first | {"seconds": 0}
    assert weights.stat().st_mtime_ns == written
    assert not (tmp_path / "out" / "checkpoint-7").exists()


def test_a_checkpoint_of_other_settings_is_not_gone_on_from(tmp_path):
    run(short(tmp_path, save_steps=3))
    before = (tmp_path / "out" / "results.json").read_text()
    for changes, message in (
        (dict(learning_rate=1e-5), "of a run with learning_rate 0.01 and not 1e-05; give another"),
        (dict(seed=7, save_steps=0), "with save_steps.*|seed 0 and not 7, save_steps 3 and not 0"),
        (dict(model_config={"num_hidden_layers": 2}), "model_config None and not"),
    ):
        with pytest.raises(ValueError, match=message):
            run(short(tmp_path, **(dict(save_steps=3) | changes)))
    assert (tmp_path / "out" / "results.json").read_text() == before
    (tmp_path / "out" / "settings.json").unlink()
    with pytest.raises(ValueError, match="checkpoint without settings.json beside it"):
        run(short(tmp_path, save_steps=3))
    # Where nothing was saved, a folder is anybody's.
    for rate in (1e-3, 1e-4):
        result = run(short(tmp_path, output=str(tmp_path / "free"), steps=1, learning_rate=rate))
        assert result["settings"]["learning_rate"] == rate


def test_labels_are_smoothed_in_training_and_not_in_the_test(tmp_path):
    # At rate 0 the model stays what it was, so that its losses can be compared.
    still = dict(learning_rate=0.0, optim="adamw_torch_fused", optim_args=None, steps=1)
    plain = run(short(tmp_path, **still))
    smooth = run(short(tmp_path, label_smoothing=0.3, **still))
    assert smooth["test_loss"] == plain["test_loss"]
    assert smooth["losses"] != plain["losses"]


def test_a_schedule_takes_its_own_arguments(tmp_path):
    ends = {}
    for kwargs in (None, {"min_lr": 0.002}):
        kind = "cosine_with_min_lr" if kwargs else "cosine"
        arguments = training_arguments(
            short(tmp_path, lr_scheduler_type=kind, lr_scheduler_kwargs=kwargs), tmp_path
        )
        trainer = Trainer(torch.nn.Linear(1, 1), arguments)
        trainer.create_optimizer_and_scheduler(num_training_steps=6)
        for _ in range(6):
            trainer.optimizer.step()
            trainer.lr_scheduler.step()
        ends[kind] = trainer.lr_scheduler.get_last_lr()[0]
    assert ends == {"cosine": pytest.approx(0), "cosine_with_min_lr": pytest.approx(0.002)}


def test_a_command_line_overrides_a_recipe(tmp_path, capsys):
    recipe = str(ROOT / "recipes" / "small" / "vit_digits.yaml")
    options = ["--model_config", '{"num_hidden_layers": 2}', "--threads", "1"]
    settings, dry_run = parse(["--learning_rate", "0.03", recipe, *options])
    assert settings.model_config == {"num_hidden_layers": 2} and not dry_run
    assert settings.learning_rate == 0.03 and settings.optim_args == "tau=0.004"
    with pytest.raises(SystemExit) as end:
        parse([recipe, "--help"])
    said = " ".join(capsys.readouterr().out.split())
    assert end.value.code == 0 and "--dry-run" in said and "YAML file of settings" in said
    assert "the highest (default: 0.01)" in said
    with pytest.raises(SystemExit) as end:
        parse(["--help"])
    said = " ".join(capsys.readouterr().out.split())
    assert end.value.code == 0 and "the highest (default: 0.001)" in said


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ([], "the following arguments are required: recipe"),
        (["none.yaml"], "No such file or directory: 'none.yaml'"),
        (["RECIPE", "--model_config", "2 layers"], "'2 layers' is not a mapping; write it as '{"),
        (["RECIPE", "--model_config", "{a: b: c}"], "'{a: b: c}' is not YAML"),
        (["RECIPE", "--learning_rat", "1"], "learning_rat"),
        (["RECIPE", "--dry-run"], "vit_digits.yaml is embedded (digits), so run it with --steps 2"),
    ],
)
def test_arguments_that_cannot_be_are_named(arguments, message, capsys):
    recipe = str(ROOT / "recipes" / "small" / "vit_digits.yaml")
    with pytest.raises((SystemExit, ValueError)) as end:
        parse([recipe if each == "RECIPE" else each for each in arguments])
    said = capsys.readouterr().err if end.type is SystemExit else str(end.value)
    assert message in said


def test_settings_that_cannot_be_end_in_one_line(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr("sys.argv", ["/somewhere/run.py"])
    recipe = str(ROOT / "recipes" / "small" / "vit_digits.yaml")
    for options, message in (
        (["--model", "resnet"], "model 'resnet' is none of vit, swin"),
        (["--on_collapse", "rollback"], "goes back to a checkpoint, and save_steps 0 writes none"),
        (["--normaliser", "l1"], "normaliser 'l1' is neither frobenius nor weight_norm"),
    ):
        with pytest.raises(SystemExit) as end:
            main([recipe, "--output", str(tmp_path / "out"), *options])
        said = capsys.readouterr().err
        assert end.value.code == 2 and said.startswith("run.py: error: ")
        assert message in said and said.count("\n") == 1


def test_what_is_logged_now_and_then_is_told_by_its_steps(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr("recipes.progress.PAUSE", 0.0)
    each = run(short(tmp_path, output=str(tmp_path / "each")))
    said = capsys.readouterr().err.splitlines()
    lines = [line for line in said if line.startswith("step ")]
    assert len(lines) == 6 and re.fullmatch(
        r"step 6 of 6, loss [\d.]+, [\d.e-]+ s a step", lines[-1]
    )
    # The monitor asks for a record at each of its probes as well.
    some = run(short(tmp_path, logging_steps=3, monitor_every=5))
    assert some["loss_steps"] == [3, 5, 6] and "loss_steps" not in each
    parts = (each["losses"][:3], each["losses"][3:5], each["losses"][5:])
    assert some["losses"] == pytest.approx([sum(part) / len(part) for part in parts], rel=1e-3)
    # The third record covers the steps after the second's.
    assert [first_step([50, 100, 150], record) for record in (None, 1, 2, 3)] == [None, 1, 51, 101]
    monkeypatch.setattr("recipes.progress.PAUSE", 300.0)
    capsys.readouterr()
    run(short(tmp_path, output=str(tmp_path / "quick")))
    assert "step 6 of 6" not in capsys.readouterr().err


def test_old_checkpoints_are_removed_unless_they_may_be_gone_back_to(tmp_path):
    for name, options, kept in (
        ("default", {}, ["checkpoint-5", "checkpoint-6"]),
        ("three", dict(save_total_limit=3), [f"checkpoint-{step}" for step in (4, 5, 6)]),
        ("all", dict(save_total_limit=0), [f"checkpoint-{step}" for step in range(1, 7)]),
        ("back", dict(on_collapse="rollback"), [f"checkpoint-{step}" for step in range(1, 7)]),
    ):
        tiny = dict(model_config=dict(num_hidden_layers=1, hidden_size=8), save_steps=1)
        run(short(tmp_path, output=str(tmp_path / name), **tiny, **options))
        found = sorted(path.name for path in (tmp_path / name).glob("checkpoint-*"))
        assert found == kept


@pytest.mark.parametrize("model", ["vit", "gpt2"])
def test_all_normalisers_start_with_the_same_weights(model):
    """Under Adam the raw weight's size decides how fast a normalised weight moves."""
    task = data.digits() if model == "vit" else data.next_tokens()
    settings = Settings(model=model, init="xavier")
    plain = build(settings, task)
    sigma = build(replace(settings, patch="sigma_reparam"), task)
    others = {
        kind: build(replace(settings, normaliser=kind), task)
        for kind in ("frobenius", "weight_norm")
    }
    layers = [layer.name for layer in hf_stable.describe(sigma).layers if layer.skipped is None]
    assert len(layers) > 20
    for name in layers:
        raw = plain.get_submodule(name).weight
        wanted = sigma.get_submodule(name)
        assert torch.equal(wanted.weight, raw)
        for kind, other in others.items():
            module = other.get_submodule(name)
            kept = module.parametrizations.weight
            original = kept.original1 if kind == "weight_norm" else kept.original
            assert torch.equal(original, raw)
            torch.testing.assert_close(module.weight, wanted.effective_weight())


def test_normed_queries_are_for_vit_alone():
    with pytest.raises(ValueError, match="qk_norm is there for model vit, not for swin"):
        build(Settings(model="swin", qk_norm=True), data.digits())


@pytest.mark.usefixtures("own_registry")
@pytest.mark.parametrize(
    "path",
    [
        pytest.param(
            path,
            id=path.stem,
            marks=[pytest.mark.slow, pytest.mark.xdist_group(read_yaml(path)["data"])]
            if read_yaml(path)["data"] in SLOW_DATA
            else [],
        )
        for path in SMALL
    ],
)
def test_every_small_recipe_builds_its_model(path):
    settings = Settings(**read_yaml(path))
    task = data.load(settings.data, model=settings.model)
    batch = {k: v[None] for k, v in task.train[0].items()}
    loss = build(settings, task)(**batch).loss
    # Before training nothing is known: about the logarithm of the number of labels, or worse.
    assert loss > 0.5 * math.log(task.num_labels)


@pytest.mark.usefixtures("own_registry")
def test_an_architecture_of_a_users_own_is_patched_trained_and_folded(tmp_path):
    settings = short(tmp_path, "linear_swin_digits", threads=1)
    result = run(settings)
    assert len(result["losses"]) == 6 and math.isfinite(result["test_loss"])
    task = data.load(settings.data, model=settings.model)
    patched = build(settings, task)
    kinds = {layer.name: layer.kind for layer in hf_stable.describe(patched).layers}
    assert kinds["swin.encoder.layers.0.blocks.0.attention.q_proj"] == "SigmaLinear"
    assert "swin.encoder.layers.0.blocks.0.attention.mix" not in kinds
    plain = hf_stable.fold(patched)
    assert not hf_stable.is_patched(plain)
    # transformers has no auto class for it, which the plugin passes over.
    hf_stable.trainer.plugin.register()


def test_the_text_is_real_and_its_references_are_entropies():
    task = data.next_tokens()
    assert len(task.train) > 10_000 and len(task.test) == data.TEST_WINDOWS
    assert 5 < task.reference < math.log(task.vocabulary)
    modules = data.which_module()
    labels = modules.train.columns["labels"]
    assert set(labels.tolist()) == set(range(data.NUM_MODULES))
    assert (modules.train.columns["input_ids"][:, 0] == 1).all()  # [CLS]
    assert modules.reference == math.log(data.NUM_MODULES)


def test_a_name_that_no_setting_has_is_refused(tmp_path):
    (tmp_path / "r.yaml").write_text("learning_rat: 1\n")
    with pytest.raises(ValueError, match="unknown 'learning_rat'; allowed are .*learning_rate"):
        read_yaml(tmp_path / "r.yaml")
    with pytest.raises(ValueError, match="data 'mnist' is not embedded"):
        data.load("mnist", model="vit")
    with pytest.raises(ValueError, match="model 'resnet' is none of"):
        build(Settings(model="resnet"), data.digits())


@pytest.mark.slow
def test_a_recipe_runs_from_the_command_line_and_on_two_processes(tmp_path):
    recipe = str(ROOT / "recipes" / "small" / "vit_digits.yaml")
    options = ["--steps", "3", "--batch_size", "4", "--learning_rate", "0.001", "--output"]
    losses = {}
    for name, launcher in (
        ("one", [sys.executable]),
        ("two", [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node", "2",
                 "--master-port", "29655"]),
        # With --cpu it starts one process; without GPUs, this starts two on the CPU.
        ("accelerate", [sys.executable, "-m", "accelerate.commands.launch", "--multi_gpu",
                        "--num_processes", "2", "--num_machines", "1", "--mixed_precision", "no",
                        "--dynamo_backend", "no", "--main_process_port", "29656"]),
    ):  # fmt: skip
        done = subprocess.run(
            [*launcher, str(ROOT / "recipes" / "run.py"), recipe, *options, str(tmp_path / name)],
            capture_output=True,
            text=True,
            cwd=tmp_path,
        )
        assert done.returncode == 0, done.stderr[-3000:]
        result = json.loads((tmp_path / name / "results.json").read_text())
        assert result["settings"]["learning_rate"] == 0.001 and len(result["losses"]) == 3
        losses[name] = result["losses"]
    assert losses["accelerate"] == losses["two"] != losses["one"]


HEALTHY = {
    "vit_digits": dict(steps=80),
    "swin_digits": dict(steps=40, batch_size=8),
    "gpt2_stdlib": dict(steps=60, learning_rate=3e-3, batch_size=8),
    "bert_stdlib": dict(steps=60, batch_size=8),
}


@pytest.mark.slow
@pytest.mark.parametrize("recipe", HEALTHY)
def test_healthy_recipes_of_all_architectures_raise_no_alarm(recipe, tmp_path):
    result = run(short(tmp_path, recipe, **HEALTHY[recipe]))
    assert result["alarms"] == [] and len(result["probes"]) > 4
    assert sum(result["losses"][-10:]) < sum(result["losses"][:10])


WITHOUT_NORMS = dict(
    init="default", patch="remove_pre_layernorm", learning_rate=1e-2, optim="adamw_torch_fused",
    optim_args=None,
)  # fmt: skip


@pytest.mark.slow
@pytest.mark.parametrize(
    ("recipe", "changes"),
    [
        ("gpt2_stdlib", dict(steps=100, batch_size=8)),
        ("vit_digits", dict(steps=60, batch_size=32, weight_decay=0.0)),
    ],
)
def test_a_run_that_collapses_alarms_before_its_loss_is_lost(recipe, changes, tmp_path):
    result = run(short(tmp_path, recipe, **(WITHOUT_NORMS | changes)))
    assert result["test_loss"] is None
    alarm = result["alarms"][0]
    assert alarm["step"] < result["lost_step"]
    print(f"alarm at step {alarm['step']}, lost at step {result['lost_step']}: {alarm}")


@pytest.mark.slow
@pytest.mark.parametrize("warmup", [0.0, 0.2])
def test_gpt2_that_stalls_alarms_and_its_twin_with_warmup_does_not(warmup, tmp_path):
    """Both have a first layer at an entropy share below .1; only one goes on learning."""
    changes = dict(optim="adamw_torch_fused", optim_args=None, warmup=warmup)
    size = dict(steps=150, batch_size=8, model_config=dict(n_layer=3))
    result = run(short(tmp_path, "gpt2_stdlib", **changes, **size))
    assert min(s for probe in result["probes"] for s in probe["entropy_normalised"]) < 0.1
    assert result["lost_step"] is None  # a stall gives nothing back that it had
    stalls = result["test_loss"] > 0.97 * result["reference"]
    assert stalls == (not warmup)
    assert [alarm["kind"] for alarm in result["alarms"]] == ["collapse"] * stalls
