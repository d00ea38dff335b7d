"""Many processes train as one: the Trainer under torchrun with patch, AdamW2 and the monitor."""

from __future__ import annotations

import hashlib
import json
import os
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
import transformers
from gloo_ranks import run_ranks
from tiny_models import DEFAULT_HEADS, MODEL_TYPES, tiny_batch, tiny_model
from tiny_training import dataset, losses, make_trainer, shard_on_cpus
from torch.distributed.tensor import DTensor

import hf_stable
from hf_stable._file_names import SIDECAR_FILE
from hf_stable.checkpoints.state_dicts import fold_state_dict
from hf_stable.commands.main import main
from hf_stable.monitor.log_file import read_log

pytestmark = pytest.mark.slow

GLOBAL_BATCH = 12
STEPS = 20

# BertForMaskedLM ties a bias between units that FSDP2 shards apart, which torch refuses.
HEADS = DEFAULT_HEADS | {"bert": "BertForSequenceClassification"}

BLOCKS = {
    "gpt2": "GPT2Block",
    "vit": "ViTLayer",
    "swin": "SwinLayer",
    "bert": "BertLayer",
}


RESUMED = {"gpt2": "SHARDED_STATE_DICT", "vit": "SHARDED_STATE_DICT", "bert": "FULL_STATE_DICT"}
"""How the checkpoints are written that another number of processes goes on from."""

QUANTITIES = (
    "entropy", "entropy_normalised", "sigma_qk", "sec", "norm_x", "norm_dx", "nonfinite_x",
    "nonfinite_dx", "gamma",
)  # fmt: skip
"""What the monitor records of a whole batch; `rank` and `mode` are of one sequence a process."""


def fsdp_options(model_type, state_dict_type, **options):
    """Blocks sharded one by one; GPT-2's also checkpointed."""
    config = {
        "version": 2,
        "transformer_layer_cls_to_wrap": [BLOCKS[model_type]],
        "auto_wrap_policy": "TRANSFORMER_BASED_WRAP",
        "state_dict_type": state_dict_type,
        "activation_checkpointing": model_type == "gpt2",
    }
    return dict(fsdp=True, fsdp_config=config | options)


def train(model_type, folder, num_processes=1, resume=None, batches=4, **options):
    """Twenty steps of a patched model under AdamW2 and the monitor, on one global batch size."""
    model = hf_stable.patch(tiny_model(model_type, HEADS[model_type]), "sigma_reparam")
    monitor = hf_stable.StabilityCallback(every=5)
    trainer = make_trainer(
        model, folder, callbacks=[monitor], optim="adamw2", max_steps=STEPS,
        per_device_train_batch_size=GLOBAL_BATCH // num_processes,
        **(dict(save_strategy="no") | options),
    )  # fmt: skip
    # transformers multiplies the loss of a BERT by the number of processes: it takes BERT's forward
    # for one that averages over the tokens of all of them.
    trainer.model_accepts_loss_kwargs &= model_type != "bert"
    examples = dataset(
        model, size=int(batches * GLOBAL_BATCH)
    )  # whole batches for any number of processes
    if model_type == "bert":
        examples = [example | {"labels": example["labels"][0] % 2} for example in examples]
    trainer.train_dataset = examples
    trainer.train(resume_from_checkpoint=resume)
    return trainer


def train_on_ranks(folder, mode, cases):
    """Train each case on this process group; what is found, the same on every rank."""
    world = dist.get_world_size()
    if mode != "ddp":
        shard_on_cpus()
    found = {}
    for case in cases:
        model_type, _, variant = case.partition("-")
        options = {}
        if mode == "fsdp2":
            options = fsdp_options(model_type, "FULL_STATE_DICT", cpu_offload=variant == "offload")
        if variant == "uneven":
            options |= dict(batches=3 / world, accelerator_config={"even_batches": False})
        out = Path(folder) / case
        trainer = train(model_type, out, world, save_strategy="steps", save_steps=20, **options)
        layers = [m for m in trainer.model.modules() if hasattr(m, "gamma")]
        whole = [
            t.full_tensor() if isinstance(t, DTensor) else t
            for layer in layers
            for t in (layer.gamma.detach(), layer.sigma, layer.sigma_u, layer.sigma_v)
        ]
        numbers = b"".join(t.contiguous().numpy().tobytes() for t in whole)
        digests = [None] * world
        dist.all_gather_object(digests, hashlib.sha256(numbers).hexdigest())
        plugin = getattr(trainer.accelerator.state, "fsdp_plugin", None)
        found[case] = {
            "losses": losses(trainer),
            "same": len(set(digests)) == 1,
            "layers": len(layers),
            "sharded": all(isinstance(layer.weight, DTensor) for layer in layers),
            "offload": repr(getattr(plugin, "cpu_offload", None)),
        }
    return found


