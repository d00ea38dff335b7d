"""The Trainer under DeepSpeed ZeRO on two processes: sigma follows the weights, folders are plain.

All runs on ranks share two processes, whose imports would cost more than the training.
"""

from __future__ import annotations

import functools
import inspect
import shutil

import pytest
import torch
import torch.distributed as dist
import transformers
from deepspeed_runs import (
    ROUNDING,
    STEPS,
    UNDER_ADAMW2,
    adamw2_of,
    digest,
    largest_error,
    losses_of,
    make_model,
    same_on_ranks,
    settings,
    told_accelerator,  # noqa: F401  (a fixture for all tests here)
    train,
)
from gloo_ranks import run_ranks
from tiny_models import tiny_batch, tiny_model
from tiny_training import make_trainer
from transformers import TrainerCallback
from transformers.integrations.deepspeed import unset_hf_deepspeed_config

import hf_stable
from hf_stable._file_names import SIDECAR_FILE
from hf_stable.checkpoints.sidecar import read_state
from hf_stable.commands.main import main
from hf_stable.methods.sigma_reparam.method import sigma_layers
from hf_stable.monitor.log_file import read_log
from hf_stable.trainer.changes import is_in_place, listed
from hf_stable.trainer.deepspeed_engine import ON_DEEPSPEED, follow_deepspeed

pytest.importorskip("deepspeed")
pytestmark = [pytest.mark.slow, pytest.mark.xdist_group("deepspeed")]

CASES = {
    "gpt2-0": dict(stage=0),
    "gpt2-1": dict(stage=1),
    "gpt2-2": dict(stage=2),
    "vit-1": dict(stage=1),
    "swin-2": dict(stage=2),
    "bert-2": dict(stage=2),
    "llama-1": dict(stage=1),
    "gpt2-1-offload": dict(stage=1, offload_optimizer={"device": "cpu"}),
    "gpt2-3": dict(stage=3),
    "vit-3": dict(stage=3),
    "llama-3": dict(stage=3),
}
"""Runs whose losses are those of one process, by model, stage and what else is asked for."""

UNIVERSAL = "gpt2-2"
"""The run that goes on from its middle on another number of processes."""

ADAMW2 = {
    "gpt2-1": dict(stage=1),
    "gpt2-3": dict(stage=3),
    "vit-2": dict(stage=2),
    "llama-3": dict(stage=3),
    "gpt2-2-offload": dict(stage=2, offload_optimizer={"device": "cpu"}),
}
"""The same under AdamW2, which bounds each weight of the flat partitions."""

NAMES = {"gpt2": "GPT-2", "vit": "ViT", "swin": "Swin", "bert": "BERT", "llama": "Llama"}


def shows(cases, method, *aspects):
    """The cases, each with the row of the guide's table that its test stands for."""
    return [
        pytest.param(
            case,
            marks=pytest.mark.parity(
                engine=f"DeepSpeed ZeRO {options['stage']}",
                models=(NAMES[case.partition("-")[0]],), method=method, same=aspects,
            ),
        )
        for case, options in cases.items()
    ]  # fmt: skip


class RemembersStart(TrainerCallback):
    """Takes note of the vectors of a layer once the engine is built."""

    def on_train_begin(self, args, state, control, model, **kwargs):
        self.layer = dict(sigma_layers(model))["transformer.h.0.attn.c_attn"]
        self.start = self.layer.sigma_v.clone()


