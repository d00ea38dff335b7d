"""What a training step costs on many GPUs: counts (`cost_model`) times rates of a machine."""

from __future__ import annotations

import os
from collections.abc import Callable
from dataclasses import asdict, dataclass
from typing import Any

import torch
import transformers
from rich.console import Console

from hf_stable._wording import nearest
from hf_stable.checkpoints.described_models import empty_model
from hf_stable.commands.bench.cost_model import (
    Collective,
    Cost,
    ModelShape,
    Strategy,
    measure_shape,
    step_costs,
)
from hf_stable.commands.bench.machines import MACHINES, Machine
from hf_stable.commands.bench.monitor_exchange import monitor_costs
from hf_stable.commands.terminal import make_console, make_table

__all__ = ["PRESETS", "Plan", "make_plan", "print_plan"]

PRESETS: dict[str, Callable[[], tuple[str, Any]]] = {
    "gpt2": lambda: ("GPT2LMHeadModel", transformers.GPT2Config()),
    "gpt2-xl": lambda: (
        "GPT2LMHeadModel", transformers.GPT2Config(n_embd=1600, n_layer=48, n_head=25)
    ),
    "vit-b": lambda: ("ViTForImageClassification", transformers.ViTConfig()),
    "vit-g": lambda: (
        "ViTForImageClassification",
        transformers.ViTConfig(
            hidden_size=1408, num_hidden_layers=40, num_attention_heads=16,
            intermediate_size=6144, patch_size=14,
        ),
    ),
    "7b": lambda: ("LlamaForCausalLM", transformers.LlamaConfig()),
}  # fmt: skip
"""Models that `make_plan` knows by name."""


@dataclass(frozen=True)
class Plan:
    """One training step of a model on many processes.

    Attributes:
        model: what was asked for.
        shape: its sizes.
        num_processes: GPUs, one process each.
        tokens: of all of them, per step.
        strategy: "ddp", "fsdp2", or "zero1" to "zero3".
        tensor_parallel: processes that cut each matrix.
        replicas: copies of the model under FSDP2.
        machine: whose rates the seconds follow.
        costs: of each part.
        seconds: computing and communicating, of each part.
        plain: seconds of a step with AdamW: the model's computing hides its communication or the
            other way round, the optimizer comes after both.
        adamw2: the same with AdamW2; nothing of ours is hidden behind anything.
        sigma_reparam: the same with AdamW on the patched model.
    """

    model: str
    shape: ModelShape
    num_processes: int
    tokens: int
    strategy: Strategy
    tensor_parallel: int
    replicas: int
    machine: Machine
    costs: dict[str, Cost]
    seconds: dict[str, tuple[float, float]]
    plain: float
    adamw2: float
    sigma_reparam: float

    def to_dict(self) -> dict[str, Any]:
        """Return plain data, for JSON, without the long lists of shapes."""
        shape = asdict(self.shape)
        for name in ("groups", "reparametrised"):
            shape.pop(name)
        shape |= {"num_bounded": len(self.shape.bounded), "num_patched": len(self.shape.patched)}
        return asdict(self) | {"shape": shape}


