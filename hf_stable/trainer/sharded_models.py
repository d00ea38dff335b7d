"""What hf_stable changes where FSDP2 first runs a model: ranks that patched it differently say so.

Parameters would be gathered of ranks that do not have them all, which hangs or mixes them up.
"""

from __future__ import annotations

from typing import Any

from torch.distributed.tensor import DTensor

from hf_stable.methods.agreement import refuse_different_shards
from hf_stable.trainer.changes import wrapping

__all__: list[str] = []


@wrapping(
    "torch.distributed.fsdp._fully_shard._fsdp_state:FSDPState._lazy_init",
    reason="refuses a model that its ranks have patched differently, before the first forward",
)
def _lazy_init(original: Any, state: Any) -> None:
    if state._is_root is None:
        for module in state._modules:
            ranks: set[int] = set()
            for mesh in {p.device_mesh for p in module.parameters() if isinstance(p, DTensor)}:
                ranks.update(mesh.mesh.flatten().tolist())
            if len(ranks) > 1:
                refuse_different_shards(module, sorted(ranks))
    original(state)