def on_ranks(folder):
    """Every run of this file, one after the other on the same two processes."""
    import deepspeed

    # They exchange by gloo alone: the exchange by shared memory takes a minute to compile.
    deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False
    world = dist.get_world_size()
    found: dict = {"parity": {}, "adamw2": {}}
    for case, zero in CASES.items():
        trainer = train(
            case.partition("-")[0], folder / case, world, deepspeed=settings(**zero),
            save_strategy="steps", save_steps=STEPS // 2 if case == UNIVERSAL else STEPS,
        )  # fmt: skip
        if case == "gpt2-3":
            trainer.deepspeed.save_16bit_model(folder / case / "together")
        found["parity"][case] = {
            "losses": losses_of(trainer),
            "engine": type(trainer.deepspeed.optimizer).__name__,
            "partitioned": all(not p.numel() for p in trainer.model.parameters()),
            "same": same_on_ranks(trainer.model),
        }
    for case, zero in ADAMW2.items():
        trainer = train(
            case.partition("-")[0], folder / f"adamw2-{case}", world, deepspeed=settings(**zero),
            **UNDER_ADAMW2,
        )  # fmt: skip
        found["adamw2"][case] = {
            "losses": losses_of(trainer), "rates": adamw2_of(trainer).effective_lr(),
        }  # fmt: skip
    found["bf16"] = {
        stage: continued_in_bfloat16(folder / f"bf16-{stage}", world, stage) for stage in (2, 3)
    }
    found["skipped"] = overflowing(folder / "skipped", world)
    found["refused"] = refused(folder / "refused", world)
    return found


def continued_by_one(folder):
    """The second half of a run of two processes, on one, from a universal checkpoint."""
    import deepspeed

    deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False
    trainer = train(
        "gpt2", folder / "by-one", resume=str(folder / UNIVERSAL / f"checkpoint-{STEPS // 2}"),
        deepspeed=settings(stage=2) | {"checkpoint": {"load_universal": True}},
    )  # fmt: skip
    return {"losses": losses_of(trainer), "error": largest_error(trainer.model)}


def continued_in_bfloat16(folder, world, stage):
    """Steps with float32 masters under dropout, and half of them again from a checkpoint."""
    unset_hf_deepspeed_config()
    options = dict(deepspeed=settings("bf16", stage=stage), bf16=True, **UNDER_ADAMW2)
    whole = train(
        "gpt2", folder / "whole", world, make_model("gpt2", dropout=True),
        save_strategy="steps", save_steps=STEPS // 2, **options,
    )  # fmt: skip
    unset_hf_deepspeed_config()
    again = train(
        "gpt2", folder / "again", world, make_model("gpt2", dropout=True),
        resume=str(folder / "whole" / f"checkpoint-{STEPS // 2}"), **options,
    )  # fmt: skip
    return {
        "dtypes": sorted({str(p.dtype) for p in whole.model.parameters()}),
        "whole": losses_of(whole),
        "again": losses_of(again),
        "same": same_on_ranks(whole.model),
        "state": digest(whole.model) == digest(again.model),
        "error": largest_error(whole.model),
    }


def overflowing(folder, world):
    """Steps whose gradients overflow, all of which DeepSpeed skips."""
    config = settings("bf16", stage=1)
    config["bf16"]["check_grad_overflow"] = True
    unset_hf_deepspeed_config()
    model = make_model("gpt2")
    model.transformer.h[0].attn.c_attn.bias.register_hook(lambda grad: grad * float("inf"))
    remembers = RemembersStart()
    trainer = train(
        "gpt2", folder, world, model, deepspeed=config, bf16=True, callbacks=[remembers]
    )  # fmt: skip
    return {
        "skipped": trainer.deepspeed.skipped_steps,
        "moved": not torch.equal(remembers.layer.sigma_v, remembers.start),
    }


