"""The models that benchmarks time, and batches for them."""

from __future__ import annotations

from typing import Any

import torch
import transformers
from torch import Tensor

__all__ = ["build_gpt2", "build_vit", "make_images", "make_tokens"]

HEAD_WIDTH = 64


def build_gpt2(hidden: int, layers: int, *, vocabulary: int, positions: int, **config: Any) -> Any:
    """Build a GPT-2 with a head of language modelling; weights are the same every time.

    Args:
        hidden: width; heads are 64 wide, unless `config` says otherwise.
        layers: number of blocks.
        vocabulary: number of tokens.
        positions: longest sequence.
        **config: further fields of a GPT2Config.
    """
    torch.manual_seed(0)
    options = {"n_head": _num_heads(hidden), "bos_token_id": 0, "eos_token_id": 0} | config
    return transformers.GPT2LMHeadModel(
        transformers.GPT2Config(
            vocab_size=vocabulary, n_positions=positions, n_embd=hidden, n_layer=layers, **options
        )
    )


def build_vit(hidden: int, layers: int, *, image: int, patch: int, **config: Any) -> Any:
    """Build a ViT that classifies images; weights are the same every time.

    Args:
        hidden: width; heads are 64 wide, unless `config` says otherwise.
        layers: number of blocks.
        image: pixels on a side.
        patch: pixels of a patch on a side.
        **config: further fields of a ViTConfig.
    """
    torch.manual_seed(0)
    options = {"num_attention_heads": _num_heads(hidden)} | config
    return transformers.ViTForImageClassification(
        transformers.ViTConfig(
            hidden_size=hidden,
            num_hidden_layers=layers,
            intermediate_size=4 * hidden,
            image_size=image,
            patch_size=patch,
            **options,
        )
    )


def make_tokens(batch: int, sequence: int, vocabulary: int) -> dict[str, Tensor]:
    """Return a batch of random tokens, which are their own labels."""
    ids = torch.randint(1, vocabulary, (batch, sequence))
    return {"input_ids": ids, "labels": ids}


def make_images(batch: int, image: int) -> dict[str, Tensor]:
    """Return a batch of random images, all of the first class."""
    pixels = torch.randn(batch, 3, image, image)
    return {"pixel_values": pixels, "labels": torch.zeros(batch, dtype=torch.long)}


def _num_heads(hidden: int) -> int:
    return max(1, hidden // HEAD_WIDTH)
