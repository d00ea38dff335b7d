"""Record what happens inside a model's attention and blocks while it runs, patched or plain.

`probe` is a context manager around a forward (and backward) that runs anyway. The model's native
attention kernel computes the output; the measures see the same queries, keys and mask.
"""

from __future__ import annotations

import os
import warnings
from collections.abc import Collection, Iterator, Sequence
from contextlib import AbstractContextManager, ExitStack, contextmanager, nullcontext
from typing import Any, Literal
from weakref import WeakKeyDictionary

import torch
from torch import nn
from transformers import PreTrainedModel

from hf_stable.architectures.finding import FoundBlock, find_blocks
from hf_stable.architectures.heads import count_heads
from hf_stable.architectures.registry import UnsupportedModelError, require_model
from hf_stable.monitor.combining import ranks_with_same_batch
from hf_stable.monitor.listening import is_listened_to, listening
from hf_stable.monitor.observing import Observed, observing_attention
from hf_stable.monitor.own_maps import asking_for_maps, modules_with_maps
from hf_stable.monitor.recorder import Recorder
from hf_stable.monitor.records import Records, check_maps, resolve_terms
from hf_stable.monitor.terms import TERMS, names_of
from hf_stable.monitor.unseen import PAST_INTERFACE, Sightings, describe_unseen

__all__ = ["Records", "is_blind", "probe"]

# What was said of a model, which is said once.
_told: WeakKeyDictionary[nn.Module, set[str]] = WeakKeyDictionary()


@contextmanager
def probe(
    model: nn.Module,
    *,
    queries: Literal["all"] | int = "all",
    terms: Literal["all", "default"] | Sequence[str] = "all",
    maps: Literal["all"] | Sequence[int] = (),
    generator: torch.Generator | None = None,
) -> Iterator[Records]:
    """Record the forward passes, and their backward passes, that run inside the block.

    Outputs, gradients and random numbers stay as they are, bit for bit. Values of several forwards
    (gradient accumulation) are averaged, and counts of non-finite entries are summed. Recomputation
    under gradient checkpointing is not recorded again, and neither are the one-token steps of
    `generate`.

    Within the block, `model.config` is a private copy that names the probing attention function.
    So another model that shares the config is not affected. The original is back after the block,
    also after an error. A compiled model runs uncompiled within the block, and its outputs differ
    by rounding and by other dropout masks. After the block it takes up its graph again.

    Where attention goes past transformers' interface but returns its maps (BLOOM, Falcon, GPT-Neo,
    DeBERTa v2, Swin v2), each runs once more for them, without dropout and gradients, beside the
    forward that counts. That costs a forward of the attention and the memory of whole maps. Hooks
    of yours within such an attention are called twice.

    Args:
        model: a transformers model, also inside DDP, FSDP2, `torch.compile` or PEFT wrappers.
        queries: rows of each attention map to measure: "all", or how many to sample (see
            `hf_stable.measures.entropy.sample_queries`).
        terms: what to record: "all", "default" (without the spectra of single weights and the
            entropy bound) or names from `hf_stable.monitor.terms`. Of "all" and "default" what
            can be measured of this model is, and a warning says what cannot: an architecture that
            is not registered has those that need no more than attention.
        maps: heads whose maps to keep, subsampled (`Records.maps`).
        generator: CPU generator for sampled rows; without one, the same rows each time. The
            global one is never used.

    Yields:
        `Records`, filled while the block runs. Under data parallelism each rank has its own; the
        replicas of nn.DataParallel are recorded as the one forward that they are.

    Raises:
        ValueError: for an unknown term, a bad `queries`, or a head in `maps` that no layer has.
        UnsupportedModelError: if terms are named that cannot be measured of this model, or none
            can be.
        RuntimeError: if the model is being probed already.
    """
    require_model(model, "probe")
    root = _root_of(model)
    asked = resolve_terms(terms)
    is_named = not isinstance(terms, str)
    wanted, blocks = _plan_blocks(root, asked, is_named)
    _check_maps(maps, root, blocks)
    if is_listened_to(root):
        raise RuntimeError("this model is being probed already; a probe does not nest")
    with ExitStack() as stack:
        wants_attention = bool(maps) or any("attention" in TERMS[term].needs for term in wanted)
        observed = stack.enter_context(observing_attention(root, is_wanted=wants_attention))
        sightings = Sightings(root, [module for found in blocks for module in _attention_of(found)])
        for part, reason in observed.refused.items():
            sightings.note_refused(part, reason)
        returning = modules_with_maps(blocks) if wants_attention else []
        if not returning and not any(map(observed.is_visible, sightings.candidates or [root])):
            wanted = _leave_attention_out(root, wanted, is_named or bool(maps), observed)
        recorder = Recorder(root, blocks, wanted, queries=queries, maps=maps, generator=generator)
        stack.callback(recorder.close)
        stack.enter_context(listening(root, recorder, sightings))
        stack.enter_context(asking_for_maps(returning))
        stack.enter_context(_uncompiled(observed.natives))
        yield recorder.records
    if recorder.wants_attention:
        _tell_unseen(root, sightings)
    _tell_missing(root, recorder.records)


def is_blind(
    model: nn.Module,
    *,
    queries: Literal["all"] | int,
    terms: Literal["all", "default"] | Sequence[str],
    maps: Literal["all"] | Sequence[int],
) -> bool:
    """Say, with a warning, whether nothing of a model can be probed.

    Args:
        model: as of `probe`, and so is what follows.
        queries: likewise.
        terms: likewise.
        maps: likewise.

    Raises:
        ValueError: as `probe` does.
        UnsupportedModelError: likewise, if terms are named or maps are asked for.
    """
    try:
        with probe(model, queries=queries, terms=terms, maps=maps):
            return False
    except UnsupportedModelError as error:
        if not isinstance(terms, str) or maps:
            raise
        warnings.warn(
            f"only losses and gradients are watched, and alarms are of these: {error}",
            UserWarning,
            stacklevel=4,
        )
        return True


