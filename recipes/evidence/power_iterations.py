"""What power iterations cost and how exact they are, against depth and their number.

    python recipes/evidence/power_iterations.py    # writes power_iterations.json

Narrow ViTs on the digits, trained by AdamW2 for a few steps. *Time* is that of a step over that of
one with torch's fused AdamW, in rounds in which all take turns: of the optimizer alone, and with
forward and backward. *Error* is that of the rate, which is what the two spectral norms are for:
Rule 1 with singular values by SVD against the rate that was used, over the matrices that Rule 1
held back in the last step.
"""

from __future__ import annotations

import json
import os
import platform
import sys
import time
from collections.abc import Callable
from pathlib import Path
from statistics import median
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))  # where it is run from must not matter

import torch
from torch import Tensor, nn

from hf_stable import AdamW2
from recipes import data
from recipes.models import build
from recipes.settings import Settings

RESULTS = Path(__file__).resolve().parent / "power_iterations.json"

DEPTHS = (12, 24, 48, 96, 128)
ITERATIONS = (1, 2, 3, 5)
TAU, RATE = 0.004, 1e-2
STEPS, BATCH, ROUNDS = 10, 8, 10
BASELINE, PASSES = "AdamW", "forward and backward"


def measure(depth: int, *, steps: int = STEPS, rounds: int = ROUNDS) -> list[dict[str, Any]]:
    """Return a row for each number of iterations, at one depth.

    Args:
        depth: blocks of the ViT, of width 32.
        steps: of training before the error is taken.
        rounds: of timing.

    Returns:
        `layers`, `iterations`, `step` and `training_step` (ratios to AdamW's), `error_median` and
        `error_max` (shares of the exact rate), and `matrices`, how many the errors are of.
    """
    narrow = dict(num_hidden_layers=depth, hidden_size=32, intermediate_size=128)
    settings = Settings(init="xavier", model_config=narrow)
    task = data.load(settings.data, model=settings.model)
    steppers: dict[str, Callable[[], object]] = {}
    rows: list[dict[str, Any]] = []
    for count in ITERATIONS:
        model = build(settings, task)
        optimizer = AdamW2(
            model.named_parameters(), lr=RATE, betas=(0.9, 0.99), tau=TAU, power_iterations=count
        )
        errors = _train(model, optimizer, task, steps)
        rows.append(
            {
                "layers": depth,
                "iterations": count,
                "error_median": _rounded(median(errors)),
                "error_max": _rounded(max(errors)),
                "matrices": len(errors),
            }
        )
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


def _train(model: nn.Module, optimizer: AdamW2, task: data.Task, steps: int) -> list[float]:
    """Take some steps; return the relative errors of the last one's rates."""
    generator = torch.Generator().manual_seed(0)
    matrices = {name: p for name, p in model.named_parameters() if p.ndim == 2 and min(p.shape) > 1}
    before: dict[str, Tensor] = {}
    for _ in range(steps):
        chosen = torch.randint(len(task.train), (BATCH,), generator=generator)
        batch = {name: column[chosen] for name, column in task.train.columns.items()}
        optimizer.zero_grad()
        model(**batch).loss.backward()
        before = {name: p.detach().clone() for name, p in matrices.items()}
        optimizer.step()
    used = optimizer.effective_lr()
    errors = []
    for name, weight in before.items():
        exact = _exact_rate(weight, optimizer.state[matrices[name]])
        if exact < RATE:
            errors.append(abs(used[name] - exact) / exact)
    return errors


def _exact_rate(weight: Tensor, state: dict[str, Any]) -> float:
    """Return Rule 1 with singular values by SVD, for the weight before the step."""
    step = float(state["step"])
    root = (state["exp_avg_sq"] / (1 - 0.99**step)).sqrt()
    direction = state["exp_avg"] / (1 - 0.9**step) / (root + 1e-8)
    sizes = (float(torch.linalg.matrix_norm(each.double(), 2)) for each in (weight, direction))
    return TAU * next(sizes) / next(sizes)


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
        f"Power iterations on narrow ViTs (`{content['command']}`, {content['machine']}): time of "
        "AdamW2's step over that of torch's fused AdamW, and of a whole training step; median and "
        f"largest error of the rate after {content['steps']} steps, by SVD.",
        "",
        *table(content["rows"]),
    ]


def table(rows: list[dict[str, Any]]) -> list[str]:
    """Return the table of the evidence's page."""
    found = {(row["layers"], row["iterations"]): row for row in rows}
    counts = sorted({row["iterations"] for row in rows})
    titles = [f"{n} iteration{'s' * (n > 1)}" for n in counts]
    lines = [f"| layers | {' | '.join(titles)} |", "|---" * (len(counts) + 1) + "|"]
    for layers in sorted({row["layers"] for row in rows}):
        cells = [
            f"{row['step']:.1f} x, {row['training_step']:.2f} x; "
            f"{100 * row['error_median']:.2g} %, {100 * row['error_max']:.2g} %"
            for row in (found[layers, count] for count in counts)
        ]
        lines.append(f"| {layers} | {' | '.join(cells)} |")
    return lines


def _rounded(value: float) -> float:
    return float(f"{value:.3g}")


def main() -> None:
    """Measure all depths, print them and write them."""
    torch.set_num_threads(1)
    rows = []
    for depth in DEPTHS:
        rows += measure(depth)
        print("\n".join(table(rows)[-1:]), flush=True)
    content = {
        "command": "python recipes/evidence/power_iterations.py",
        "machine": f"{platform.machine()}, {os.cpu_count()} cores, one thread",
        "rate": RATE,
        "tau": TAU,
        "steps": STEPS,
        "rounds": ROUNDS,
        "rows": rows,
    }
    RESULTS.write_text(json.dumps(content, indent=1) + "\n")


if __name__ == "__main__":
    main()
