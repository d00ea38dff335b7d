"""What is committed of runs: settings, figures for the judges, a few courses; read and written."""

from __future__ import annotations

import json
import math
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from statistics import mean, median
from typing import Any

from recipes.evidence.claim import ROWS_SPARSE, Claim, crash_step, failed_share
from recipes.evidence.runs import Variant, changes, key_of
from recipes.settings import Settings

RESULTS = Path(__file__).resolve().parent / "results"

EARLY = 30
"""Courses keep every probe up to this step, and later ones at multiples of ten."""

ONE_LINE = 400
"""Characters of JSON that are not broken into lines."""

ADAM_THRESHOLD = 38.0
"""Sharpness times rate at which Adam turns unstable, for beta1 = 0.9 (Cohen et al. 2022)."""

SCORES = (
    "calibration_error", "noisy_accuracy", "chrf", "copied_chrf", "word_error_rate",
    "character_error_rate",
)  # fmt: skip
"""Of images, translations and transcripts."""

MLP = (("mlp.fc1.weight", "mlp.fc2.weight"), ("mlp.c_fc.weight", "mlp.c_proj.weight"))
"""Names of W1 and W2."""


def path_of(claim: Claim) -> Path:
    """Return the file of a claim's results."""
    return RESULTS / f"claim{claim.key}.json"


def read(claim: Claim) -> dict[str, Any] | None:
    """Return what is committed for a claim, if anything is."""
    path = path_of(claim)
    return json.loads(path.read_text()) if path.is_file() else None


def write(claim: Claim, content: dict[str, Any]) -> None:
    """Write a claim's results, a line for a run, so that differences can be read."""
    RESULTS.mkdir(exist_ok=True)
    path_of(claim).write_text(_lines(content) + "\n")


def runs_of(content: dict[str, Any]) -> dict[str, list[dict[str, Any]]]:
    """Return the runs by variant, as a judge takes them."""
    return {name: entry["runs"] for name, entry in content["variants"].items()}


def settings_of(content: dict[str, Any], name: str) -> Settings:
    """Return the settings that a variant was run with, seed 0."""
    return Settings(**(content["defaults"] | content["variants"][name]["changes"]))


def committed(claims: Iterable[Claim]) -> dict[str, dict[str, Any]]:
    """Return what is committed of variants, by `key_of` their settings, whatever claim it is for.

    Where several claims have a variant, the entry that says most is returned.
    """
    found: dict[str, dict[str, Any]] = {}
    for claim in claims:
        content = read(claim)
        for name, entry in (content or {"variants": {}})["variants"].items():
            key = key_of(settings_of(content or {}, name))
            if key not in found or _size(entry) > _size(found[key]):
                found[key] = entry
    return found


def serves(entry: Mapping[str, Any], claim: Claim, variant: Variant, seeds: Sequence[int]) -> bool:
    """Return whether a committed entry has all that a claim asks of one of its variants."""
    there = [run["settings"]["seed"] for run in entry["runs"]] == list(seeds)
    read_by_judge = all(claim.needs <= set(run) for run in entry["runs"])
    drawn = claim.figure is None or variant.name not in claim.figure.names or "course" in entry
    return there and read_by_judge and drawn


def entry_of(
    variant: Variant, results: Sequence[Mapping[str, Any]], made_with: str, *, drawn: bool
) -> dict[str, Any]:
    """Return what is committed of a variant's runs; what is drawn is the one that ended best."""
    return {
        "changes": changes(variant.settings),
        "made_with": made_with,
        "runs": [summary(result) for result in results],
        **({"course": course(min(results, key=_end))} if drawn else {}),
    }