UNDER_TORCHRUN = """
import json, os, sys
sys.path[:0] = sys.argv[1], os.path.join(sys.argv[1], "..", "..")
from accelerate import PartialState
import torch.distributed as dist
from tests.contracts.test_parity import train_on_ranks

folder, mode, *cases = sys.argv[2:]
PartialState(cpu=True)  # joins the others, as the Trainer's arguments do
found = train_on_ranks(folder, mode, cases)
if dist.get_rank() == 0:
    print("RESULT", json.dumps(found))
dist.barrier()
dist.destroy_process_group()
sys.stdout.flush()
os._exit(0)  # at times a thread of gloo that is left aborts an interpreter that takes its time
"""


def resume_on_ranks(folder, mode):
    """Begin sharded runs, or go on with those that others began; losses by model."""
    shard_on_cpus()
    world = dist.get_world_size()
    found = {}
    for model_type, state_dict_type in RESUMED.items():
        options = dict(
            save_strategy="steps", save_steps=10, **fsdp_options(model_type, state_dict_type)
        )
        out = folder / model_type
        found[model_type] = {}
        if mode == "begin":
            trainer = train(model_type, out, world, **options)
            found[model_type]["whole"] = losses(trainer)
            model = trainer.model
            assert all(isinstance(p, DTensor) for p in model.parameters())
            plain, _ = fold_state_dict(model, model.state_dict())
            if dist.get_rank() == 0:
                torch.save(plain, out / "plain.pt")
        again, begun = folder / f"{model_type}-resumed", str(out / "checkpoint-10")
        trainer = train(model_type, again, world, resume=begun, **options)
        found[model_type]["resumed"] = losses(trainer)
    return found


DYING = """
import os, sys
sys.path.insert(0, sys.argv[1])
from transformers import TrainerCallback
import hf_stable
from tiny_models import tiny_model
from tiny_training import make_trainer

class Dies(TrainerCallback):
    def on_step_begin(self, args, state, control, **kwargs):
        if args.process_index == 1 and state.global_step == 3:
            raise RuntimeError("this rank dies")

model = hf_stable.patch(tiny_model("gpt2"), "sigma_reparam")
callbacks = [hf_stable.StabilityCallback(every=1), Dies()]
make_trainer(model, sys.argv[2], callbacks=callbacks, optim="adamw2", save_steps=2).train()
"""


def launch(script, num_processes, folder, *arguments):
    path = folder / "rank.py"
    path.write_text(script)
    return subprocess.run(
        [
            *(sys.executable, "-m", "torch.distributed.run", "--standalone"),
            *("--nproc_per_node", str(num_processes), path, Path(__file__).parents[1] / "support"),
            *map(str, arguments),
        ],
        capture_output=True,
        text=True,
        timeout=400,
        env={**os.environ, "HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1"},
    )


@pytest.fixture(scope="module")
def alone(tmp_path_factory):
    """Losses of one process with the same global batch, and its log."""
    folder = tmp_path_factory.mktemp("alone")
    trainers = {name: train(name, folder / name) for name in MODEL_TYPES}
    return {name: losses(trainer) for name, trainer in trainers.items()}, folder


def shows(engine, *aspects):
    """The mark of a test on the four first models that compares these with one process."""
    return pytest.mark.parity(
        engine=engine, models=("GPT-2", "ViT", "Swin", "BERT"),
        method="sigmaReparam and AdamW2", same=aspects,
    )  # fmt: skip


@pytest.mark.parametrize(
    ("mode", "num_processes", "cases", "launcher"),
    [
        pytest.param("ddp", 3, MODEL_TYPES, None,
                     marks=shows("DDP", "losses", "vectors", "checkpoints")),
        ("ddp", 2, ("vit", "gpt2-uneven"), "torchrun"),
        pytest.param("fsdp2", 2, (*MODEL_TYPES, "gpt2-offload"), None,
                     marks=shows("FSDP2", "losses", "vectors", "checkpoints")),
        ("fsdp2", 3, ("swin", "bert"), None),
    ],
)  # fmt: skip
def test_many_processes_train_and_log_as_one(mode, num_processes, cases, launcher, alone, tmp_path):
    if launcher is None:
        result, *_ = run_ranks(train_on_ranks, num_processes, tmp_path, mode, cases)
    else:
        done = launch(UNDER_TORCHRUN, num_processes, tmp_path, tmp_path, mode, *cases)
        result = result_of(done)
    expected, folder = alone
    assert list(result) == list(cases)
    for case, found in result.items():
        name, _, variant = case.partition("-")
        assert found["sharded"] == (mode == "fsdp2")
        assert found["same"] and found["layers"] >= 8
        assert ("CPUOffloadPolicy" in found["offload"]) == (variant == "offload")
        assert len(found["losses"]) == STEPS
        log, log_alone = (
            [e for e in read_log(path) if e["event"] == "probe"]
            for path in (tmp_path / case, folder / name)
        )
        assert [e["step"] for e in log] == [e["step"] for e in log_alone]  # once, not per rank
        if variant == "uneven":  # ranks with more and with fewer batches: no step is one's own
            continue
        mine = by_step(found["losses"])
        for step, (loss, _) in expected[name].items():
            assert mine[step][0] == pytest.approx(loss, rel=1e-5, abs=1e-5), name
        # The steps do something: equal losses are not those of a model that stands still.
        only = [loss for loss, _ in expected[name].values()]
        assert max(only) - min(only) > 0.02
        for mine, theirs in zip(log, log_alone, strict=True):
            assert mine["loss"] == pytest.approx(theirs["loss"], rel=1e-5, abs=1e-5)
            check_quantities(mine["quantities"], theirs["quantities"], case)
            assert list(mine["effective_lr"]) == list(theirs["effective_lr"])
        check_checkpoint(tmp_path / case / f"checkpoint-{STEPS}", name)