def refused(folder, world):
    """What every rank is told, after which the others go on: nobody waits."""
    (folder / "other").mkdir(parents=True, exist_ok=True)
    rank = dist.get_rank()
    by_hand = settings(stage=1) | {
        "train_micro_batch_size_per_gpu": 1, "zero_allow_untested_optimizer": True,
        "gradient_accumulation_steps": 1, "gradient_clipping": 1.0,
    }  # fmt: skip

    def differently():
        unset_hf_deepspeed_config()
        excluded = ["transformer.h.1.*"] if rank else None
        model = hf_stable.patch(tiny_model("gpt2"), "sigma_reparam", exclude=excluded)
        ways = dict(deepspeed=settings(stage=2), save_strategy="no", optim="adamw_torch")
        make_trainer(model, folder, max_steps=1, per_device_train_batch_size=4, **ways).train()

    def with_own_optimizer():
        config = settings(stage=1) | {"optimizer": {"type": "AdamW", "params": {"lr": 1e-3}}}
        train("gpt2", folder, world, deepspeed=config, optim="adamw2", learning_rate=1e-3)

    def from_another_engine():
        train("gpt2", folder, world, resume=str(folder / "other"), deepspeed=settings(stage=1))

    def without_gammas():
        import deepspeed

        unset_hf_deepspeed_config()
        model = tiny_model("gpt2")
        optimizer = torch.optim.AdamW(model.parameters())
        hf_stable.patch(model, "sigma_reparam")
        deepspeed.initialize(model=model, optimizer=optimizer, config=by_hand)

    def patched_inside():
        import deepspeed

        unset_hf_deepspeed_config()
        model = tiny_model("gpt2")
        optimizer = torch.optim.AdamW(model.parameters())
        engine, *_ = deepspeed.initialize(model=model, optimizer=optimizer, config=by_hand)
        hf_stable.patch(engine.module, "sigma_reparam")

    told = {}
    for attempt in (
        patched_inside,
        differently,
        with_own_optimizer,
        from_another_engine,
        without_gammas,
    ):
        with pytest.raises((ValueError, RuntimeError)) as error:
            attempt()
        everywhere = [None] * world
        dist.all_gather_object(everywhere, str(error.value))
        told[attempt.__name__] = everywhere
    return told


@pytest.fixture(scope="module")
def ran(tmp_path_factory):
    folder = tmp_path_factory.mktemp("deepspeed")
    result, _ = run_ranks(on_ranks, 2, folder)
    return result, folder


def alone_folder(tmp_path_factory):
    """Where the runs of one process are."""
    return tmp_path_factory.getbasetemp() / "alone"


@pytest.fixture(scope="module")
def alone(tmp_path_factory):
    folder = alone_folder(tmp_path_factory)
    names = {case.partition("-")[0] for case in CASES}
    return {name: losses_of(train(name, folder / name)) for name in sorted(names)}


@pytest.fixture(scope="module")
def alone_under_adamw2(tmp_path_factory):
    folder = tmp_path_factory.mktemp("adamw2")
    found = {}
    for name in sorted({case.partition("-")[0] for case in ADAMW2}):
        trainer = train(name, folder / name, **UNDER_ADAMW2)
        found[name] = losses_of(trainer), adamw2_of(trainer).effective_lr()
    return found


@pytest.mark.parametrize("case", shows(CASES, "sigmaReparam", "losses"))
def test_losses_are_those_of_one_process(case, ran, alone):
    found, expected = ran[0]["parity"][case], alone[case.partition("-")[0]]
    assert ("ZeroOptimizer" in found["engine"]) == (CASES[case]["stage"] > 0)
    assert found["partitioned"] == (CASES[case]["stage"] == 3)
    assert found["same"]
    assert list(found["losses"]) == list(expected) == list(range(1, STEPS + 1))
    for step, loss in expected.items():
        assert found["losses"][step] == pytest.approx(loss, rel=ROUNDING)
    assert max(expected.values()) - min(expected.values()) > 1e-3


@pytest.mark.parametrize("case", shows(ADAMW2, "sigmaReparam and AdamW2", "losses"))
def test_adamw2_steps_as_in_one_process(case, ran, alone_under_adamw2):
    found = ran[0]["adamw2"][case]
    losses, rates = alone_under_adamw2[case.partition("-")[0]]
    for step, loss in losses.items():
        assert found["losses"][step] == pytest.approx(loss, rel=ROUNDING)
    assert found["rates"].keys() == rates.keys()
    for name, rate in rates.items():
        # A ratio of two spectral norms, one of an update that small second moments divide.
        assert found["rates"][name] == pytest.approx(rate, rel=10 * ROUNDING), name
    # The rule binds: what is exempt has the rate of the schedule, and matrices have less.
    every = [
        each for rate in rates.values() for each in (rate if isinstance(rate, list) else [rate])
    ]
    assert min(every) < 0.5 * max(every)


