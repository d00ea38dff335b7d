"""Linear layers whose weight is used as `gamma / sigma(W) * W`: sigmaReparam, layer by layer.

`SigmaLinear`, `SigmaConv1D` and `SigmaConv2d` are the plain layers with another class: `weight`
stays the raw parameter, `gamma` joins it, and three buffers hold the singular triple. `refreshing`
moves the triple once per optimizer step; where anything else changed the weight (an average of
weights, a plain state dict), `settling` makes the triple that of the weight before it is used.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Literal
from weakref import WeakSet

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.autograd.forward_ad import unpack_dual
from torch.distributed.tensor import DTensor
from transformers.pytorch_utils import Conv1D

from hf_stable._ranks import whole_tensor
from hf_stable.measures.leading import leading_triple
from hf_stable.measures.matrices import (
    RowShard,
    as_matrix,
    matrix_blocks,
    spectral_dtype,
    split_blocks,
)
from hf_stable.methods.sigma_reparam.function import (
    effective_weight,
    scaled_linear,
    scales_in_product,
    spread_over_blocks,
)
from hf_stable.methods.sigma_reparam.triples import (
    mark_moved,
    mark_settled,
    settle_if_moved,
    settle_loaded,
)

__all__ = [
    "SIGMA_CLASSES",
    "SigmaConv1D",
    "SigmaConv2d",
    "SigmaLayer",
    "SigmaLinear",
    "SigmaState",
    "fold_layer",
    "install",
    "live_layers",
    "prepare",
]

_ALIGNMENT = 64  # bytes, of what torch allocates

_serial_numbers = itertools.count()
_live: WeakSet[SigmaLayer] = WeakSet()


def live_layers() -> list[SigmaLayer]:
    """Return every sigma layer of this process, oldest first, the same order on every rank."""
    return sorted(_live, key=lambda layer: layer.serial_number)


class SigmaLayer(nn.Module):
    """What the three sigma layers share: the singular triple beside `weight`, and gamma.

    Attributes:
        weight: the raw weight W, as the plain layer keeps it. Trained.
        gamma: (k,) one learnable scale for each of k blocks, at least float32. Trained.
        sigma: (k,) the value of `u.T W v` at the last refresh, in the dtype of gamma.
        sigma_u: (k, m) left singular vectors of the blocks of the 2-D weight.
        sigma_v: (k, n) right singular vectors.
        block_dim: dimension of `weight` along which its blocks lie.
        layer_name: qualified name in the model, for messages.
        settled_for: identity and version of the weight that the triple was last known to fit.
    """

    weight: Tensor
    bias: Any
    gamma: nn.Parameter
    sigma: Tensor
    sigma_u: Tensor
    sigma_v: Tensor
    block_dim: int
    layer_name: str
    serial_number: int
    settled_for: tuple[int, int]

    SIGMA_TENSORS = ("gamma", "sigma", "sigma_u", "sigma_v")

    @property
    def num_blocks(self) -> int:
        """The number of blocks with a sigma and a gamma of their own."""
        return len(self.gamma)

    def effective_weight(self) -> Tensor:
        """Return `gamma / sigma * W`, differentiable, shaped like `weight`."""
        settle_if_moved(self)
        return effective_weight(
            self.weight, self.gamma, self.sigma, self.sigma_u, self.sigma_v, self.block_dim
        )

    def scaled_product(self, x: Tensor) -> Tensor | None:
        """Map (..., in) to (..., out) where the product itself can scale, else return None."""
        weight, gamma = self.weight, self.gamma
        if not scales_in_product(x, weight, gamma):
            return None
        settle_if_moved(self)
        sigma, u, v = self.sigma, self.sigma_u, self.sigma_v
        return scaled_linear(x, weight, self.bias, gamma, sigma, u, v, self.block_dim)

    def output_scale(self) -> Tensor:
        """Return gamma / sigma over the output features: (1,) or (out_features,)."""
        settle_if_moved(self)
        return spread_over_blocks(self.gamma / self.sigma, self.weight, self.block_dim).flatten()

    def scales_activations(self, num_tokens: int, in_features: int) -> bool:
        """Say whether scaling the output is right and cheaper than scaling the weight.

        It is where no derivative is wanted (`generate`, evaluation) and the output is the smaller
        of the two. Training always scales the weight, whose backward is exact in two passes;
        also in the forward without gradients that reentrant checkpointing makes, so that both
        of its forwards round alike.
        """
        if self.training or num_tokens >= in_features:
            return False
        return not (_is_differentiated(self.weight) or _is_differentiated(self.gamma))

    def register(self) -> None:
        """Let the optimizer hook find this layer for as long as it lives."""
        self.serial_number = next(_serial_numbers)
        _live.add(self)

    def __setstate__(self, state: dict[str, Any]) -> None:
        """Register the copy that deepcopy or pickle makes: it keeps refreshing on its own."""
        from hf_stable.methods.sigma_reparam.steps import install_hooks  # which imports this module

        super().__setstate__(state)
        self.register()
        mark_moved(self)
        install_hooks()  # in a process that unpickles, nobody has called patch

    def train(self, mode: bool = True) -> SigmaLayer:
        """Switch between training and evaluation, where averages of weights come and go."""
        if mode != self.training:
            mark_moved(self)
        return super().train(mode)

    def register_parameter(self, name: str, param: nn.Parameter | None) -> None:
        """Register a parameter; another `weight` needs another sigma."""
        super().register_parameter(name, param)
        if name == "weight":
            mark_moved(self)

    def _load_from_state_dict(
        self, state_dict: dict[str, Any], prefix: str, *args: Any, **kwargs: Any
    ) -> None:
        super()._load_from_state_dict(state_dict, prefix, *args, **kwargs)
        names = ("weight", *self.SIGMA_TENSORS)
        settle_loaded(self, {name for name in names if prefix + name in state_dict})

    def _save_to_state_dict(self, *args: Any, **kwargs: Any) -> None:
        settle_if_moved(self)
        super()._save_to_state_dict(*args, **kwargs)

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> SigmaLayer:
        # bfloat16 would change every weight by up to 0.4 % through gamma and sigma, and a gamma
        # that small steps cannot move stays where it is.
        kept = [self.gamma.grad, *(getattr(self, name) for name in self.SIGMA_TENSORS)]

        def keep_precision(tensor: Tensor) -> Tensor:
            result = fn(tensor)
            dtype = spectral_dtype(result.dtype)
            if result.dtype != dtype and any(tensor is other for other in kept):
                return tensor.to(device=result.device, dtype=dtype)
            return result

        super()._apply(keep_precision, recurse)
        return self

    def extra_repr(self) -> str:
        """Append the number of blocks to what the plain layer prints."""
        return f"{super().extra_repr()}, sigma_blocks={self.num_blocks}"


class SigmaLinear(SigmaLayer, nn.Linear):
    """`nn.Linear` with the effective weight; W is (out, in)."""

    def forward(self, input: Tensor) -> Tensor:
        """Map (..., in) to (..., out)."""
        product = self.scaled_product(input)
        if product is not None:
            return product
        if not self.scales_activations(input.numel() // self.in_features, self.in_features):
            return F.linear(input, self.effective_weight(), self.bias)
        return _scaled_output(F.linear(input, self.weight), self)


class SigmaConv1D(SigmaLayer, Conv1D):
    """transformers' `Conv1D` (GPT-2) with the effective weight; W is (in, out)."""

    def forward(self, x: Tensor) -> Tensor:
        """Map (..., in) to (..., out)."""
        product = self.scaled_product(x)
        if product is not None:
            return product
        rows = x.reshape(-1, x.size(-1))
        if self.scales_activations(len(rows), x.size(-1)):
            output = _scaled_output(rows @ self.weight, self)
        else:
            output = torch.addmm(self.bias, rows, self.effective_weight())
        return output.view(*x.shape[:-1], output.shape[1])

    def __repr__(self) -> str:
        """Print what `Conv1D` prints of itself, which it does without `extra_repr`."""
        return f"Sigma{super().__repr__()[:-1]}, sigma_blocks={self.num_blocks})"


