"""optim="adamw2": every way to name it, what the Trainer builds from it, and bad options."""

from __future__ import annotations

import copy
import dataclasses
import json
import math
import os
import pickle
import subprocess
import sys

import peft
import pytest
import torch
import yaml
from tiny_models import MODEL_TYPES, tiny_model
from tiny_training import Interrupt, dropout_model, losses, make_trainer, same_state
from transformers import (
    HfArgumentParser,
    LlamaConfig,
    LlamaForCausalLM,
    SchedulerType,
    Trainer,
    TrainingArguments,
)

import hf_stable
from hf_stable.adamw2.planning import plan_tau
from hf_stable.checkpoints.provenance import RECORD_ATTRIBUTE
from hf_stable.measures.parts import Parts
from hf_stable.methods.sigma_reparam.method import sigma_layers


def arguments(**options) -> TrainingArguments:
    return TrainingArguments("out", report_to="none", use_cpu=True, **options)


def built(model, folder, **options):
    """The optimizer that the Trainer builds."""
    return make_trainer(model, folder, optim="adamw2", **options).create_optimizer()


def group_of(optimizer, param):
    return next(g for g in optimizer.param_groups if any(p is param for p in g["params"]))


# Its name


def test_every_way_to_name_it(tmp_path):
    flags = ["--output_dir", "out", "--optim", "adamw2", "--optim_args", "tau=0.004", "--use_cpu"]
    options = {"output_dir": "out", "optim": "adamw2", "optim_args": "tau=0.004", "use_cpu": True}
    (tmp_path / "args.json").write_text(json.dumps(options))
    (tmp_path / "args.yaml").write_text(yaml.safe_dump(options))
    parser = HfArgumentParser(TrainingArguments)
    named = [
        arguments(optim="adamw2", optim_args="tau=0.004"),
        *parser.parse_args_into_dataclasses(flags),
        *parser.parse_dict(options),
        *parser.parse_json_file(str(tmp_path / "args.json")),
        *parser.parse_yaml_file(str(tmp_path / "args.yaml")),
        arguments().set_optimizer("adamw2", args="tau=0.004"),
    ]
    for args in named:
        optimizer_class, kwargs = Trainer.get_optimizer_cls_and_kwargs(args)
        assert issubclass(optimizer_class, hf_stable.AdamW2)
        assert kwargs["tau"] == 0.004
    with pytest.raises(ValueError, match="adamw2"):  # among the names to choose from
        arguments(optim="adamw3")


def test_the_name_that_pickles_look_for_stays():
    """A training_args.bin names a function; moving it would make old checkpoints unreadable."""
    member = arguments(optim="adamw2").optim
    written = pickle.dumps(member)
    assert b"hf_stable.trainer.optimizer" in written and b"optimizer_name" in written
    by_0_1_0 = b"\x80\x02chf_stable.trainer_plugin\n_optimizer_name\nU\x06adamw2\x85R."
    for pickled in (written, by_0_1_0):
        assert pickle.loads(pickled) is member
    with pytest.raises(ValueError, match="adamw3"):
        pickle.loads(by_0_1_0.replace(b"adamw2", b"adamw3"))


def test_arguments_survive_every_copy(tmp_path):
    args = arguments(optim="adamw2", optim_args="tau=0.004")
    torch.save(args, tmp_path / "training_args.bin")
    copies = [
        copy.copy(args),
        copy.deepcopy(args),
        pickle.loads(pickle.dumps(args)),
        dataclasses.replace(args, learning_rate=1e-3),
        torch.load(tmp_path / "training_args.bin", weights_only=False),
        TrainingArguments(**{**args.to_dict(), "output_dir": "out"}),
    ]
    for other in copies:
        assert other.optim is args.optim
        assert other.optim_args == "tau=0.004"
    assert json.loads(args.to_json_string())["optim"] == "adamw2"
    assert args.to_sanitized_dict()["optim"] == "adamw2"
    script = """
import sys, torch
from transformers import HfArgumentParser, Trainer, TrainingArguments
before = HfArgumentParser(TrainingArguments)  # keeps the choices of its time
args = torch.load(sys.argv[1], weights_only=False)  # imports hf_stable
print(args.optim.value, Trainer.get_optimizer_cls_and_kwargs(args)[1]['tau'])
flags = ['--output_dir', 'out', '--optim', 'adamw2']
print(HfArgumentParser(TrainingArguments).parse_args_into_dataclasses(flags)[0].optim.value)
try:
    before.parse_args_into_dataclasses(flags)
except SystemExit:
    print('refused')
"""
    result = subprocess.run(
        [sys.executable, "-c", script, tmp_path / "training_args.bin"],
        capture_output=True,
        text=True,
        cwd=tmp_path,
        env={**os.environ, "HF_HUB_OFFLINE": "1"},
    )
    said = [word for word in result.stdout.split() if word in ("adamw2", "0.004", "refused")]
    assert said == ["adamw2", "0.004", "adamw2", "refused"], result.stderr[-2000:]


