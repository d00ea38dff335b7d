"""A tiny model of every shipped architecture, and a batch for it; nothing is downloaded."""

from __future__ import annotations

import re

import torch
import transformers

TOKENS = dict(pad_token_id=0, bos_token_id=1, eos_token_id=2)


def text(**changes):
    sizes = dict(
        vocab_size=37, hidden_size=16, num_hidden_layers=2, num_attention_heads=4,
        intermediate_size=24, max_position_embeddings=32,
    )  # fmt: skip
    return sizes | TOKENS | changes


def grouped(**changes):
    return text(num_key_value_heads=2, **changes)


def image(**changes):
    sizes = dict(
        image_size=8, patch_size=4, num_channels=1, hidden_size=16, num_hidden_layers=2,
        num_attention_heads=2, intermediate_size=32,
    )  # fmt: skip
    return sizes | changes


def two_stacks(**changes):
    sizes = dict(
        vocab_size=37, d_model=16, encoder_layers=2, decoder_layers=2, encoder_attention_heads=2,
        decoder_attention_heads=2, encoder_ffn_dim=24, decoder_ffn_dim=24,
        max_position_embeddings=32, decoder_start_token_id=1, forced_eos_token_id=None,
    )  # fmt: skip
    return sizes | TOKENS | changes


def t5(**changes):
    sizes = dict(vocab_size=37, d_model=16, d_kv=8, d_ff=24, num_layers=2, num_heads=2)
    return sizes | dict(decoder_start_token_id=0) | changes


def speech(**changes):
    sizes = dict(
        vocab_size=37, hidden_size=16, num_hidden_layers=2, num_attention_heads=2,
        intermediate_size=24, conv_dim=(8, 8), conv_stride=(4, 4), conv_kernel=(8, 4),
        num_conv_pos_embeddings=8, num_conv_pos_embedding_groups=2, num_feat_extract_layers=2,
    )  # fmt: skip
    return sizes | changes


def windows(**changes):
    sizes = dict(
        image_size=16, patch_size=2, num_channels=1, embed_dim=16, depths=[2, 2], num_heads=[2, 4],
        window_size=4,
    )  # fmt: skip
    return sizes | changes


