"""The method "sigma_reparam": its options, and the layers of a model that it has changed."""

from __future__ import annotations

from collections.abc import Iterable
from typing import ClassVar, Literal

from torch import nn

from hf_stable.architectures.paths import state_dict_name
from hf_stable.architectures.registry import require_model
from hf_stable.methods.config import MethodConfig, method_options
from hf_stable.methods.sigma_reparam.layers import SigmaLayer
from hf_stable.methods.sigma_reparam.triples import settle

__all__ = ["SigmaReparamConfig", "refresh", "sigma_layers"]


@method_options
class SigmaReparamConfig(MethodConfig):
    """sigmaReparam (Zhai et al. 2023): `W_hat = gamma / sigma(W) * W` in every linear layer.

    Attributes:
        init: `"spectral"` starts gamma at sigma(W), so that patching changes no output. This is
            for pretrained weights. It holds bit for bit in float32 on a CPU; elsewhere there is one
            more rounding per layer where few tokens are evaluated. `"one"` starts gamma at 1, as
            the paper's text does.
        fused_qkv: `"split"` gives each part of a fused projection a sigma and a gamma of its own;
            `"joint"` one for the whole matrix, as the authors' vision code does.
        heads: `"include"` also reparametrises untied heads.
        include: glob patterns over module names; where given, only these layers.
        exclude: glob patterns over module names, taken out last.
        power_iterations: power iterations on each weight after a step. More of them keep sigma
            closer to its weight in the first steps at a high rate, where a weight turns fast.
    """

    init: Literal["spectral", "one"] = "spectral"
    fused_qkv: Literal["split", "joint"] = "split"
    heads: Literal["skip", "include"] = "skip"
    include: tuple[str, ...] | None = None
    exclude: tuple[str, ...] | None = None
    power_iterations: int = 1

    method: ClassVar[str] = "sigma_reparam"

    def __post_init__(self) -> None:
        """Check the choices and make the patterns hashable."""
        super().__post_init__()
        if type(self.power_iterations) is not int or self.power_iterations < 1:
            raise ValueError(
                f"power_iterations={self.power_iterations!r} is not allowed; give an integer >= 1"
            )
        for name in ("include", "exclude"):
            given = getattr(self, name)
            if given is None:
                continue
            is_sequence = isinstance(given, Iterable) and not isinstance(given, str)
            patterns = tuple(given) if is_sequence else (None,)
            if not all(isinstance(pattern, str) for pattern in patterns):
                raise TypeError(f"{name} takes a sequence of glob patterns, got {given!r}")
            object.__setattr__(self, name, patterns)


def sigma_layers(model: nn.Module) -> list[tuple[str, SigmaLayer]]:
    """Return (name, layer) of every sigma layer, in the order of the model.

    The names are those of the state dict, which knows nothing of the wrappers that torch puts
    around blocks for activation checkpointing.
    """
    return [
        (state_dict_name(name), module)
        for name, module in model.named_modules()
        if isinstance(module, SigmaLayer)
    ]


def refresh(model: nn.Module) -> nn.Module:
    """Bring sigma of every sigma layer up to date with its weight, in place.

    Most changes are noticed without it: optimizer steps, averaging in place, loading, copying, and
    switching between `train` and `eval`. Call it after weights were changed through `.data`, and
    after any change by hand to a model under `torch.compile`. Where no weight has changed, sigma
    stays as it is. Every rank of a sharded model has to call it.

    Returns:
        The same model.
    """
    require_model(model, "refresh")
    for _, layer in sigma_layers(model):
        settle(layer)
    return model
