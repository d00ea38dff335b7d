"""Interventions in the attention of a model that trains: collapse it from outside, or hold it up.

A run names one in its setting `intervention`, as fields: its kind, and what that kind takes, of
`KINDS`. What an optimizer does is never touched, only the weights after or before its step, or the
queries and keys on their way to the attention function.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, Literal, NamedTuple

import torch
from torch import Tensor, nn
from transformers import TrainerCallback

import hf_stable
from hf_stable.spectral import Parts, as_matrix, qk_singular_values
from recipes.evidence import logits

__all__ = ["KINDS", "Intervening", "Projections"]

KINDS: dict[str, tuple[str, ...]] = {
    "scale_queries_keys": ("at", "factor"),
    "scale_values_outputs": ("at", "factor"),
    "temperature": ("at", "factor"),
    "cap_logits": ("limit",),
    "clamp_sigma": ("limit",),
    "freeze_queries_keys": ("at",),
    "qk_clip": ("limit",),
}
"""Kinds, and the fields that each has to have; `layers` and `heads`, lists of numbers, choose.

- `scale_queries_keys`: before step `at`, Wq and Wk with their biases times `factor`, once: logits
  grow by its square.
- `scale_values_outputs`: Wv, its bias and Wo in their place: what attention adds to the stream
  grows by its square, and the logits of that layer stay.
- `temperature`: from step `at` on logits times the square of `factor`, the weights as they are.
- `cap_logits`: queries and keys shortened where a logit could be beyond `limit` in size.
- `clamp_sigma`: after each step Wq and Wk of a head made smaller until sigma1(Wq^T Wk) is `limit`.
- `freeze_queries_keys`: Wq and Wk stay as they were before step `at`.
- `qk_clip`: after each step Wq and Wk of a head made smaller by the factor that its largest logit
  of that step was beyond `limit`, half on either side: what MuonClip does (Kimi K2, 2025).