def summary(run: Mapping[str, Any]) -> dict[str, Any]:
    """Return the figures of a run, from what `recipes.run.run` returned.

    Returns:
        `settings` (model and seed), `test_loss`, `accuracy`, `reference`, `seconds`,
        `lowest_entropy`; what of `SCORES` there is; and of a run that was watched `fall_step` (of
        the first probe with a head below half of its largest entropy), `crash_step`,
        `sigma_growth` (the largest sigma1(Wq^T Wk) over that of the first probe), `highest_sec` (of
        any head) and `modes` (head maps seen, by mode). Of AdamW2's rates and of sharpness, and of
        an intervention, what `rate_shares`, `above_threshold` and
        `around_intervention` return.
    """
    settings, probes = run["settings"], run["probes"]
    shares = [(p["step"], _finite(p["entropy_normalised"])) for p in probes]
    lowest = [(step, min(values)) for step, values in shares if values]
    found: dict[str, Any] = {
        "settings": {key: settings[key] for key in ("model", "seed")},
        "lowest_entropy": min((value for _, value in lowest), default=None),
        **{key: run[key] for key in ("test_loss", "reference", "seconds")},
    }
    found |= {key: _short(run[key]) for key in ("accuracy", *SCORES) if key in run}
    if not probes:
        return found
    sigmas = [max(values) for p in probes if (values := _finite(p["sigma_qk"]))]
    modes: Counter[str] = Counter()
    for probe in probes:
        modes.update(probe["modes"])
    found |= {
        "fall_step": next((step for step, value in lowest if value < ROWS_SPARSE), None),
        "crash_step": crash_step(
            run["losses"], run["reference"], run["lost_step"], failed_share(settings["model"])
        ),
        "sigma_growth": _rounded(max(sigmas) / sigmas[0]) if sigmas and sigmas[0] else None,
        "highest_sec": max((v for p in probes for v in _finite(p["sec"])), default=None),
        "modes": dict(sorted(modes.items())),
    }
    return found | rate_shares(run) | above_threshold(run) | around_intervention(run)


def rate_shares(run: Mapping[str, Any]) -> dict[str, Any]:
    """Return how AdamW2's rates compare with a cosine schedule without warmup, and one another.

    Returns:
        `early` and `late`: the median share of the scheduled rate that was used, up to a fifth of
        the steps and after it; and over the first half of the steps the mean rate of the shallow
        half of the blocks over that of the deep half, and of W2 over W1. Nothing for other runs.
    """
    settings = run["settings"]
    probes = [p for p in run["probes"] if "rates" in p]
    if not probes or settings["lr_scheduler_type"] != "cosine" or settings["warmup"]:
        return {}
    steps = settings["steps"]
    shares: tuple[list[float], list[float]] = ([], [])
    halves: tuple[list[float], list[float]] = ([], [])
    layers: tuple[list[float], list[float]] = ([], [])
    for probe in probes:
        progress = (probe["step"] - 1) / steps
        scheduled = settings["learning_rate"] * 0.5 * (1 + math.cos(math.pi * progress))
        rates = probe["rates"]
        blocks = [value for name, value in rates.items() if name.startswith("block ")]
        shares[probe["step"] > 0.2 * steps].append(mean(blocks) / scheduled)
        if probe["step"] > steps / 2:
            continue
        half = len(blocks) // 2
        halves[0].append(mean(blocks[:half]))
        halves[1].append(mean(blocks[half:]))
        for first, second in MLP:
            if first in rates:
                layers[0].append(rates[first])
                layers[1].append(rates[second])
    if not all(shares):
        return {}  # too short to have both
    found = {"early": _rounded(median(shares[0])), "late": _rounded(median(shares[1]))}
    if layers[0]:
        found["shallow_over_deep"] = _rounded(mean(halves[0]) / mean(halves[1]))
        found["w2_over_w1"] = _rounded(mean(layers[1]) / mean(layers[0]))
    return {"rates": found}


def around_intervention(run: Mapping[str, Any]) -> dict[str, Any]:
    """Return what a run was like just before and just after the step of its intervention.

    Args:
        run: what `recipes.run.run` returned.

    Returns:
        `before`: the lowest entropy share at the last probe before; `after`: the same at the first
        probe from then on, the highest of ten losses over the mean of the five before, and how many
        steps it took until the mean of five losses was no higher than that. Nothing for runs that
        were not touched at a step in between.
    """
    given = run["settings"].get("intervention") or {}
    at = given.get("at", 1)
    if at == 1:
        return {}
    lowest = {
        probe["step"]: min(_finite(probe["entropy_normalised"]), default=None)
        for probe in run["probes"]
    }
    numbers = [math.inf if loss is None else loss for loss in run["losses"]]
    level = mean(numbers[at - 6 : at - 1])
    means = ((step, mean(numbers[step - 5 : step])) for step in range(at + 4, len(numbers) + 1))
    back = next((step - at + 1 for step, value in means if value <= level), None)
    return {
        "before": {"entropy": lowest[max(step for step in lowest if step < at)]},
        "after": {
            "entropy": lowest[min(step for step in lowest if step >= at)],
            "loss": _rounded(max(numbers[at - 1 : at + 9]) / level),
            "back": back,
        },
    }


