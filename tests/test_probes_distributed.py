"""The probe inside DDP and FSDP2 in two real processes, and inside PEFT."""

from __future__ import annotations

import os
import subprocess
import sys
import textwrap

import pytest
import torch
from conftest import tiny_batch, tiny_model

from hf_stable.probes import probe

SCRIPT = """
import sys
import torch
import torch.distributed as dist
from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard
from torch.distributed.tensor import DTensor
from torch.nn.parallel import DistributedDataParallel
from transformers import GPT2Config, GPT2LMHeadModel

import hf_stable.probes as probes
from hf_stable.patching import patch

def build():
    torch.manual_seed(0)
    config = GPT2Config(vocab_size=37, n_positions=32, n_embd=16, n_layer=2, n_head=2,
                        resid_pdrop=0.0, embd_pdrop=0.0, attn_pdrop=0.0)
    model = GPT2LMHeadModel(config)
    for name, p in model.named_parameters():
        if p.ndim == 2 and "wte" not in name:
            p.data *= 20
    return patch(model, "sigma_reparam") if sys.argv[2] == "patched" else model

def records_of(model, ids):
    with probes.probe(model) as records:
        model(input_ids=ids, labels=ids).loss.backward()
    return records

dist.init_process_group("gloo")
rank = dist.get_rank()
ids = torch.randint(1, 37, (4, 12), generator=torch.Generator().manual_seed(1))[2 * rank :][:2]
expected = records_of(build(), ids)
model = build()
if sys.argv[1] == "ddp":
    model = DistributedDataParallel(model)
else:
    units = list(model.transformer.h)
    if sys.argv[1] == "fsdp_inside":  # units smaller than a block
        units = [m for block in units for m in (block.attn, block.mlp.c_fc, block.mlp.c_proj)]
    for unit in units:
        fully_shard(unit)
    fully_shard(model)
    assert all(isinstance(p, DTensor) for p in model.parameters())
for _ in range(2):
    records = records_of(model, ids)
    for term in probes.TERMS:
        got, want = getattr(records, term), getattr(expected, term)
        assert list(got) == list(want) and (want or term == "maps"), term
        for layer in want:
            if term == "mode":
                assert got[layer] == want[layer]
            else:
                torch.testing.assert_close(got[layer], want[layer], rtol=1e-4, atol=1e-5, msg=term)
one = records.entropy["transformer.h.0"].clone()
dist.broadcast(one, 0)
assert rank == 0 or not torch.equal(one, records.entropy["transformer.h.0"])  # other data
dist.barrier()  # a rank that left while another still talks to it would abort that one
dist.destroy_process_group()
"""


@pytest.mark.slow
@pytest.mark.parametrize("weights", ["plain", "patched"])
@pytest.mark.parametrize("wrapper", ["ddp", "fsdp", "fsdp_inside"])
def test_ranks_record_what_a_single_process_would(wrapper, weights, tmp_path):
    script = tmp_path / "ranks.py"
    script.write_text(textwrap.dedent(SCRIPT))
    result = subprocess.run(
        [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2",
         script, wrapper, weights],
        capture_output=True, text=True, env=os.environ | {"OMP_NUM_THREADS": "1"}, timeout=300,
    )  # fmt: skip
    assert result.returncode == 0, result.stderr[-3000:]


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