MODELS = {  # model type, or a name of a variant -> head class, sizes
    "gpt2": ("GPT2LMHeadModel", TOKENS | dict(vocab_size=37, n_positions=32, n_embd=16, n_layer=2,
                                              n_head=2)),
    "bert": ("BertForMaskedLM", text()),
    "vit": ("ViTForImageClassification", image()),
    "swin": ("SwinForImageClassification", windows()),
    "llama": ("LlamaForCausalLM", grouped()),
    "mistral": ("MistralForCausalLM", grouped()),
    "qwen2": ("Qwen2ForCausalLM", grouped()),
    "qwen3": ("Qwen3ForCausalLM", grouped(head_dim=4)),
    "smollm3": ("SmolLM3ForCausalLM", grouped()),
    "granite": ("GraniteForCausalLM", grouped()),
    "gemma": ("GemmaForCausalLM", text(head_dim=4, num_key_value_heads=1)),
    "gemma2": ("Gemma2ForCausalLM", grouped(head_dim=4)),
    "gemma3_text": ("Gemma3ForCausalLM", grouped(head_dim=4)),
    "olmo2": ("Olmo2ForCausalLM", grouped()),
    "olmo3": ("Olmo3ForCausalLM", grouped()),
    "phi": ("PhiForCausalLM", text()),
    "phi3": ("Phi3ForCausalLM", grouped()),
    "stablelm": ("StableLmForCausalLM", grouped()),
    "starcoder2": ("Starcoder2ForCausalLM", grouped()),
    "cohere": ("CohereForCausalLM", grouped()),
    "glm": ("GlmForCausalLM", grouped(head_dim=8)),
    "gpt_neox": ("GPTNeoXForCausalLM", text()),
    "bloom": ("BloomForCausalLM", dict(vocab_size=37, hidden_size=16, n_layer=2, n_head=2)),
    "falcon": ("FalconForCausalLM", text()),
    "opt": (
        "OPTForCausalLM",
        dict(
            vocab_size=37, hidden_size=16, num_hidden_layers=2, ffn_dim=24, num_attention_heads=2,
            max_position_embeddings=32, word_embed_proj_dim=16,
        ),
    ),
    "opt, post-LN": (
        "OPTForCausalLM",
        dict(
            vocab_size=37, hidden_size=16, num_hidden_layers=2, ffn_dim=24, num_attention_heads=2,
            max_position_embeddings=32, word_embed_proj_dim=8, do_layer_norm_before=False,
        ),
    ),
    "gpt_neo": (
        "GPTNeoForCausalLM",
        dict(
            vocab_size=37, hidden_size=16, num_layers=2, num_heads=2, window_size=4,
            attention_types=[[["global", "local"], 1]], max_position_embeddings=32,
        ),
    ),
    "gptj": (
        "GPTJForCausalLM",
        dict(vocab_size=37, n_embd=16, n_layer=2, n_head=2, rotary_dim=4, n_positions=32),
    ),
    "mixtral": ("MixtralForCausalLM", grouped(num_local_experts=4, num_experts_per_tok=2)),
    "qwen3_moe": (
        "Qwen3MoeForCausalLM",
        grouped(
            head_dim=4, num_experts=4, num_experts_per_tok=2, moe_intermediate_size=8,
            decoder_sparse_step=1, mlp_only_layers=[1],
        ),
    ),
    "roberta": ("RobertaForMaskedLM", text()),
    "xlm-roberta": ("XLMRobertaForMaskedLM", text()),
    "electra": ("ElectraForMaskedLM", text(embedding_size=8)),
    "electra, one width": ("ElectraForMaskedLM", text(embedding_size=16)),
    "distilbert": (
        "DistilBertForMaskedLM",
        dict(
            vocab_size=37, dim=16, n_layers=2, n_heads=2, hidden_dim=24,
            max_position_embeddings=32,
        ),
    ),
    "albert": ("AlbertForMaskedLM", text(embedding_size=8)),
    "deberta-v2": (
        "DebertaV2ForMaskedLM",
        text(relative_attention=True, pos_att_type=["c2p", "p2c"], position_buckets=8),
    ),
    "modernbert": (
        "ModernBertForMaskedLM", text(local_attention=8, cls_token_id=1, sep_token_id=2)
    ),
    "deit": ("DeiTForImageClassification", image()),
    "dinov2": ("Dinov2ForImageClassification", image(mlp_ratio=2)),
    "dinov2, gated": ("Dinov2ForImageClassification", image(mlp_ratio=2, use_swiglu_ffn=True)),
    "dinov2_with_registers": ("Dinov2WithRegistersForImageClassification", image(mlp_ratio=2)),
    "dinov3_vit": ("DINOv3ViTModel", image(num_register_tokens=1)),
    "dinov3_vit, gated": ("DINOv3ViTModel", image(use_gated_mlp=True)),
    "beit": ("BeitForImageClassification", image()),
    "vit_mae": (
        "ViTMAEForPreTraining",
        image(
            decoder_num_attention_heads=2, decoder_hidden_size=16, decoder_num_hidden_layers=2,
            decoder_intermediate_size=32,
        ),
    ),
    "videomae": ("VideoMAEForVideoClassification", image(num_frames=4, tubelet_size=2)),
    "swinv2": ("Swinv2ForImageClassification", windows()),
    "segformer": (
        "SegformerForImageClassification",
        dict(
            num_channels=1, num_encoder_blocks=2, depths=[2, 2], sr_ratios=[2, 1],
            hidden_sizes=[16, 16], patch_sizes=[3, 3], strides=[2, 2], num_attention_heads=[1, 2],
            mlp_ratios=[2, 2], decoder_hidden_size=16,
        ),
    ),
    "t5": ("T5ForConditionalGeneration", t5()),
    "mt5": ("MT5ForConditionalGeneration", t5(feed_forward_proj="gated-gelu")),
    "bart": ("BartForConditionalGeneration", two_stacks()),
    "mbart": ("MBartForConditionalGeneration", two_stacks()),
    "marian": ("MarianMTModel", two_stacks()),
    "pegasus": ("PegasusForConditionalGeneration", two_stacks()),
    "m2m_100": ("M2M100ForConditionalGeneration", two_stacks()),
    "whisper": (
        "WhisperForConditionalGeneration",
        two_stacks(
            num_mel_bins=8, max_source_positions=8, max_target_positions=32,
            begin_suppress_tokens=None, suppress_tokens=None,
        ),
    ),
    "speech_to_text": (
        "Speech2TextForConditionalGeneration",
        two_stacks(
            input_feat_per_channel=8, input_channels=1, num_conv_layers=2,
            conv_kernel_sizes=(5, 5), conv_channels=8, max_source_positions=64,
            max_target_positions=32,
        ),
    ),
    "wav2vec2": ("Wav2Vec2ForCTC", speech()),
    "wav2vec2, pre-LN": (
        "Wav2Vec2ForCTC", speech(do_stable_layer_norm=True, feat_extract_norm="layer")
    ),
    "hubert": ("HubertForCTC", speech()),
    "wavlm": ("WavLMForCTC", speech()),
    "clip": (
        "CLIPModel",
        dict(text_config=text(projection_dim=8), vision_config=image(), projection_dim=8),
    ),
    "siglip": ("SiglipModel", dict(text_config=text(), vision_config=image())),
}  # fmt: skip


