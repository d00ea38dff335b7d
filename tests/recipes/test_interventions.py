"""Interventions: each does to attention what it says, and nothing where it is not meant."""

from __future__ import annotations

import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from transformers import TrainerCallback

ROOT = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(ROOT))

from recipes import data  # noqa: E402
from recipes.evidence.interventions import Intervening  # noqa: E402
from recipes.models import build  # noqa: E402
from recipes.run import run  # noqa: E402
from recipes.settings import Settings  # noqa: E402

LAYERS = {"vit": "num_hidden_layers", "gpt2": "n_layer", "llama": "num_hidden_layers"}


def tiny(model, **changes):
    task = data.digits() if model == "vit" else data.next_tokens()
    settings = Settings(model=model, init="xavier", model_config={LAYERS[model]: 2}, **changes)
    batch = {name: torch.stack([task.train[i][name] for i in range(4)]) for name in task.train[0]}
    return build(settings, task).eval(), batch


def begin(intervening, step):
    intervening.on_step_begin(None, SimpleNamespace(global_step=step - 1), None)


def seen(model, batch):
    """Queries and keys that the attention functions get, with their scale; and the loss."""
    calls = []
    interface = model.config._attn_implementation

    def looking(module, query, key, value, mask, scaling=None, **kwargs):
        calls.append((query.detach(), key.detach(), value.detach(), scaling))
        return original(module, query, key, value, mask, scaling=scaling, **kwargs)

    from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

    original = ALL_ATTENTION_FUNCTIONS[interface]
    ALL_ATTENTION_FUNCTIONS[interface] = looking
    try:
        with torch.no_grad():
            loss = model(**batch).loss.item()
    finally:
        ALL_ATTENTION_FUNCTIONS[interface] = original
    return calls, loss


def logits(call):
    query, key, _, scale = call
    return query @ key.mT * scale


@pytest.mark.parametrize("model", LAYERS)
def test_logits_grow_by_the_square_and_the_control_leaves_them(model):
    plain, batch = tiny(model)
    (before, *_), loss = seen(plain, batch)
    for kind in ("scale_queries_keys", "temperature"):
        own, _ = tiny(model)
        acting = Intervening(own, dict(kind=kind, at=3, factor=2.0))
        begin(acting, 2)
        assert seen(own, batch)[1] == loss  # its step has not come
        begin(acting, 3)
        begin(acting, 4)  # nothing is done twice
        (after, *_), changed = seen(own, batch)
        torch.testing.assert_close(logits(after), 4 * logits(before))
        torch.testing.assert_close(after[2], before[2])
        assert changed != loss
    own, _ = tiny(model)
    begin(Intervening(own, dict(kind="scale_values_outputs", at=1, factor=2.0)), 1)
    (after, *_), changed = seen(own, batch)
    torch.testing.assert_close(logits(after), logits(before))
    torch.testing.assert_close(after[2], 2 * before[2])
    assert changed != loss


def test_layers_and_heads_are_chosen():
    plain, batch = tiny("gpt2")
    first, second = seen(plain, batch)[0]
    own, _ = tiny("gpt2")
    given = dict(kind="scale_queries_keys", at=1, factor=2.0, layers=[0], heads=[1])
    begin(Intervening(own, given), 1)
    own_first, _ = seen(own, batch)[0]
    torch.testing.assert_close(logits(own_first)[:, 0], logits(first)[:, 0])
    torch.testing.assert_close(logits(own_first)[:, 1], 4 * logits(first)[:, 1])
    assert torch.equal(
        own.transformer.h[1].attn.c_attn.weight, plain.transformer.h[1].attn.c_attn.weight
    )


@pytest.mark.parametrize("model", LAYERS)
def test_no_logit_is_beyond_its_cap(model):
    plain, batch = tiny(model)
    own, _ = tiny(model)
    Intervening(own, dict(kind="cap_logits", limit=0.2))
    assert max(logits(call).abs().max() for call in seen(plain, batch)[0]) > 0.5
    assert max(logits(call).abs().max() for call in seen(own, batch)[0]) <= 0.2 + 1e-5


