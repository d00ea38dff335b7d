"""Names of the calls of a layer that a model runs several times in a forward (ALBERT)."""

from __future__ import annotations

import threading
from collections import Counter
from collections.abc import Iterable

from torch import nn

from hf_stable.architectures.finding import FoundBlock

__all__ = ["CallNames"]


class CallNames:
    """Gives each call of a shared layer a name of its own, and leaves those of others alone.

    The n-th call since the model's forward began is "layer@n": the depth at which the layer acts.
    """

    def __init__(self, blocks: Iterable[FoundBlock]) -> None:
        """Find the blocks that are shared, and their attentions; nothing has run yet."""
        self._shared: set[nn.Module] = set()
        for found in blocks:
            if found.block.is_shared:
                attentions = (attention.module for _, attention in found.attentions())
                self._shared |= {found.module, *map(found.module.get_submodule, attentions)}
        # By thread: replicas run beside each other.
        self._counts: Counter[tuple[int, nn.Module]] = Counter()

    def begin(self) -> None:
        """Count from one again: a model begins its forward in this thread."""
        here = threading.get_ident()
        for key in [key for key in self._counts if key[0] == here]:
            del self._counts[key]

    def next_of(self, module: nn.Module, layer: str) -> str:
        """Return the name of the call that begins.

        Args:
            module: the model's own, a block or an attention.
            layer: the name of its layer.
        """
        if module not in self._shared:
            return layer
        key = threading.get_ident(), module
        self._counts[key] += 1
        return f"{layer}@{self._counts[key]}"
