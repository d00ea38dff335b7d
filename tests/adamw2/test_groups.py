"""Groups of a model's parameters for AdamW2, in a loop without the Trainer."""

from __future__ import annotations

import warnings

import pytest
import torch
from tiny_architectures import batch, build, outputs_of
from tiny_models import tiny_batch, tiny_model
from torch import nn
from torch.distributed.algorithms._checkpoint.checkpoint_wrapper import (
    apply_activation_checkpointing,
)
from transformers import VisionEncoderDecoderModel

import hf_stable
from hf_stable.adamw2.model_optimizer import ModelAdamW2
from hf_stable.adamw2.unseen_models import joined_projections
from hf_stable.measures.parts import Parts


def test_a_bias_that_left_zero_trains_on():
    """A new optimizer on a young model: what its biases are is no scale for their steps."""
    model = tiny_model("gpt2")
    bias = model.transformer.h[0].mlp.c_fc.bias
    with torch.no_grad():
        bias.fill_(1e-4)
    model(**tiny_batch(model)).loss.backward()
    optimizer = hf_stable.AdamW2(hf_stable.parameter_groups(model), lr=1e-2)
    optimizer.step()
    assert (bias - 1e-4).abs().max().item() == pytest.approx(1e-2, rel=1e-3)
    assert optimizer.effective_lr()["transformer.h.0.mlp.c_fc.weight"] < 0.9e-2


# Fused projections, wherever the model is held.


def two_steps(model, optimizer):
    for _ in range(2):
        model(**tiny_batch(model)).loss.backward()
        optimizer.step()
    return optimizer


@pytest.mark.parametrize("patched", [False, True], ids=["plain", "patched"])
def test_parameters_without_their_model_are_warned_of_once(patched):
    model = tiny_model("gpt2")
    if patched:
        hf_stable.patch(model, "sigma_reparam")
    optimizer = hf_stable.AdamW2(model.parameters(), weight_decay=0.0)
    with pytest.warns(UserWarning, match="takes 2 fused projections of this GPT2LMHeadModel") as w:
        two_steps(model, optimizer)
    assert len([each for each in w if "fused" in str(each.message)]) == 1
    assert "'transformer.h.0.attn.c_attn.weight'" in str(w[0].message)


@pytest.mark.parametrize("optimizer_class", [torch.optim.AdamW, hf_stable.AdamW2])
def test_the_state_of_any_optimizer_over_the_groups_loads_without_a_class(
    optimizer_class, tmp_path
):
    model = tiny_model("gpt2")
    optimizer = two_steps(model, optimizer_class(hf_stable.parameter_groups(model)))
    torch.save(optimizer.state_dict(), tmp_path / "optimizer.pt")
    loaded = torch.load(tmp_path / "optimizer.pt", weights_only=True)
    assert any(group.get("blocks") == 3 for group in loaded["param_groups"])
    optimizer_class(hf_stable.parameter_groups(model)).load_state_dict(loaded)


def test_groups_that_know_the_parts_are_not_warned_of():
    own = tiny_model("gpt2")
    fused = [block.attn.c_attn.weight for block in own.transformer.h]
    rest = [p for p in own.parameters() if not any(p is each for each in fused)]
    groups = [{"params": fused, "parts": Parts((1, 1, 1), dim=1)}, {"params": rest}]
    gpt2, llama = tiny_model("gpt2"), build("llama")  # the latter has none
    with warnings.catch_warnings():
        warnings.simplefilter("error", UserWarning)
        two_steps(own, hf_stable.AdamW2(groups))
        two_steps(gpt2, hf_stable.AdamW2(hf_stable.parameter_groups(gpt2)))
        optimizer = hf_stable.AdamW2(llama.parameters())
        outputs_of(llama, batch("llama")).sum().backward()
        optimizer.step()
    assert joined_projections(optimizer.param_groups, gpt2) == []


class Holder(nn.Module):
    """A model without a config, around others."""

    def __init__(self, **parts):
        super().__init__()
        self.parts, self.head = nn.ModuleDict(parts), nn.Linear(16, 3)


def with_compiled_block():
    model = tiny_model("gpt2")
    model.transformer.h[0] = torch.compile(model.transformer.h[0])
    return model


def with_checkpointed_blocks():
    model = tiny_model("gpt2")
    apply_activation_checkpointing(model, check_fn=lambda m: type(m).__name__ == "GPT2Block")
    return model


def composite():
    vit = tiny_model("vit", hidden_size=16)
    gpt2 = tiny_model("gpt2", add_cross_attention=True, is_decoder=True)
    return VisionEncoderDecoderModel(encoder=vit.vit, decoder=gpt2)


