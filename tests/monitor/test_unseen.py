"""Composites, replicas and faults within a probe: all attention is seen, or named as unseen."""

from __future__ import annotations

import collections
import json
import math
import warnings

import pytest
import torch
import transformers
from tiny_models import tiny_config, tiny_model
from tiny_training import make_trainer, same_state
from torch import nn

import hf_stable
from hf_stable.measures.entropy import attention_entropy
from hf_stable.monitor import attention_terms
from hf_stable.monitor.log_file import read_log
from hf_stable.monitor.probing import probe

CROSS = dict(add_cross_attention=True, is_decoder=True)


def encoder_decoder(folder, **options):
    """A ViT and a GPT-2 with cross-attention, put together as the documentation says."""
    torch.manual_seed(0)
    transformers.ViTModel(tiny_config("vit")).save_pretrained(folder / "vit")
    transformers.GPT2LMHeadModel(tiny_config("gpt2", **CROSS, **options)).save_pretrained(
        folder / "gpt2"
    )
    model = transformers.VisionEncoderDecoderModel.from_encoder_decoder_pretrained(
        str(folder / "vit"), str(folder / "gpt2")
    )
    model.config.decoder_start_token_id = model.config.pad_token_id = 0
    return model.eval()


def inputs(model):
    generator = torch.Generator().manual_seed(1)
    return dict(
        pixel_values=torch.randn(4, 1, 8, 8, generator=generator),
        labels=torch.randint(1, 37, (4, 6), generator=generator),
    )


LAYERS = {
    "encoder.layers.0", "encoder.layers.1", "decoder.transformer.h.0", "decoder.transformer.h.1",
    "decoder.transformer.h.0.crossattention", "decoder.transformer.h.1.crossattention",
}  # fmt: skip


def test_both_parts_of_an_encoder_decoder_are_seen(tmp_path):
    model = encoder_decoder(tmp_path)
    expected = model(**inputs(model)).logits
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        with probe(model, terms="default") as records:
            logits = model(**inputs(model)).logits
    assert torch.equal(logits, expected)
    assert set(records.entropy) == set(records.sigma_qk) == LAYERS
    assert set(records.norm_x) == {name for name in LAYERS if "cross" not in name}

    # A collapse of the encoder is seen there, and what a reloaded model shows is the same.
    with torch.no_grad():
        for layer in model.encoder.layers:
            layer.attention.q_proj.weight.mul_(1e4)
    model.save_pretrained(tmp_path / "whole")
    again = transformers.VisionEncoderDecoderModel.from_pretrained(tmp_path / "whole").eval()
    found = []
    for each in (model, again):
        with probe(each, terms=["entropy_normalised"]) as records:
            each(**inputs(each))
        lowest = {name: value.min().item() for name, value in records.entropy_normalised.items()}
        found.append(lowest)
    assert found[0] == pytest.approx(found[1], rel=1e-4)
    assert max(found[0][f"encoder.layers.{i}"] for i in (0, 1)) < 0.2
    assert min(value for name, value in found[0].items() if "decoder" in name) > 0.9


def test_each_part_keeps_the_attention_that_it_has(tmp_path):
    model = encoder_decoder(tmp_path)
    model.encoder.set_attn_implementation("eager")
    expected = model(**inputs(model)).logits
    with probe(model, terms=["entropy"]) as records:
        assert torch.equal(model(**inputs(model)).logits, expected)
    assert set(records.entropy) == LAYERS
    assert model.encoder.config._attn_implementation == "eager"
    assert model.decoder.config._attn_implementation == "sdpa"


class TwoTowers(nn.Module):
    """A module of a user's, which is no transformers model but holds two."""

    def __init__(self):
        super().__init__()
        self.image = transformers.ViTModel(tiny_config("vit"))
        self.text = transformers.BertModel(tiny_config("bert"))
        self.mix = nn.MultiheadAttention(16, 2, batch_first=True)

    def forward(self, pixel_values, input_ids):
        image = self.image(pixel_values).last_hidden_state
        text = self.text(input_ids).last_hidden_state
        return self.mix(text, image, image)[0].mean()


