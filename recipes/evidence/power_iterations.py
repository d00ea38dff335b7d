"""What power iterations cost and how exact they are, against depth and their number.

    python recipes/evidence/power_iterations.py    # writes power_iterations.json

Narrow ViTs on the digits and GPT-2s on source code, trained for a few steps. *Time* is over that of
the plain model with torch's fused AdamW, in rounds in which all take turns.

By AdamW2: time of the optimizer's step alone, and with forward and backward. *Error* is that of the
rate, which is what the two spectral norms are for: Rule 1 with singular values by SVD against the
rate that was used, over the matrices that Rule 1 held back in the last step.

Patched with sigmaReparam, which takes one power iteration after each step; here it takes more by
doing that again. Time of a whole training step; *error* is that of sigma after the last step,
against SVD, over all matrices.
"""

from __future__ import annotations

import gc
import json
import math
import os
import platform
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from statistics import median
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))  # where it is run from must not matter

import torch
from torch import Tensor, nn

import hf_stable
from hf_stable.methods.sigma_reparam.steps import refresh
from hf_stable.spectral import Parts, matrices_of
from recipes import data
from recipes.models import build
from recipes.settings import Fields, Settings

RESULTS = Path(__file__).resolve().parent / "power_iterations.json"

NARROW = {
    "ViT": Settings(
        init="xavier", model_config=Fields(dict(hidden_size=32, intermediate_size=128))
    ),
    "GPT-2": Settings(
        model="gpt2",
        data="stdlib",
        init="xavier",
        model_config=Fields(dict(n_embd=32, n_inner=128)),
    ),
}
DEPTH_OF = {"ViT": "num_hidden_layers", "GPT-2": "n_layer"}
DEPTHS = (12, 24, 48, 96, 128)
ITERATIONS = (1, 2, 3, 5)
TAU, RATE = 0.004, 1e-2
STEPS, BATCH, ROUNDS = 10, 8, 10
BASELINE, PASSES = "AdamW", "forward and backward"


def measure(
    model_name: str, depth: int, *, steps: int = STEPS, rounds: int = ROUNDS
) -> list[dict[str, Any]]:
    """Return a row for each number of iterations, of a model at one depth.

    Args:
        model_name: of `NARROW`.
        depth: its blocks, of width 32.
        steps: of training before the error is taken.
        rounds: of timing.

    Returns:
        `model`, `layers`, `iterations`, `step` and `training_step` (ratios to AdamW's),
        `error_median` and `error_max` (shares of the exact rate), and `matrices`, how many the
        errors are of.
    """
    settings, task = _narrow(model_name, depth)
    steppers: dict[str, Callable[[], object]] = {}
    rows: list[dict[str, Any]] = []
    for count in ITERATIONS:
        model = build(settings, task)
        groups = hf_stable.parameter_groups(model)
        optimizer = hf_stable.AdamW2(
            groups, lr=RATE, betas=(0.9, 0.99), tau=TAU, power_iterations=count
        )
        errors = _train(model, optimizer, task, steps)
        rows.append(_row(model_name, depth, count, errors))
        steppers[str(count)] = _stepper(optimizer)
    steppers[BASELINE] = _stepper(torch.optim.AdamW(model.parameters(), lr=RATE, fused=True))
    steppers[PASSES] = _passes(model, task)
    taken = _alternate(steppers, rounds)
    for row in rows:
        turns = list(
            zip(taken[str(row["iterations"])], taken[BASELINE], taken[PASSES], strict=True)
        )
        row["step"] = _rounded(median(own / base for own, base, _ in turns))
        whole = ((passes + own) / (passes + base) for own, base, passes in turns)
        row["training_step"] = _rounded(median(whole))
    return rows