def build(name: str, *, dropout: float | None = None, **options):
    """A random model, its biases and gains not those of a fresh one, in evaluation mode.

    Args:
        name: in `MODELS`.
        dropout: rate of everything that its config names a dropout; None leaves the defaults.
        options: of the building: `attn_implementation`, which some models take at no other time.
    """
    head, sizes = MODELS[name]
    torch.manual_seed(0)
    model_class = getattr(transformers, head)
    config = model_class.config_class(**sizes)
    if dropout is not None:
        drop(config, dropout)
    model = model_class._from_config(config, **options)
    with torch.no_grad():
        for parameter in model.parameters():
            if not parameter.requires_grad:  # tables of sines, which no file has
                continue
            if parameter.ndim == 1:
                parameter.add_(torch.randn_like(parameter), alpha=0.1)
            elif parameter.ndim == 2:
                parameter.mul_(3)
    return model.eval()


def drop(config, rate: float) -> None:
    """Set every rate of a config, and of those in it, that is named for dropping something."""
    for key, value in vars(config).items():
        if isinstance(value, transformers.PreTrainedConfig):
            drop(value, rate)
        elif isinstance(value, float) and re.search("drop|pdrop", key):
            setattr(config, key, rate)


def batch(name: str, size: int = 2) -> dict[str, torch.Tensor]:
    """Inputs of some sequences, images or sounds."""
    generator = torch.Generator().manual_seed(1)
    head, sizes = MODELS[name]
    ids = torch.randint(3, 37, (size, 8), generator=generator)
    side = sizes.get("image_size", 16)

    def draw(*shape):
        return torch.randn(shape, generator=generator)

    if name in ("clip", "siglip"):
        return {"input_ids": ids, "pixel_values": draw(size, 1, 8, 8)}
    if name == "vit_mae":
        return {"pixel_values": draw(size, 1, 8, 8), "noise": draw(size, 4)}
    if name == "videomae":
        return {"pixel_values": draw(size, 4, 1, 8, 8)}
    if "image_size" in sizes or "num_channels" in sizes:
        return {"pixel_values": draw(size, 1, side, side)}
    if "conv_dim" in sizes:
        return {"input_values": draw(size, 320)}
    if name == "whisper":
        return {"input_features": draw(size, 8, 16), "decoder_input_ids": ids}
    if name == "speech_to_text":
        return {"input_features": draw(size, 32, 8), "decoder_input_ids": ids}
    if "ForConditionalGeneration" in head or "MT" in head:
        return {"input_ids": ids, "decoder_input_ids": ids[:, :5]}
    return {"input_ids": ids}


def outputs_of(model, inputs) -> torch.Tensor:
    """The main output: logits, or the last hidden states."""
    return main_output(model(**inputs))


def main_output(found) -> torch.Tensor:
    """The logits of an output, or its last hidden states."""
    for field in ("logits", "logits_per_image", "last_hidden_state"):
        if field in found:
            return found[field]
    raise KeyError(list(found))
