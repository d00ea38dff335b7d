"""How late sigma can be: the exact largest singular value beside the tracked one, step by step.

    python recipes/evidence/lateness.py    # writes lateness.json; about four minutes on one core

sigmaReparam takes one power iteration after each optimizer step. Where a weight changes fast, the
tracked sigma lags behind the exact one, and the spectral norm of gamma / sigma * W exceeds gamma by
the ratio of the two. Small models start to train at a constant rate, without warmup; an SVD after
the step tells the ratio of every matrix, and the largest one is kept.
"""

from __future__ import annotations

import json
import os
import platform
import sys
from collections.abc import Iterable
from dataclasses import replace
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))  # where it is run from must not matter

import torch

from recipes import data
from recipes.evidence.power_iterations import batches, exact_and_tracked
from recipes.models import build
from recipes.settings import Settings

RESULTS = Path(__file__).resolve().parent / "lateness.json"

MODELS = {
    "ViT": Settings(),
    "BERT": Settings(model="bert", data="stdlib"),
    "GPT-2": Settings(model="gpt2", data="stdlib"),
}
INITS = ("default", "xavier")
RATES = (1e-3, 3e-3, 1e-2)
SEEDS = (0, 1, 2)
STRETCHES = ((1, 10), (11, 30), (31, 60))
"""First and last step of each stretch over which the largest ratio is taken."""

MATRICES_EVERY = 5
"""Steps from SVD to SVD after the first stretch."""


def measure(settings: Settings, *, steps: int = STRETCHES[-1][1]) -> list[float]:
    """Train a patched model for some steps; return the largest ratio in each stretch.

    Args:
        settings: of the recipe; its patch is replaced.
        steps: how many to take; a stretch that they do not reach has no entry.

    Returns:
        Exact over tracked sigma, the largest over the matrices and the steps of a stretch.
    """
    task = data.load(settings.data, model=settings.model)
    model = build(replace(settings, patch="sigma_reparam"), task)
    optimizer = torch.optim.AdamW(model.parameters(), lr=settings.learning_rate, betas=(0.9, 0.99))
    layers = [layer for layer in model.modules() if hasattr(layer, "sigma_u")]
    worst = [0.0 for first, _ in STRETCHES if first <= steps]
    for step, batch in enumerate(batches(task, steps, seed=settings.seed), start=1):
        optimizer.zero_grad()
        model(**batch).loss.backward()
        optimizer.step()
        if step <= STRETCHES[0][1] or step % MATRICES_EVERY == 0:
            ratio = max(exact / tracked for exact, tracked in exact_and_tracked(layers))
            stretch = next(i for i, (_, last) in enumerate(STRETCHES) if step <= last)
            worst[stretch] = max(worst[stretch], ratio)
    return worst


def rows(models: Iterable[str] = MODELS) -> list[dict[str, Any]]:
    """Measure every model, initialisation and rate; return the worst of the seeds for each."""
    found = []
    for name in models:
        for init in INITS:
            for rate in RATES:
                runs = [
                    measure(replace(MODELS[name], init=init, learning_rate=rate, seed=seed))
                    for seed in SEEDS
                ]
                worst = [float(f"{max(each):.3g}") for each in zip(*runs, strict=True)]
                found.append({"model": name, "init": init, "rate": rate, "ratios": worst})
                print(line(found[-1]), flush=True)
    return found


def table(content: list[dict[str, Any]]) -> list[str]:
    """Return the table of the method card."""
    titles = [f"steps {first} to {last}" for first, last in STRETCHES]
    head = f"| model, initialisation, rate | {' | '.join(titles)} |"
    return [head, "|---" * (len(titles) + 1) + "|", *map(line, content)]


def line(row: dict[str, Any]) -> str:
    """Return a line of the table."""
    init = {"default": "transformers' own", "xavier": "xavier"}[row["init"]]
    ratios = " | ".join(f"{ratio:.2f}" for ratio in row["ratios"])
    return f"| {row['model']}, {init}, {row['rate']:g} | {ratios} |"


def main() -> None:
    """Measure and write."""
    torch.set_num_threads(1)
    content = {
        "command": "python recipes/evidence/lateness.py",
        "machine": f"{platform.machine()}, {os.cpu_count()} cores, one thread",
        "seeds": SEEDS,
        "stretches": STRETCHES,
        "rows": rows(),
    }
    RESULTS.write_text(json.dumps(content, indent=1) + "\n")


if __name__ == "__main__":
    main()