@pytest.mark.parametrize("model", LAYERS)
def test_a_head_whose_logits_were_too_large_is_clipped_to_the_limit(model):
    limit = 0.6
    own, batch = tiny(model)
    acting = Intervening(own, dict(kind="qk_clip", limit=limit))
    own.train()  # evaluation is not watched
    (first, *_), loss = seen(own, batch)
    mask = torch.ones(logits(first).shape[-2:]).tril() if model != "vit" else torch.ones(1)
    before = logits(first).where(mask.bool(), -torch.inf).amax((0, 2, 3))
    assert before.max() > limit, "choose a limit that a head is beyond"
    acting.on_step_end(None, None, None)
    (first, *_), changed = seen(own, batch)
    after = logits(first).where(mask.bool(), -torch.inf).amax((0, 2, 3))
    torch.testing.assert_close(after, before.clamp(max=limit))
    assert changed != loss
    own, _ = tiny(model)
    acting = Intervening(own, dict(kind="qk_clip", limit=100.0))
    kept = {name: each.clone() for name, each in own.state_dict().items()}
    own.train()
    assert seen(own, batch)[1] == loss
    acting.on_step_end(None, None, None)
    assert all(torch.equal(each, kept[name]) for name, each in own.state_dict().items())


class Watching(TrainerCallback):
    """Keeps Wq of the first layer, and the largest sigma1(Wq^T Wk), after each step."""

    def __init__(self):
        self.queries, self.sigmas = [], []

    def on_step_end(self, args, state, control, model=None, **kwargs):
        attention = model.vit.layers[0].attention
        query, key = attention.q_proj.weight.detach(), attention.k_proj.weight.detach()
        self.queries.append(query.clone())
        heads = zip(query.chunk(2), key.chunk(2), strict=True)
        self.sigmas.append(max(torch.linalg.matrix_norm(q.T @ k, 2).item() for q, k in heads))


def watched(tmp_path, intervention):
    watching = Watching()
    run(
        Settings(
            init="xavier", learning_rate=1e-2, steps=4, batch_size=8, monitor_every=0,
            model_config={"num_hidden_layers": 2}, intervention=intervention,
            output=str(tmp_path),
        ),
        callbacks=[watching],
    )  # fmt: skip
    return watching


def test_what_the_optimizer_moves_is_put_right_after_each_step(tmp_path):
    plain = watched(tmp_path / "plain", None)
    assert not torch.equal(plain.queries[0], plain.queries[1]) and max(plain.sigmas) > 1.5
    clamped = watched(tmp_path / "clamped", dict(kind="clamp_sigma", limit=1.0))
    assert max(clamped.sigmas) == pytest.approx(1.0, abs=1e-4)
    frozen = watched(tmp_path / "frozen", dict(kind="freeze_queries_keys", at=3))
    for step in (0, 1):
        torch.testing.assert_close(frozen.queries[step], plain.queries[step])
    assert torch.equal(frozen.queries[1], frozen.queries[2])
    assert torch.equal(frozen.queries[1], frozen.queries[3])


def test_what_cannot_be_is_refused():
    own, _ = tiny("vit")
    for given, message in (
        (dict(kind="hope"), "kind 'hope' is none of scale_queries_keys"),
        (dict(kind="temperature", at=1), "takes at, factor, and layers and heads .* given are at"),
        (dict(kind="cap_logits", limit=1, at=1), "takes limit, .* given are at, limit"),
        (dict(kind="cap_logits", limit=1, layers=[2]), "no attention 2; the model has 2"),
        (dict(kind="cap_logits", limit=1, heads=[-1]), "no head -1; each attention has 2"),
    ):
        with pytest.raises(ValueError, match=message):
            Intervening(own, given)
    patched, _ = tiny("vit", patch="sigma_reparam")
    with pytest.raises(ValueError, match="leave patch sigma_reparam out"):
        Intervening(patched, dict(kind="cap_logits", limit=1))
    normed = build(Settings(model="qwen3"), data.next_tokens())
    with pytest.raises(ValueError, match="models vit, llama, gpt2, not for qwen3"):
        Intervening(normed, dict(kind="cap_logits", limit=1))
