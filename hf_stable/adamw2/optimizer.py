"""AdamW2: AdamW that never moves a weight by more than tau times its own spectral norm.

"Taming Transformer Without Using Learning Rate Warmup" (Qi et al., ICLR 2025; AdamW^2 there).
The optimizer's options, state and bad input; the maths is in `rule`.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from hf_stable._late_changes import make_late_changes
from hf_stable.adamw2.adam import adam_step
from hf_stable.adamw2.group_weights import given_shapes, note_lr, rates_of_group, weights_of
from hf_stable.adamw2.loaded_states import Entries, prepare_loaded, restore_state
from hf_stable.adamw2.merged_rule import pair_factors, update_adapters
from hf_stable.adamw2.options import (
    GROUP_DEFAULTS,
    as_numbers,
    check_group,
    check_options,
    parts_options,
)
from hf_stable.adamw2.partitioned_groups import PartitionedGroups, take_matrices_out
from hf_stable.adamw2.partitions import Partition
from hf_stable.adamw2.planning import AUTO, DEFAULT_TAU, choose_tau, note_other_plan
from hf_stable.adamw2.rule import update
from hf_stable.adamw2.unseen_models import look_at_first_step
from hf_stable.adamw2.weights import prepare_state
from hf_stable.kernels.choosing import Workspaces

__all__ = ["AdamW2"]


class AdamW2(Optimizer):
    """AdamW with a rate for each weight, so that no step changes a weight by too much.

    It takes the place of a warmup. For each weight W with Adam's update U (Qi et al. 2025, Rule 1
    and Eq. 6), where sigma1 is the largest singular value of a matrix and the l2 norm of a vector:

        rate = min(lr, tau * sigma1(W) / sigma1(U))
        W   <- W - rate * U - rate * weight_decay * W

    One step raises sigma1(W) by at most the factor 1 + tau. Power iteration tracks sigma1, and
    starts from the vectors of the step before.

    A weight that is all zero at its first step (a bias, LoRA's B) would stay zero under this rule.
    So it is exempt, which is decided once and kept in the state. A bias that has left zero before
    is not recognised. `hf_stable.parameter_groups` reads the model instead: it exempts biases,
    LoRA's B and embeddings by `tau=inf`, and gives fused projections their parts. The first step
    warns where such projections came without their model.

    Args:
        params: parameters, `(name, parameter)` tuples or groups, as for any torch optimizer. A
            group may set any of the options below, and also `parts`: where the matrices of a fused
            weight lie, each with its own rate (GPT-2's `c_attn`: `hf_stable.spectral.Parts((1, 1,
            1), dim=1)`, or in short `blocks=3, block_dim=1`). A group that sets `lora_scale` holds
            LoRA's factors; see `hf_stable.lora_groups`.
        lr: highest learning rate; a float or a one-element tensor.
        betas: decay of the running means of the gradient and of its square; tensors of one
            element are read once.
        eps: added to the root of the second moment. Paper: inside the root; here outside, as
            torch does it.
        weight_decay: decoupled decay; the clipped rate multiplies it too (Algorithm 1, line 11).
        tau: bound on the relative change of sigma1 in one step. The paper uses 0.004 for ViT and
            Swin, 0.01 for GPT. `inf` gives torch's fused AdamW, bit for bit. "auto" derives it from
            `total_steps` (`planning.plan_tau`); `print(optimizer)` shows it. A state keeps its own.
        total_steps: of the planned run, for `tau="auto"` alone. Where a schedule lowers the rate,
            give the sum over the steps of the rate over the highest one: half of the steps for a
            linear or a cosine schedule. The Trainer does so itself.
        power_iterations: power iterations per step on each weight. Its update gets one more, since
            it may change direction from one step to the next.
        amsgrad: False alone; AdamW2 keeps no maximum of the second moments.
        maximize: ascend instead of descend.
        foreach: taken as torch's AdamW takes it, and of no effect: AdamW2 chooses its kernels
            itself, by device and by the size of the weights. The same holds for `fused`.
        capturable: tells torch's check that the step may be captured in a CUDA graph, which holds.
        differentiable: False alone; the step runs in kernels that have no derivative.
        fused: see `foreach`.

    Raises:
        ValueError: for an option out of range, no parameters, or parameters flattened by another
            library.
        RuntimeError: for `fused` and `foreach` together, as torch's AdamW.
        TypeError: for parameters that are not real floating-point tensors.
    """

    def __init__(
        self,
        params: Iterable[Any],
        lr: float | Tensor = 1e-3,
        betas: tuple[float | Tensor, float | Tensor] = (0.9, 0.999),
        eps: float = 1e-8,
        weight_decay: float = 1e-2,
        amsgrad: bool = False,
        *,
        tau: float | Literal["auto"] = DEFAULT_TAU,
        total_steps: float | None = None,
        power_iterations: int = 1,
        maximize: bool = False,
        foreach: bool | None = None,
        capturable: bool = False,
        differentiable: bool = False,
        fused: bool | None = None,
    ) -> None:
        """Check the options and create the groups."""
        if isinstance(params, nn.Module):
            raise TypeError(
                f"AdamW2 takes parameters, got the model {type(params).__name__}: give "
                "hf_stable.parameter_groups(model)"
            )
        defaults = dict(
            lr=lr,
            betas=as_numbers(betas),
            eps=eps,
            weight_decay=weight_decay,
            tau=choose_tau(tau, total_steps),
            total_steps=total_steps,
            power_iterations=power_iterations,
            **GROUP_DEFAULTS,
            maximize=maximize,
            capturable=capturable,
            amsgrad=amsgrad,
            foreach=foreach,
            differentiable=differentiable,
            fused=fused,
        )
        check_options(defaults)
        make_late_changes()  # an engine of DeepSpeed that is built from here on is followed
        self._workspaces = Workspaces()
        self._partitioned: PartitionedGroups | None = None
        super().__init__(params, defaults)
        look_at_first_step(self)

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        """Add a group of parameters, with options of its own where it names them.

        Raises:
            ValueError: for an option out of range, or `parts` or `lora_scale` that do not fit the
                weights.
            TypeError: for parameters that are not real floating-point tensors.
        """
        if isinstance(param_group, dict) and not isinstance(param_group["params"], set):
            given = param_group["params"]
            param_group["params"] = [given] if isinstance(given, Tensor) else list(given)
            params = [p[1] if isinstance(p, tuple) else p for p in param_group["params"]]
            if "betas" in param_group:
                param_group["betas"] = as_numbers(param_group["betas"])
            if param_group.get("tau") == AUTO:
                total = param_group.get("total_steps", self.defaults["total_steps"])
                param_group |= {"tau": choose_tau(AUTO, total), "total_steps": total}
            param_group |= parts_options(param_group)
            check_group(params, self.defaults | param_group)
        super().add_param_group(param_group)
        self._shapes = given_shapes(self.param_groups)

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
            ValueError: if the parameters were replaced by flattened ones that `partition` was not
                told of (FSDP1), or those of a group with `lora_scale` cannot be stepped together.
                Either is raised before anything has moved.
        """
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        if self._partitioned is None:
            self._step_weights()
        else:
            self._partitioned.step(self.param_groups, self.state)
        return loss

    def _step_weights(self) -> None:
        pairs = zip(self.param_groups, self._shapes, strict=True)
        everything = [(group, weights_of(group, shapes, self.state)) for group, shapes in pairs]
        ruled, adapters = [], []
        for group, weights in everything:
            if not math.isinf(group["tau"]) and group["lora_scale"] is not None:
                adapters += pair_factors(group, weights)
            elif not math.isinf(group["tau"]):
                ruled += weights
        for group, weights in everything:
            note_lr(group)
            for weight in weights:
                prepare_state(weight)
        for group, weights in everything:
            if math.isinf(group["tau"]) and weights:
                params = [weight.param for weight in weights]
                adam_step(weights, params, lr=group["lr"], weight_decay=group["weight_decay"])
        update(ruled, self._workspaces)
        update_adapters(adapters)

    def partition(self, partitions: Mapping[Tensor, Partition]) -> None:
        """Say what the flat tensors are made of that an engine puts in the place of parameters.

        From here on, `step` takes those of them that are in the groups. Every process that shares
        one has to call it with its part, and to step the groups in the same order.

        Args:
            partitions: by flat tensor.

        Raises:
            ValueError: if a group sets `lora_scale`, which needs whole factors.
        """
        if any(group["lora_scale"] is not None for group in self.param_groups):
            raise ValueError(
                "lora_scale needs whole factors, and these are cut into flat partitions: train "
                "LoRA's factors each by its own norm (lora='factors'), or use DDP"
            )
        self._partitioned = PartitionedGroups(partitions) if partitions else None

    def effective_lr(self) -> dict[Any, float | list[float]]:
        """Return the rate that each weight really got in its last step (Figure 15 of the paper).

        It reads values back to the host, so call it when you log and not in each step.

        Returns:
            Parameter name (or the parameter, where none was given) -> rate; for a fused weight a
            list of rates. Parameters never stepped are left out.
        """
        if self._partitioned is not None:
            return self._partitioned.rates(self.param_groups)
        rates: dict[Any, float | list[float]] = {}
        for group in self.param_groups:
            rates |= rates_of_group(group, self.state)
        return rates

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Load a state of AdamW2, or of torch's AdamW.

        Power vectors are float32, and float64 for float64 weights. A state of torch's AdamW gives
        its moments and options; `tau` and the other options of AdamW2 stay as they are here. A
        state of AdamW2 keeps its own tau, and a warning says so where `tau="auto"` would be another
        one. The spectra start anew at the next step after a state of AdamW, and also where
        `lora_scale` differs. A state of AdamW does not tell what started at zero, so a weight is
        exempt as well if one step at `lr` would be larger than it. Where this raises, nothing has
        changed.

        Raises:
            ValueError: if shapes or groups do not fit, for options out of range, and for a state
                of another optimizer, of Adam with weight decay in the gradient, or with `amsgrad`.
        """
        entries: Entries = []
        matrices: dict[Tensor, Any] = {}

        def before(_: Optimizer, given: dict[str, Any]) -> dict[str, Any]:
            if self._partitioned is not None:
                return take_matrices_out(given, self.param_groups, matrices)
            parted = self._as_parted(given)
            prepared, entries[:] = prepare_loaded(parted, self.param_groups, tuple(self.defaults))
            note_other_plan(parted["param_groups"], self.param_groups)
            return prepared

        def after(_: Optimizer) -> None:
            if self._partitioned is not None:
                self._partitioned.restore_matrices(self.state, matrices)
            for param, entry in entries:
                restore_state(self.state[param], entry, param)

        # The last of the pre-hooks and the first of the post-hooks, so that a caller's hooks work.
        handles = (
            self.register_load_state_dict_pre_hook(before),
            self.register_load_state_dict_post_hook(after, prepend=True),
        )
        try:
            super().load_state_dict(state_dict)
        finally:
            for handle in handles:
                handle.remove()

    def _as_parted(self, state_dict: dict[str, Any]) -> dict[str, Any]:
        """Return a loaded state with groups like those of this optimizer."""
        return state_dict

    def __setstate__(self, state: dict[str, Any]) -> None:
        """Restore a pickled or copied optimizer."""
        super().__setstate__(state)
        # torch comes here after loading too, when the parameters may have been replaced.
        self.__dict__.setdefault("_shapes", given_shapes(self.param_groups))
        self.__dict__.setdefault("_workspaces", Workspaces())
        self.__dict__.setdefault("_partitioned", None)
