"""DeepSpeed configs that cannot work are refused by name, whether or not DeepSpeed is installed."""

from __future__ import annotations

import json

import pytest

from hf_stable.trainer.deepspeed_settings import read_settings, refuse_unfit_settings

UNFIT = [
    (dict(fp16={"enabled": True, "fp16_master_weights_and_grads": True}), "float32 master weights"),
    (dict(bf16={"enabled": True, "bf16_master_weights_and_grads": True}), "float32 master weights"),
    (dict(offload_optimizer={"device": "nvme"}), r"offload_optimizer to nvme \(ZeRO-Infinity\)"),
    (dict(offload_param={"device": "nvme"}), r"offload_param to nvme \(ZeRO-Infinity\)"),
    (dict(zenflow={"topk_ratio": 0.1}), "zenflow"),
    (dict(tensor_parallel={"autotp_size": 2}), "tensor_parallel"),
    (dict(zero_hpz_partition_size=2), "zero_hpz_partition_size"),
    (dict(mics_shard_size=2), "mics_shard_size"),
    (dict(zero_quantized_weights=True), "zero_quantized_weights"),
]

ADAMW2_ALONE = [
    (
        dict(optimizer={"type": "AdamW"}),
        r"an optimizer \('AdamW'\), which takes the place of AdamW2",
    ),
    (dict(optimizer={"type": "OneBitAdam"}), 'Remove "optimizer" from the config'),
    (dict(offload_optimizer={"device": "cpu"}), '"zero_force_ds_cpu_optimizer": false'),
    (dict(round_robin_gradients=True), "round_robin_gradients"),
    (dict(stage=1, data_types={"grad_accum_dtype": "fp32"}), "stage 1"),
]

AT_TOP = ("fp16", "bf16", "tensor_parallel", "optimizer", "data_types")


def settings(options):
    """A config with options where they belong."""
    zero = {key: value for key, value in options.items() if key not in AT_TOP}
    top = {key: value for key, value in options.items() if key in AT_TOP}
    return {"zero_optimization": {"stage": 2} | zero} | top


@pytest.mark.parametrize(("options", "message"), UNFIT)
@pytest.mark.parametrize("who", ["is_patched", "uses_adamw2"])
def test_what_cannot_work_is_refused(options, message, who):
    asked = {"is_patched": False, "uses_adamw2": False}
    refuse_unfit_settings(settings(options), **asked)
    with pytest.raises(ValueError, match=message):
        refuse_unfit_settings(settings(options), **(asked | {who: True}))


@pytest.mark.parametrize(("options", "message"), ADAMW2_ALONE)
def test_what_adamw2_alone_cannot_is_refused_for_it(options, message):
    with pytest.raises(ValueError, match=message):
        refuse_unfit_settings(settings(options), is_patched=False, uses_adamw2=True)
    if "OneBit" in str(options):
        with pytest.raises(ValueError, match="the optimizer 'OneBitAdam'"):
            refuse_unfit_settings(settings(options), is_patched=True, uses_adamw2=False)
    else:
        refuse_unfit_settings(settings(options), is_patched=True, uses_adamw2=False)


def test_what_works_passes_from_a_mapping_or_a_file(tmp_path):
    works = settings(dict(bf16={"enabled": True}, offload_param={"device": "cpu"}, stage=3))
    path = tmp_path / "deepspeed.json"
    path.write_text(json.dumps(works))
    for given in (works, str(path), path, None):
        refuse_unfit_settings(read_settings(given), is_patched=True, uses_adamw2=True)
    assert read_settings(path) == works