# What it builds


def test_options_reach_the_optimizer(tmp_path):
    optimizer = built(
        tiny_model("vit"), tmp_path, optim_args="tau=0.02, power_iterations=3", learning_rate=0.3,
        adam_beta1=0.8, adam_beta2=0.95, adam_epsilon=1e-6, weight_decay=0.2,
    )  # fmt: skip
    assert isinstance(optimizer, hf_stable.AdamW2)
    for group in optimizer.param_groups:
        assert group["lr"] == 0.3
        assert group["betas"] == (0.8, 0.95)
        assert group["eps"] == 1e-6
        assert group["power_iterations"] == 3
    assert {group["tau"] for group in optimizer.param_groups} == {0.02, math.inf}
    assert {group["weight_decay"] for group in optimizer.param_groups} == {0.2, 0.0}


def test_embeddings_and_heads_tied_to_them_are_exempt(tmp_path):
    model = tiny_model("gpt2")
    optimizer = built(model, tmp_path)
    assert model.lm_head.weight is model.transformer.wte.weight
    for weight in (model.transformer.wte.weight, model.transformer.wpe.weight):
        assert group_of(optimizer, weight)["tau"] == math.inf
    assert group_of(optimizer, model.transformer.h[0].mlp.c_fc.weight)["tau"] == 0.01
    assert sum(len(group["params"]) for group in optimizer.param_groups) == len(
        list(model.parameters())
    )


def test_biases_and_what_starts_at_zero_beside_them_are_exempt(model_type, tmp_path):
    model = hf_stable.patch(tiny_model(model_type), "sigma_reparam")
    optimizer = built(model, tmp_path)
    for name, param in model.named_parameters():
        is_embedding = "embeddings." in name and name.endswith("embeddings.weight")
        free = "bias" in name or is_embedding or name.endswith(("wte.weight", "wpe.weight"))
        assert math.isinf(group_of(optimizer, param)["tau"]) == free, name
    if model_type == "vit":  # bare parameters, under the rule
        assert group_of(optimizer, model.vit.embeddings.cls_token)["tau"] == 0.01
    if model_type == "swin":
        assert any("relative_position_bias_table" in name for name, _ in model.named_parameters())


@pytest.mark.parametrize("patched", [False, True], ids=["plain", "patched"])
def test_groups_for_a_loop_are_those_of_the_trainer(model_type, patched, tmp_path):
    model = tiny_model(model_type)
    if patched:
        hf_stable.patch(model, "sigma_reparam")
    frozen = next(model.parameters()).requires_grad_(False)
    theirs = built(model, tmp_path, weight_decay=0.2)
    ours = hf_stable.AdamW2(hf_stable.parameter_groups(model, weight_decay=0.2))
    for name, param in model.named_parameters():
        if param is frozen:
            continue
        mine, other = group_of(ours, param), group_of(theirs, param)
        for option in ("tau", "parts", "weight_decay"):
            if not (option == "weight_decay" and param.ndim > 2):
                assert mine[option] == other[option], (name, option)
    assert sum(len(group["params"]) for group in ours.param_groups) == (
        len(list(model.parameters())) - 1
    )
    default = hf_stable.parameter_groups(model)
    assert {group["weight_decay"] for group in default} == {0.0, 0.01}


@pytest.mark.parametrize("patched", [False, True], ids=["plain", "patched"])
def test_fused_projections_have_a_rate_per_part(patched, tmp_path):
    model = tiny_model("gpt2")
    if patched:
        hf_stable.patch(model, "sigma_reparam", fused_qkv="joint")
    optimizer = built(model, tmp_path)
    attention = model.transformer.h[1].attn
    group = group_of(optimizer, attention.c_attn.weight)
    assert Parts.of(group["parts"]) == Parts((1, 1, 1), dim=1)
    assert Parts.of(group_of(optimizer, attention.c_proj.weight)["parts"]).is_whole


