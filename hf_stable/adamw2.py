"""AdamW2: AdamW that never moves a weight by more than tau times its own spectral norm.

"Taming Transformer Without Using Learning Rate Warmup" (Qi et al., ICLR 2025; AdamW^2 there).
The optimizer's options, state and bad input; the maths is in `adamw2_update`.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import Tensor
from torch.optim import Optimizer

from hf_stable.adamw2_lora import Adapter, check_factors, pair_factors, update_adapters
from hf_stable.adamw2_update import (
    MOMENTS,
    RULE_STATE,
    Weight,
    adam_step,
    prepare_state,
    update,
)
from hf_stable.spectral import spectral_dtype

__all__ = ["AdamW2"]

_ADAMW_ONLY_OPTIONS = ("amsgrad", "foreach", "fused", "differentiable", "decoupled_weight_decay")


class AdamW2(Optimizer):
    """AdamW whose rate is clipped per weight so that spectra change smoothly: no warmup needed.

    For each weight W with Adam's update U (Qi et al. 2025, Rule 1 and Eq. 6; sigma1 is the largest
    singular value, the l2 norm of a vector):

        rate = min(lr, tau * sigma1(W) / sigma1(U))
        W   <- W - rate * U - rate * weight_decay * W

    so one step cannot raise sigma1(W) by more than the factor 1 + tau. sigma1 is tracked by power
    iteration, warm-started from the vectors of the step before.

    A weight that is all zero when it is first stepped (a bias, LoRA's B) would stay zero under
    this rule for ever. It is exempt, which is decided once and kept in the state. Exempt a whole
    group, such as token embeddings, with `tau=inf`.

    Args:
        params: parameters, `(name, parameter)` tuples or groups, as for any torch optimizer. A
            group may set any of the options below, and also `blocks` and `block_dim`: a fused
            weight is `blocks` equal matrices along dimension `block_dim`, each with its own rate
            (GPT-2's `c_attn`: `blocks=3, block_dim=1`). A group that sets `lora_scale` holds
            LoRA's factors; see `hf_stable.lora_groups`.
        lr: highest learning rate; a float or a one-element tensor.
        betas: decay of the running means of the gradient and of its square.
        eps: added to the root of the second moment. Paper: inside the root; here outside, as
            torch does it.
        weight_decay: decoupled decay; the clipped rate multiplies it too (Algorithm 1, line 11).
        tau: bound on the relative change of sigma1 in one step. The paper uses 0.004 for ViT and
            Swin, 0.01 for GPT. `inf` gives torch's fused AdamW, bit for bit.
        power_iterations: power iterations per step on each weight; its update, which nothing
            keeps from jumping, gets one more.
        maximize: ascend instead of descend.
        capturable: tells torch's check that the step may be captured in a CUDA graph. All state
            lives beside the parameters and nothing is read back, so the step is the same.

    Raises:
        ValueError: for an option out of range, no parameters, or parameters flattened by another
            library.
        TypeError: for parameters that are not real floating-point tensors.
    """

    def __init__(
        self,
        params: Iterable[Any],
        lr: float | Tensor = 1e-3,
        betas: tuple[float, float] = (0.9, 0.999),
        eps: float = 1e-8,
        weight_decay: float = 1e-2,
        *,
        tau: float = 0.01,
        power_iterations: int = 1,
        maximize: bool = False,
        capturable: bool = False,
    ) -> None:
        """Check the options and create the groups."""
        defaults = dict(
            lr=lr,
            betas=betas,
            eps=eps,
            weight_decay=weight_decay,
            tau=tau,
            power_iterations=power_iterations,
            blocks=1,
            block_dim=0,
            lora_scale=None,
            lora_transposed=False,
            maximize=maximize,
            capturable=capturable,
        )
        _check_options(defaults)
        super().__init__(params, defaults)

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        """Add a group of parameters, with options of its own where it names them.

        Raises:
            ValueError: for an option out of range, or `blocks` or `lora_scale` that do not fit the
                weights.
            TypeError: for parameters that are not real floating-point tensors.
        """
        if isinstance(param_group, dict) and not isinstance(param_group["params"], Tensor | set):
            param_group["params"] = list(param_group["params"])
            options = self.defaults | param_group
            _check_options(options)
            params = [p[1] if isinstance(p, tuple) else p for p in param_group["params"]]
            for param in params:
                _check_param(param, options)
            if options["lora_scale"] is not None:
                check_factors(params, options)
        super().add_param_group(param_group)
        self._group_sizes = [len(group["params"]) for group in self.param_groups]

    @torch.no_grad()
    def step(self, closure: Callable[[], Any] | None = None) -> Any:
        """Update every parameter that has a gradient, by Algorithm 1 of the paper.

        No value is read back to the host. Sharded weights of a process group share one all-reduce
        per power iteration. A NaN or infinite gradient spreads to its weight and moments, as
        under torch's AdamW; the power vectors keep their last finite values.

        Args:
            closure: evaluates the model again and returns the loss.

        Returns:
            What the closure returned, or None.

        Raises:
            RuntimeError: for a sparse gradient.
            ValueError: if the parameters were replaced by flattened ones (DeepSpeed ZeRO, FSDP1),
                or those of a group with `lora_scale` cannot be stepped together.
        """
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        ruled: list[Weight] = []
        adapters: list[Adapter] = []
        for group, size in zip(self.param_groups, self._group_sizes, strict=True):
            weights = [
                self._weight(param, group, replaced=len(group["params"]) != size)
                for param in group["params"]
                if param.grad is not None
            ]
            if not math.isinf(group["tau"]) and group["lora_scale"] is not None:
                adapters += pair_factors(group, weights)
            elif not math.isinf(group["tau"]):
                ruled += weights
            elif weights:
                params = [weight.param for weight in weights]
                adam_step(weights, params, lr=group["lr"], weight_decay=group["weight_decay"])
        update(ruled)
        update_adapters(adapters)
        return loss

    def _weight(self, param: Tensor, group: dict[str, Any], *, replaced: bool) -> Weight:
        grad, state = param.grad, self.state[param]
        assert grad is not None
        if grad.is_sparse:
            raise RuntimeError("AdamW2 takes no sparse gradients: use torch.optim.SparseAdam")
        if not state:
            _refuse_flattened(param, replaced=replaced)
        weight = Weight(param, grad, state, group)
        prepare_state(weight)
        return weight

    def effective_lr(self) -> dict[Any, float | list[float]]:
        """Return the rate that each weight really got in its last step (Figure 15 of the paper).

        Reads values back to the host: call it when you log, not in each step.

        Returns:
            Parameter name (or the parameter, where none were given) -> rate; a list of rates,
            one per block, for a fused weight. Parameters never stepped are left out.
        """
        rates: dict[Any, float | list[float]] = {}
        for group in self.param_groups:
            for name, param in zip(
                group.get("param_names", group["params"]), group["params"], strict=True
            ):
                state = self.state.get(param, {})
                if "effective_lr" in state and not math.isinf(group["tau"]):
                    values = state["effective_lr"].tolist()
                    rates[name] = values if len(values) > 1 else values[0]
                elif state:
                    rates[name] = float(group["lr"])
        return rates

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Load a state of AdamW2, or of torch's AdamW.

        Power vectors stay float32 (float64 for float64 weights) whatever the weights are. From
        torch's AdamW the moments and options are taken, `tau` and the like stay as they are here,
        and the spectra start anew at the next step.

        Raises:
            ValueError: if shapes or groups do not fit, or for a state with `amsgrad`.
        """
        saved_groups, entries = state_dict["param_groups"], state_dict["state"]
        if any(group.get("amsgrad") for group in saved_groups):
            raise ValueError(
                "cannot load the state of an AdamW with amsgrad=True: AdamW2 keeps no maximum of "
                "the second moments"
            )
        known = [
            {key: group[key] for key in self.defaults if key in group}
            | {key: value for key, value in saved.items() if key not in _ADAMW_ONLY_OPTIONS}
            for group, saved in zip(self.param_groups, saved_groups, strict=False)
        ]
        indices = [index for group in saved_groups for index in group["params"]]
        params = [param for group in self.param_groups for param in group["params"]]
        for index, param in zip(indices, params, strict=False):
            _check_moments(entries.get(index, {}), param)
        # Optimizer.load_state_dict casts all that it sees to the dtype of the weight.
        super().load_state_dict(
            {
                **state_dict,
                "param_groups": known + list(saved_groups[len(known) :]),
                "state": {
                    index: {key: value for key, value in entry.items() if key not in RULE_STATE}
                    for index, entry in entries.items()
                },
            }
        )
        for index, param in zip(indices, params, strict=True):
            if index in entries:
                _restore_state(self.state[param], entries[index], param)

    def __setstate__(self, state: dict[str, Any]) -> None:
        """Restore a pickled or copied optimizer."""
        super().__setstate__(state)
        self._group_sizes = [len(group["params"]) for group in self.param_groups]


def _check_options(options: dict[str, Any]) -> None:
    """Raise for an option that no AdamW2 group can have."""
    if isinstance(options["lr"], Tensor) and options["lr"].numel() != 1:
        raise ValueError(f"a tensor lr needs one element, got shape {tuple(options['lr'].shape)}")
    checks: dict[str, tuple[str, Callable[[Any], bool]]] = {
        "lr": ("a finite number >= 0", lambda lr: 0 <= lr < math.inf),
        "betas": ("two numbers in [0, 1)", lambda betas: all(0 <= beta < 1 for beta in betas)),
        "eps": ("a number >= 0", lambda eps: eps >= 0),
        "weight_decay": ("a number >= 0", lambda decay: decay >= 0),
        "tau": ("a number > 0; inf switches Rule 1 off", lambda tau: tau > 0),
        "power_iterations": ("an integer >= 1", lambda n: isinstance(n, int) and n >= 1),
        "blocks": ("an integer >= 1", lambda n: isinstance(n, int) and n >= 1),
        "block_dim": ("0 or 1", lambda dim: dim in (0, 1)),
        "lora_scale": ("None or a finite number > 0", lambda s: s is None or 0 < s < math.inf),
        "lora_transposed": ("True or False", lambda transposed: transposed in (True, False)),
    }
    for name, (allowed, holds) in checks.items():
        if not holds(options[name]):
            raise ValueError(f"AdamW2 cannot use {name}={options[name]!r}: give {allowed}")


def _check_param(param: Any, options: dict[str, Any]) -> None:
    """Raise for a parameter that AdamW2 cannot step, or that the blocks of its group do not fit."""
    if not isinstance(param, Tensor):
        return  # torch's own message follows
    if not param.is_floating_point():
        raise TypeError(
            f"AdamW2 cannot optimize a {param.dtype} parameter of shape {tuple(param.shape)}: "
            "give real floating-point parameters"
        )
    _refuse_flattened(param)
    blocks, dim = options["blocks"], options["block_dim"]
    if blocks > 1 and (param.ndim != 2 or param.shape[dim] % blocks):
        raise ValueError(
            f"blocks={blocks} along block_dim={dim} do not fit a parameter of shape "
            f"{tuple(param.shape)}: give such weights a group of their own"
        )


def _refuse_flattened(param: Tensor, *, replaced: bool = False) -> None:
    """Raise for a parameter that another library has flattened, so that it has no spectrum."""
    if replaced or hasattr(param, "ds_id") or getattr(param, "_fsdp_flattened", False):
        raise ValueError(
            "AdamW2 needs whole weight matrices, and these parameters were flattened or replaced "
            "(DeepSpeed ZeRO and FSDP1 do that): use DDP, ZeroRedundancyOptimizer or FSDP2's "
            "fully_shard"
        )


def _check_moments(entry: dict[str, Any], param: Tensor) -> None:
    for key in MOMENTS:
        if key in entry and entry[key].shape != param.shape:
            raise ValueError(
                f"the loaded {key} has shape {tuple(entry[key].shape)}, its parameter "
                f"{tuple(param.shape)}: the state belongs to another model or another order of "
                "parameters"
            )


def _restore_state(state: dict[str, Any], entry: dict[str, Any], param: Tensor) -> None:
    """Finish a loaded state, of which torch has cast the moments to the dtype of the weight."""
    state["step"] = torch.as_tensor(state["step"], dtype=torch.float32).to(param.device)
    for key in MOMENTS:
        if state[key].stride() != param.stride():
            state[key] = torch.empty_like(param).copy_(state[key])
    for key in RULE_STATE:
        if key in entry:
            dtype = torch.bool if key == "exempt" else spectral_dtype(param.dtype)
            state[key] = entry[key].to(device=param.device, dtype=dtype, copy=True)
