"""Publish a model: plain weights, code of its own where LayerNorms are gone, a card; no sidecar."""

from __future__ import annotations

import copy
import os
import tempfile
from typing import Any

import torch
from huggingface_hub import HfApi, ModelCard, hf_hub_download
from huggingface_hub.errors import EntryNotFoundError
from torch import nn
from torch.distributed.tensor import DTensor
from transformers import PreTrainedModel

from hf_stable.architectures.registry import UnsupportedModelError
from hf_stable.checkpoints.card_pictures import draw_curves
from hf_stable.checkpoints.model_cards import amend_card, read_card
from hf_stable.checkpoints.provenance import TrainingRecord, read_training, record_of
from hf_stable.checkpoints.saving import check_writable
from hf_stable.checkpoints.weight_files import WEIGHT_PATTERNS, remove_stale_weights
from hf_stable.measures.matrices import spectral_dtype
from hf_stable.methods.config import CONFIGS_ATTRIBUTE
from hf_stable.methods.sigma_reparam.folding import fold_layer
from hf_stable.methods.sigma_reparam.method import sigma_layers

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
    `README.md` is amended if there is one; it quotes the settings and final metrics of the last
    training by a Trainer in this process, and shows loss and attention entropy as a picture where
    matplotlib is installed. The model stays as it is.

    Args:
        model: a model of transformers, patched or not.
        folder: where to; made if it is not there.
        dtype: of the weights in the folder, by default that of the model. The product
            `gamma / sigma * W` is taken in float32 and cast once.
        max_shard_size: as for `save_pretrained`.
        processing_class: tokenizer or processor to save along.
        checkpoint: a folder of the Trainer whose training the card is to quote instead; a model
            that was loaded, or trained without a Trainer, has none of its own.

    Raises:
        TypeError: for a wrapper around a model, or a model with adapters.
        UnsupportedModelError: if the model is sharded, or could not be saved without its norms.
        FileNotFoundError: if `checkpoint` has no `trainer_state.json`.
        ValueError: if the card in the folder, or a file of `checkpoint`, is damaged.
        OSError: if the folder cannot be written.
    """
    plain, training = plain_copy(model, dtype), _training_of(model, checkpoint)
    check_writable(folder)  # transformers logs a line and writes nothing where a file is in the way
    card = _card_in(folder)
    _save(plain, folder, max_shard_size, processing_class)
    _write_card(card or _card_in(folder), model, folder, _name_of(folder), training)


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

    Weights that the repository has already are replaced, also where their files were others.

    Args:
        model: a model of transformers, patched or not.
        repo_id: `"name"` or `"owner/name"`; made if it is not there.
        private: whether a new repository is private; by default as the owner has set it.
        token: of a user who may write there; by default the one that is stored.
        commit_message: of the commit.
        revision: branch to commit to, whose card it is that is amended; made if it is not there.
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
        FileNotFoundError: as for `export`.
        ValueError: as for `export`, of the repository's card.
        huggingface_hub.errors.HfHubHTTPError: if the Hub refuses.
    """
    api, training = HfApi(token=token), _training_of(model, checkpoint)
    with tempfile.TemporaryDirectory() as folder:
        # Whatever can be refused is refused before anything is made on the Hub.
        _save(plain_copy(model, dtype), folder, max_shard_size, processing_class)
        card = _card_in(folder)
        repo_id = api.create_repo(repo_id, private=private, exist_ok=True).repo_id
        if revision is not None and not (create_pr or revision.startswith("refs/")):
            api.create_branch(repo_id, branch=revision, exist_ok=True)
        card = _card_on_hub(repo_id, revision, token) or card
        _write_card(card, model, folder, repo_id, training)
        commit = api.upload_folder(
            repo_id=repo_id,
            folder_path=folder,
            commit_message=commit_message,
            revision=revision,
            create_pr=create_pr,
            delete_patterns=list(WEIGHT_PATTERNS),
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
        given, (holder, name) = layer.weight, layer.plain_place
        wide = given.detach().to(spectral_dtype(given.dtype), copy=True)
        layer.weight = nn.Parameter(wide, requires_grad=given.requires_grad)
        fold_layer(layer)
        folded = layer.weight.detach().to(dtype or given.dtype)
        setattr(holder, name, nn.Parameter(folded, requires_grad=given.requires_grad))
    for module in copied.modules():
        module.__dict__.pop(CONFIGS_ATTRIBUTE, None)
    return copied if dtype is None else copied.to(dtype)


def _save(
    plain: PreTrainedModel, folder: Folder, max_shard_size: int | str, processing_class: Any
) -> None:
    plain.save_pretrained(folder, max_shard_size=max_shard_size)
    remove_stale_weights(folder)
    if processing_class is not None:
        processing_class.save_pretrained(folder)


def _write_card(
    card: ModelCard | None, model: Any, folder: Folder, name: str, training: TrainingRecord
) -> None:
    picture = draw_curves(training.history, folder)
    card = amend_card(card, model, name=name, training=training, picture=picture)
    card.save(os.path.join(folder, CARD_FILE))


def _training_of(model: Any, checkpoint: Folder | None) -> TrainingRecord:
    return record_of(model) if checkpoint is None else read_training(checkpoint)


def _card_in(folder: Folder) -> ModelCard | None:
    path = os.path.join(folder, CARD_FILE)
    return read_card(path) if os.path.isfile(path) else None


def _card_on_hub(repo_id: str, revision: str | None, token: str | None) -> ModelCard | None:
    try:
        path = hf_hub_download(repo_id, CARD_FILE, revision=revision, token=token)
    except EntryNotFoundError:
        return None
    return read_card(path, f"{CARD_FILE} of {repo_id} on the Hub")


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