def test_the_class_alone_gets_the_same_groups(tmp_path):
    options = dict(tau="auto", lr=1e-3)

    def given(model, args, **rest):
        return Trainer(model, args, optimizer_cls_and_kwargs=(hf_stable.AdamW2, options), **rest)

    settings = dict(max_steps=4, weight_decay=0.1, learning_rate=1e-3)
    trainer = make_trainer(tiny_model("gpt2"), tmp_path / "class", trainer_class=given, **settings)
    usual = make_trainer(
        tiny_model("gpt2"), tmp_path / "name", optim="adamw2", optim_args="tau=auto", **settings
    )
    trainer.train()
    usual.train()
    own, theirs = (each.optimizer.optimizer.effective_lr() for each in (trainer, usual))
    assert own == theirs and any(isinstance(rate, list) for rate in own.values())
    assert losses(trainer) == losses(usual)
    assert trainer.optimizer_cls_and_kwargs == (hf_stable.AdamW2, options)
    assert options == dict(tau="auto", lr=1e-3)  # the caller's own


def test_model_of_another_architecture(tmp_path):
    config = LlamaConfig(
        vocab_size=37, hidden_size=16, intermediate_size=32, num_hidden_layers=1,
        num_attention_heads=2,
    )  # fmt: skip
    model = LlamaForCausalLM(config)
    args = arguments(optim="adamw2")
    optimizer = Trainer(model, args).create_optimizer()
    assert group_of(optimizer, model.model.embed_tokens.weight)["tau"] == math.inf
    assert group_of(optimizer, model.lm_head.weight)["tau"] == 0.01
    assert all(Parts.of(group["parts"]).is_whole for group in optimizer.param_groups)


def test_effective_rates_are_reported_by_name(tmp_path):
    model = hf_stable.patch(dropout_model("gpt2"), "sigma_reparam")
    trainer = make_trainer(
        model, tmp_path, optim="adamw2", save_strategy="no", learning_rate=0.1,
        lr_scheduler_type="constant",
    )  # fmt: skip
    trainer.train()
    rates = trainer.optimizer.optimizer.effective_lr()
    assert set(rates) == {name for name, _ in model.named_parameters()}
    assert len(rates["transformer.h.0.attn.c_attn.weight"]) == 3
    assert rates["transformer.h.0.mlp.c_fc.weight"] < rates["transformer.wte.weight"] == 0.1


def test_without_a_bound_it_is_adamw(tmp_path):
    results = {}
    for name, optim, optim_args in [
        ("adamw", "adamw_torch_fused", None),
        ("unbounded", "adamw2", "tau=inf"),
        ("bounded", "adamw2", None),
    ]:
        trainer = make_trainer(
            dropout_model("vit"), tmp_path, optim=optim, optim_args=optim_args, save_strategy="no",
            weight_decay=0.1,
        )  # fmt: skip
        trainer.train()
        results[name] = trainer
    assert same_state(results["adamw"].model, results["unbounded"].model)
    assert losses(results["adamw"]) == losses(results["unbounded"])
    assert not same_state(results["adamw"].model, results["bounded"].model)


SCHEDULES = {
    "cosine_with_min_lr": dict(lr_scheduler_kwargs={"min_lr": 1e-5}),
    "cosine_warmup_with_min_lr": dict(lr_scheduler_kwargs={"min_lr": 1e-5}),
    "warmup_stable_decay": dict(lr_scheduler_kwargs={"num_decay_steps": 1}),
    "reduce_lr_on_plateau": dict(eval_strategy="steps", eval_steps=1),
    "greedy": dict(eval_strategy="steps", eval_steps=1, metric_for_best_model="eval_loss"),
}


@pytest.mark.parametrize("scheduler", [kind.value for kind in SchedulerType])
def test_schedules_act_on_every_group(scheduler, tmp_path):
    def rates(optim):
        trainer = make_trainer(
            tiny_model("gpt2"), tmp_path, optim=optim, lr_scheduler_type=scheduler, max_steps=3,
            save_strategy="no", **SCHEDULES.get(scheduler, {}),
        )  # fmt: skip
        trainer.train()
        assert len({group["lr"] for group in trainer.optimizer.param_groups}) == 1
        return [r["learning_rate"] for r in trainer.state.log_history if "learning_rate" in r]

    assert rates("adamw2") == rates("adamw_torch")