def trained_by_peft():
    peft = pytest.importorskip("peft")
    config = peft.LoraConfig(r=2, target_modules=["c_fc"], modules_to_save=["c_attn"])
    return peft.get_peft_model(tiny_model("gpt2"), config)


HELD = {
    "alone": (lambda: tiny_model("gpt2"), 2),
    "in a module": (lambda: Holder(gpt2=tiny_model("gpt2").transformer), 2),
    "two in a module": (lambda: Holder(a=tiny_model("gpt2"), b=tiny_model("gpt2")), 4),
    "two deep": (lambda: Holder(a=Holder(b=tiny_model("gpt2"))), 2),
    "DataParallel": (lambda: nn.DataParallel(tiny_model("gpt2")), 2),
    "compiled": (lambda: torch.compile(tiny_model("gpt2")), 2),
    "compiled block": (with_compiled_block, 2),
    "checkpointed blocks": (with_checkpointed_blocks, 2),
    "composite": (composite, 4),  # cross-attention has a fused key and value
    "patched in a module": (
        lambda: Holder(a=hf_stable.patch(tiny_model("gpt2"), "sigma_reparam")),
        2,
    ),
    "PEFT's modules_to_save": (trained_by_peft, 2),
}


@pytest.mark.filterwarnings("ignore:.*fan_in_fan_out", "ignore:`is_gradient_checkpointing`")
@pytest.mark.parametrize(("make", "num_fused"), HELD.values(), ids=HELD)
@pytest.mark.parametrize("how", ["parameter_groups", "trainer"])
def test_each_part_of_a_fused_projection_has_its_rate_wherever_the_model_is(make, num_fused, how):
    model = make()
    if how == "parameter_groups":
        optimizer = hf_stable.AdamW2(hf_stable.parameter_groups(model), lr=1e-2)
    else:
        given = [{"params": [p for p in model.parameters() if p.requires_grad]}]
        optimizer = ModelAdamW2(given, structure=model, lr=1e-2)
    names = {id(param): name for name, param in model.named_parameters()}
    fused = {
        names[id(param)]: (group["blocks"], group["block_dim"])
        for group in optimizer.param_groups
        if group["blocks"] > 1
        for param in group["params"]
    }
    assert len(fused) == num_fused and all("attn" in name for name in fused)
    cross = {name for name in fused if "crossattention.c_attn" in name}
    assert {fused[name] for name in cross} <= {(2, 1)}
    assert {fused[name] for name in fused.keys() - cross} == {(3, 1)}
    for param in model.parameters():
        if param.requires_grad:
            param.grad = torch.randn_like(param)
    optimizer.step()
    rates = optimizer.effective_lr()
    by_name = {name.replace("._orig_mod", ""): rate for name, rate in rates.items()}
    for name, (blocks, _) in fused.items():
        rate = by_name[name.replace("._orig_mod", "")]
        assert len(rate) == blocks and len(set(rate)) == blocks


def test_blocks_say_parts_in_two_numbers():
    def step(**options):
        weight = nn.Parameter(torch.randn(4, 6, generator=torch.Generator().manual_seed(0)))
        weight.grad = torch.randn(4, 6, generator=torch.Generator().manual_seed(1))
        optimizer = hf_stable.AdamW2([{"params": weight, **options}], lr=1.0)
        optimizer.step()
        return weight, optimizer.param_groups[0]

    (short, group), (full, same) = step(blocks=3, block_dim=1), step(parts=Parts((1,) * 3, dim=1))
    assert torch.equal(short, full) and not torch.equal(short, step()[0])
    names = ("parts", "blocks", "block_dim")
    assert [group[name] for name in names] == [same[name] for name in names]
    assert (group["blocks"], group["block_dim"]) == (3, 1)
    with pytest.raises(ValueError, match="say something else than Parts"):
        step(blocks=2, block_dim=1, parts=Parts((1,) * 3, dim=1))
    with pytest.raises(ValueError, match="blocks=0 along block_dim=0"):
        step(blocks=0)
    with pytest.raises(ValueError, match="blocks=3 along block_dim=2"):
        step(blocks=3, block_dim=2)
    with pytest.raises(ValueError, match="does not fit a parameter of shape"):
        step(blocks=3, block_dim=0)


def test_groups_of_an_optimizer_make_another():
    model = tiny_model("gpt2")
    first = ModelAdamW2([{"params": list(model.parameters())}], structure=model, lr=0.1)
    again = ModelAdamW2(first.param_groups, structure=model, lr=0.1)
    blocks = [[group["blocks"] for group in each.param_groups] for each in (first, again)]
    assert blocks[0] == blocks[1] and 3 in blocks[0]