"""

HEADS_CHOSEN = ("layers", "heads")


Role = Literal["query", "key", "value", "output"]


class Place(NamedTuple):
    """Where a model has its attentions, and their projections in them.

    Attributes:
        blocks: path of the list of blocks.
        attention: path of the attention in a block.
        inputs: names of the projections of queries, keys and values; one for a fused one.
        output: name of the one behind.
        dim: dimension of a weight along which its outputs lie.
    """

    blocks: str
    attention: str
    inputs: tuple[str, ...]
    output: str
    dim: int = 0


PLACES = {
    "vit": Place("vit.layers", "attention", ("q_proj", "k_proj", "v_proj"), "o_proj"),
    "llama": Place("model.layers", "self_attn", ("q_proj", "k_proj", "v_proj"), "o_proj"),
    "gpt2": Place("transformer.h", "attn", ("c_attn",), "c_proj", dim=1),
}
"""By model type; models whose queries and keys have norms, which undo what is done, are left out.
"""


@dataclass(frozen=True)
class Projections:
    """The weights of one attention, to be read and written head by head."""

    attention: nn.Module
    place: Place
    num_heads: int

    def heads(self, role: Role) -> list[Tensor]:
        """Return views of what belongs to one role, the heads first: matrix, then bias if any.

        Returns:
            (heads, d_head, d) of a weight, Wo transposed; (heads, d_head) of a bias. Wo's bias is
            none of a head's and left out.
        """
        layer, parts, number = self._find(role)
        weight = parts.views(as_matrix(layer.weight.detach()))[number]
        rows = weight.T if self.place.dim else weight
        if role == "output":
            return [rows.T.unflatten(0, (self.num_heads, -1))]
        found = [rows]
        if layer.bias is not None:
            found.append(parts.vectors(layer.bias.detach())[number])
        return [each.unflatten(0, (self.num_heads, -1)) for each in found]

    def on_output(self, role: Role, change: Callable[[Tensor], Tensor]) -> None:
        """Have what a projection gives for a role changed, (..., heads, d_head)."""
        layer, parts, number = self._find(role)

        def hook(module: nn.Module, inputs: Any, output: Tensor) -> Tensor:
            pieces = list(output.split(parts.lengths(output.shape[-1]), -1))
            pieces[number] = change(pieces[number].unflatten(-1, (self.num_heads, -1))).flatten(-2)
            return torch.cat(pieces, -1)

        layer.register_forward_hook(hook)

    def _find(self, role: Role) -> tuple[Any, Parts, int]:
        """Return the layer that has a role, where its parts lie, and which one it is."""
        if role == "output":
            return self.attention.get_submodule(self.place.output), Parts(dim=self.place.dim), 0
        number = _INPUTS.index(role)
        if len(self.place.inputs) == 1:
            fused = self.attention.get_submodule(self.place.inputs[0])
            return fused, Parts((1, 1, 1), dim=self.place.dim), number
        layer = self.attention.get_submodule(self.place.inputs[number])
        return layer, Parts(dim=self.place.dim), 0


_INPUTS: tuple[Role, ...] = ("query", "key", "value")


class Intervening(TrainerCallback):
    """Does what a setting `intervention` says, at its step."""

    def __init__(self, model: Any, given: Mapping[str, Any]) -> None:
        """Read the setting and find the attentions.

        Args:
            model: plain, with as many heads of keys as of queries.
            given: `kind` and its fields.

        Raises:
            ValueError: for another kind, other fields, layers or heads that the model does not
                have, or a model that is none of `PLACES` or has sigmaReparam.
        """
        self.given = dict(given)
        self.kind = _checked(self.given)
        self.at, self.factor = int(given.get("at", 1)), float(given.get("factor", 1.0))
        self.limit = float(given.get("limit", math.inf))
        self.attentions = _chosen(model, self.given.get("layers"))
        self.chosen = _chosen_heads(self.attentions, self.given.get("heads"))
        self.kept: list[tuple[Tensor, Tensor]] = []
        self.is_on = False
        if self.kind == "cap_logits":
            self._hook(_shortened(self.limit))
        elif self.kind == "qk_clip":
            logits.watch(model)

    def on_step_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Act before the step that is meant; a run that goes on after it is as it was left."""
        step = state.global_step + 1
        if step == self.at and self.kind == "scale_queries_keys":
            self._scale("query", "key")
        elif step == self.at and self.kind == "scale_values_outputs":
            self._scale("value", "output")
        elif step >= self.at and not self.is_on:
            self.is_on = True
            if self.kind == "temperature":
                self._hook(lambda length: lambda heads: self._times(heads, self.factor))
            elif self.kind == "freeze_queries_keys":
                self.kept = [
                    (own, own.clone())
                    for each in self.attentions
                    for own in each.heads("query") + each.heads("key")
                ]

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Put right what the optimizer has moved."""
        for own, kept in self.kept:
            for head in self.chosen:
                own[head].copy_(kept[head])
        if self.kind in ("clamp_sigma", "qk_clip"):
            for each in self.attentions:
                self._clamp(each)

    def _scale(self, *roles: Role) -> None:
        for each in self.attentions:
            for role in roles:
                for own in each.heads(role):
                    for head in self.chosen:
                        own[head].mul_(self.factor)

    def _clamp(self, projections: Projections) -> None:
        if self.kind == "qk_clip":
            sizes = logits.take(projections.attention)
        else:
            query, key = (projections.heads(role)[0].flatten(0, 1) for role in _INPUTS[:2])
            sizes = qk_singular_values(query, key, projections.num_heads)[:, 0]
        # Below zero a largest logit is beyond no limit.
        factors = (self.limit / sizes.clamp(min=self.limit)).sqrt()
        for own in projections.heads("query") + projections.heads("key"):
            for head in self.chosen:
                own[head].mul_(factors[head])

    def _hook(self, change: Callable[[Projections], Callable[[Tensor], Tensor]]) -> None:
        for each in self.attentions:
            for role in _INPUTS[:2]:
                each.on_output(role, change(each))

    def _times(self, heads: Tensor, factor: float) -> Tensor:
        factors = heads.new_ones(heads.shape[-2], 1)
        factors[list(self.chosen)] = factor
        return heads * factors


def _checked(given: Mapping[str, Any]) -> str:
    kind = given.get("kind")
    if kind not in KINDS:
        raise ValueError(f"intervention kind {kind!r} is none of {', '.join(KINDS)}")
    wanted, there = set(KINDS[kind]), set(given) - {"kind", *HEADS_CHOSEN}
    if wanted != there:
        raise ValueError(
            f"intervention {kind!r} takes {', '.join(sorted(wanted))}, and layers and heads where "
            f"not all are meant; given are {', '.join(sorted(there)) or 'none of these'}"
        )
    return str(kind)


def _chosen(model: Any, layers: Any) -> list[Projections]:
    kind, heads = model.config.model_type, model.config.num_attention_heads
    if kind not in PLACES:
        raise ValueError(f"interventions are for models {', '.join(PLACES)}, not for {kind}")
    if hf_stable.is_patched(model) and any(
        layer.kind.startswith("Sigma") for layer in hf_stable.describe(model).layers
    ):
        raise ValueError(
            "interventions act on weights, and those of a model with sigmaReparam are made of "
            "others; leave patch sigma_reparam out"
        )
    if getattr(model.config, "num_key_value_heads", heads) != heads:
        raise ValueError("interventions need as many key heads as query heads")
    place = PLACES[kind]
    found = [
        Projections(block.get_submodule(place.attention), place, heads)
        for block in model.get_submodule(place.blocks).children()
    ]
    numbers = range(len(found)) if layers is None else layers
    if unknown := [number for number in numbers if not 0 <= number < len(found)]:
        raise ValueError(f"there is no attention {unknown[0]}; the model has {len(found)}")
    return [found[number] for number in numbers]


def _chosen_heads(attentions: list[Projections], heads: Any) -> tuple[int, ...]:
    total = min((each.num_heads for each in attentions), default=0)
    numbers = tuple(range(total) if heads is None else heads)
    if unknown := [number for number in numbers if not 0 <= number < total]:
        raise ValueError(f"there is no head {unknown[0]}; each attention has {total}")
    return numbers


def _shortened(limit: float) -> Callable[[Projections], Callable[[Tensor], Tensor]]:
    """Return what shortens queries and keys so that no logit of theirs is beyond a limit."""

    def of(projections: Projections) -> Callable[[Tensor], Tensor]:
        def change(heads: Tensor) -> Tensor:
            scale = getattr(projections.attention, "scaling", None) or heads.shape[-1] ** -0.5
            lengths = torch.linalg.vector_norm(heads, dim=-1, keepdim=True)
            return heads * (math.sqrt(limit / scale) / lengths).clamp(max=1.0)

        return change

    return of