def above_threshold(run: Mapping[str, Any]) -> dict[str, Any]:
    """Return in what share of the measurements the sharpness was above the optimizer's threshold.

    The threshold is that of the rate that was used: AdamW2's mean over the matrices of the blocks,
    and the scheduled one of other optimizers. `above_scheduled` takes the scheduled one always.
    The first step is left out: there is no second moment yet.
    """
    measured = _measured(run)
    if not measured:
        return {}
    return {
        "above": _rounded(mean(value > used for _, value, used, _ in measured)),
        "above_scheduled": _rounded(mean(value > top for _, value, _, top in measured)),
        "first_above": next((step for step, value, used, _ in measured if value > used), None),
    }


def _measured(run: Mapping[str, Any]) -> list[tuple[int, float, float, float]]:
    """Return step, sharpness, its threshold by the rate used, and that by the scheduled rate."""
    found = []
    for probe in run["probes"]:
        if probe["step"] == 1 or probe.get("sharpness") is None:
            continue
        scheduled = used = probe["sharpness_threshold"]
        if blocks := [v for k, v in probe.get("rates", {}).items() if k.startswith("block ")]:
            used = ADAM_THRESHOLD / mean(blocks)
        found.append((probe["step"], probe["sharpness"], used, scheduled))
    return found


def course(run: Mapping[str, Any]) -> dict[str, Any]:
    """Return what is drawn of a run: its seed and by quantity its values at the steps of `step`.

    Of the layers the worst head; `over_threshold` is the sharpness over its threshold, and
    `block 0`, `block 1`, ... are AdamW2's rates.
    """
    probes = [p for p in run["probes"] if p["step"] <= EARLY or p["step"] % 10 == 0]
    ratios = {step: _rounded(value / used) for step, value, used, _ in _measured(run)}
    found: dict[str, Any] = {
        "seed": run["settings"]["seed"],
        "step": [p["step"] for p in probes],
        "loss": [run["losses"][p["step"] - 1] for p in probes],
        "entropy": [min(_finite(p["entropy_normalised"]), default=None) for p in probes],
        "sec": [max(_finite(p["sec"]), default=None) for p in probes],
        "sigma_qk": [max(_finite(p["sigma_qk"]), default=None) for p in probes],
    }
    if ratios:
        found["over_threshold"] = [ratios.get(p["step"]) for p in probes]
    blocks = [name for name in probes[0].get("rates", {}) if name.startswith("block ")]
    return found | {name: [p["rates"][name] for p in probes] for name in blocks}


def _end(run: Mapping[str, Any]) -> float:
    return math.inf if run["test_loss"] is None else run["test_loss"]


def _finite(values: Iterable[float | None]) -> list[float]:
    return [value for value in values if value is not None and math.isfinite(value)]


def _rounded(value: float) -> float | None:
    return float(f"{value:.4g}") if math.isfinite(value) else None


def _short(share: float | None) -> float | None:
    """Return a share without the digits that stand for no image and no letter."""
    return None if share is None else float(f"{share:.6g}")


def _size(entry: Mapping[str, Any]) -> tuple[bool, int, int]:
    return "course" in entry, len(entry["runs"][0]), len(entry["runs"])


def _lines(value: Any, depth: int = 0) -> str:
    """Return JSON in which what holds no other containers but short ones is one line."""
    inner = "\n" + " " * (depth + 1)
    outer = "\n" + " " * depth
    flat = json.dumps(value)
    if not isinstance(value, dict | list) or len(flat) <= ONE_LINE or _is_flat(value):
        return flat
    if isinstance(value, list):
        return "[" + inner + f",{inner}".join(_lines(v, depth + 1) for v in value) + outer + "]"
    pairs = (f"{json.dumps(key)}: {_lines(each, depth + 1)}" for key, each in value.items())
    return "{" + inner + f",{inner}".join(pairs) + outer + "}"


def _is_flat(value: Any) -> bool:
    parts = value.values() if isinstance(value, dict) else value
    return not any(isinstance(part, dict | list) for part in parts)
