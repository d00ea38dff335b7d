"""Tiny real models and batches, shared by every test; no network, a few thousand weights each."""

from __future__ import annotations

import pytest
import torch
import transformers
from packaging.version import Version
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from tokenizers.pre_tokenizers import Whitespace
from torch import nn

MODEL_TYPES = ("gpt2", "vit", "swin", "bert")

DEFAULT_HEADS = {
    "gpt2": "GPT2LMHeadModel",
    "vit": "ViTForImageClassification",
    "swin": "SwinForImageClassification",
    "bert": "BertForMaskedLM",
}

METHOD = {
    "gpt2": "remove_pre_layernorm",
    "vit": "remove_pre_layernorm",
    "swin": "remove_pre_layernorm",
    "bert": "remove_layernorm",
}
"""The method that removes the norms of a model's blocks."""


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


def tiny_tokenizer():
    special = {"unk_token": "[UNK]", "pad_token": "[PAD]", "mask_token": "[MASK]"}
    words = [*special.values(), *(f"w{i}" for i in range(34))]
    tokenizer = Tokenizer(WordLevel({word: i for i, word in enumerate(words)}, "[UNK]"))
    tokenizer.pre_tokenizer = Whitespace()
    return transformers.PreTrainedTokenizerFast(tokenizer_object=tokenizer, **special)
