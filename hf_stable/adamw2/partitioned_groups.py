"""Groups of AdamW2 whose parameters an engine has replaced by flat tensors."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from torch import Tensor

from hf_stable.adamw2.group_weights import note_lr
from hf_stable.adamw2.loaded_states import rule_entry
from hf_stable.adamw2.partitions import MATRICES, Partition, rates_of, step_partition
from hf_stable.adamw2.replaced_weights import refuse_flattened
from hf_stable.kernels.choosing import Workspaces

__all__ = ["PartitionedGroups", "take_matrices_out"]


class PartitionedGroups:
    """What AdamW2 knows of the flat tensors in its groups, and keeps from step to step."""

    def __init__(self, partitions: Mapping[Tensor, Partition]) -> None:
        """Begin with what each flat tensor is made of."""
        self._partitions = dict(partitions)
        self._workspaces: dict[Tensor, Workspaces] = {}
        self._rates: dict[Tensor, Tensor | None] = {}

    def step(
        self, groups: Sequence[dict[str, Any]], states: Mapping[Tensor, dict[str, Any]]
    ) -> None:
        """Step every flat tensor that has a gradient.

        Args:
            groups: of the optimizer.
            states: of the flat tensors, made where they are missing.

        Raises:
            ValueError: for a tensor in the groups that no partition is known of.
        """
        for group in groups:
            for flat in group["params"]:
                if flat.grad is not None:
                    if flat not in self._partitions:
                        refuse_flattened(flat, replaced=True)
                    own = self._workspaces.setdefault(flat, Workspaces())
                    self._rates[flat] = step_partition(
                        flat, states[flat], group, self._partitions[flat], own
                    )
            if group["params"]:
                note_lr(group)

    def rates(self, groups: Sequence[Mapping[str, Any]]) -> dict[Any, float | list[float]]:
        """Return the rates that weights got in their last step, by their names.

        Args:
            groups: of the optimizer.
        """
        rates: dict[Any, float | list[float]] = {}
        for flat, partition in self._partitions.items():
            if flat in self._rates:
                rates |= rates_of(partition, self._rates[flat], groups[partition.group])
        return rates

    def restore_matrices(
        self,
        states: Mapping[Tensor, dict[str, Any]],
        saved: Mapping[Tensor, Mapping[str, Mapping[str, Tensor]]],
    ) -> None:
        """Put back what `take_matrices_out` has found.

        Args:
            states: of the flat tensors.
            saved: what a loaded state has for each of them.

        Raises:
            ValueError: if they are other weights. Nothing is put back then.
        """
        for flat, matrices in saved.items():
            own = {piece.name for piece in self._partitions[flat].pieces}
            if odd := sorted(set(matrices) ^ own):
                raise ValueError(
                    f"the loaded state was written for other partitions: {odd[0]!r} is in one of "
                    "it and this process alone. Resume with the ZeRO stage, the number of "
                    "processes and the model that wrote it"
                )
        for flat, matrices in saved.items():
            states[flat][MATRICES] = {
                name: {key: rule_entry(key, value, flat) for key, value in entry.items()}
                for name, entry in matrices.items()
            }


def take_matrices_out(
    state_dict: dict[str, Any],
    groups: Sequence[Mapping[str, Any]],
    found: dict[Tensor, dict[str, dict[str, Tensor]]],
) -> dict[str, Any]:
    """Return a loaded state without what Rule 1 keeps of weights, which torch would cast.

    Args:
        state_dict: the loaded state. Nothing in it is changed.
        groups: of the optimizer that loads it.
        found: gains what was there, by flat tensor.
    """
    labels = [
        pair
        for saved, own in zip(state_dict["param_groups"], groups, strict=False)
        for pair in zip(saved["params"], own["params"], strict=False)
    ]  # where they differ in number, torch says so
    states = state_dict["state"]
    found |= {
        flat: states[label][MATRICES] for label, flat in labels if MATRICES in states.get(label, {})
    }
    rest = {
        label: {key: value for key, value in entry.items() if key != MATRICES}
        for label, entry in states.items()
    }
    return {**state_dict, "state": rest}
