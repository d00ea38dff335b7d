"""Settings under which a reparametrised model cannot be sharded are refused by name."""

from __future__ import annotations

import pytest
import torch
from accelerate import FullyShardedDataParallelPlugin, ParallelismConfig
from tiny_architectures import build
from tiny_models import tiny_model
from tiny_training import make_trainer
from transformers.distributed import DistributedConfig

import hf_stable
from hf_stable.methods.sharding import refuse_unfit_sharding
from hf_stable.trainer.watching import refuse_cut_sequences


def plugin(**options):
    return FullyShardedDataParallelPlugin(
        **(dict(fsdp_version=2, cpu_ram_efficient_loading=False) | options)
    )


@pytest.fixture(autouse=True)
def environment(monkeypatch):
    """accelerate's plugin writes its settings into the environment."""
    monkeypatch.setattr("os.environ", dict())


@pytest.mark.parametrize(
    ("options", "dtype", "message"),
    [
        (dict(fsdp_plugin=dict(cpu_ram_efficient_loading=True)), torch.float32,
         "Set cpu_ram_efficient_loading to false"),
        (dict(fsdp_plugin=dict(fsdp_version=1)), torch.float32, "does not train under FSDP1"),
        (dict(fsdp_plugin={}), torch.bfloat16, r"MixedPrecisionPolicy\(param_dtype=torch.bfloat16"),
    ],
)  # fmt: skip
def test_what_cannot_work_is_refused_and_only_for_sigma_layers(options, dtype, message):
    if "fsdp_plugin" in options:
        options = {"fsdp_plugin": plugin(**options["fsdp_plugin"])}
    model = tiny_model("gpt2").to(dtype)
    refuse_unfit_sharding(model, **options)
    hf_stable.patch(model, "sigma_reparam")
    with pytest.raises(ValueError, match=message):
        refuse_unfit_sharding(model, **options)
    refuse_unfit_sharding(model)


@pytest.mark.parametrize(("dtype", "mixed_precision"), [("float32", "no"), ("bfloat16", "bf16")])
def test_float32_weights_and_mixed_precision_pass(dtype, mixed_precision):
    model = hf_stable.patch(tiny_model("gpt2").to(getattr(torch, dtype)), "sigma_reparam")
    refuse_unfit_sharding(model, fsdp_plugin=plugin(), mixed_precision=mixed_precision)


def test_the_trainer_refuses_before_it_prepares_anything(tmp_path, monkeypatch):
    model = hf_stable.patch(tiny_model("gpt2"), "sigma_reparam")
    trainer = make_trainer(model, tmp_path, max_steps=1, save_strategy="no")
    unfit = plugin(cpu_ram_efficient_loading=True)
    monkeypatch.setattr(trainer.accelerator.state, "fsdp_plugin", unfit, raising=False)
    with pytest.raises(ValueError, match="cpu_ram_efficient_loading"):
        trainer.train()
    assert trainer.optimizer is None
    monkeypatch.undo()
    trainer.train()
    assert trainer.state.global_step == 1


def test_a_monitor_of_attention_is_refused_where_processes_share_a_sequence(tmp_path, monkeypatch):
    def trainer(terms):
        monitor = hf_stable.StabilityCallback(every=1, terms=terms)
        options = dict(max_steps=1, save_strategy="no", callbacks=[monitor])
        return make_trainer(tiny_model("gpt2"), tmp_path, **options)

    refused, taken = trainer("default"), trainer(["sigma_qk", "norm_x"])
    for each in (refused, taken):
        monkeypatch.setattr(
            each.accelerator.state, "parallelism_config", ParallelismConfig(cp_size=2)
        )
        assert each.accelerator.parallelism_config.cp_enabled
    with pytest.raises(ValueError, match=r"cp_size=2, .* attention that entropy.* sigma_qk"):
        refused.train()
    assert refused.optimizer is None
    refuse_cut_sequences(taken)
    monkeypatch.undo()
    refuse_cut_sequences(refused)


def test_a_pipeline_of_transformers_is_refused():
    model = build("llama")
    model.config.distributed_config = DistributedConfig(pp_size=2)
    with pytest.raises(hf_stable.UnsupportedModelError, match="pp_size=2: .* forwards alone"):
        hf_stable.patch(model, "sigma_reparam")
    assert not hf_stable.is_patched(model)
    model.config.distributed_config = DistributedConfig(tp_size=2)
    assert hf_stable.is_patched(hf_stable.patch(model, "sigma_reparam"))
