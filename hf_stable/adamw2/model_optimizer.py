"""AdamW2 for a whole model: groups as they are given, parted by what the model asks for."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any, NamedTuple

from torch import nn
from torch.optim import Optimizer

from hf_stable._wording import nearest
from hf_stable.adamw2.groups import part_groups
from hf_stable.adamw2.optimizer import AdamW2

__all__ = ["ModelAdamW2", "part_schedule"]

_LORA = ("factors", "merged")


class ModelAdamW2(AdamW2):
    """AdamW2 over given groups, each parted further by what the model's structure asks for.

    Embeddings, biases and LoRA's B are exempt from the rule, and each part of a fused projection
    has a rate of its own; `parameter_rules` says which parameters these are. Everything else that
    the groups say stays: weight decay, the order, and which parameters are stepped together. A
    state of torch's AdamW over the groups as they were given can be loaded.

    Args:
        params: groups, as dicts.
        structure: the model whose parameters they are.
        lora: `"factors"` bounds LoRA's A by its own norm, `"merged"` A and B by the weight that
            they change; see `lora_groups`.
        **options: for AdamW2.

    Raises:
        ValueError: for another `lora`, or `"merged"` where nothing trains by LoRA.
        UnsupportedModelError: as `lora_groups` does.
    """

    def __init__(
        self,
        params: Iterable[dict[str, Any]],
        *,
        structure: nn.Module,
        lora: str = "factors",
        **options: Any,
    ) -> None:
        """Part the groups and create the optimizer."""
        if lora not in _LORA:
            raise ValueError(
                f"lora={lora!r} is not allowed{nearest(lora, _LORA)}; choose one of "
                f"{', '.join(map(repr, _LORA))}"
            )
        given = [{**group, "params": list(group["params"])} for group in params]
        super().__init__(part_groups(given, structure, merged=lora == "merged"), **options)
        places = {
            id(param): (index, place)
            for index, group in enumerate(given)
            for place, param in enumerate(group["params"])
        }
        self._parting = _Parting(
            [len(group["params"]) for group in given],
            [[places.get(id(param)) for param in group["params"]] for group in self.param_groups],
        )

    @property
    def num_given_groups(self) -> int:
        """The number of groups as they were given."""
        return len(self._parting.sizes)

    def per_group(self, values: Sequence[Any]) -> list[Any]:
        """Return one value for each group of this optimizer.

        Args:
            values: one for each group, or one for each that was given.

        Raises:
            ValueError: if they are neither.
        """
        if len(values) == len(self.param_groups):
            return list(values)
        if len(values) != self.num_given_groups:
            raise ValueError(
                f"{len(values)} values are neither one for each of the {self.num_given_groups} "
                f"given groups nor one for each of the {len(self.param_groups)} made of them"
            )
        return [values[index] for index in self._parting.indices()]

    def _as_parted(self, state_dict: dict[str, Any]) -> dict[str, Any]:
        groups = state_dict.get("param_groups", ())
        if any("tau" in group for group in groups):
            return state_dict
        if [len(group["params"]) for group in groups] != self._parting.sizes:
            return state_dict
        # Names would be those of the whole group. A frozen weight under LoRA has no label.
        parted = [
            {key: value for key, value in groups[index].items() if key != "param_names"}
            | {"params": [None if at is None else groups[at[0]]["params"][at[1]] for at in places]}
            for index, places in zip(self._parting.indices(), self._parting.places, strict=True)
        ]
        return {**state_dict, "param_groups": parted}

    def __getstate__(self) -> dict[str, Any]:
        """Return what pickles and copies keep."""
        return {**super().__getstate__(), "_parting": self._parting}


class _Parting(NamedTuple):
    """How the groups of an optimizer come from those that it was given.

    Attributes:
        sizes: number of parameters in each given group.
        places: for each group, for each of its parameters: index of the given group and place in
            it; None for a frozen weight under LoRA, which no given group has.
    """

    sizes: list[int]
    places: list[list[tuple[int, int] | None]]

    def indices(self) -> list[int]:
        """Return the index of the given group that each group is a part of."""
        return [next(at[0] for at in group if at is not None) for group in self.places]


def part_schedule(scheduler: Any, optimizer: Optimizer) -> None:
    """Give a schedule that was loaded a rate for each group of a ModelAdamW2.

    A schedule saved with torch's AdamW has one for each group that the Trainer made, which
    ModelAdamW2 has parted further.

    Args:
        scheduler: of the optimizer, with its state loaded.
        optimizer: any; nothing is done for others.
    """
    if not isinstance(optimizer, ModelAdamW2):
        return
    for name in ("base_lrs", "min_lrs", "_init_lrs", "_last_lr"):
        values = getattr(scheduler, name, None)
        if isinstance(values, list):
            setattr(scheduler, name, optimizer.per_group(values))