def test_all_models_in_a_module_are_seen_and_what_is_not_is_named_once():
    torch.manual_seed(0)
    model = TwoTowers()
    batch = dict(pixel_values=torch.randn(2, 1, 8, 8), input_ids=torch.arange(1, 9).view(2, 4))
    with pytest.warns(UserWarning, match=r"was not seen.*: mix \(it goes past") as seen:
        for _ in range(2):
            with probe(nn.Sequential(model), terms="default") as records:
                model(**batch)
    assert len(seen) == 1
    assert set(records.entropy) == {
        "image.layers.0", "image.layers.1", "text.encoder.layer.0", "text.encoder.layer.1",
    }  # fmt: skip


def test_a_part_that_cannot_be_observed_is_named_with_its_reason(tmp_path):
    model = encoder_decoder(tmp_path, reorder_and_upcast_attn=True)
    model.set_attn_implementation("eager")
    with pytest.warns(UserWarning, match="was not seen.*h.0.attn.*reorder_and_upcast_attn"):
        with probe(model, terms=["entropy"]) as records:
            model(**inputs(model))
    assert "encoder.layers.0" in records.entropy


@pytest.mark.parametrize("cap", [None, 0.05])
def test_capped_logits_are_measured_as_the_model_has_them(cap):
    torch.manual_seed(0)
    config = transformers.Gemma2Config(
        vocab_size=37, hidden_size=16, intermediate_size=32, num_hidden_layers=2,
        num_attention_heads=2, num_key_value_heads=1, head_dim=8, sliding_window=32,
        attn_logit_softcapping=cap, attn_implementation="eager", initializer_range=0.5,
        pad_token_id=0,
    )  # fmt: skip
    model = transformers.Gemma2ForCausalLM(config).eval()
    ids = torch.arange(1, 13)[None]
    attentions = model(ids, output_attentions=True).attentions
    with probe(model, terms=["entropy", "rank"], maps="all") as records:
        model(ids)
    for maps, entropy, kept in zip(
        attentions, records.entropy.values(), records.maps.values(), strict=True
    ):
        torch.testing.assert_close(entropy, attention_entropy(maps).nanmean((0, 2)))
        torch.testing.assert_close(kept, maps[0])
    uniform = torch.arange(1, 13).log().mean().item()  # what a cap near zero leaves
    assert (entropy.max().item() > 0.99 * uniform) == (cap is not None)


def test_attention_with_sinks_is_named_and_ends_no_forward():
    torch.manual_seed(0)
    config = transformers.GptOssConfig(
        vocab_size=37, hidden_size=16, intermediate_size=16, num_hidden_layers=2,
        num_attention_heads=2, num_key_value_heads=1, head_dim=8, num_local_experts=2,
        num_experts_per_tok=1, layer_types=["full_attention", "full_attention"],
        pad_token_id=0,
    )  # fmt: skip
    model = transformers.GptOssForCausalLM(config).eval()
    with pytest.warns(UserWarning, match="was not seen.*layers.0.self_attn.*has sinks"):
        with probe(model, terms=["entropy"]) as records:
            model(torch.arange(1, 13)[None])
    assert records.to_dict() == {}


# nn.DataParallel


def replicate(network):
    """What torch's own replicate does, on CPUs."""
    modules = list(network.modules())
    at = {module: index for index, module in enumerate(modules)}
    copies = [module._replicate_for_data_parallel() for module in modules]
    for copy, module in zip(copies, modules, strict=True):
        copy._former_parameters = collections.OrderedDict()
        for key, child in module._modules.items():
            setattr(copy, key, copies[at[child]])
        for key, parameter in module._parameters.items():
            if parameter is None:
                copy._parameters[key] = None
            else:
                setattr(copy, key, parameter.clone())
        for key, buffer in module._buffers.items():
            copy._buffers[key] = None if buffer is None else buffer.clone()
    return copies[0]


def forward_in_halves(self, **inputs):
    outs = [
        replicate(self.module)(
            **{k: v.chunk(2)[half] for k, v in inputs.items() if isinstance(v, torch.Tensor)}
        )
        for half in (0, 1)
    ]
    return {
        "loss": torch.stack([out.loss for out in outs]),
        "logits": torch.cat([out.logits for out in outs]),
    }