def make_plan(
    model: str,
    *,
    num_processes: int,
    tokens: int,
    strategy: Strategy = "fsdp2",
    machine: str = "h100",
    sequence: int | None = None,
    tensor_parallel: int = 1,
    replicas: int = 1,
) -> Plan:
    """Work out what a training step costs, from the model's shapes alone.

    Args:
        model: one of `PRESETS`, or folder, file or name on the Hub of a config.json.
        num_processes: GPUs.
        tokens: per step, of all GPUs (patches, for images).
        strategy: "ddp", "fsdp2", or "zero1" to "zero3" (DeepSpeed, with its default sizes).
        machine: one of `MACHINES`.
        sequence: tokens per sequence; by default the longest that the config allows.
        tensor_parallel: processes that cut each matrix and see the same tokens.
        replicas: copies of the model under FSDP2 (HSDP).

    Raises:
        OSError, ValueError: if there is no such model or machine, or a number is not positive or
            does not fit the others.
    """
    if machine not in MACHINES:
        raise ValueError(
            f"machine {machine!r} is not known{nearest(machine, MACHINES)}; machines are "
            f"{', '.join(MACHINES)}"
        )
    if model in PRESETS:
        class_name, config = PRESETS[model]()
        with torch.device("meta"):
            built = getattr(transformers, class_name)(config)
    elif "/" in model or os.path.exists(model):
        built = empty_model(model)
    else:
        raise ValueError(
            f"there is no model {model!r}{nearest(model, PRESETS)}: give one of "
            f"{', '.join(PRESETS)}, or folder, file or Hub id (owner/name) of a config.json"
        )
    shape = measure_shape(built, sequence)
    costs = step_costs(
        shape, num_processes=num_processes, tokens=tokens, strategy=strategy,
        tensor_parallel=tensor_parallel, replicas=replicas,
    ) | monitor_costs(shape, num_processes)  # fmt: skip
    rates = MACHINES[machine]
    seconds = {part: rates.seconds(cost, num_processes) for part, cost in costs.items()}
    model_seconds = max(seconds["model"])
    adamw, adamw2, sigma = (sum(seconds[part]) for part in ("AdamW", "AdamW2", "sigmaReparam"))
    return Plan(
        model, shape, num_processes, tokens, strategy, tensor_parallel, replicas, rates, costs,
        seconds,
        plain=model_seconds + adamw,
        adamw2=model_seconds + adamw2,
        sigma_reparam=model_seconds + adamw + sigma,
    )  # fmt: skip


def print_plan(plan: Plan, console: Console | None = None) -> None:
    """Print a plan as a table, one row per part, and what the methods add to a step."""
    table = make_table(
        "part", "TFLOP", "GB moved", "collectives", "GB held", "GB for a while", "compute ms",
        "network ms",
    )  # fmt: skip
    for column in table.columns[1:]:
        column.justify = "right"
    for part, cost in plan.costs.items():
        computing, communicating = plan.seconds[part]
        table.add_row(
            part,
            f"{cost.flops / 1e12:.3g}" if cost.flops else "",
            f"{cost.moved / 1e9:.3g}" if cost.moved else "",
            "\n".join(map(_describe, cost.collectives)),
            f"{cost.state / 1e9:.3g}" if cost.state else "",
            f"{cost.working / 1e9:.3g}" if cost.working else "",
            f"{1e3 * computing:.3g}" if computing else "",
            f"{1e3 * communicating:.3g}",
        )
    console = console or make_console()
    shape = plan.shape
    console.print(
        f"{plan.model}: {shape.name}, {shape.num_parameters / 1e9:.3g} B parameters, sequences of "
        f"{shape.sequence}; {plan.num_processes} GPUs, {_describe_layout(plan)}, {plan.tokens} "
        f"tokens a step; {plan.machine.name} (assumed rates, nothing here is measured)",
        table,
        f"A step takes {1e3 * plan.plain:.3g} ms with AdamW. AdamW2 makes that "
        f"{plan.adamw2 / plan.plain:.3f} x, sigmaReparam {plan.sigma_reparam / plan.plain:.3f} x.",
        sep="\n",
    )
    if not shape.is_registered:
        console.print(
            "This architecture is not registered: sigmaReparam is counted on every Linear but the "
            "head, and needs hf_stable.register_architecture."
        )


def _describe_layout(plan: Plan) -> str:
    sizes = {"tensor parallel": plan.tensor_parallel, "replicas": plan.replicas}
    return ", ".join([plan.strategy, *(f"{n} {size}" for n, size in sizes.items() if size > 1)])


def _describe(each: Collective) -> str:
    amount, unit = next(
        (each.bytes / size, unit)
        for size, unit in ((1e9, "GB"), (1e6, "MB"), (1e3, "kB"), (1, "B"))
        if each.bytes >= size / 10 or unit == "B"
    )
    return f"{each.count} {each.kind}, {amount:.3g} {unit}"
