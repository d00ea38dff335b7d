"""A report of what is patched in a model and what is not, with the reason."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from torch import nn

from hf_stable._ranks import whole_shape
from hf_stable.architectures.coverage import Uncovered, find_uncovered
from hf_stable.architectures.finding import find_layers, find_norms
from hf_stable.architectures.paths import join, modules_of_class, named_modules
from hf_stable.architectures.registry import require_model
from hf_stable.methods.config import MethodConfig
from hf_stable.methods.layernorms.removal import RemovedNorm
from hf_stable.methods.patching import patch_configs
from hf_stable.methods.sigma_reparam.layers import SigmaLayer
from hf_stable.methods.sigma_reparam.method import SigmaReparamConfig
from hf_stable.methods.sigma_reparam.planning import choose_layers

__all__ = ["LayerReport", "PatchReport", "describe"]


MOST_LISTED = 4
"""Values of one layer that a table lists one by one."""


@dataclass(frozen=True)
class LayerReport:
    """One row of a `PatchReport`.

    Attributes:
        name: qualified name of the layer.
        kind: class of the layer.
        shape: shape of its weight, as stored; empty for a module without one.
        sigma: largest singular value of each block, as last refreshed; empty if not patched.
        gamma: learnable scale of each block; empty if not patched.
        skipped: why the layer is not patched, or None.
    """

    name: str
    kind: str
    shape: tuple[int, ...]
    sigma: tuple[float, ...] = ()
    gamma: tuple[float, ...] = ()
    skipped: str | None = None


@dataclass(frozen=True)
class PatchReport:
    """What is patched in a model and what is not, with the reason; prints as a table.

    Attributes:
        model: class of the model.
        configs: the methods in force.
        layers: every matrix that the architecture names.
        removed_norms: names of the norms that are gone.
        uncovered: matrices that no entry names, or that one leaves out, each with the reason.
    """

    model: str
    configs: tuple[MethodConfig, ...]
    layers: tuple[LayerReport, ...]
    removed_norms: tuple[str, ...] = ()
    uncovered: tuple[Uncovered, ...] = ()

    @property
    def num_patched(self) -> int:
        """Return the number of patched layers."""
        return sum(layer.skipped is None for layer in self.layers)

    def __str__(self) -> str:
        """Lay the report out as a plain-text table."""
        rows = [("layer", "kind", "shape", "sigma", "gamma")]
        for layer in self.layers:
            shape = "x".join(map(str, layer.shape))
            if layer.skipped is None:
                sigma, gamma = _listed(layer.sigma), _listed(layer.gamma)
                rows.append((layer.name, layer.kind, shape, sigma, gamma))
            else:
                rows.append((layer.name, layer.kind, shape, f"skipped: {layer.skipped}", ""))
        widths = [max(len(row[column]) for row in rows) for column in range(3)]
        widths.append(max(len(row[3]) for row in rows if not row[3].startswith("skipped")))
        lines = [
            "  ".join(cell.ljust(width) for cell, width in zip(row, [*widths, 0], strict=True))
            for row in rows
        ]
        head = f"{self.model}: {self.num_patched} of {len(self.layers)} layers patched"
        if self.configs:
            head += f" by {', '.join(map(str, self.configs))}"
        if self.removed_norms:
            lines.append(
                f"{len(self.removed_norms)} norms removed: {', '.join(self.removed_norms)}"
            )
        if self.uncovered:
            lines.append(f"{len(self.uncovered)} more matrices, which no method touches:")
            lines += [
                f"  {each.name}  {'x'.join(map(str, each.shape))}  {each.reason}"
                for each in self.uncovered
            ]
        return "\n".join([head, *(line.rstrip() for line in lines)])


def _listed(values: tuple[float, ...]) -> str:
    """List a few values, and of many (every expert has its own) the range."""
    if len(values) <= MOST_LISTED:
        return " ".join(f"{value:.4g}" for value in values)
    return f"{min(values):.4g} to {max(values):.4g} ({len(values)} values)"


def describe(model: nn.Module) -> PatchReport:
    """Report every matrix that the model's architecture names: patched, or skipped and why.

    Norms are listed where they are removed. Reads sigma and gamma back to the host.

    Raises:
        UnsupportedModelError: if the architecture is not registered.
    """
    require_model(model, "describe")
    configs, layers = patch_configs(model), find_layers(model)
    reasons: dict[str, str] = {}
    otherwise = "sigma_reparam is not in force" if configs else "the model is not patched"
    for config in configs:
        if isinstance(config, SigmaReparamConfig):
            reasons = choose_layers(model, config, layers)[1]
            otherwise = "not in the part that was patched, or put in since: patch again to take it"
    rows = []
    for layer in layers:
        module: Any = layer.module
        weight = layer.weight  # None: a head may be replaced by anything
        shape = () if weight is None else tuple(whole_shape(weight))
        if isinstance(module, SigmaLayer):
            kind = type(module).__name__
            sigma, gamma = tuple(module.sigma.tolist()), tuple(module.gamma.tolist())
            rows.append(LayerReport(layer.name, kind, shape, sigma, gamma))
        else:
            reason = reasons.get(layer.name, otherwise) if weight is not None else "has no weight"
            rows.append(LayerReport(layer.name, type(module).__name__, shape, skipped=reason))
    return PatchReport(
        type(model).__name__,
        configs,
        tuple(rows),
        _removed(model),
        tuple(find_uncovered(model, layers)),
    )


def _removed_by_config(module: Any) -> dict[str, list[str]]:
    return getattr(getattr(module, "config", None), "removed_layernorms", None) or {}


def _removed(model: nn.Module) -> tuple[str, ...]:
    """Return the names of norms that were removed; some models have identities of their own."""
    by_class = {
        (name, path)
        for module in model.modules()
        for name, paths in _removed_by_config(module).items()
        for path in paths
    }
    modules = named_modules(model)
    loaded_without = {
        join(name, path)
        for class_name, path in by_class
        for name, _ in modules_of_class(modules, class_name)
    }
    return tuple(
        norm.name
        for norm in find_norms(model)
        if isinstance(norm.module, RemovedNorm)
        or (isinstance(norm.module, nn.Identity) and norm.name in loaded_without)
    )
