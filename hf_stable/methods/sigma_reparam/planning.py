"""Which layers of a model become sigma layers, and all that is computed before any of them does."""

from __future__ import annotations

import warnings
from collections.abc import Iterable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from fnmatch import fnmatchcase

import torch
from torch import nn

from hf_stable._ranks import is_divided
from hf_stable._wording import nearest
from hf_stable.architectures.coverage import find_uncovered
from hf_stable.architectures.finding import FoundLayer, find_layers
from hf_stable.measures.parts import Parts
from hf_stable.methods.sigma_reparam.layers import SigmaLayer
from hf_stable.methods.sigma_reparam.method import SigmaReparamConfig
from hf_stable.methods.sigma_reparam.swapping import SigmaState, install, prepare
from hf_stable.methods.undoing import Undo

__all__ = ["SigmaReparamPlan", "choose_layers", "plan_layers", "plan_sigma_reparam"]

_UNASKED = ("tied to",)
"""How the reasons begin that are the model's and not the caller's."""


@dataclass(frozen=True)
class SigmaReparamPlan:
    """Layers with the exact singular triples that they are to start from."""

    states: tuple[tuple[nn.Module, SigmaState], ...]

    def apply(self, undo: Undo) -> None:
        """Turn the layers into sigma layers, and have optimizers refresh them from now on."""
        for module, state in self.states:
            install(module, state, undo)


def plan_sigma_reparam(model: nn.Module, config: SigmaReparamConfig) -> SigmaReparamPlan:
    """Compute everything that the method needs, without touching the model.

    Layers that are reparametrised already stay as they are: a part of the model was patched before.

    Raises:
        ValueError: if no layer is left, a pattern matches none, a matrix is zero or not finite, or
            a layer is reparametrised already with other options.
        TypeError: if a layer is of a type that cannot be reparametrised.
        UnsupportedModelError: if a layer's weight or forward is not its own; see `check_plain`.
    """
    layers = find_layers(model)
    names = [layer.name for layer in layers]
    _refuse_idle_patterns(config, names)
    chosen, reasons = choose_layers(model, config, layers)
    if not chosen:
        asked = [name for name in reasons if _is_asked_for(name, config)]
        why = "".join(f"; {name!r} is skipped, {reasons[name]}" for name in asked)
        raise ValueError(
            f"no layer left to patch with include={config.include}, exclude={config.exclude}, "
            f"heads={config.heads!r}{why}; the patterns are matched against names such as "
            f"{', '.join(map(repr, names[:3]))}"
        )
    plan = plan_layers([layer for layer in chosen if not _is_patched(layer, config)], config)
    if plan.states:
        _warn_if_partial(model, layers, reasons, config)
    return plan


def plan_layers(layers: Iterable[FoundLayer], config: SigmaReparamConfig) -> SigmaReparamPlan:
    """Compute the singular triples of plain layers, without touching them; raises as above."""
    layers = list(layers)

    def plan(layer: FoundLayer) -> tuple[nn.Module, SigmaState]:
        state = prepare(
            layer.module,
            parts=_parts_of(layer, config),
            init=config.init,
            name=layer.name,
            parameter=layer.parameter,
        )
        return layer.module, replace(state, power_iterations=config.power_iterations)

    # Of a product with a vector BLAS takes one thread, and threads that share one wait for each
    # other most of the time. So each thread has matrices of its own.
    threads = torch.get_num_threads() if all(_is_local(each) for each in layers) else 1
    if threads == 1:  # also where ranks gather weights, in the same order on each
        return SigmaReparamPlan(tuple(map(plan, layers)))
    with ThreadPoolExecutor(threads) as pool:
        try:
            return SigmaReparamPlan(tuple(pool.map(plan, layers)))
        except BaseException:
            pool.shutdown(cancel_futures=True)
            raise


def _parts_of(layer: FoundLayer, config: SigmaReparamConfig) -> Parts:
    return layer.parts if config.fused_qkv == "split" else replace(layer.parts, shares=(1,))


def _is_patched(layer: FoundLayer, config: SigmaReparamConfig) -> bool:
    """Say whether a layer is a sigma layer already, and raise if it is one of other options."""
    module = layer.module
    if not isinstance(module, SigmaLayer):
        return False
    shares, iterations = _parts_of(layer, config).shares, config.power_iterations
    if (module.parts.shares, module.power_iterations) != (shares, iterations):
        raise ValueError(
            f"{layer.name!r} is reparametrised already, with power_iterations="
            f"{module.power_iterations} and {module.num_parts} gamma; {config} asks for others. "
            "Patch with the same options, or call hf_stable.fold(model) first"
        )
    return True