class PerGroup(Trainer):
    """A lambda for each of the Trainer's two groups, as its overriders write it."""

    kind = "LambdaLR"

    def create_scheduler(self, num_training_steps, optimizer=None):
        optimizer = self.optimizer if optimizer is None else optimizer
        options = {
            "LambdaLR": dict(lr_lambda=[lambda step: 0.5, lambda step: 0.25]),
            "MultiplicativeLR": dict(lr_lambda=[lambda step: 0.5, lambda step: 0.25]),
            "OneCycleLR": dict(max_lr=[0.5, 0.25], total_steps=10),
            "CyclicLR": dict(base_lr=[0.5, 0.25], max_lr=[0.6, 0.3], cycle_momentum=False),
            "ReduceLROnPlateau": dict(min_lr=[0.5, 0.25]),
        }
        kind = getattr(torch.optim.lr_scheduler, self.kind)
        self.lr_scheduler = kind(optimizer, **options[self.kind])
        return self.lr_scheduler


@pytest.mark.parametrize(
    "kind", ["LambdaLR", "MultiplicativeLR", "OneCycleLR", "CyclicLR", "ReduceLROnPlateau"]
)
def test_a_schedule_of_a_value_per_group_spreads_it_over_what_they_were_parted_into(kind, tmp_path):
    model = tiny_model("gpt2")
    trainer = make_trainer(model, tmp_path, optim="adamw2", learning_rate=1.0, weight_decay=0.1)
    trainer.__class__ = type(kind, (PerGroup,), {"kind": kind})
    trainer.create_optimizer_and_scheduler(10)
    optimizer, scheduler = trainer.optimizer, trainer.lr_scheduler
    assert len(optimizer.param_groups) > 2
    decayed = [group["weight_decay"] > 0 for group in optimizer.param_groups]
    expected = [0.5 if is_decayed else 0.25 for is_decayed in decayed]
    assert set(expected) == {0.5, 0.25}
    if kind == "ReduceLROnPlateau":
        assert scheduler.min_lrs == expected
        return
    if kind == "OneCycleLR":
        assert [group["max_lr"] for group in optimizer.param_groups] == expected
        return
    if kind == "MultiplicativeLR":
        optimizer.step()
        scheduler.step()
    assert [group["lr"] for group in optimizer.param_groups] == expected


def test_a_schedule_of_another_number_of_values_is_still_refused(tmp_path):
    optimizer = built(tiny_model("gpt2"), tmp_path)
    with pytest.raises(ValueError, match="lr_lambdas"):
        torch.optim.lr_scheduler.LambdaLR(optimizer, [lambda step: 1.0] * 7)
    torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: 1.0)


# A checkpoint that AdamW wrote


@pytest.mark.parametrize(
    ("kind", "scheduler"),
    [*((kind, "linear") for kind in MODEL_TYPES), ("gpt2", "greedy")],
)
def test_continues_what_adamw_began(kind, scheduler, tmp_path):
    """Without a bound it is AdamW bit for bit, so that any moment in a wrong place would show."""

    def trained(folder, optim, resume=None, **options):
        trainer = make_trainer(
            dropout_model(kind), tmp_path / folder, optim=optim, max_steps=4, save_steps=2,
            lr_scheduler_type=scheduler, weight_decay=0.1, **SCHEDULES.get(scheduler, {}),
            **options,
        )  # fmt: skip
        trainer.train(resume_from_checkpoint=resume)
        return trainer

    whole = trained("whole", "adamw_torch_fused")
    checkpoint = tmp_path / "whole" / "checkpoint-2"
    same = trained("same", "adamw2", checkpoint, optim_args="tau=inf")
    bounded = trained("bounded", "adamw2", checkpoint)
    assert len(bounded.optimizer.param_groups) > 2
    for trainer in (same, bounded):
        steps = {int(state["step"]) for state in trainer.optimizer.optimizer.state.values()}
        assert steps == {4}
    assert same_state(same.model, whole.model)
    assert losses(same) == losses(whole)
    assert not same_state(bounded.model, whole.model)
    assert losses(bounded)[3] == losses(whole)[3]  # before the first bounded step
    assert {group["tau"] for group in bounded.optimizer.param_groups} >= {0.01, math.inf}
    assert len({group["lr"] for group in bounded.optimizer.param_groups}) == 1


