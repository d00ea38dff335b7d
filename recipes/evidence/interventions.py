"""Interventions in the attention of a model that trains: collapse it from outside, or hold it up.

A run names one in its setting `intervention`, as fields: its kind, and what that kind takes, of
`KINDS`. What an optimizer does is never touched, only the weights after or before its step, or the
queries and keys on their way to the attention function.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from transformers import TrainerCallback

from hf_stable.architectures.description import Attention
from hf_stable.architectures.finding import find_blocks
from hf_stable.architectures.heads import Role, count_key_heads, parts_of_projection, roles_at
from hf_stable.methods.sigma_reparam.layers import SigmaLayer
from hf_stable.monitor.block_weights import AttentionWeights
from hf_stable.spectral import qk_singular_values

__all__ = ["KINDS", "Intervening", "Projections"]

KINDS: dict[str, tuple[str, ...]] = {
    "scale_queries_keys": ("at", "factor"),
    "scale_values_outputs": ("at", "factor"),
    "temperature": ("at", "factor"),
    "cap_logits": ("limit",),
    "clamp_sigma": ("limit",),
    "freeze_queries_keys": ("at",),
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
"""

HEADS_CHOSEN = ("layers", "heads")


@dataclass(frozen=True)
class Projections:
    """The weights of one attention, to be read and written head by head."""

    block: nn.Module
    attention: Attention

    @property
    def num_heads(self) -> int:
        """Of its queries; as many of keys."""
        return AttentionWeights(self.block, self.attention).num_heads

    def heads(self, role: Role) -> list[Tensor]:
        """Return views of what belongs to one role, the heads first: matrix, then bias if any.

        Returns:
            (heads, d_head, d) of a weight, Wo transposed; (heads, d_head) of a bias. Wo's bias is
            none of a head's and left out.
        """
        matrix: Tensor = getattr(AttentionWeights(self.block, self.attention), role)
        found = [matrix.T if role == "output" else matrix]
        layer: Any = self.block.get_submodule(getattr(self.attention, role))
        if role != "output" and getattr(layer, "bias", None) is not None:
            roles, parts = self.parts(layer, role)
            found.append(parts.vectors(layer.bias.detach())[roles.index(role)])
        return [each.unflatten(0, (self.num_heads, -1)) for each in found]

    def parts(self, layer: nn.Module, role: Role) -> Any:
        """Return the roles of the projection that has one role, and where their parts lie."""
        roles = roles_at(self.attention, getattr(self.attention, role))
        return roles, parts_of_projection(self.block, layer, roles, self.attention)

    def on_output(self, role: Role, change: Callable[[Tensor], Tensor]) -> Any:
        """Have what a projection gives for a role changed, (..., heads, d_head); return the hook.

        Returns:
            A handle, whose `remove` takes the hook away.
        """
        layer = self.block.get_submodule(getattr(self.attention, role))
        roles, parts = self.parts(layer, role)

        def hook(module: nn.Module, inputs: Any, output: Tensor) -> Tensor:
            pieces = list(output.split(parts.lengths(output.shape[-1]), -1))
            own = roles.index(role)
            by_head = pieces[own].unflatten(-1, (self.num_heads, -1))
            pieces[own] = change(by_head).flatten(-2)
            return torch.cat(pieces, -1)

        return layer.register_forward_hook(hook)


class Intervening(TrainerCallback):
    """Does what a setting `intervention` says, at its step."""

    def __init__(self, model: nn.Module, given: Mapping[str, Any]) -> None:
        """Read the setting and find the attentions.

        Args:
            model: plain, with as many heads of keys as of queries.
            given: `kind` and its fields.

        Raises:
            ValueError: for another kind, other fields, layers or heads that the model does not
                have, or a model whose weights or queries are not its own.
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
        if self.kind == "clamp_sigma":
            for each in self.attentions:
                self._clamp(each)

    def _scale(self, *roles: Role) -> None:
        for each in self.attentions:
            for role in roles:
                for own in each.heads(role):
                    for head in self.chosen:
                        own[head].mul_(self.factor)

    def _clamp(self, projections: Projections) -> None:
        weights = AttentionWeights(projections.block, projections.attention)
        sigmas = qk_singular_values(weights.query, weights.key, weights.num_heads)[:, 0]
        factors = (self.limit / sigmas).clamp(max=1.0).sqrt()
        for own in projections.heads("query") + projections.heads("key"):
            for head in self.chosen:
                own[head].mul_(factors[head])

    def _hook(self, change: Callable[[Projections], Callable[[Tensor], Tensor]]) -> None:
        for each in self.attentions:
            for role in _QUERY_KEY:
                each.on_output(role, change(each))

    def _times(self, heads: Tensor, factor: float) -> Tensor:
        factors = heads.new_ones(heads.shape[-2], 1)
        factors[list(self.chosen)] = factor
        return heads * factors


_QUERY_KEY: tuple[Role, Role] = ("query", "key")


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


def _chosen(model: nn.Module, layers: Any) -> list[Projections]:
    if any(isinstance(module, SigmaLayer) for module in model.modules()):
        raise ValueError(
            "interventions act on weights, and those of a model with sigmaReparam are made of "
            "others; leave patch sigma_reparam out"
        )
    found = [
        Projections(block.module, attention)
        for block in find_blocks(model)
        for _, attention in block.attentions()
    ]
    for each in found:
        owner = each.block.get_submodule(each.attention.module)
        if any("norm" in name for name, _ in owner.named_children()):
            raise ValueError(
                f"{type(owner).__name__} normalises its queries and keys, which undoes an "
                "intervention in them; take a model that does not"
            )
        if count_key_heads(each.block, each.attention) != each.num_heads:
            raise ValueError("interventions need as many key heads as query heads")
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
        owner = projections.block.get_submodule(projections.attention.module)

        def change(heads: Tensor) -> Tensor:
            scale = getattr(owner, "scaling", None) or heads.shape[-1] ** -0.5
            lengths = torch.linalg.vector_norm(heads, dim=-1, keepdim=True)
            return heads * (math.sqrt(limit / scale) / lengths).clamp(max=1.0)

        return change

    return of