def check_quantities(mine, theirs, case):
    """Compare what the monitor saw on many processes and on one, layer by layer."""
    assert set(QUANTITIES) <= set(mine) == set(theirs)
    for quantity in QUANTITIES:
        assert list(mine[quantity]) == list(theirs[quantity]), (case, quantity)
        for layer, value in theirs[quantity].items():
            assert mine[quantity][layer] == pytest.approx(value, rel=1e-3, abs=1e-6), (
                case, quantity, layer,
            )  # fmt: skip


def check_checkpoint(folder, name):
    """A folder that many processes wrote loads plainly and patched, as the same model."""
    assert (folder / SIDECAR_FILE).is_file()
    model_class = getattr(transformers, HEADS[name])
    plain, patched = (
        model_class.from_pretrained(folder).eval(),
        hf_stable.load(model_class, folder).eval(),
    )
    batch = {k: v for k, v in tiny_batch(plain).items() if k != "labels"}
    with torch.no_grad():
        torch.testing.assert_close(
            plain(**batch).logits, patched(**batch).logits, rtol=1e-4, atol=1e-5
        )


def by_step(losses):
    """Losses by number: JSON has texts for keys."""
    return {int(step): values for step, values in losses.items()}


def result_of(done):
    assert done.returncode == 0, done.stderr[-9000:]
    line = next(line for line in done.stdout.splitlines() if line.startswith("RESULT"))
    return json.loads(line.removeprefix("RESULT"))


@pytest.mark.parity(
    engine="FSDP2", models=("GPT-2", "ViT", "BERT"), method="sigmaReparam and AdamW2",
    same=("resume",),
)  # fmt: skip
def test_checkpoints_resume_on_any_number_of_processes_and_fold(alone, tmp_path):
    begun, _ = run_ranks(resume_on_ranks, 2, tmp_path, "begin")
    on_three, *_ = run_ranks(resume_on_ranks, 3, tmp_path, "resume")
    expected, _ = alone
    for name, state_dict_type in RESUMED.items():
        whole, resumed = begun[name]["whole"], begun[name]["resumed"]
        assert resumed == whole  # exactly, on as many processes
        for step, (loss, _) in expected[name].items():
            assert whole[step][0] == pytest.approx(loss, rel=1e-5, abs=1e-5)
            if step > 10:
                assert on_three[name]["resumed"][step][0] == pytest.approx(loss, rel=1e-5)
        checkpoint, plain = tmp_path / name / f"checkpoint-{STEPS}", tmp_path / f"{name}-plain"
        if state_dict_type == "FULL_STATE_DICT":
            check_checkpoint(checkpoint, name)
            continue
        assert not list(checkpoint.glob("*.safetensors"))
        config = tmp_path / f"{name}-config"
        untrained = tiny_model(name, HEADS[name])
        untrained.config.architectures = [HEADS[name]]
        untrained.config.save_pretrained(config)
        assert main(["fold", str(checkpoint), str(plain), "--config", str(config)]) == 0
        model, info = getattr(transformers, HEADS[name]).from_pretrained(
            plain, output_loading_info=True
        )
        assert not any(info[k] for k in ("missing_keys", "unexpected_keys", "mismatched_keys"))
        trained = torch.load(tmp_path / name / "plain.pt")
        for key, tensor in model.state_dict().items():
            torch.testing.assert_close(tensor, trained[key], rtol=0, atol=0)
        start = untrained.state_dict()
        assert any(not torch.equal(trained[key], start[key]) for key in start)


def test_a_rank_that_dies_ends_the_job_and_leaves_the_checkpoint(tmp_path):
    started = time.monotonic()
    result = launch(DYING, 2, tmp_path, tmp_path / "out")
    assert result.returncode != 0 and time.monotonic() - started < 120
    assert "this rank dies" in result.stderr
    model = hf_stable.load(transformers.GPT2LMHeadModel, tmp_path / "out" / "checkpoint-2")
    assert hf_stable.is_patched(model)
    # One process goes on from what two have left.
    fresh = hf_stable.patch(tiny_model("gpt2"), "sigma_reparam")
    trainer = make_trainer(fresh, tmp_path / "out", optim="adamw2", save_strategy="no")
    trainer.train(resume_from_checkpoint=str(tmp_path / "out" / "checkpoint-2"))
    assert trainer.state.global_step == 6
