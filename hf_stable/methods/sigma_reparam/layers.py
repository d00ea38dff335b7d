"""Linear layers whose weight is used as `gamma / sigma(W) * W`: sigmaReparam, layer by layer.

`SigmaLinear`, `SigmaConv1D` and `SigmaConv2d` are the plain layers with another class: `weight`
stays the raw parameter, `gamma` joins it, and three buffers hold the singular triple. `steps`
moves the triple once per optimizer step; where anything else changed the weight (an average of
weights, a plain state dict), `triples` makes it that of the weight before it is used. `swapping`
makes sigma layers out of plain ones.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.autograd.forward_ad import unpack_dual
from torch.distributed.tensor import DTensor
from transformers.pytorch_utils import Conv1D

from hf_stable.measures.matrices import spectral_dtype
from hf_stable.measures.parts import Parts
from hf_stable.methods.sigma_reparam.function import (
    effective_weight,
    scaled_linear,
    scales_in_product,
)
from hf_stable.methods.sigma_reparam.shared_function import shared_effective_weight
from hf_stable.methods.sigma_reparam.steps import follow
from hf_stable.methods.sigma_reparam.stored_parts import PARTS_TENSOR
from hf_stable.methods.sigma_reparam.triples import (
    SIGMA_TENSORS,
    mark_moved,
    settle_cast,
    settle_if_moved,
    settle_loaded,
)

__all__ = [
    "SigmaConv1D",
    "SigmaConv1d",
    "SigmaConv2d",
    "SigmaConv3d",
    "SigmaLayer",
    "SigmaLinear",
]


class SigmaLayer(nn.Module):
    """What the sigma layers share: the singular triple beside `weight`, and gamma.

    Attributes:
        weight: the raw weight W, as the plain layer keeps it. Trained.
        gamma: (k,) one learnable scale for each of k parts, at least float32. Trained.
        sigma: (k,) the value of `u.T W v` at the last refresh, in the dtype of gamma.
        sigma_u: (k, m) left singular vectors of the parts; a smaller part's are followed by zeros.
        sigma_v: (k, n) right singular vectors.
        parts: where the parts lie in `weight`.
        power_iterations: how many the triple is moved by after a step.
        layer_name: qualified name in the model, for messages.
        serial_number: which of the process's sigma layers it is, oldest first.
        plain_class: the class that it was and will be, where that is not exactly the plain one.
        settled_for: identity and version of the weight that the triple was last known to fit.
        seen_entries: some entries of that weight; None since a step has moved it.
    """

    weight: Tensor
    bias: Any
    gamma: nn.Parameter
    sigma: Tensor
    sigma_u: Tensor
    sigma_v: Tensor
    parts: Parts
    power_iterations: int
    plain_class: type[nn.Module]
    layer_name: str
    serial_number: int
    settled_for: tuple[int, int]
    seen_entries: Tensor | None

    SIGMA_TENSORS = SIGMA_TENSORS

    @property
    def sigma_tensors(self) -> tuple[str, ...]:
        """The names of all that the layer has beside the tensors of the plain one."""
        own = (PARTS_TENSOR,) if PARTS_TENSOR in self._buffers else ()
        return (*self.SIGMA_TENSORS, *own)

    @property
    def plain_place(self) -> tuple[nn.Module, str]:
        """The module and the name under which the plain model has the weight."""
        return self, "weight"

    @property
    def num_parts(self) -> int:
        """The number of parts with a sigma and a gamma of their own."""
        return len(self.sigma)

    def effective_weight(self) -> Tensor:
        """Return `gamma / sigma * W`, differentiable, shaped like `weight`."""
        settle_if_moved(self, look=True)
        weight, gamma, sigma, u, v = (getattr(self, name) for name in ("weight", *SIGMA_TENSORS))
        if isinstance(weight, DTensor):
            return shared_effective_weight(weight, gamma, sigma, u, v, self.parts)
        return effective_weight(weight, gamma, sigma, u, v, self.parts)

    def scaled_product(self, x: Tensor) -> Tensor | None:
        """Map (..., in) to (..., out) where the product itself can scale, else return None."""
        weight, gamma = self.weight, self.gamma
        if not scales_in_product(x, weight, gamma):
            return None
        settle_if_moved(self, look=True)
        # Attributes of a module are found on a long way, which counts in a small layer.
        triple: dict[str, Any] = self._buffers
        sigma, u, v = triple["sigma"], triple["sigma_u"], triple["sigma_v"]
        return scaled_linear(x, weight, self.bias, gamma, sigma, u, v, self.parts)

    def output_scale(self) -> Tensor:
        """Return gamma / sigma over the output features: (1,) or (out_features,)."""
        # To look would wait for another device than the CPU, and few tokens leave no time for it.
        settle_if_moved(self, look=self.weight.is_cpu)
        return self.parts.spread(self.gamma / self.sigma, self.weight.shape).flatten()

    def scales_activations(self, num_tokens: int, in_features: int) -> bool:
        """Say whether scaling the output is right and cheaper than scaling the weight.

        It is where no derivative is wanted (`generate`, evaluation) and the output is the smaller
        of the two. Training always scales the weight, whose backward is exact in two passes;
        also in the forward without gradients that reentrant checkpointing makes, so that both
        of its forwards round alike.
        """
        if self.training or num_tokens >= in_features or isinstance(self.weight, DTensor):
            return False
        return not (_is_differentiated(self.weight) or _is_differentiated(self.gamma))

    def __setstate__(self, state: dict[str, Any]) -> None:
        """Follow the copy that deepcopy or pickle makes: it keeps refreshing on its own."""
        super().__setstate__(state)
        follow(self)
        mark_moved(self)

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
        self,
        state_dict: dict[str, Any],
        prefix: str,
        local_metadata: dict[str, Any],
        strict: bool,
        missing_keys: list[str],
        *others: Any,
    ) -> None:
        super()._load_from_state_dict(
            state_dict, prefix, local_metadata, strict, missing_keys, *others
        )
        names = ("weight", *self.SIGMA_TENSORS)
        given = {name for name in names if prefix + name in state_dict}
        settle_loaded(self, given)
        if "weight" in given:  # what was not given is that of the weight now: nothing is missing
            beside = {prefix + name for name in self.sigma_tensors}
            missing_keys[:] = [key for key in missing_keys if key not in beside]

    def _save_to_state_dict(self, *args: Any, **kwargs: Any) -> None:
        settle_if_moved(self, look=True)
        super()._save_to_state_dict(*args, **kwargs)

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> SigmaLayer:
        # bfloat16 would change every weight by up to 0.4 % through gamma and sigma, and a gamma
        # that small steps cannot move stays where it is.
        kept = [self.gamma.grad, *(getattr(self, name) for name in self.SIGMA_TENSORS)]

        def keep_precision(tensor: Tensor) -> Tensor:
            result = fn(tensor)
            dtype = spectral_dtype(result.dtype)
            # What is less precise already is so on purpose: DeepSpeed has a float32 master of it.
            was_exact = tensor.dtype == spectral_dtype(tensor.dtype)
            if result.dtype != dtype and was_exact and any(tensor is other for other in kept):
                return tensor.to(device=result.device, dtype=dtype)
            return result

        before = self.weight.dtype
        super()._apply(keep_precision, recurse)
        if self.weight.dtype != before:
            settle_cast(self, before)
        return self

    def extra_repr(self) -> str:
        """Append the number of parts to what the plain layer prints."""
        return f"{super().extra_repr()}, sigma_parts={self.num_parts}"


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
        return f"Sigma{super().__repr__()[:-1]}, sigma_parts={self.num_parts})"


class SigmaConv1d(SigmaLayer, nn.Conv1d):
    """`nn.Conv1d` (front ends of speech models) with the effective weight; W is (out, in, k)."""

    def forward(self, input: Tensor) -> Tensor:
        """Map (batch, in, length) to (batch, out, length')."""
        return self._conv_forward(input, self.effective_weight(), self.bias)


class SigmaConv3d(SigmaLayer, nn.Conv3d):
    """`nn.Conv3d` (tubes of a video) with the effective weight; W is (out, in, kd, kh, kw)."""

    def forward(self, input: Tensor) -> Tensor:
        """Map (batch, in, frames, height, width) to (batch, out, frames', height', width')."""
        return self._conv_forward(input, self.effective_weight(), self.bias)


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