def choose_layers(
    model: nn.Module, config: SigmaReparamConfig, layers: list[FoundLayer] | None = None
) -> tuple[list[FoundLayer], dict[str, str]]:
    """Return the layers to patch, and for every other one the reason.

    Args:
        model: of registered architectures.
        config: what was asked for.
        layers: what `find_layers` has found in it, for who has it at hand.
    """
    tied = _tied_to(model)
    chosen, reasons = [], {}
    for layer in find_layers(model) if layers is None else layers:
        weight_name = layer.name if layer.parameter != "weight" else f"{layer.name}.weight"
        if layer.bypassed:
            reasons[layer.name] = "the model uses its weight without the layer's forward"
        elif weight_name in tied:
            reasons[layer.name] = f"tied to {tied[weight_name]}"
        elif "head" in layer.roles and config.heads == "skip":
            reasons[layer.name] = "a head (heads='include' patches it)"
        elif config.include is not None and not _matches(layer.name, config.include):
            reasons[layer.name] = "not in include"
        elif config.exclude is not None and _matches(layer.name, config.exclude):
            reasons[layer.name] = "in exclude"
        else:
            chosen.append(layer)
    return chosen, reasons


def _warn_if_partial(
    model: nn.Module,
    layers: list[FoundLayer],
    reasons: dict[str, str],
    config: SigmaReparamConfig,
) -> None:
    """Warn where layers stay plain that nobody has asked to leave out, for the reasons given."""
    unasked = {
        name: reason
        for name, reason in reasons.items()
        if reason.startswith(_UNASKED) and _is_asked_for(name, config)
    }
    heads = {layer.name for layer in layers if "head" in layer.roles}
    if config.heads == "skip":
        unasked = {name: reason for name, reason in unasked.items() if name not in heads}
    outside = {
        each.name: each.reason
        for each in find_uncovered(model, layers)
        if each.reason.startswith("outside")
    }
    if len(outside) > len(layers):
        unasked |= outside  # most of the model is of no registered architecture
    if unasked:
        total = len(layers) + len(outside)
        named = "; ".join(f"{name!r} ({unasked[name]})" for name in list(unasked)[:3])
        number = f"{'is' if len(unasked) == 1 else 'are'} {len(unasked)}"
        warnings.warn(
            f"{len(layers) - len(reasons)} of {total} matrices are patched. Not patched, though "
            f"nothing was said to leave them out, {number}: {named}"
            f"{' ...' if len(unasked) > 3 else ''}. "
            "hf_stable.describe(model) lists all; exclude=[...] says that it is meant",
            UserWarning,
            stacklevel=4,
        )


def _refuse_idle_patterns(config: SigmaReparamConfig, names: list[str]) -> None:
    """Raise if a pattern matches no layer: a misspelt one would pass for a chosen one."""
    for option in ("include", "exclude"):
        for pattern in getattr(config, option) or ():
            if not any(fnmatchcase(name, pattern) for name in names):
                raise ValueError(
                    f"{option} pattern {pattern!r} matches no layer{nearest(pattern, names)}; "
                    "hf_stable.describe(model) lists their names"
                )


def _tied_to(model: nn.Module) -> dict[str, str]:
    """Map the name of every shared parameter to another of its names."""
    names: dict[int, list[str]] = {}
    for name, parameter in model.named_parameters(remove_duplicate=False):
        names.setdefault(id(parameter), []).append(name)
    shared = {
        name: next(other for other in group if other != name)
        for group in names.values()
        for name in group
        if len(group) > 1
    }
    return dict(getattr(model, "all_tied_weights_keys", None) or {}) | shared


def _is_asked_for(name: str, config: SigmaReparamConfig) -> bool:
    included = config.include is None or _matches(name, config.include)
    return included and not _matches(name, config.exclude or ())


def _matches(name: str, patterns: Iterable[str]) -> bool:
    return any(fnmatchcase(name, pattern) for pattern in patterns)


def _is_local(layer: FoundLayer) -> bool:
    """Say whether a weight is all on this process's CPU."""
    weight = layer.weight
    return weight is not None and weight.is_cpu and not is_divided(weight)
