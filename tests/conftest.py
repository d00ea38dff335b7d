"""Tiny real models and batches, shared by every test; no network, a few thousand weights each."""

from __future__ import annotations

import os

os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
if "PYTEST_XDIST_WORKER" in os.environ:
    # One core for each worker and the processes that it starts: more threads wait for each other.
    os.environ.setdefault("OMP_NUM_THREADS", "1")

import pytest
import torch
import transformers
from huggingface_hub import constants
from packaging.version import Version
from torch import nn

from hf_stable.architectures import registry

MODEL_TYPES = ("gpt2", "vit", "swin", "bert")

DEFAULT_HEADS = {
    "gpt2": "GPT2LMHeadModel",
    "vit": "ViTForImageClassification",
    "swin": "SwinForImageClassification",
    "bert": "BertForMaskedLM",
}


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Start what may take longest first: at the end one process would wait for another's."""

    def allowed(item: pytest.Item) -> float:
        return max((mark.args[0] for mark in item.iter_markers("timeout")), default=0)

    items.sort(key=allowed, reverse=True)


def tiny_config(model_type: str, **overrides) -> transformers.PreTrainedConfig:
    """A config of a model with two blocks (Swin: 2 stages of 2), dropout off unless asked for."""
    if model_type == "gpt2":
        kwargs = dict(
            vocab_size=37, n_positions=32, n_embd=16, n_layer=2, n_head=2,
            resid_pdrop=0.0, embd_pdrop=0.0, attn_pdrop=0.0, bos_token_id=0, eos_token_id=0,
            pad_token_id=0,
        )  # fmt: skip
        return transformers.GPT2Config(**(kwargs | overrides))
    if model_type == "bert":
        kwargs = dict(
            vocab_size=37, hidden_size=16, num_hidden_layers=2, num_attention_heads=2,
            intermediate_size=32, max_position_embeddings=32,
            hidden_dropout_prob=0.0, attention_probs_dropout_prob=0.0,
        )  # fmt: skip
        return transformers.BertConfig(**(kwargs | overrides))
    if model_type == "vit":
        kwargs = dict(
            image_size=8, patch_size=4, num_channels=1, hidden_size=16, num_hidden_layers=2,
            num_attention_heads=2, intermediate_size=32, num_labels=3,
            hidden_dropout_prob=0.0, attention_probs_dropout_prob=0.0,
        )  # fmt: skip
        return transformers.ViTConfig(**(kwargs | overrides))
    if model_type == "swin":
        kwargs = dict(
            image_size=16, patch_size=2, num_channels=1, embed_dim=16, depths=[2, 2],
            num_heads=[2, 4], window_size=4, num_labels=3, drop_path_rate=0.0,
            hidden_dropout_prob=0.0, attention_probs_dropout_prob=0.0, encoder_stride=4,
        )  # fmt: skip
        return transformers.SwinConfig(**(kwargs | overrides))
    raise KeyError(model_type)


def tiny_model(model_type: str, head: str | None = None, *, seed: int = 0, **overrides):
    """A randomly initialised model in train mode; `head` is a transformers class name."""
    torch.manual_seed(seed)
    cls = getattr(transformers, head or DEFAULT_HEADS[model_type])
    return cls(tiny_config(model_type, **overrides)).train()


def tiny_batch(model: nn.Module, *, size: int = 4, seed: int = 1) -> dict[str, torch.Tensor]:
    """Inputs for one of the default head classes, with labels."""
    generator = torch.Generator().manual_seed(seed)
    config = model.config
    if hasattr(config, "vocab_size"):
        ids = torch.randint(1, config.vocab_size, (size, 12), generator=generator)
        return {"input_ids": ids, "labels": ids.clone()}
    side = config.image_size
    pixels = torch.randn(size, config.num_channels, side, side, generator=generator)
    labels = torch.randint(0, config.num_labels, (size,), generator=generator)
    return {"pixel_values": pixels, "labels": labels}


def sgd_steps(model: nn.Module, *, steps: int = 3, lr: float = 0.1) -> list[float]:
    """Train for a few steps so that weights, sigma and gamma have really moved."""
    optimizer = torch.optim.SGD(model.parameters(), lr=lr)
    losses = []
    for step in range(steps):
        optimizer.zero_grad()
        loss = model(**tiny_batch(model, seed=step)).loss
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    return losses


def add_adapter(model, config) -> None:
    """Add an adapter as transformers does it itself, where it takes the PEFT that is installed."""
    peft = pytest.importorskip("peft")
    needed = transformers.integrations.peft.MIN_PEFT_VERSION
    if Version(peft.__version__) < Version(needed):
        pytest.skip(f"transformers' add_adapter needs peft {needed}")
    model.add_adapter(config)


@pytest.fixture(params=MODEL_TYPES)
def model_type(request) -> str:
    return request.param


@pytest.fixture
def own_registry(monkeypatch):
    """Registrations that end with the test."""
    monkeypatch.setattr(registry, "_registry", dict(registry._registry))


@pytest.fixture
def hub(tmp_path, monkeypatch):
    """A Hub on loopback, and huggingface_hub's own client turned to it."""
    from hub_stand_in import TOKEN, StandIn

    stand_in = StandIn()
    template = stand_in.endpoint + "/{repo_id}/resolve/{revision}/{filename}"
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    monkeypatch.setattr(constants, "ENDPOINT", stand_in.endpoint)
    monkeypatch.setattr(constants, "HUGGINGFACE_CO_URL_TEMPLATE", template)
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "cache"))
    monkeypatch.setenv("HF_TOKEN", TOKEN)
    # transformers keeps one client, which has the endpoint of the time it was made.
    monkeypatch.setattr(transformers.utils.hub, "_hf_api", None)
    yield stand_in
    stand_in.close()
