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

LLAMA: dict[str, Any] = dict(
    max_position_embeddings=CONTEXT, hidden_size=64, num_hidden_layers=6, num_attention_heads=2,
    num_key_value_heads=2, intermediate_size=172,
)  # fmt: skip
"""Two thirds of four times the width for each of the three matrices of its MLP."""

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
    "llama": LLAMA,
    "qwen3": LLAMA | dict(head_dim=32),
    "marian": dict(
        d_model=64, encoder_layers=2, decoder_layers=2, encoder_attention_heads=2,
        decoder_attention_heads=2, encoder_ffn_dim=256, decoder_ffn_dim=256, dropout=0.0,
        max_position_embeddings=128, scale_embedding=True, forced_eos_token_id=None,
    ),
    "wav2vec2": dict(
        hidden_size=64, num_hidden_layers=3, num_attention_heads=2, intermediate_size=256,
        conv_dim=(32, 64, 64), conv_kernel=(40, 8, 8), conv_stride=(20, 4, 4),
        num_feat_extract_layers=3, feat_extract_norm="layer", do_stable_layer_norm=True,
        num_conv_pos_embeddings=16, num_conv_pos_embedding_groups=4, hidden_dropout=0.0,
        attention_dropout=0.0, activation_dropout=0.0, feat_proj_dropout=0.0, final_dropout=0.0,
        layerdrop=0.0, mask_time_prob=0.0, ctc_loss_reduction="mean", ctc_zero_infinity=True,
    ),
    "whisper": dict(
        d_model=64, encoder_layers=3, decoder_layers=2, encoder_attention_heads=2,
        decoder_attention_heads=2, encoder_ffn_dim=256, decoder_ffn_dim=256, dropout=0.0,
        max_target_positions=64,
    ),
    "t5": dict(
        d_model=64, d_kv=32, d_ff=256, num_layers=2, num_decoder_layers=2, num_heads=2,
        dropout_rate=0.0,
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
    "llama": (transformers.LlamaConfig, transformers.LlamaForCausalLM),
    # A Llama whose queries and keys have norms of their own.
    "qwen3": (transformers.Qwen3Config, transformers.Qwen3ForCausalLM),
    "marian": (transformers.MarianConfig, transformers.MarianMTModel),
    "t5": (transformers.T5Config, transformers.T5ForConditionalGeneration),
    "wav2vec2": (transformers.Wav2Vec2Config, transformers.Wav2Vec2ForCTC),
    "whisper": (transformers.WhisperConfig, transformers.WhisperForConditionalGeneration),
    "bert": (transformers.BertConfig, transformers.BertForSequenceClassification),
}

DECODERS = ("gpt2", "llama", "qwen3")
"""Models that predict the next token."""


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
    sizes |= task.sizes
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