class SigmaConv2d(SigmaLayer, nn.Conv2d):
    """`nn.Conv2d` (patch embeddings) with the effective weight; W is (out, in, kh, kw)."""

    def forward(self, input: Tensor) -> Tensor:
        """Map (batch, in, height, width) to (batch, out, height', width')."""
        return self._conv_forward(input, self.effective_weight(), self.bias)


def _is_differentiated(tensor: Tensor) -> bool:
    """Say whether a derivative is taken through a tensor, backward or forward (`jvp`)."""
    return (torch.is_grad_enabled() and tensor.requires_grad) or (
        unpack_dual(tensor).tangent is not None
    )


def _scaled_output(output: Tensor, layer: SigmaLayer) -> Tensor:
    scale = layer.output_scale()
    if layer.bias is None:
        return (output * scale).to(output.dtype)
    return torch.addcmul(layer.bias, output, scale).to(output.dtype)


SIGMA_CLASSES: dict[type, type] = {
    nn.Linear: SigmaLinear,
    Conv1D: SigmaConv1D,
    nn.Conv2d: SigmaConv2d,
}
PLAIN_CLASSES: dict[type[nn.Module], type[nn.Module]] = {
    sigma: plain for plain, sigma in SIGMA_CLASSES.items()
}


@dataclass(frozen=True)
class SigmaState:
    """What `install` adds to a plain layer; computed by `prepare`, which changes nothing."""

    gamma: Tensor
    sigma: Tensor
    u: Tensor
    v: Tensor
    block_dim: int
    name: str


