"""Models of the recipes: small ones for embedded data, the papers' own sizes by their names."""

from __future__ import annotations

import copy
from typing import Any

import torch
import transformers
from torch import nn
from transformers.pytorch_utils import Conv1D

import hf_stable
from hf_stable.methods.sigma_reparam.function import scale_parts
from hf_stable.spectral import Parts, matrices_of
from recipes import linear_swin
from recipes.data import CONTEXT, Task
from recipes.settings import Settings

SMALL: dict[str, dict[str, Any]] = {
    "vit": dict(
        patch_size=7, hidden_size=64, num_hidden_layers=8, num_attention_heads=2,
        intermediate_size=256,
    ),
    "swin": dict(patch_size=2, embed_dim=32, depths=[2, 4], num_heads=[2, 4], window_size=7),
    "linear_swin": dict(
        patch_size=2, embed_dim=32, depths=[2, 4], num_heads=[2, 4], window_size=14
    ),
    "gpt2": dict(
        n_positions=CONTEXT, n_embd=64, n_layer=6, n_head=2, resid_pdrop=0.0, embd_pdrop=0.0,
        attn_pdrop=0.0, bos_token_id=0, eos_token_id=0,
    ),
    "bert": dict(
        max_position_embeddings=CONTEXT, hidden_size=64, num_hidden_layers=4,
        num_attention_heads=2, intermediate_size=256, hidden_dropout_prob=0.0,
        attention_probs_dropout_prob=0.0, pad_token_id=0,
    ),
}  # fmt: skip

INITS = ("default", "xavier", "truncated_xavier")

CLASSES = {
    "vit": (transformers.ViTConfig, transformers.ViTForImageClassification),
    "swin": (transformers.SwinConfig, transformers.SwinForImageClassification),
    "linear_swin": (linear_swin.LinearSwinConfig, linear_swin.LinearSwinForImageClassification),
    "gpt2": (transformers.GPT2Config, transformers.GPT2LMHeadModel),
    "bert": (transformers.BertConfig, transformers.BertForSequenceClassification),
}


def build(settings: Settings, task: Task) -> Any:
    """Return the model that a recipe describes, initialised and patched.

    Raises:
        ValueError: for an unknown model or init.
    """
    if settings.model not in CLASSES:
        raise ValueError(f"model {settings.model!r} is none of {', '.join(CLASSES)}")
    if settings.model == "linear_swin":
        linear_swin.register()
    transformers.set_seed(settings.seed)
    config_class, model_class = CLASSES[settings.model]
    if settings.model == "bert" and not task.is_small:
        model_class = transformers.BertForMaskedLM
    sizes = (SMALL[settings.model] if task.is_small else {}) | (settings.model_config or {})
    if task.image_size:
        sizes |= dict(
            image_size=task.image_size, num_channels=task.num_channels, num_labels=task.num_labels
        )
    else:
        sizes["vocab_size"] = task.vocabulary
        if settings.model == "bert" and task.is_small:
            sizes["num_labels"] = task.num_labels
    model = model_class(config_class(**sizes))
    initialise(model, settings.init, settings.init_scale)
    if settings.qk_norm:
        add_qk_norm(model)
    if settings.normaliser:
        normalise(model, settings.normaliser)
    if settings.patch:
        hf_stable.patch(model, [_method(name, settings) for name in settings.patch.split(",")])
    return model


def build_empty(settings: Settings) -> Any:
    """Return the plain model of a full-scale recipe without memory for its weights."""
    config_class, model_class = CLASSES[settings.model]
    with torch.device("meta"):
        return model_class(config_class(**(settings.model_config or {})))


def _method(name: str, settings: Settings) -> Any:
    if name == "sigma_reparam":
        return hf_stable.SigmaReparamConfig(init=settings.patch_init)
    if name == "remove_pre_layernorm":
        return hf_stable.RemovePreLayerNormConfig(scope=settings.patch_scope)
    if name == "remove_layernorm":
        return hf_stable.RemoveLayerNormConfig(scope=settings.patch_scope)
    return name


