"""What a run leaves behind beside its losses: what the monitor saw, and how a model generalises."""

from __future__ import annotations

import json
import math
import statistics
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

from recipes.data import Task

__all__ = ["finite", "first_step", "generalisation", "watched"]


def first_step(steps: Sequence[int], record: int | None) -> int | None:
    """Return the first step of a record, counted from 1; `steps` has the last step of each."""
    return record and (steps[record - 2] if record > 1 else 0) + 1


@torch.no_grad()
def generalisation(model: Any, task: Task) -> dict[str, Any]:
    """Return the calibration error of a classifier, and its accuracy on noisy test images.

    The error is that of Guo et al. 2017, with 15 bins; the noise has one standard deviation of the
    images, whose own is one.
    """
    model.eval()
    images, labels = (task.test.columns[name] for name in ("pixel_values", "labels"))
    noise = torch.randn(images.shape, generator=torch.Generator().manual_seed(0))
    right, confidence = [], []
    for inputs in (images, images + noise):
        parts = inputs.to(model.device).split(64)
        logits = torch.cat([model(pixel_values=part).logits for part in parts]).cpu()
        values, answers = logits.softmax(-1).max(-1)
        right.append((answers == labels).float())
        confidence.append(values)
    bins = (confidence[0] * 15).long().clamp(max=14)
    gaps = [
        (right[0][bins == each] - confidence[0][bins == each]).sum().abs() for each in range(15)
    ]
    error = float(sum(gaps)) / len(labels)
    return {"calibration_error": finite(error), "noisy_accuracy": float(right[1].mean())}


def watched(folder: Path | None) -> dict[str, Any]:
    """Read the monitor's own file: probes with the worst head of each layer, and alarms."""
    if folder is None:
        return {"probes": [], "alarms": []}
    lines = [json.loads(line) for line in (folder / "stability.jsonl").read_text().splitlines()]
    probes = []
    for line in lines:
        if line["event"] != "probe" or not line["quantities"].get("entropy_normalised"):
            continue
        found = line["quantities"]
        probe: dict[str, Any] = {"step": line["step"]}
        for name, worst in (("entropy_normalised", min), ("sec", max), ("sigma_qk", max)):
            layers = found.get(name, {}).values()
            probe[name] = [
                _rounded(worst((v for v in heads if v is not None), default=None))
                for heads in layers
            ]
        modes = [mode for heads in found.get("mode", {}).values() for mode in heads]
        probe["modes"] = {mode: modes.count(mode) for mode in sorted(set(modes))}
        if "effective_lr" in line:
            probe["rates"] = _mean_rates(line["effective_lr"])
        for name in ("sharpness", "sharpness_threshold"):
            if name in line:
                probe[name] = _rounded(line[name])
        probes.append(probe)
    keys = ("kind", "step", "layer", "head", "quantity", "value")
    alarms = [{k: line[k] for k in keys} for line in lines if line["event"] == "alarm"]
    return {"probes": probes, "alarms": alarms}


def _mean_rates(rates: dict[str, Any]) -> dict[str, float]:
    """Return the mean effective rate of the matrices of each block and of each kind of matrix."""
    groups: dict[str, list[float]] = {}
    for name, rate in rates.items():
        # Gains are vectors with rates of their own, many times those of matrices.
        if not name.endswith("weight") or "norm" in name.lower() or ".ln_" in name:
            continue
        values = rate if isinstance(rate, list) else [rate]
        numbers = [part for part in name.split(".") if part.isdigit()]
        if numbers:
            groups.setdefault("block " + ".".join(numbers), []).extend(values)
            groups.setdefault(name.split(numbers[-1] + ".", 1)[1], []).extend(values)
    return {key: _rounded(statistics.mean(values)) for key, values in groups.items()}


def finite(value: float) -> float | None:
    """Return a number with four digits, or None where it is none, as JSON has it."""
    return _rounded(value) if math.isfinite(value) else None


def _rounded(value: Any) -> Any:
    return None if value is None else float(f"{value:.4g}")
