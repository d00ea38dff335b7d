"""Context parallelism on two processes: torch's own, run by accelerate, with the CPU's kernel."""

from __future__ import annotations

import warnings

import pytest
import tiny_architectures
import torch
import torch.distributed as dist
import transformers
from accelerate.big_modeling import _attach_context_parallel_hooks
from accelerate.parallelism_config import ParallelismConfig
from gloo_ranks import run_ranks
from ring_attention import ring_on_cpus
from tiny_training import losses, make_trainer, shard_on_cpus
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import DTensor
from torch.distributed.tensor.experimental import context_parallel

import hf_stable
from hf_stable.methods.sigma_reparam.method import sigma_layers
from hf_stable.monitor.log_file import read_log

pytest.importorskip("torch.distributed.tensor.experimental._context_parallel")
pytestmark = pytest.mark.slow

STEPS = 4
TOKENS = 16
WITHOUT_ATTENTION = ["sigma_qk", "sec", "norm_x", "norm_dx"]

ROUNDING = 2e-6
"""float32 rounds by 6e-8. Processes sum in another order, and four steps add up."""


def make_run(folder, name, terms=WITHOUT_ATTENTION, **options):
    """A Trainer with everything of ours on a Llama; more than one process share each sequence."""
    torch.manual_seed(0)
    model = hf_stable.patch(tiny_architectures.build("llama"), "sigma_reparam")
    if dist.is_initialized():
        options |= dict(
            parallelism_config=ParallelismConfig(cp_size=dist.get_world_size()), fsdp=True,
            fsdp_config={
                "version": 2, "transformer_layer_cls_to_wrap": ["LlamaDecoderLayer"],
                "auto_wrap_policy": "TRANSFORMER_BASED_WRAP",
                "state_dict_type": "FULL_STATE_DICT", "cpu_ram_efficient_loading": False,
            },
        )  # fmt: skip
    generator = torch.Generator().manual_seed(5)
    size = 3, model.config.vocab_size - 1
    ids = [torch.randint(*size, (TOKENS,), generator=generator) for _ in range(24)]
    rows = [{"input_ids": row, "labels": row.clone()} for row in ids]
    return make_trainer(
        model, folder / name, rows=rows, optim="adamw2", weight_decay=0.1, max_steps=STEPS,
        per_device_train_batch_size=4, callbacks=[hf_stable.StabilityCallback(1, terms=terms)],
        **(dict(save_strategy="no") | options),
    )  # fmt: skip