def measure_sigma(
    model_name: str, depth: int, *, steps: int = STEPS, rounds: int = ROUNDS
) -> list[dict[str, Any]]:
    """Return a row for each number of iterations of sigmaReparam, of a model at one depth.

    Returns:
        As `measure`, without `step`; `training_step` is over that of the plain model, and errors
        are shares of the exact sigma.
    """
    settings, task = _narrow(model_name, depth)
    plain = build(settings, task)
    optimizer = torch.optim.AdamW(plain.parameters(), lr=RATE, fused=True)
    steppers: dict[str, Callable[[], object]] = {BASELINE: _whole_step(plain, optimizer, task, 1)}
    rows: list[dict[str, Any]] = []
    for count in ITERATIONS:
        model = build(replace(settings, patch="sigma_reparam"), task)
        optimizer = torch.optim.AdamW(model.parameters(), lr=RATE, fused=True)
        layers = [layer for layer in model.modules() if hasattr(layer, "sigma_u")]
        for batch in batches(task, steps):
            _step(model, optimizer, batch, layers, count)
        errors = [abs(found - exact) / exact for exact, found in exact_and_tracked(layers)]
        rows.append(_row(model_name, depth, count, errors))
    gc.collect()  # layers of models that are still there are looked through after each step
    for count in ITERATIONS:
        steppers[str(count)] = _whole_step(model, optimizer, task, count)
    taken = _alternate(steppers, rounds)
    for row in rows:
        pairs = zip(taken[str(row["iterations"])], taken[BASELINE], strict=True)
        row["training_step"] = _rounded(median(own / base for own, base in pairs))
    return rows


def _row(model_name: str, depth: int, count: int, errors: list[float]) -> dict[str, Any]:
    """Return what is known of a model before it is timed."""
    return {
        "model": model_name,
        "layers": depth,
        "iterations": count,
        "error_median": _rounded(median(errors)),
        "error_max": _rounded(max(errors)),
        "matrices": len(errors),
    }


def _narrow(model_name: str, depth: int) -> tuple[Settings, data.Task]:
    """Return the settings of a narrow model of some depth, and its task."""
    settings = NARROW[model_name]
    sizes = Fields({**(settings.model_config or {}), DEPTH_OF[model_name]: depth})
    return replace(settings, model_config=sizes), data.load(settings.data, model=settings.model)


def batches(task: data.Task, steps: int, *, seed: int = 0) -> Iterator[dict[str, Tensor]]:
    """Yield random batches, the same ones each time."""
    generator = torch.Generator().manual_seed(seed)
    for _ in range(steps):
        chosen = torch.randint(len(task.train), (BATCH,), generator=generator)
        yield {name: column[chosen] for name, column in task.train.columns.items()}


def _step(
    model: nn.Module,
    optimizer: torch.optim.Optimizer,
    batch: dict[str, Tensor],
    layers: list[Any],
    iterations: int,
) -> None:
    """Take a training step with so many power iterations behind it; the optimizer's hook is one."""
    optimizer.zero_grad()
    model(**batch).loss.backward()
    optimizer.step()
    for _ in range(iterations - 1):
        refresh(layers)


def _whole_step(
    model: nn.Module, optimizer: torch.optim.Optimizer, task: data.Task, iterations: int
) -> Callable[[], object]:
    (batch,) = batches(task, 1)
    layers = [layer for layer in model.modules() if hasattr(layer, "sigma_u")]
    return lambda: _step(model, optimizer, batch, layers, iterations)


@torch.no_grad()
def exact_and_tracked(layers: list[Any]) -> Iterator[tuple[float, float]]:
    """Yield sigma by SVD, and the one that a layer has, of each matrix."""
    for layer in layers:
        matrices = matrices_of(layer.weight, layer.parts)
        for matrix, sigma in zip(matrices, layer.sigma.tolist(), strict=True):
            yield float(torch.linalg.matrix_norm(matrix.double(), 2)), sigma


def _train(
    model: nn.Module, optimizer: hf_stable.AdamW2, task: data.Task, steps: int
) -> list[float]:
    """Take some steps; return the relative errors of the last one's rates."""
    weights: dict[Tensor, Tensor] = {}
    for batch in batches(task, steps):
        optimizer.zero_grad()
        model(**batch).loss.backward()
        weights = {p: p.detach().clone() for p in model.parameters()}
        optimizer.step()
    return [abs(used - exact) / exact for exact, used in _rates(optimizer, weights) if exact < RATE]


