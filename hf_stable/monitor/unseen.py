"""Attention that runs within a probe without being seen: it is named, whatever the cause."""

from __future__ import annotations

import re
from collections import defaultdict
from collections.abc import Collection, Mapping

from torch import nn
from torch.nn.parameter import is_lazy

__all__ = ["PAST_INTERFACE", "Sightings", "describe_unseen"]

_NAME = re.compile(r"attention|attn", re.IGNORECASE)

MOST_NAMES = 4
"""Layers that a warning names; it counts the others."""

PAST_INTERFACE = "it goes past transformers' attention interface"


class Sightings:
    """Which attention of a model ran, and which of it was seen.

    Attention is what the registry says is, and what its class calls so: a module with two weight
    matrices or more and no further attention within it.

    Args:
        root: the model.
        described: modules that the registry says are attention.

    Attributes:
        candidates: what is attention, with its name in the model.
        ran_model: whether the model, or a part of it, ran.
    """

    def __init__(self, root: nn.Module, described: Collection[nn.Module]) -> None:
        """Find what is attention; nothing has run yet."""
        self.candidates = _find_attention(root, described)
        self.ran_model = False
        self._names = {module: name for name, module in root.named_modules()}
        self._ran: set[nn.Module] = set()
        self._seen: set[str] = set()
        self._reasons: dict[str, str] = {}

    @property
    def saw_any(self) -> bool:
        """Whether any attention was seen."""
        return bool(self._seen)

    def note_run(self, module: nn.Module) -> None:
        """Remember that attention ran."""
        self._ran.add(module)

    def note_seen(self, module: nn.Module) -> None:
        """Remember that attention was seen, recorded or not."""
        self._seen.add(self._names[module])

    def note_refused(self, module: nn.Module, reason: str) -> None:
        """Remember why a module, or what is in it, cannot be seen."""
        self._reasons[self._names[module]] = reason

    def unseen(self) -> dict[str, str]:
        """Return the attention that ran and was not seen, and why, in the order of the model."""
        return {
            name: self._reason_of(name)
            for module, name in self.candidates.items()
            if module in self._ran
            and not any(_is_within(name, seen) or _is_within(seen, name) for seen in self._seen)
        }

    def _reason_of(self, name: str) -> str:
        holders = [refused for refused in self._reasons if _is_within(name, refused)]
        return self._reasons[max(holders, key=len)] if holders else PAST_INTERFACE


def describe_unseen(unseen: Mapping[str, str]) -> str:
    """Return one sentence on attention that was not seen, a few of its layers named."""
    by_reason: defaultdict[str, list[str]] = defaultdict(list)
    for name, reason in unseen.items():
        by_reason[reason].append(name)
    parts = []
    for reason, names in by_reason.items():
        more = f" and {len(names) - MOST_NAMES} more" if len(names) > MOST_NAMES else ""
        parts.append(f"{', '.join(names[:MOST_NAMES])}{more} ({reason})")
    return (
        "attention ran within a probe and was not seen, so neither its entropy nor its collapse "
        f"is recorded: {'; '.join(parts)}"
    )


def _find_attention(root: nn.Module, described: Collection[nn.Module]) -> dict[nn.Module, str]:
    names = {name for name, module in root.named_modules() if module in described}
    called = {
        name: module
        for name, module in root.named_modules()
        if _NAME.search(type(module).__name__) and _has_projections(module)
    }
    # The innermost is the one that attends; those around it hold its output projection and norm.
    innermost = {
        name: module
        for name, module in called.items()
        if not any(other != name and _is_within(other, name) for other in (*called, *names))
    }
    return {
        module: name
        for name, module in root.named_modules()
        if module in described or name in innermost
    }


def _has_projections(module: nn.Module) -> bool:
    matrices = [p for p in module.parameters() if not is_lazy(p) and p.ndim > 1]
    return len(matrices) > 1


def _is_within(name: str, holder: str) -> bool:
    return not holder or name == holder or name.startswith(f"{holder}.")
