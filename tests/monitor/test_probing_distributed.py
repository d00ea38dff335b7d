"""The probe inside DDP and FSDP2 in two real processes, and inside PEFT."""

from __future__ import annotations

import pytest
import torch
import torch.distributed as dist
from gloo_ranks import run_ranks
from tiny_models import tiny_batch, tiny_model
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor
from torch.nn.parallel import DistributedDataParallel

import hf_stable
from hf_stable.monitor.probing import probe
from hf_stable.monitor.terms import names_of


def build(weights):
    torch.manual_seed(0)
    model = tiny_model("gpt2")
    for name, parameter in model.named_parameters():
        if parameter.ndim == 2 and "wte" not in name:
            parameter.data *= 20
    return hf_stable.patch(model, "sigma_reparam") if weights == "patched" else model


def records_of(model, ids):
    with probe(model) as records:
        model(input_ids=ids, labels=ids).loss.backward()
    return records


def record_on_ranks(wrapper, weights):
    """Compare what a wrapped model shows with what this rank's own, unwrapped one does."""
    rank = dist.get_rank()
    ids = torch.randint(1, 37, (4, 12), generator=torch.Generator().manual_seed(1))
    ids = ids[2 * rank :][:2]
    expected = records_of(build(weights), ids)
    model = build(weights)
    if wrapper == "ddp":
        model = DistributedDataParallel(model)
    else:
        units = list(model.transformer.h)
        if wrapper == "fsdp_inside":  # units smaller than a block
            units = [m for block in units for m in (block.attn, block.mlp.c_fc, block.mlp.c_proj)]
        for unit in units:
            fully_shard(unit)
        fully_shard(model)
        assert all(isinstance(p, DTensor) for p in model.parameters())
    for _ in range(2):
        records = records_of(model, ids)
        for term in names_of():
            got, want = getattr(records, term), getattr(expected, term)
            assert list(got) == list(want) and (want or term == "maps"), term
            for layer in want:
                if term == "mode":
                    assert got[layer] == want[layer]
                else:
                    torch.testing.assert_close(
                        got[layer], want[layer], rtol=1e-4, atol=1e-5, msg=term
                    )
    return records.entropy["transformer.h.0"].clone()


@pytest.mark.slow
@pytest.mark.parametrize("weights", ["plain", "patched"])
@pytest.mark.parametrize("wrapper", ["ddp", "fsdp", "fsdp_inside"])
def test_ranks_record_what_a_single_process_would(wrapper, weights):
    first, second = run_ranks(record_on_ranks, 2, wrapper, weights)
    assert not torch.equal(first, second)  # other data


@pytest.mark.filterwarnings("ignore:.is_gradient_checkpointing. is deprecated")
def test_adapters_do_not_hide_the_model():
    peft = pytest.importorskip("peft")
    model = tiny_model("vit")
    batch = tiny_batch(model)
    with probe(model) as expected:
        model(**batch)
    config = peft.LoraConfig(target_modules=["q_proj"], r=2)
    with probe(peft.get_peft_model(model, config)) as records:
        model(**batch)
    assert list(records.entropy) == list(expected.entropy)
    for layer, value in expected.entropy.items():
        torch.testing.assert_close(records.entropy[layer], value)