def prepare(
    layer: nn.Module,
    *,
    num_blocks: int = 1,
    init: Literal["spectral", "one"] = "spectral",
    name: str = "",
) -> SigmaState:
    """Compute the exact singular triples of a plain layer without touching it.

    Args:
        layer: exactly an `nn.Linear`, `Conv1D` or `nn.Conv2d`.
        num_blocks: number of equal blocks of output features with a sigma of their own.
        init: `"spectral"` sets gamma to sigma, which leaves the layer's function as it is;
            `"one"` sets gamma to 1 (the paper's text).
        name: qualified name for messages.

    Raises:
        TypeError: if the layer is of any other type, a subclass included.
        ValueError: if a block is zero or not finite.
    """
    if type(layer) not in SIGMA_CLASSES:
        raise TypeError(
            f"cannot reparametrise {name or 'a layer'} of type {type(layer).__module__}."
            f"{type(layer).__qualname__}; allowed are exactly Linear, Conv1D and Conv2d (a "
            "subclass, a quantised layer or an adapter may use its weight in ways that gamma / "
            "sigma would break). To patch the others, exclude it"
        )
    weight: Any = layer.weight
    block_dim = 1 if type(layer) is Conv1D else 0
    blocks = split_blocks(as_matrix(weight.detach()), num_blocks, block_dim)
    triples = []
    for block in blocks:
        try:
            triples.append(leading_triple(block))
        except ValueError as error:
            raise ValueError(f"cannot reparametrise {name or 'a layer'}: {error}") from error
    sigma, u, v = (torch.stack(part) for part in zip(*triples, strict=True))
    if not (sigma > 0).all():
        raise ValueError(
            f"cannot reparametrise {name or 'a layer'}: its {tuple(weight.shape)} weight has an "
            "all-zero block, so gamma / sigma is 0 / 0; initialise it or exclude the layer"
        )
    gamma = sigma.clone() if init == "spectral" else torch.ones_like(sigma)
    return SigmaState(gamma, sigma, u, v, block_dim, name)


def install(layer: nn.Module, state: SigmaState) -> SigmaLayer:
    """Turn a plain layer into a sigma layer in place: same object, same `weight`, new class."""
    sigma_class: Any = SIGMA_CLASSES[type(layer)]
    layer.__class__ = sigma_class
    assert isinstance(layer, SigmaLayer)
    if layer.weight.data_ptr() % _ALIGNMENT:
        # It lies as safetensors found it in the file. Products with vectors round otherwise there,
        # and a run would depend on whether its weights were just initialised or loaded.
        layer.weight.data = layer.weight.data.clone()
    layer.gamma = nn.Parameter(state.gamma.clone(), requires_grad=layer.weight.requires_grad)
    layer.register_buffer("sigma", state.sigma)
    layer.register_buffer("sigma_u", state.u)
    layer.register_buffer("sigma_v", state.v)
    layer.block_dim = state.block_dim
    layer.layer_name = state.name
    layer.register()
    mark_settled(layer)
    return layer


@torch.no_grad()
def fold_layer(layer: SigmaLayer) -> nn.Module:
    """Turn a sigma layer into the plain layer that computes the same, in place.

    `weight` keeps its identity, so optimizers, adapters and sharding that hold it go on.
    """
    settle_if_moved(layer)
    weight = layer.weight
    gamma = whole_tensor(layer.gamma)
    sigma = layer.sigma.to(gamma.device)  # gamma and the weight may be offloaded
    scale = spread_over_blocks(gamma / sigma, weight, layer.block_dim)
    if isinstance(weight, DTensor):
        shard = matrix_blocks(weight)[0]
        if isinstance(shard, RowShard) and scale.ndim and len(scale) > 1:
            scale = scale[shard.offset : shard.offset + len(shard.local)]
        weight = weight.to_local()
    weight.copy_(weight.to(scale.dtype) * scale)
    for name in SigmaLayer.SIGMA_TENSORS:
        delattr(layer, name)
    for name in ("block_dim", "layer_name", "serial_number", "settled_for"):
        delattr(layer, name)
    _live.discard(layer)
    plain_class: Any = PLAIN_CLASSES[type(layer)]
    layer.__class__ = plain_class
    return layer
