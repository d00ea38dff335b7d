"""Saving patched models: plain weights for everybody, and beside them what continues the model.

A saved folder holds folded weights under the architecture's own names, which any transformers
loads, and a sidecar with the raw state.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping, MutableMapping
from contextlib import nullcontext
from typing import Any

from torch import Tensor, nn
from transformers import PreTrainedModel

from hf_stable.checkpoints.sidecar import remove_state, write_state
from hf_stable.checkpoints.state_dicts import fold_state_dict
from hf_stable.checkpoints.weight_files import remove_stale_weights
from hf_stable.methods.layernorms.removal import check_can_be_saved, needs_standalone_form
from hf_stable.methods.layernorms.standalone import removed_by_class, standalone_form
from hf_stable.methods.patching import configs_by_part, is_patched
from hf_stable.methods.sigma_reparam.method import sigma_layers
from hf_stable.modeling_hf_stable import weight_guard

__all__ = ["check_writable", "save", "save_held"]

Folder = str | os.PathLike[str]


def save(
    model: PreTrainedModel,
    options: MutableMapping[str, Any],
    write: Callable[[], Any],
    provenance: dict[str, Any],
    *,
    for_continuing: bool,
) -> Any:
    """Run `save_pretrained` so that it writes plain weights, and the sidecar after it.

    A plain model is written as it is; a sidecar that an earlier save left is removed.

    Args:
        model: plain, patched, or without its LayerNorms.
        options: the arguments of `save_pretrained` by name; some are replaced.
        write: runs `save_pretrained` with them.
        provenance: where the model comes from, for the sidecar.
        for_continuing: write a sidecar; a folder that is published has none.

    Returns:
        What `write` returns.

    Raises:
        ValueError: if the state dict to be saved is not the model's, or every rank were to write
            raw weights of its own.
        UnsupportedModelError: if norms of a part were removed, and nothing could load the whole.
        OSError: if the folder cannot be written.
    """
    folder = options["save_directory"]
    saves_here = _saves_here(model, options["is_main_process"])
    raw: dict[str, Tensor] = {}
    layers, guarded = sigma_layers(model), needs_standalone_form(model)
    if guarded:
        check_can_be_saved(model)
    if layers:
        _refuse_raw_writing(options)
        if saves_here:
            check_writable(folder)
    if options["state_dict"] is None and (layers or guarded):
        options["state_dict"] = model.state_dict()
    if layers:
        options["state_dict"], raw = fold_state_dict(model, options["state_dict"])
    if guarded:
        options["save_original_format"] = False  # the names that the modeling file expects
        guard = weight_guard(model, removed_by_class(model))
        options["state_dict"] = {**options["state_dict"], **guard}
    with standalone_form(model) if guarded else nullcontext():
        result = write()
    # The sidecar comes after the original, which uploads what it finds (push_to_hub=True).
    if saves_here and os.path.isdir(folder):
        if is_patched(model) and options["variant"] is None:
            remove_stale_weights(folder)
        parts, is_whole = configs_by_part(model), bool(raw) or not layers
        if parts and is_whole and for_continuing:
            write_state(folder, parts, raw, options["max_shard_size"], provenance)
        else:
            remove_state(folder)
    return result


def save_held(
    module: nn.Module,
    state_dict: Mapping[str, Any] | None,
    folder: Folder,
    write: Callable[[dict[str, Any]], None],
    provenance: dict[str, Any],
) -> None:
    """Save a module that holds a patched model, but is none of transformers, in the same way.

    Args:
        module: the module; its own class writes no config and knows no `save_pretrained`.
        state_dict: its state dict, if it has been gathered already.
        folder: where the weights go.
        write: writes a state dict there.
        provenance: where the model comes from, for the sidecar.

    Raises:
        ValueError: if the state dict to be saved is not the module's.
        OSError: if the folder cannot be written.
    """
    check_writable(folder)
    given = module.state_dict() if state_dict is None else state_dict
    plain, raw = fold_state_dict(module, given)
    write(plain)
    if raw or not sigma_layers(module):
        write_state(folder, configs_by_part(module), raw, provenance=provenance)
    else:
        remove_state(folder)


def check_writable(folder: Folder) -> None:
    """Create a folder, and raise OSError naming it if it cannot be written to."""
    try:
        os.makedirs(folder, exist_ok=True)
        if not os.access(folder, os.W_OK):
            raise PermissionError("no permission to write there")
    except OSError as error:
        raise OSError(
            f"cannot save the model to {os.fspath(folder)!r}: {error}. Nothing was written; choose "
            "a directory that can be written to"
        ) from error


def _saves_here(model: PreTrainedModel, is_main_process: bool) -> bool:
    decide = getattr(model, "should_save_on_this_rank", None)  # older versions lack it
    return is_main_process if decide is None else decide(is_main_process)


def _refuse_raw_writing(options: MutableMapping[str, Any]) -> None:
    if options.get("distributed_checkpoint"):
        raise ValueError(
            "distributed_checkpoint=True writes each rank's raw weights, which no plain model can "
            "load; save a patched model without it, or hf_stable.fold it first"
        )
