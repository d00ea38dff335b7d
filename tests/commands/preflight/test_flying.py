"""A preflight of real Trainers in this process: what legs do to a run, and what they leave."""

from __future__ import annotations

import json
import math
import shutil

import pytest
import torch
from tiny_models import tiny_batch, tiny_model
from tiny_training import Interrupt
from transformers import EarlyStoppingCallback, Trainer, TrainingArguments

import hf_stable
from hf_stable.adamw2.planning import plan_tau
from hf_stable.commands.preflight.beginnings import judge_beginnings
from hf_stable.commands.preflight.flying import RESULT_FILE
from hf_stable.commands.preflight.page import write_page
from hf_stable.report.reading import read_run

STEPS = 24


def unchanged(model):
    return model


def make_trainer(tmp_path, change=unchanged, **options):
    model = tiny_model("gpt2")
    batch = tiny_batch(model)  # four sentences, which are soon known by heart
    data = [{name: rows[i % 4] for name, rows in batch.items()} for i in range(32)]
    arguments = dict(
        max_steps=200, per_device_train_batch_size=4, learning_rate=1e-2, use_cpu=True,
        lr_scheduler_type="cosine", report_to="none", save_steps=5, disable_tqdm=True,
        remove_unused_columns=False,  # a compiled model does not tell which it uses
    )  # fmt: skip
    args = TrainingArguments(str(tmp_path / "own"), **(arguments | options))
    return Trainer(change(model), args, train_dataset=data)


def fly(tmp_path, make=None, change=unchanged, **options):
    options = dict(remedies="none", rates=[1.0], steps=STEPS, output=tmp_path / "legs") | options
    return hf_stable.preflight(make or (lambda: make_trainer(tmp_path, change)), **options)


def losses(folder):
    history = json.loads((folder / "trainer_state.json").read_text())["log_history"]
    return [record["loss"] for record in history if "loss" in record]


def test_a_leg_is_the_beginning_of_the_run_bit_for_bit(tmp_path):
    result = fly(tmp_path)
    (leg,) = result.outcomes
    assert leg.ending.steps == STEPS and leg.kind == "trains"
    assert leg.ending.facts["max_steps"] == 200 and leg.ending.facts["optim"] == "adamw_torch_fused"

    whole = make_trainer(tmp_path, logging_steps=1, max_steps=200, save_strategy="no")
    whole.add_callback(hf_stable.StabilityCallback(every=1))
    whole.add_callback(Interrupt(2 * STEPS))
    whole.train()
    course = [record["loss"] for record in whole.state.log_history if "loss" in record]
    assert losses(leg.folder) == course[:STEPS]
    whole.save_state()
    own = read_run(tmp_path / "own")
    beginning = judge_beginnings({1: own}, STEPS)[1]
    assert (beginning.kind, own.num_steps) == (leg.kind, 2 * STEPS)
    probes = [probe.quantities for probe in own.probes]
    assert [probe.quantities for probe in read_run(leg.folder).probes] == probes[:STEPS]
    guessing = math.log(whole.model.config.vocab_size)
    assert read_run(leg.folder).guessing == pytest.approx(guessing)
    # A schedule made for the leg alone would be another run.
    short = make_trainer(tmp_path, logging_steps=1, max_steps=STEPS, save_strategy="no")
    short.train()
    assert [r["loss"] for r in short.state.log_history if "loss" in r] != course[:STEPS]
    assert not (tmp_path / "own").exists() or not list((tmp_path / "own").glob("checkpoint-*"))


def test_rates_and_remedies_make_legs_and_a_page(tmp_path):
    made = []

    def make():
        made.append(make_trainer(tmp_path))
        return made[-1]

    result = fly(tmp_path, make, rates=[0.5, 3.0, 1e6, 1e7], remedies="none,adamw2+sigma_reparam")
    found = {(o.leg.remedy.name, o.leg.factor): o for o in result.outcomes}
    assert len(found) == 10
    plain = found["none", 1.0]
    assert found["none", 0.5].loss != plain.loss
    assert found["none", 1e6].is_lost and found["none", 1e7].kind == "skipped"
    assert "lost at 1e+06 times the rate" in found["none", 1e7].reason
    both = found["adamw2+sigma_reparam", 1.0]
    probes = [json.loads(line) for line in (both.folder / "stability.jsonl").open()]
    rates = [line["effective_lr"] for line in probes if line["event"] == "probe"]
    assert any("gamma" in name for name in rates[0])  # patched, and stepped by AdamW2
    assert both.survives and result.remedies[0].fails_at == 1e6
    # tau goes by the 200 steps of the run, half of them at the full rate, and not by the leg's.
    assert math.isclose(result.tau, plan_tau(100), rel_tol=0.02)
    assert result.tau in {group["tau"] for group in made[-1].optimizer.param_groups}
    assert f"AdamW2's tau=auto is tau={result.tau:.3g}" in " ".join(result.sentences)
    assert json.loads((tmp_path / "legs" / RESULT_FILE).read_text())["passed"] is result.passed
    page = write_page(result, tmp_path / "legs").read_text()
    assert '<td class="failed">' in page and "not run" in page and result.sentences[0] in page