@torch.no_grad()
def initialise(model: nn.Module, init: str, scale: float) -> None:
    """Draw the matrices by Xavier's rule, or keep transformers' own; then scale them.

    Raises:
        ValueError: for another `init`.
    """
    if init not in INITS:
        raise ValueError(f"init {init!r} is none of {', '.join(INITS)}")
    for module in model.modules():
        if isinstance(module, nn.Linear | nn.Conv2d | Conv1D):
            if init == "xavier":
                nn.init.xavier_uniform_(module.weight)
            elif init == "truncated_xavier":
                fans = module.weight.shape[0] + module.weight[0].numel()
                deviation = (2 / fans) ** 0.5
                nn.init.trunc_normal_(
                    module.weight, std=deviation, a=-2 * deviation, b=2 * deviation
                )
            module.weight.mul_(scale)


class _OverFrobenius(nn.Module):
    """`gamma / |W|_F * W` for each part: sigmaReparam with the Frobenius norm in sigma's place."""

    def __init__(self, gamma: torch.Tensor, parts: Parts) -> None:
        super().__init__()
        self.gamma, self.parts = nn.Parameter(gamma), parts

    def forward(self, weight: torch.Tensor) -> torch.Tensor:
        return scale_parts(weight, self.gamma / self.sizes(weight), self.parts)

    def sizes(self, weight: torch.Tensor) -> torch.Tensor:
        """Return the Frobenius norm of each part, (k,)."""
        matrices = matrices_of(weight, self.parts)
        return torch.stack([torch.linalg.vector_norm(matrix) for matrix in matrices])


@torch.no_grad()
def normalise(model: Any, kind: str) -> None:
    """Divide the weights that sigmaReparam would patch by another norm, in place.

    They start as they would there: with the raw weights as they are, and a spectral norm of 1. The
    size of a raw weight that is divided by its norm is its rate under Adam, so that another size
    would be another rate.

    Raises:
        ValueError: for an unknown kind.
    """
    if kind not in ("frobenius", "weight_norm"):
        raise ValueError(f"normaliser {kind!r} is neither frobenius nor weight_norm")
    patched = hf_stable.patch(copy.deepcopy(model), "sigma_reparam")
    for layer in hf_stable.describe(patched).layers:
        if layer.skipped is not None:
            continue
        module, like = model.get_submodule(layer.name), patched.get_submodule(layer.name)
        sigma, parts = like.sigma, like.parts  # which lie along the output features
        if kind == "weight_norm":
            nn.utils.parametrizations.weight_norm(module, dim=parts.dim)
            rows = module.parametrizations.weight.original0
            rows /= parts.spread(sigma, module.weight.shape)
        else:
            norm = _OverFrobenius(torch.ones_like(sigma), parts)
            norm.gamma.copy_(norm.sizes(module.weight) / sigma)
            nn.utils.parametrize.register_parametrization(module, "weight", norm)


class _NormedProjection(nn.Module):
    """A projection whose output is normalised head by head: QK-norm (Dehghani et al. 2023)."""

    def __init__(self, projection: nn.Linear, num_heads: int) -> None:
        super().__init__()
        self.projection, self.num_heads = projection, num_heads
        self.norm = nn.LayerNorm(projection.out_features // num_heads)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        heads = self.projection(x).unflatten(-1, (self.num_heads, -1))
        return self.norm(heads).flatten(-2)


def add_qk_norm(model: Any) -> None:
    """Put a LayerNorm behind the query and key projections of a ViT, in place.

    Raises:
        ValueError: for another model.
    """
    if not hasattr(model, "vit"):
        raise ValueError(
            f"qk_norm is there for model vit, not for {model.config.model_type}; leave it out"
        )
    for layer in model.vit.layers:
        attention = layer.attention
        for name in ("q_proj", "k_proj"):
            normed = _NormedProjection(getattr(attention, name), model.config.num_attention_heads)
            setattr(attention, name, normed)