@pytest.mark.parametrize("case", shows(CASES, "sigmaReparam", "checkpoints"))
def test_checkpoints_are_plain_folders(case, ran):
    folder = ran[1] / case / f"checkpoint-{STEPS}"
    name = case.partition("-")[0]
    model_class = type(make_model(name))
    plain = model_class.from_pretrained(folder).eval()
    patched = hf_stable.load(model_class, folder).eval()
    batch = {k: v for k, v in tiny_batch(plain).items() if k != "labels"}
    with torch.no_grad():
        # Folding rounds each weight once.
        torch.testing.assert_close(
            plain(**batch).logits, patched(**batch).logits, rtol=ROUNDING, atol=ROUNDING
        )
    start = make_model(name).eval()
    with torch.no_grad():
        assert not torch.allclose(plain(**batch).logits, start(**batch).logits, atol=1e-3)


@pytest.mark.parity(
    engine="DeepSpeed ZeRO {stage}", models=("GPT-2",), method="sigmaReparam and AdamW2",
    same=("resume",),
)  # fmt: skip
@pytest.mark.parametrize("stage", [2, 3])
def test_bfloat16_with_float32_masters_resumes_exactly(stage, ran):
    found, folder = ran[0]["bf16"][stage], ran[1] / f"bf16-{stage}" / "whole"
    folder /= f"checkpoint-{STEPS}"
    assert found["dtypes"] == ["torch.bfloat16"]
    assert found["same"] and found["state"]
    half = {step: loss for step, loss in found["whole"].items() if step > STEPS // 2}
    assert {s: found["again"][s] for s in half} == half and len(half) == STEPS // 2
    assert found["error"] < ROUNDING  # of the weights that the next forward uses
    raw = read_state(folder).tensors
    assert {
        tensor.dtype for name, tensor in raw.items() if name.endswith((".weight", ".gamma"))
    } == {torch.float32}
    weight = raw["transformer.h.0.attn.c_attn.weight"]
    assert not torch.equal(weight, weight.bfloat16().float())  # masters, not roundings
    assert (folder / SIDECAR_FILE).is_file()
    plain = transformers.GPT2LMHeadModel.from_pretrained(folder, dtype="auto")
    assert {p.dtype for p in plain.parameters()} == {torch.bfloat16}


@pytest.mark.parametrize(("case", "safe"), [("gpt2-3", False), ("llama-3", True)])
def test_what_zero_to_fp32_writes_is_folded(case, safe, ran, tmp_path):
    from deepspeed.utils.zero_to_fp32 import convert_zero_checkpoint_to_fp32_state_dict

    checkpoint = ran[1] / case / f"checkpoint-{STEPS}"
    raw, plain = tmp_path / "raw", tmp_path / "plain"
    convert_zero_checkpoint_to_fp32_state_dict(checkpoint, raw, safe_serialization=safe)
    shutil.copy(checkpoint / "config.json", raw)
    model_class = type(make_model(case.partition("-")[0]))
    if safe:
        with pytest.raises(ValueError, match="raw weights of a patched model"):
            model_class.from_pretrained(raw)
    assert main(["fold", str(raw), str(plain)]) == 0
    folded, saved = (model_class.from_pretrained(each).state_dict() for each in (plain, checkpoint))
    for key, tensor in saved.items():
        assert torch.equal(folded[key], tensor)  # the same float32 numbers in the same order


def test_what_the_engine_saves_in_one_file_is_folded(ran, tmp_path):
    together, checkpoint = ran[1] / "gpt2-3" / "together", ran[1] / "gpt2-3" / f"checkpoint-{STEPS}"
    shutil.copy(checkpoint / "config.json", together)
    assert main(["fold", str(together), str(tmp_path / "plain")]) == 0
    model_class = type(make_model("gpt2"))
    folded, saved = (
        model_class.from_pretrained(each).state_dict() for each in (tmp_path / "plain", checkpoint)
    )
    for key, tensor in saved.items():
        assert torch.equal(folded[key], tensor)


def test_a_universal_checkpoint_continues_on_another_number_of_processes(ran, monkeypatch):
    from deepspeed.checkpoint import ds_to_universal

    folder = ran[1] / UNIVERSAL / f"checkpoint-{STEPS // 2}"
    step = (folder / "latest").read_text()
    given = dict(
        input_folder=folder / step, output_folder=folder / f"{step}_universal",
        num_extract_workers=1, num_merge_workers=1,
    )  # fmt: skip
    words = [word for name, value in given.items() for word in (f"--{name}", str(value))]
    monkeypatch.setattr("sys.argv", ["ds_to_universal", *words, "--inject_missing_state"])
    ds_to_universal.main(ds_to_universal.parse_arguments())
    (found,) = run_ranks(continued_by_one, 1, ran[1])
    whole = ran[0]["parity"][UNIVERSAL]["losses"]
    for number in range(STEPS // 2 + 1, STEPS + 1):
        assert found["losses"][number] == pytest.approx(whole[number], rel=ROUNDING)
    assert found["error"] < ROUNDING


@pytest.mark.parametrize(
    ("attempt", "message"),
    [
        ("differently", "the ranks have patched the model differently"),
        ("with_own_optimizer", "an optimizer ('AdamW'), which takes the place of AdamW2"),
        ("from_another_engine", "was not saved under DeepSpeed"),
        ("patched_inside", "the model is wrapped in DeepSpeedEngine already"),
        ("without_gammas", "have their weight in the optimizer but not their gamma"),
    ],
)
def test_every_rank_is_told_what_cannot_work(attempt, message, ran):
    told = ran[0]["refused"][attempt]
    assert len(told) == 2 and all(message in each for each in told)


@pytest.mark.parametrize("case", ["gpt2-1", "gpt2-2", "gpt2-3"])
def test_the_monitor_records_what_it_records_in_one_process(case, ran, alone, tmp_path_factory):
    mine, theirs = (
        [event for event in read_log(folder) if event["event"] == "probe"]
        for folder in (ran[1] / case, alone_folder(tmp_path_factory) / "gpt2")
    )
    assert [event["step"] for event in mine] == [event["step"] for event in theirs] != []
    for one, other in zip(mine, theirs, strict=True):
        gammas = () if case == "gpt2-3" else ("gamma",)  # which no process has whole there
        assert ("gamma" in one["quantities"]) == bool(gammas)
        for quantity in ("entropy", "sigma_qk", "sec", *gammas):
            for layer, value in other["quantities"][quantity].items():
                # Spectra of products of small weights lose a digit.
                assert one["quantities"][quantity][layer] == pytest.approx(
                    value, rel=10 * ROUNDING, abs=ROUNDING / 2
                )


def test_the_changes_are_made_to_a_step_that_something_else_has_wrapped(monkeypatch):
    from deepspeed.runtime.engine import DeepSpeedEngine

    bare = inspect.unwrap(DeepSpeedEngine.step)

    @functools.wraps(bare)
    def timed(*args, **kwargs):
        return bare(*args, **kwargs)

    monkeypatch.setattr(DeepSpeedEngine, "step", timed)
    changes = [wrap for wrap in listed() if wrap.made_by == ON_DEEPSPEED]
    assert not all(map(is_in_place, changes))
    follow_deepspeed()
    assert all(map(is_in_place, changes))


def test_a_step_that_is_skipped_moves_nothing(ran):
    assert ran[0]["skipped"] == {"skipped": STEPS, "moved": False}
