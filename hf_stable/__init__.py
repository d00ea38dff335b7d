"""Stable training of Hugging Face Transformers: sigmaReparam, AdamW2 and a monitor.

Importing this package takes a moment. What it is made of, with torch and transformers, comes when
the first of its names is used; what it changes in transformers is changed as soon as transformers
is there (`hf_stable._registering`).
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from hf_stable._registering import register_in_time

if TYPE_CHECKING:
    from hf_stable._library import (
        AdamW2,
        Architecture,
        Attention,
        Block,
        Member,
        RemoveLayerNormConfig,
        RemovePreLayerNormConfig,
        SigmaReparamConfig,
        StabilityCallback,
        UnsupportedModelError,
        describe,
        export,
        fold,
        is_patched,
        load,
        lora_groups,
        parameter_groups,
        patch,
        preflight,
        probe,
        push_to_hub,
        refresh,
        register_architecture,
        restore_layernorms,
        supported_architectures,
    )

__version__ = "0.1.0"

__all__ = [
    "AdamW2",
    "Architecture",
    "Attention",
    "Block",
    "Member",
    "RemoveLayerNormConfig",
    "RemovePreLayerNormConfig",
    "SigmaReparamConfig",
    "StabilityCallback",
    "UnsupportedModelError",
    "describe",
    "export",
    "fold",
    "is_patched",
    "load",
    "lora_groups",
    "parameter_groups",
    "patch",
    "preflight",
    "probe",
    "push_to_hub",
    "refresh",
    "register_architecture",
    "restore_layernorms",
    "supported_architectures",
]


def __getattr__(name: str) -> Any:
    if name not in __all__:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    from hf_stable import _library

    globals().update({each: getattr(_library, each) for each in __all__})
    return globals()[name]


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})


register_in_time()
