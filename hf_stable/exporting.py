"""Publish a model: plain weights, code of its own where LayerNorms are gone, a card; no sidecar."""

from __future__ import annotations

import copy
import os
import tempfile
from typing import Any

import torch
from huggingface_hub import HfApi, ModelCard
from huggingface_hub.errors import EntryNotFoundError
from torch import nn
from torch.distributed.tensor import DTensor
from transformers import PreTrainedModel

from hf_stable.architectures.registry import UnsupportedModelError
from hf_stable.card_pictures import draw_curves
from hf_stable.method_config import CONFIGS_ATTRIBUTE
from hf_stable.model_cards import TrainingRecord, amend_card, read_training
from hf_stable.sigma_layers import fold_layer
from hf_stable.sigma_reparam import sigma_layers
from hf_stable.spectral import spectral_dtype

__all__ = ["CARD_FILE", "export", "plain_copy", "push_to_hub"]

CARD_FILE = "README.md"

Folder = str | os.PathLike[str]


def export(
    model: PreTrainedModel,
    folder: Folder,
    *,
    dtype: torch.dtype | None = None,
    max_shard_size: int | str = "50GB",
    processing_class: Any = None,
    checkpoint: Folder | None = None,
) -> None:
    """Write a model to a folder that needs no hf_stable.

    Weights are folded. Without removed LayerNorms the folder is a plain one of the model's own
    architecture; with them it has a model_type of its own and `modeling_hf_stable.py`, loads with
    `trust_remote_code=True`, and is refused by the classes of transformers themselves. The card in
    `README.md` is amended if there is one; it shows loss and attention entropy as a picture where
    both a record of the training and matplotlib are there. The model stays as it is.

    Args:
        model: a model of transformers, patched or not.
        folder: where to; made if it is not there.
        dtype: of the weights in the folder, by default that of the model. The product
            `gamma / sigma * W` is taken in float32 and cast once.
        max_shard_size: as for `save_pretrained`.
        processing_class: tokenizer or processor to save along.
        checkpoint: a folder with the `trainer_state.json` that the card is to quote; by default
            the one that the model was loaded from.

    Raises:
        TypeError: for a wrapper around a model, or a model with adapters.
        UnsupportedModelError: if the model is sharded, or could not be saved without its norms.
        OSError: if the folder cannot be written.
    """
    _export(
        model, folder, _name_of(folder), None, dtype, max_shard_size, processing_class, checkpoint
    )


def push_to_hub(
    model: PreTrainedModel,
    repo_id: str,
    *,
    private: bool | None = None,
    token: str | None = None,
    commit_message: str = "Upload model",
    revision: str | None = None,
    create_pr: bool = False,
    dtype: torch.dtype | None = None,
    max_shard_size: int | str = "50GB",
    processing_class: Any = None,
    checkpoint: Folder | None = None,
) -> str:
    """Upload to the Hub what `export` writes, in one commit; the repository's card is amended.

    Args:
        model: a model of transformers, patched or not.
        repo_id: `"name"` or `"owner/name"`; made if it is not there.
        private: whether a new repository is private; by default as the owner has set it.
        token: of a user who may write there; by default the one that is stored.
        commit_message: of the commit.
        revision: branch to commit to.
        create_pr: open a pull request instead of committing.
        dtype: as for `export`.
        max_shard_size: as for `export`.
        processing_class: as for `export`.
        checkpoint: as for `export`.

    Returns:
        The address of the commit, or of the pull request.

    Raises:
        TypeError: as for `export`.
        UnsupportedModelError: as for `export`.
        huggingface_hub.errors.HfHubHTTPError: if the Hub refuses.
    """
    api = HfApi(token=token)
    repo_id = api.create_repo(repo_id, private=private, exist_ok=True).repo_id
    try:
        card = ModelCard.load(repo_id, token=token)
    except EntryNotFoundError:
        card = None
    with tempfile.TemporaryDirectory() as folder:
        _export(model, folder, repo_id, card, dtype, max_shard_size, processing_class, checkpoint)
        commit = api.upload_folder(
            repo_id=repo_id,
            folder_path=folder,
            commit_message=commit_message,
            revision=revision,
            create_pr=create_pr,
        )
    return commit.pr_url or commit.commit_url


def plain_copy(model: PreTrainedModel, dtype: torch.dtype | None = None) -> PreTrainedModel:
    """Return a plain model that computes the same. It shares all memory that it can.

    Args:
        model: a model of transformers, patched or not; it stays as it is.
        dtype: cast all weights to this; by default each keeps its own.

    Raises:
        TypeError: for a wrapper around a model, or a model with adapters.
        UnsupportedModelError: if the model is sharded.
    """
    _refuse_wrapped(model)
    copied = copy.deepcopy(model, _sharing_memo(model))
    for _, layer in sigma_layers(copied):
        given = layer.weight
        wide = given.detach().to(spectral_dtype(given.dtype), copy=True)
        layer.weight = nn.Parameter(wide, requires_grad=given.requires_grad)
        fold_layer(layer)
        folded = layer.weight.detach().to(dtype or given.dtype)
        layer.weight = nn.Parameter(folded, requires_grad=given.requires_grad)
    for module in copied.modules():
        module.__dict__.pop(CONFIGS_ATTRIBUTE, None)
    return copied if dtype is None else copied.to(dtype)


def _export(
    model: PreTrainedModel,
    folder: Folder,
    name: str,
    card: ModelCard | None,
    dtype: torch.dtype | None,
    max_shard_size: int | str,
    processing_class: Any,
    checkpoint: Folder | None,
) -> None:
    plain = plain_copy(model, dtype)
    plain.save_pretrained(folder, max_shard_size=max_shard_size)
    if processing_class is not None:
        processing_class.save_pretrained(folder)
    path = os.path.join(folder, CARD_FILE)
    if card is None and os.path.isfile(path):
        card = ModelCard.load(path)
    source = checkpoint or model.name_or_path
    training = read_training(source) if source else TrainingRecord()
    picture = draw_curves(training.history, folder)
    amend_card(card, model, name=name, training=training, picture=picture).save(path)


def _name_of(folder: Folder) -> str:
    return os.path.basename(os.path.abspath(folder))


def _refuse_wrapped(model: Any) -> None:
    if not isinstance(model, PreTrainedModel):
        raise TypeError(
            f"{type(model).__name__} is no model of transformers but may hold one; pass that model "
            "itself (of adapters: merge_and_unload first)"
        )
    if getattr(model, "peft_config", None):
        raise TypeError("the model has adapters; merge them, or save them with save_pretrained")
    if any(isinstance(parameter, DTensor) for parameter in model.parameters()):
        raise UnsupportedModelError(
            "the model is sharded; save it with the Trainer or save_pretrained, then export the "
            "folder that this writes: hf-stable export FOLDER OUT"
        )


def _sharing_memo(model: nn.Module) -> dict[int, Any]:
    """Return what makes deepcopy take the tensors of a model over instead of copying them."""
    memo: dict[int, Any] = {}
    for parameter in model.parameters():
        own = nn.Parameter(parameter.detach(), requires_grad=parameter.requires_grad)
        memo[id(parameter)] = own
    return memo | {id(buffer): buffer.detach() for buffer in model.buffers()}