@pytest.mark.parametrize("accumulation", [1, 2])
def test_replicas_are_recorded_as_the_one_forward_that_they_are(
    accumulation, tmp_path, monkeypatch
):
    recorded = {}
    for devices in (1, 2):
        if devices == 2:
            monkeypatch.setattr(nn.DataParallel, "forward", forward_in_halves)
        folder = tmp_path / str(devices)
        trainer = make_trainer(
            hf_stable.patch(tiny_model("vit"), "sigma_reparam"), folder, max_steps=1,
            gradient_accumulation_steps=accumulation,
            callbacks=[hf_stable.StabilityCallback(every=1, terms="all", maps="all")],
        )  # fmt: skip
        trainer.args._n_gpu = devices  # after the batch size was taken from it: 8 for both
        trainer.train()
        (recorded[devices],) = [line for line in read_log(folder) if line["event"] == "probe"]
        assert (type(trainer.model_wrapped) is nn.DataParallel) == (devices == 2)
    one, two = (recorded[devices]["quantities"] for devices in (1, 2))
    assert {"entropy", "norm_x", "norm_dx", "rank", "sigma_qk", "gamma", "maps"} <= one.keys()
    flat = [torch.cat([flattened(v) for v in each.values()]) for each in (one, two)]
    assert one.keys() == two.keys()
    torch.testing.assert_close(flat[1], flat[0], rtol=1e-4, atol=1e-5)


def flattened(by_layer):
    values = [json.loads(json.dumps(value)) for value in by_layer.values()]
    if values and isinstance(values[0], list) and isinstance(values[0][0], str):
        return torch.tensor([float(word == "normal") for heads in values for word in heads])
    return torch.cat([torch.tensor(value, dtype=torch.float64).flatten() for value in values])


# What cannot be measured


def test_a_measure_that_fails_is_missing_with_a_reason_and_training_is_the_same(
    tmp_path, monkeypatch
):
    plain = make_trainer(tiny_model("gpt2"), tmp_path / "plain", max_steps=3)
    plain.train()

    def fails(*args, **kwargs):
        raise torch.linalg.LinAlgError("it did not converge")

    monkeypatch.setattr("hf_stable.monitor.block_terms.qk_singular_values", fails)
    monkeypatch.setattr(attention_terms, "first_maps", fails)
    trainer = make_trainer(
        tiny_model("gpt2"), tmp_path / "watched", max_steps=3,
        callbacks=[hf_stable.StabilityCallback(every=1)],
    )  # fmt: skip
    with pytest.warns(
        UserWarning, match="sigma_qk.* could not be measured .transformer.h.0: Lin"
    ) as seen:
        trainer.train()
    said = [str(w.message) for w in seen if "could not be measured" in str(w.message)]
    assert len(said) == 1 and "rank" in said[0]
    assert same_state(trainer.model, plain.model)
    probes = [line for line in read_log(tmp_path / "watched") if line["event"] == "probe"]
    assert len(probes) == 3
    for line in probes:
        assert {"entropy", "norm_x", "norm_dx"} <= line["quantities"].keys()
        assert not {"sigma_qk", "sec", "rank", "mode"} & line["quantities"].keys()
        reason = "LinAlgError: it did not converge"
        assert line["missing"]["sigma_qk"]["transformer.h.0"] == reason
        assert line["missing"]["rank"]["transformer.h.1"] == reason


@pytest.mark.parametrize("size", [1e12, 1e19, 1e30])
def test_large_weights_end_no_training_and_the_alarm_acts(size, tmp_path, capsys):
    model = tiny_model("gpt2")
    monitor = hf_stable.StabilityCallback(every=1, terms="all", on_collapse="stop")

    class Grows(transformers.TrainerCallback):
        def on_step_begin(self, args, state, control, **kwargs):
            if state.global_step == 2:
                for block in model.transformer.h:
                    block.attn.c_attn.weight.data.mul_(size)
                    block.mlp.c_fc.weight.data.mul_(size)

    trainer = make_trainer(
        model, tmp_path, max_steps=30, callbacks=[Grows(), monitor], save_strategy="no",
        learning_rate=1e-6,
    )  # fmt: skip
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        trainer.train()
    probes = [line for line in read_log(tmp_path) if line["event"] == "probe"]
    third = probes[2]["quantities"]["sigma_wq"]["transformer.h.0"]
    before = probes[1]["quantities"]["sigma_wq"]["transformer.h.0"]
    assert third == pytest.approx(before * size, rel=1e-2)
    qk = probes[2]["quantities"]["sigma_qk"]["transformer.h.0"]
    if size < 1e30:
        assert all(math.isfinite(value) for value in qk)
    else:  # beyond what float32 holds
        assert qk == [None, None]
        assert probes[2]["missing"]["sigma_qk"]["transformer.h.0"] == "too large for torch.float32"
    if size >= 1e19:
        assert trainer.state.global_step < 30 and "hf-stable: " in capsys.readouterr().err