def on_ranks(folder):
    ring_on_cpus()
    shard_on_cpus()
    refused = make_run(folder, "refused", terms="default")
    with pytest.raises(ValueError) as error:
        refused.train()
    whole = make_run(folder, "whole", save_strategy="steps", save_steps=STEPS // 2)
    whole.train()
    again = make_run(folder, "again")
    again.train(resume_from_checkpoint=str(folder / "whole" / f"checkpoint-{STEPS // 2}"))
    layers = [layer for _, layer in sigma_layers(whole.model)]
    return {
        "refused": str(error.value),
        "built": refused.optimizer is not None,
        "losses": losses(whole),
        "again": losses(again),
        "sharded": isinstance(layers[0].weight, DTensor),
        "vectors": [(layer.gamma.full_tensor().detach(), layer.sigma_v) for layer in layers],
        "probed": probed(),
    }


def probed():
    """What a probe tells, and records, in a loop without the Trainer."""
    model = tiny_architectures.build("llama")
    _attach_context_parallel_hooks(model)  # positions that lie apart do not make a mask
    ids = torch.arange(TOKENS)[None] % model.config.vocab_size
    places = torch.arange(TOKENS)[None]
    mesh = init_device_mesh("cpu", (dist.get_world_size(),))
    told = {}
    for is_cut in (False, True):
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            with hf_stable.probe(model, terms=["entropy", "norm_x"]) as records, torch.no_grad():
                if is_cut:
                    with context_parallel(mesh, buffers=[ids, places], buffer_seq_dims=[1, 1]):
                        model(input_ids=ids, position_ids=places)
                else:
                    model(input_ids=ids, position_ids=places)
        messages = [str(each.message) for each in caught]
        told[is_cut] = {
            "layers": (len(records.entropy), len(records.norm_x)),
            "said": [each for each in messages if "processes share each sequence" in each],
        }
    return told


@pytest.fixture(scope="module")
def ran(tmp_path_factory):
    folder = tmp_path_factory.mktemp("cut")
    return run_ranks(on_ranks, 2, folder), folder


@pytest.fixture(scope="module")
def alone(tmp_path_factory):
    folder = tmp_path_factory.mktemp("alone")
    trainer = make_run(folder, "whole")
    trainer.train()
    return trainer, folder


@pytest.mark.parity(
    engine="context parallel", models=("Llama",), method="sigmaReparam and AdamW2",
    same=("losses", "vectors"),
)  # fmt: skip
def test_processes_that_share_each_sequence_train_as_one(ran, alone):
    (first, second), _ = ran
    trainer, _ = alone
    assert first["sharded"] and first["losses"] == second["losses"]
    expected = losses(trainer)
    assert len(expected) == STEPS
    for step, values in expected.items():
        assert first["losses"][step] == pytest.approx(values, rel=ROUNDING)
    layers = [layer for _, layer in sigma_layers(trainer.model)]
    mine = zip(first["vectors"], second["vectors"], layers, strict=True)
    for (gamma, v), (other_gamma, other_v), layer in mine:
        assert torch.equal(gamma, other_gamma) and torch.equal(v, other_v)
        torch.testing.assert_close(gamma, layer.gamma, rtol=ROUNDING, atol=0)
        # A direction is as sharp as its singular value is apart from the next.
        torch.testing.assert_close(v, layer.sigma_v, rtol=0, atol=50 * ROUNDING)
    start = sigma_layers(hf_stable.patch(tiny_architectures.build("llama"), "sigma_reparam"))
    pairs = zip(first["vectors"], start, strict=True)
    moved = [(gamma - old.gamma).abs().max() for (gamma, _), (_, old) in pairs]
    assert min(moved) > 1e-3


def test_the_monitor_records_weights_and_tokens_as_in_one_process(ran, alone):
    mine, theirs = (
        [event["quantities"] for event in read_log(folder / "whole") if event["event"] == "probe"]
        for folder in (ran[1], alone[1])
    )
    assert len(mine) == len(theirs) == STEPS
    for one, other in zip(mine, theirs, strict=True):
        assert one.keys() == other.keys() >= set(WITHOUT_ATTENTION)
        for quantity in WITHOUT_ATTENTION:
            for layer, value in other[quantity].items():
                # Spectra of products of small weights lose a digit.
                assert one[quantity][layer] == pytest.approx(value, rel=10 * ROUNDING), quantity


@pytest.mark.parity(
    engine="context parallel", models=("Llama",), method="sigmaReparam and AdamW2",
    same=("checkpoints", "resume"),
)  # fmt: skip
def test_a_checkpoint_is_plain_and_resumes_exactly(ran):
    (first, _), folder = ran
    half = {step: values for step, values in first["losses"].items() if step > STEPS // 2}
    assert {step: first["again"][step] for step in half} == half and len(half) == STEPS // 2
    checkpoint = folder / "whole" / f"checkpoint-{STEPS}"
    plain = transformers.LlamaForCausalLM.from_pretrained(checkpoint).eval()
    patched = hf_stable.load(transformers.LlamaForCausalLM, checkpoint).eval()
    ids = torch.arange(TOKENS)[None] + 3
    with torch.no_grad():
        start = tiny_architectures.build("llama").eval()(input_ids=ids).logits
        logits = plain(input_ids=ids).logits
        # Folding rounds each weight once.
        torch.testing.assert_close(
            logits, patched(input_ids=ids).logits, rtol=ROUNDING, atol=ROUNDING
        )
    assert not torch.allclose(logits, start, atol=1e-3)


def test_attention_that_no_process_sees_whole_is_refused_or_named(ran):
    for found in ran[0]:
        assert "cp_size=2" in found["refused"] and "processes share each" in found["refused"]
        assert not found["built"]
        whole, cut = found["probed"][False], found["probed"][True]
        assert whole == {"layers": (2, 2), "said": []}
        assert cut["layers"] == (0, 2) and len(cut["said"]) == 1