def test_legs_that_are_done_are_taken_and_others_run(tmp_path):
    made = []

    def make():
        made.append(1)
        return make_trainer(tmp_path)

    first = fly(tmp_path, make)
    again = fly(tmp_path, make)
    assert len(made) == 1 and again.outcomes[0].loss == first.outcomes[0].loss
    fly(tmp_path, make, rates=[1.0, 2.0])
    assert len(made) == 2
    fly(tmp_path, make, steps=STEPS + 1)
    assert len(made) == 3
    with pytest.raises(ValueError, match="holds the preflight of"):
        fly(tmp_path, lambda: make_trainer(tmp_path))
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "something").write_text("")
    with pytest.raises(ValueError, match="is not empty and holds no preflight"):
        fly(tmp_path, make, output=tmp_path / "full")


def test_a_second_preflight_is_refused_while_one_runs_in_the_folder(tmp_path):
    refused = []

    def make():
        with pytest.raises(ValueError, match="a preflight runs in .*legs already"):
            fly(tmp_path, make)
        refused.append(True)
        return make_trainer(tmp_path)

    fly(tmp_path, make)
    assert refused == [True]
    fly(tmp_path, make)  # which is over, and is taken as it is
    assert refused == [True]


def adapted(model):
    peft = pytest.importorskip("peft")
    return peft.get_peft_model(model, peft.LoraConfig(target_modules=["c_attn"]))


def compiled(model):
    return torch.compile(model, backend="eager")


def norm_free(model):
    return hf_stable.patch(model, "remove_pre_layernorm")


def unwritable(model):
    model.config.tensor = torch.zeros(2)
    return model


@pytest.fixture(scope="module")
def plainly(tmp_path_factory):
    """The folder of a preflight that a plain model flew, one leg of it."""
    folder = tmp_path_factory.mktemp("plainly")
    (leg,) = fly(folder).outcomes
    assert read_run(leg.folder).guessing is not None
    return folder / "legs"


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing`:FutureWarning")  # PEFT's own
@pytest.mark.parametrize(
    ("change", "is_known"),
    [(norm_free, True), (compiled, True), (adapted, False), (unwritable, False)],
)
def test_a_config_that_says_nothing_ends_no_leg(tmp_path, capsys, plainly, change, is_known):
    shutil.copytree(plainly, tmp_path / "legs")
    # The leg has the folder of the plain model's, whose config is not this one's.
    (leg,) = fly(tmp_path, change=change, steps=STEPS + 1).outcomes
    before = plainly / leg.folder.relative_to(tmp_path / "legs")
    assert leg.ending.steps == STEPS + 1 and (before / "config.json").is_file()
    known = read_run(before).guessing
    assert read_run(leg.folder).guessing == (known if is_known else None)
    said = "cannot be written as JSON" in capsys.readouterr().err
    assert said == (change is unwritable)


@pytest.mark.slow
def test_a_bisection_ends_within_a_factor_of_one_and_a_half(tmp_path):
    row = fly(tmp_path, rates=[1.0, 1e4], bisect=True).remedies[0]
    assert row.survives_to < row.fails_at <= 1.5 * row.survives_to


def test_an_optimizer_of_the_scripts_own_has_its_rate_scaled_and_nothing_else(tmp_path):
    def make():
        trainer = make_trainer(tmp_path)
        optimizer = torch.optim.SGD(trainer.model.parameters(), lr=0.25)
        schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: 1 / (1 + step))
        trainer.optimizer, trainer.lr_scheduler = optimizer, schedule
        trainer.add_callback(EarlyStoppingCallback())  # would ask for evaluations
        return trainer

    result = fly(tmp_path, make, rates=[1.0, 4.0], remedies="adamw2,sigma_reparam,warmup,clip:0.1")
    rows = {row.remedy.name: row for row in result.remedies}
    assert result.rate == 0.25
    for name in ("adamw2", "sigma_reparam"):
        assert "hands its own optimizer to the Trainer" in rows[name].refused
    assert "hands its own schedule" in rows["warmup"].refused and not rows["clip:0.1"].refused
    history = {
        o.leg.factor: json.loads((o.folder / "trainer_state.json").read_text())["log_history"]
        for o in result.outcomes
        if o.leg.remedy.name == "none"
    }
    for own, scaled in zip(history[1.0][:5], history[4.0][:5], strict=True):
        assert math.isclose(scaled["learning_rate"], 4 * own["learning_rate"], rel_tol=1e-12)


def test_a_clip_that_changes_nothing_is_said_to(tmp_path):
    row = fly(tmp_path, remedies="clip").remedies[1]
    assert "clips gradients at 1 already" in row.refused


def test_an_error_that_is_not_the_losses_ends_the_preflight(tmp_path):
    def make():
        trainer = make_trainer(tmp_path)

        def fail(module, inputs):
            if trainer.state.global_step == 3:
                raise MemoryError("no room")

        trainer.model.register_forward_pre_hook(fail)
        return trainer

    with pytest.raises(MemoryError, match="no room"):
        fly(tmp_path, make)
    assert not (tmp_path / "legs" / RESULT_FILE).exists()


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"rates": [0.0]}, "a rate is a positive multiple of the script's own, got 0.0"),
        ({"rates": [math.nan]}, "a rate is a positive multiple"),
        ({"remedies": "adamw"}, r"unknown remedy 'adamw' \(did you mean 'adamw2'\?\)"),
        ({"remedies": "optim:adafactr"}, r"names no optimizer .* \(did you mean 'adafactor'\?\)"),
        ({"steps": 4}, "4 steps are too few: a loss can be judged from 20 on"),
        ({"seeds": 0}, "seeds is a number from 1 on, got 0"),
    ],
)
def test_bad_input_is_refused_before_anything_is_done(tmp_path, options, message):
    with pytest.raises(ValueError, match=message):
        fly(tmp_path, **options)
    assert not (tmp_path / "legs").exists()
