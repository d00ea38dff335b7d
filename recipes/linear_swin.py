"""An architecture of a user's own: Swin with linear attention, registered in a few lines.

It stands for Flatten-Swin (Han et al. 2023), which transformers does not have: attention
`phi(Q) (phi(K)^T V)` with their focused feature map, over windows as large as the image, and a
depthwise convolution that gives V back what a map of low rank loses.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from transformers import SwinConfig, SwinForImageClassification

import hf_stable
from hf_stable import Architecture, Attention, Block, Member

FOCUS = 3
"""The power that sharpens features (Han et al. 2023, Eq. 5)."""


class LinearSwinConfig(SwinConfig):
    """Swin's config under a name of its own."""

    model_type = "linear_swin"


class LinearAttention(nn.Module):
    """Attention of a window whose cost is linear in its size."""

    def __init__(self, config: Any, width: int, num_heads: int) -> None:
        """Create projections under Swin's names, and the convolution."""
        super().__init__()
        self.num_heads = num_heads
        for name in ("q_proj", "k_proj", "v_proj"):
            setattr(self, name, nn.Linear(width, width, bias=config.qkv_bias))
        self.o_proj = nn.Linear(width, width)
        self.mix = nn.Conv2d(width, width, 5, padding=2, groups=width)

    def forward(
        self, hidden_states: Tensor, attention_mask: Tensor | None = None, **_: Any
    ) -> tuple[Tensor, None]:
        """Attend within windows (windows, tokens, width).

        Raises:
            ValueError: for shifted windows, whose mask linear attention cannot apply.
        """
        if attention_mask is not None:
            raise ValueError("windows are shifted: make window_size the side of the feature map")
        q, k, v = (
            project(hidden_states).unflatten(-1, (self.num_heads, -1)).transpose(1, 2)
            for project in (self.q_proj, self.k_proj, self.v_proj)
        )
        q, k = focused(q), focused(k)
        total = q @ k.sum(-2, keepdim=True).mT
        out = (q @ (k.mT @ v) / total.clamp_min(1e-6)).transpose(1, 2).flatten(-2)
        side = round(hidden_states.shape[1] ** 0.5)
        image = v.transpose(1, 2).flatten(-2).mT.unflatten(-1, (side, side))
        return self.o_proj(out + self.mix(image).flatten(-2).mT), None


def focused(x: Tensor) -> Tensor:
    """Return positive features of the same length, closer to their largest entries."""
    x = torch.relu(x) + 1e-6
    sharp = x**FOCUS
    length = torch.linalg.vector_norm(x, dim=-1, keepdim=True)
    return sharp / torch.linalg.vector_norm(sharp, dim=-1, keepdim=True) * length


class LinearSwinForImageClassification(SwinForImageClassification):
    """Swin for image classification with linear attention."""

    config_class = LinearSwinConfig

    def __init__(self, config: LinearSwinConfig) -> None:
        """Build Swin and replace its attentions."""
        super().__init__(config)
        for stage, num_heads in zip(self.swin.encoder.layers, config.num_heads, strict=True):
            for layer in stage.blocks:
                width = layer.attention.q_proj.in_features
                layer.attention = LinearAttention(config, width, num_heads)
        self.post_init()


ARCHITECTURE = Architecture(
    model_type="linear_swin",
    block=Block(
        class_name="SwinLayer",
        attentions=(
            Attention(
                module="attention",
                query="attention.q_proj",
                key="attention.k_proj",
                value="attention.v_proj",
                output="attention.o_proj",
            ),
        ),
        mlp_in=("mlp.fc1",),
        mlp_out=("mlp.fc2",),
        pre_norms=("layernorm_before", "layernorm_after"),
    ),
    layers=(
        Member("SwinPatchEmbeddings", "projection"),
        Member("SwinPatchMerging", "reduction"),
    ),
    heads=(Member("LinearSwinForImageClassification", "classifier"),),
    norms=(
        Member("SwinEmbeddings", "norm"),
        Member("SwinPatchMerging", "norm"),
        Member("SwinModel", "layernorm"),
    ),
)


def register() -> None:
    """Make the architecture known to hf_stable; again, if it is already."""
    hf_stable.register_architecture(ARCHITECTURE, overwrite=True)
