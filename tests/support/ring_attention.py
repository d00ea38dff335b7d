"""torch's context parallelism on CPUs: its ring attention knows the kernels of GPUs alone."""

from __future__ import annotations

from functools import partial
from typing import Any

import torch
from torch.distributed.tensor import DTensor

_flash = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu
_flash_backward = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu_backward


def _around_ring(ring: Any, op_call: Any, args: Any, kwargs: Any) -> tuple[DTensor, ...]:
    """Call a ring on what is here of DTensors that are cut along the sequence."""
    names = [argument.name for argument in op_call._schema.arguments]
    given = dict(zip(names, args, strict=False)) | kwargs
    assert given.pop("attn_mask", None) is None
    query = given["query"]
    local = {n: v.to_local() if isinstance(v, DTensor) else v for n, v in given.items()}
    local.setdefault("is_causal", False)
    results = ring(query.device_mesh.get_group(), 2, **local)
    return tuple(
        DTensor.from_local(each, query.device_mesh, query.placements, run_check=False)
        for each in results
    )


def ring_on_cpus() -> None:
    """Let torch's context parallelism take the CPU's kernel in this process."""
    from torch.distributed.tensor.experimental._context_parallel import _attention  # not in 2.8

    forward = partial(_attention._templated_ring_attention, op=_flash)
    backward = partial(
        _attention._templated_ring_attention_backward,
        op=_flash_backward.default,
        grad_out_name="grad_out",
    )
    _attention.custom_ops[_flash.default] = partial(_around_ring, forward)
    _attention.custom_ops[_flash_backward.default] = partial(_around_ring, backward)