def _root_of(model: nn.Module) -> nn.Module:
    """Return the transformers model inside whatever wraps it, or the module that holds several."""
    tops: dict[str, nn.Module] = {}
    for name, module in model.named_modules():
        if isinstance(module, PreTrainedModel) and not any(
            not top or name.startswith(f"{top}.") for top in tops
        ):
            tops[name] = module
    if not tops:
        raise UnsupportedModelError(
            f"{type(model).__name__} holds no transformers model: probe() observes attention "
            "through transformers' attention interface; hf_stable.entropy measures tensors of any "
            "origin"
        )
    if len(tops) == 1:
        return next(iter(tops.values()))
    shared = os.path.commonprefix([name.split(".")[:-1] for name in tops])
    return model.get_submodule(".".join(shared))


def _plan_blocks(
    root: nn.Module, asked: frozenset[str], is_named: bool
) -> tuple[frozenset[str], list[FoundBlock]]:
    """Return the blocks of a model, and which of the terms can be measured as far as they go."""
    possible = names_of(seen=("attention",))
    try:
        return asked, find_blocks(root)
    except UnsupportedModelError as error:
        if asked <= set(possible):
            return asked, []
        if is_named:
            raise UnsupportedModelError(
                f"{error}. Without that, pass terms={list(possible)}: these are recorded for "
                "any model that uses transformers' attention interface"
            ) from error
        wanted = asked & set(possible)
        _tell_left_out(root, asked - wanted, wanted, str(error))
        return wanted, []


def _attention_of(found: FoundBlock) -> Iterator[nn.Module]:
    for _, attention in found.attentions():
        yield found.module.get_submodule(attention.module)


def _leave_attention_out(
    root: nn.Module, wanted: frozenset[str], is_named: bool, observed: Observed
) -> frozenset[str]:
    """Return the terms that can be measured of a model none of whose attention is observed.

    Args:
        root: the model.
        wanted: terms that can be as far as its blocks go.
        is_named: whether they were asked for by name, and none may be left out.
        observed: why its attention is not.

    Raises:
        UnsupportedModelError: if nothing is left, or something was asked for by name.
    """
    needing = {term for term in wanted if "attention" in TERMS[term].needs}
    if is_named and not needing:
        return wanted
    reason = next(iter(observed.refused.values()), PAST_INTERFACE)
    rest = wanted - needing
    if is_named or not rest:
        raise UnsupportedModelError(
            f"the attention of this {type(root).__name__} cannot be observed: {reason}. Its "
            "weights can be measured by hf_stable.spectral"
        )
    _tell_left_out(root, needing, rest, reason)
    return rest


def _check_maps(
    maps: Literal["all"] | Sequence[int], root: nn.Module, blocks: Sequence[FoundBlock]
) -> None:
    """Raise ValueError for maps of heads that no layer has, or that no process sees all of."""
    check_maps(maps, _most_heads(root, blocks))
    if maps and len(ranks_with_same_batch(root)) > 1:
        raise ValueError(
            f"maps={maps!r}: under tensor parallelism each process sees its own heads alone, and "
            "maps are kept by the first process; leave maps out"
        )


def _most_heads(root: nn.Module, blocks: Sequence[FoundBlock]) -> int | None:
    """Return how many heads the layer with most of them has; None where nothing says so."""
    if not blocks:
        heads = getattr(getattr(root, "config", None), "num_attention_heads", None)
        return heads if isinstance(heads, int) else None
    return max(
        count_heads(found.module, attention)
        for found in blocks
        for _, attention in found.attentions()
    )


def _uncompiled(natives: Collection[str]) -> AbstractContextManager[Any]:
    """Let compiled models run as they were written, for as long as the context is open.

    Traced with hooks, a graph would come in pieces, and torch.compile would go on to use the
    pieces after the hooks are gone. Flex attention has to be compiled to be itself.
    """
    is_flex = any("flex" in native for native in natives)
    return nullcontext() if is_flex else torch.compiler.set_stance("force_eager")


def _tell_left_out(
    root: nn.Module, left_out: Collection[str], rest: Collection[str], reason: str
) -> None:
    names, kept = (", ".join(t for t in TERMS if t in some) for some in (left_out, rest))
    _tell(
        root,
        f"of this {type(root).__name__} {kept} are recorded; {names} are left out, since they "
        f"cannot be measured: {reason}",
    )


def _tell_unseen(root: nn.Module, sightings: Sightings) -> None:
    told = _told.setdefault(root, set())
    unseen = {name: why for name, why in sightings.unseen().items() if name not in told}
    told.update(unseen)
    if unseen:
        _tell(root, describe_unseen(unseen))
    elif sightings.ran_model and not sightings.saw_any and not sightings.unseen():
        _tell(
            root,
            f"{type(root).__name__} ran within probe(), and none of its attention was seen: it "
            "goes past transformers' attention interface",
        )


def _tell_missing(root: nn.Module, records: Records) -> None:
    told = _told.setdefault(root, set())
    new = {term: layers for term, layers in records.missing.items() if f"no {term}" not in told}
    told.update(f"no {term}" for term in new)
    if new:
        layer, reason = next(iter(next(iter(new.values())).items()))
        _tell(
            root,
            f"{', '.join(new)} could not be measured ({layer}: {reason}): the values are missing",
        )


def _tell(root: nn.Module, message: str) -> None:
    """Warn of something once for each model."""
    told = _told.setdefault(root, set())
    if message not in told:
        told.add(message)
        warnings.warn(message, UserWarning, stacklevel=6)