def _rates(
    optimizer: hf_stable.AdamW2, weights: dict[Tensor, Tensor]
) -> Iterator[tuple[float, float]]:
    """Yield the rate by Rule 1 with singular values by SVD, and the one used, of each matrix.

    Args:
        optimizer: that has taken a step.
        weights: the parameters as they were before it.
    """
    for group in optimizer.param_groups:
        for param in group["params"]:
            state = optimizer.state[param]
            if param.ndim != 2 or min(param.shape) == 1 or math.isinf(group["tau"]):
                continue
            step = float(state["step"])
            root = (state["exp_avg_sq"] / (1 - 0.99**step)).sqrt()
            direction = state["exp_avg"] / (1 - 0.9**step) / (root + 1e-8)
            layout = Parts.of(group["parts"])
            parts = (matrices_of(each, layout) for each in (weights[param], direction))
            for (weight, update), used in zip(
                zip(*parts, strict=True), state["effective_lr"].tolist(), strict=True
            ):
                sizes = [torch.linalg.matrix_norm(e.double(), 2) for e in (weight, update)]
                yield TAU * float(sizes[0] / sizes[1]), used


def _stepper(optimizer: torch.optim.Optimizer) -> Callable[[], object]:
    generator = torch.Generator().manual_seed(1)
    for group in optimizer.param_groups:
        for param in group["params"]:
            param.grad = torch.randn(param.shape, generator=generator)
    return optimizer.step


def _passes(model: nn.Module, task: data.Task) -> Callable[[], object]:
    batch = {name: column[:BATCH] for name, column in task.train.columns.items()}
    return lambda: model(**batch).loss.backward()


def _alternate(subjects: dict[str, Callable[[], object]], rounds: int) -> dict[str, list[float]]:
    """Return the seconds of each subject in rounds in which all take turns; one more warms up."""
    taken: dict[str, list[float]] = {name: [] for name in subjects}
    for round_number in range(rounds + 1):
        for name, subject in subjects.items():
            start = time.perf_counter()
            subject()
            if round_number:
                taken[name].append(time.perf_counter() - start)
    return taken


def section() -> list[str]:
    """Return the lines of the evidence's page, from the committed file."""
    content = json.loads(RESULTS.read_text())
    return [
        f"Power iterations on narrow models (`{content['command']}`, {content['machine']}): time "
        "of AdamW2's step over that of torch's fused AdamW, and of a whole training step; median "
        f"and largest error of the rate after {content['steps']} steps, by SVD.",
        "",
        *table(content["rows"]),
        "",
        "And of sigmaReparam: time of a whole training step over that of the plain model; median "
        f"and largest error of sigma after {content['steps']} steps, by SVD.",
        "",
        *table(content["sigma_rows"]),
    ]


def table(rows: list[dict[str, Any]]) -> list[str]:
    """Return a table of the evidence's page: a line for each model, a column for each count."""
    found = {(row["model"], row["layers"], row["iterations"]): row for row in rows}
    counts = sorted({row["iterations"] for row in rows})
    titles = [f"{n} iteration{'s' * (n > 1)}" for n in counts]
    lines = [f"| layers | {' | '.join(titles)} |", "|---" * (len(counts) + 1) + "|"]
    for model, layers in dict.fromkeys((row["model"], row["layers"]) for row in rows):
        cells = (_cell(found[model, layers, count]) for count in counts)
        lines.append(f"| {model}, {layers} | {' | '.join(cells)} |")
    return lines


def _cell(row: dict[str, Any]) -> str:
    alone = f"{row['step']:.1f} x, " if "step" in row else ""
    errors = ", ".join(f"{100 * row[key]:.2g} %" for key in ("error_median", "error_max"))
    return f"{alone}{row['training_step']:.2f} x; {errors}"


def _rounded(value: float) -> float:
    return float(f"{value:.3g}")


def main() -> None:
    """Measure all depths, print them and write them."""
    torch.set_num_threads(1)
    found: dict[str, list[dict[str, Any]]] = {"rows": [], "sigma_rows": []}
    for key, measured in (("rows", measure), ("sigma_rows", measure_sigma)):
        for name in NARROW:
            for depth in DEPTHS:
                found[key] += measured(name, depth)
                print(table(found[key])[-1], flush=True)
    content = {
        "command": "python recipes/evidence/power_iterations.py",
        "machine": f"{platform.machine()}, {os.cpu_count()} cores, one thread",
        "rate": RATE,
        "tau": TAU,
        "steps": STEPS,
        "rounds": ROUNDS,
        **found,
    }
    RESULTS.write_text(json.dumps(content, indent=1) + "\n")


if __name__ == "__main__":
    main()