def test_another_optimizer_does_not_continue_what_adamw2_began_and_says_so(tmp_path):
    make_trainer(tiny_model("vit"), tmp_path, optim="adamw2", max_steps=1, save_steps=1).train()
    other = make_trainer(tiny_model("vit"), tmp_path, optim="adamw_torch", max_steps=2)
    with pytest.raises(ValueError, match=r"was saved with AdamW2, and AdamW has no such groups.*"
                                         r"Resume it with optim=.adamw2."):  # fmt: skip
        other.train(resume_from_checkpoint=True)


def test_accumulated_micro_batches_equal_one_batch(tmp_path):
    states = []
    for size, accumulation in [(8, 1), (2, 4)]:
        trainer = make_trainer(
            tiny_model("vit"), tmp_path, optim="adamw2", per_device_train_batch_size=size,
            gradient_accumulation_steps=accumulation, max_steps=3, save_strategy="no",
        )  # fmt: skip
        trainer.train()
        states.append(trainer.model.state_dict())
    for key, value in states[0].items():
        # Sums of float32 gradients in another order, through Adam's division by their size.
        torch.testing.assert_close(value, states[1][key], rtol=1e-3, atol=1e-4)


def test_clipping_by_norm_reaches_it(tmp_path):
    def norms(limit):
        trainer = make_trainer(
            tiny_model("vit"), tmp_path, optim="adamw2", max_grad_norm=limit, adam_epsilon=1.0,
            max_steps=2, save_strategy="no",
        )  # fmt: skip
        start = [param.detach().clone() for param in trainer.model.parameters()]
        trainer.train()
        moved = zip(start, trainer.model.parameters(), strict=True)
        return max((old - new).abs().max().item() for old, new in moved)

    assert norms(1e-4) < 0.1 * norms(1.0)


def test_gamma_moves_within_its_own_bound(tmp_path):
    model = hf_stable.patch(tiny_model("gpt2"), "sigma_reparam")
    start = {name: layer.gamma.detach().clone() for name, layer in sigma_layers(model)}
    trainer = make_trainer(
        model, tmp_path, optim="adamw2", optim_args="tau=0.01", learning_rate=0.5, max_steps=1,
        save_strategy="no",
    )  # fmt: skip
    trainer.train()
    for name, layer in sigma_layers(model):
        change = (layer.gamma.detach() - start[name]).norm() / start[name].norm()
        # Reached, for the rate is far above it; float32 rounding on top.
        assert 0.009 < change <= 0.01 * (1 + 1e-4)


@pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing`:FutureWarning")  # PEFT's own
def test_lora_trains_as_under_adamw(tmp_path):
    def final_loss(optim):
        model = tiny_model("gpt2")
        adapted = peft.get_peft_model(
            model, peft.LoraConfig(r=4, target_modules=["c_attn", "c_fc", "c_proj"])
        )
        trainer = make_trainer(
            adapted, tmp_path, optim=optim, max_steps=40, learning_rate=1e-2, save_strategy="no",
        )  # fmt: skip
        trainer.train()
        assert all(p.any() for name, p in adapted.named_parameters() if "lora_B" in name)
        curve = [loss for loss, _ in losses(trainer).values()]
        return curve[0], sum(curve[-5:]) / 5

    (start, adamw2), (_, adamw) = final_loss("adamw2"), final_loss("adamw_torch")
    print(start, adamw2, adamw)
    assert start - adamw2 > 0.8 * (start - adamw) > 0


# tau=auto


def taus_of(trainer) -> set[float]:
    groups = trainer.optimizer.param_groups
    return {group["tau"] for group in groups if not math.isinf(group["tau"])}


@pytest.mark.parametrize(
    ("schedule", "share"),
    [
        (dict(lr_scheduler_type="constant"), 1.0),
        (dict(lr_scheduler_type="linear"), 0.5),
        (dict(lr_scheduler_type="cosine"), 0.5),
        (dict(lr_scheduler_type="linear", warmup_steps=40), 0.5),
        (dict(lr_scheduler_type="constant_with_warmup", warmup_steps=40), 0.8),
        (dict(lr_scheduler_type="cosine_with_min_lr", lr_scheduler_kwargs={"min_lr_rate": 0.2}),
         0.6),
        (dict(lr_scheduler_type="reduce_lr_on_plateau", eval_strategy="steps"), 1.0),
    ],
)  # fmt: skip
def test_tau_auto_counts_the_steps_at_the_full_rate(schedule, share, tmp_path):
    options = dict(max_steps=100, optim_args="tau=auto") | schedule
    optimizer = built(tiny_model("gpt2"), tmp_path, **options)
    bound = [group for group in optimizer.param_groups if not math.isinf(group["tau"])]
    for group in bound:
        # The share is an integral: a sum over steps, each at its beginning, is off by half a step.
        assert abs(group["total_steps"] - share * 100) < 0.5 + 1e-9
        assert group["tau"] == plan_tau(group["total_steps"])
    assert bound


def test_tau_auto_of_a_run_that_is_counted_in_epochs_and_resumed(tmp_path):
    def trained(folder, resume=None, callbacks=(), **options):
        trainer = make_trainer(
            dropout_model("vit"), tmp_path / folder, optim="adamw2", optim_args="tau=auto",
            callbacks=callbacks, **(dict(max_steps=-1, num_train_epochs=2) | options),
        )  # fmt: skip
        with pytest.raises(ValueError, match=r"known only once train\(\) has begun: let train\(\)"):
            trainer.create_optimizer()
        trainer.train(resume_from_checkpoint=resume)
        return trainer

    whole = trained("whole")  # 2 epochs of 5 batches, linear
    assert taus_of(whole) == {plan_tau(5.5)}
    trained("cut", callbacks=[Interrupt(4)])
    resumed = trained("cut", tmp_path / "cut" / "checkpoint-4")
    assert same_state(resumed.model, whole.model) and losses(resumed) == losses(whole)

    with pytest.warns(UserWarning, match=r"goes on with tau=0\.06396 .* and not with tau=0\.01496"):
        longer = trained("cut", tmp_path / "cut" / "checkpoint-4", num_train_epochs=40,
                         callbacks=[Interrupt(6)])  # fmt: skip
    assert taus_of(longer) == taus_of(whole)


def test_tau_auto_is_in_the_record_of_a_patched_model(tmp_path):
    model = hf_stable.patch(tiny_model("vit"), "sigma_reparam")
    make_trainer(model, tmp_path, optim="adamw2", optim_args="tau=auto", max_steps=2).train()
    settings = getattr(model, RECORD_ATTRIBUTE)["settings"]
    assert settings["optimizer options"] == f"tau=auto,which is {plan_tau(1.5):.4g}"


# Bad options


@pytest.mark.parametrize(
    ("optim_args", "message"),
    [
        ("tau", r"'tau' is not of the form key=value"),
        ("tau=0.1,power_iterations", r"'power_iterations' is not of the form key=value"),
        ("tau=0.1=2", r"'tau=0\.1=2' is not of the form key=value"),
        ("tau=small", r"tau='small', which is no float, and not 'auto'"),
        ("tau=", r"tau='', which is no float"),
        ("power_iterations=1.5", r"power_iterations='1\.5', which is no int"),
        ("taus=0.1", r"'taus', which adamw2 does not take \(did you mean 'tau'\?\)"),
        ("TAU=0.1", r"'TAU', which adamw2 does not take \(did you mean 'tau'\?\)"),
        ("lr=0.1", r"'lr', which adamw2 does not take \(set TrainingArguments\.learning_rate\)"),
        ("tau=0", r"tau"),
        ("tau=-1", r"tau"),
        ("power_iterations=0", r"power_iterations"),
    ],
)
def test_bad_optim_args(optim_args, message, tmp_path):
    with pytest.raises(ValueError, match=message):
        built(tiny_model("vit"), tmp_path, optim_args=optim_args)


@pytest.mark.slow
def test_hyperparameter_search(tmp_path):
    def start():
        return hf_stable.patch(dropout_model("vit"), "sigma_reparam")

    trainer = make_trainer(
        None, tmp_path, model_init=start, optim="adamw2", max_steps=2, eval_strategy="steps",
        eval_steps=2, save_strategy="no",
    )  # fmt: skip
    rates = iter([1e-3, 1e-2, 1e-1])
    best = trainer.hyperparameter_search(
        hp_space=lambda trial: {
            "learning_rate": next(rates),
            "optim_args": trial.suggest_categorical("optim_args", ["tau=0.003", "tau=auto"]),
        },
        n_trials=3,
        backend="optuna",
        direction="minimize",
    )
    assert math.isfinite(best.objective)
    optimizer = trainer.optimizer.optimizer
    assert isinstance(optimizer, hf_stable.AdamW2)
    assert {group["lr"] for group in optimizer.param_groups} <= {0.1, 0.0}
    chosen = {"tau=0.003": 0.003, "tau=auto": plan_tau(1.5)}[trainer.args.optim_args]
    assert taus_of(trainer) == {chosen}
