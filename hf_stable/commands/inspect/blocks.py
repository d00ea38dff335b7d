"""What a checkpoint's attention heads and norms look like, block by block, without its model.

The model is built on the meta device, without memory, to know which tensor on disk is which weight;
weights are read two at a time.
"""

from __future__ import annotations

from dataclasses import dataclass

from torch import nn
from transformers import PreTrainedModel

from hf_stable.architectures.description import Attention
from hf_stable.architectures.finding import FoundBlock, find_blocks, find_norms, find_regions
from hf_stable.architectures.heads import count_heads, part_of_role
from hf_stable.architectures.registry import UnsupportedModelError
from hf_stable.checkpoints.described_models import empty_model
from hf_stable.checkpoints.key_renaming import key_renaming
from hf_stable.checkpoints.weight_files import WeightFiles
from hf_stable.commands.inspect.bounds import bounded_building, bounded_content
from hf_stable.measures.products import (
    qk_singular_values,
    spectral_energy_concentration,
    stable_rank,
)
from hf_stable.monitor.terms import SEC_VALUES

__all__ = [
    "BlockSpectrum",
    "ModelOutline",
    "NormGain",
    "inspect_blocks",
    "inspect_norms",
    "outline",
]


@dataclass(frozen=True)
class BlockSpectrum:
    """Wq^T Wk of one block; each value has one entry per head.

    Attributes:
        name: of the block in the model.
        head_size: d_q, and so how many singular values each head has.
        sigma_qk: largest singular value.
        sec: share of energy in the four largest singular values, SEC(d_q, 4).
        stable_rank: sum of squared singular values over the largest squared.
        finite: whether all weights involved are finite; otherwise there are no values.
    """

    name: str
    head_size: int
    sigma_qk: tuple[float, ...]
    sec: tuple[float, ...]
    stable_rank: tuple[float, ...]
    finite: bool = True


@dataclass(frozen=True)
class NormGain:
    """The gain of one norm: its l2 norm and its largest absolute entry, None if not finite."""

    name: str
    norm: float | None
    largest: float | None


@dataclass(frozen=True)
class ModelOutline:
    """A model without weights, and the names of its tensors on disk.

    Attributes:
        model: on the meta device.
        on_disk: the name on disk by that in the model.
    """

    model: PreTrainedModel
    on_disk: dict[str, str]

    @property
    def in_model(self) -> dict[str, str]:
        """Return the name in the model by that on disk."""
        return {disk: name for name, disk in self.on_disk.items()}


def outline(weights: WeightFiles) -> ModelOutline:
    """Build the model that a checkpoint's config.json describes, without memory.

    Raises:
        UnsupportedModelError: if there is no usable config.json, or its architecture is not
            registered.
    """
    model = _build(weights)
    find_regions(model)  # refuses what is not registered
    rename, names = key_renaming(model), model.state_dict()
    on_disk = {}
    for key in weights.shapes:
        name = rename(key)
        on_disk[name if name in names else key] = key
    return ModelOutline(model, on_disk)


def inspect_blocks(weights: WeightFiles, model: ModelOutline) -> tuple[BlockSpectrum, ...]:
    """Compute the spectra of Wq^T Wk of every head; blocks whose weights are not here are left out.

    Raises:
        UnsupportedModelError: if config.json describes heads that the weights cannot be cut into.
        ValueError: if a file is damaged.
    """
    found = []
    for block in find_blocks(model.model):
        for name, attention in block.attentions():
            names = [f"{block.name}.{path}.weight" for path in (attention.query, attention.key)]
            if all(each in model.on_disk for each in names):
                found.append(_block_spectrum(weights, model, block, name, attention))
    return tuple(found)


def inspect_norms(weights: WeightFiles, model: ModelOutline) -> tuple[NormGain, ...]:
    """Measure the gain of every norm that has one."""
    found = []
    for norm in find_norms(model.model):
        key = model.on_disk.get(f"{norm.name}.weight")
        # In the place of a norm that was removed there may be a guard, which is no gain.
        if key is not None and not isinstance(norm.module, nn.Identity):
            gain = weights.read(key).double()
            finite = bool(gain.isfinite().all())
            norms = (gain.norm().item(), gain.abs().max().item()) if finite else (None, None)
            found.append(NormGain(norm.name, *norms))
    return tuple(found)


def _build(weights: WeightFiles) -> PreTrainedModel:
    folder = weights.path if weights.path.is_dir() else weights.path.parent
    if not (folder / "config.json").is_file():
        raise UnsupportedModelError(f"there is no config.json in {folder}")
    try:
        with bounded_building(weights.shapes):
            return empty_model(folder, lambda content: bounded_content(content, weights.shapes))
    except (OSError, ValueError) as error:
        raise UnsupportedModelError(str(error)) from error


def _block_spectrum(
    weights: WeightFiles, model: ModelOutline, block: FoundBlock, name: str, attention: Attention
) -> BlockSpectrum:
    whole = {
        path: weights.read_effective(model.on_disk[f"{block.name}.{path}.weight"])
        for path in dict.fromkeys((attention.query, attention.key))
    }
    try:
        query = part_of_role(block.module, attention, "query", whole[attention.query])
        key = part_of_role(block.module, attention, "key", whole[attention.key])
        values = qk_singular_values(query, key, count_heads(block.module, attention))
    except ValueError as error:
        raise UnsupportedModelError(
            f"config.json does not fit the weights of {name}: {error}"
        ) from error
    head_size = values.shape[1]
    if not values.isfinite().all():
        return BlockSpectrum(name, head_size, (), (), (), finite=False)
    dominant = min(SEC_VALUES, head_size)
    return BlockSpectrum(
        name,
        head_size,
        tuple(values[:, 0].tolist()),
        tuple(spectral_energy_concentration(values, dominant).nan_to_num(0.0).tolist()),
        tuple(stable_rank(values).nan_to_num(0.0).tolist()),
    )
