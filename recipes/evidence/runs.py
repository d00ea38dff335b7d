"""The runs behind the evidence: settings by name, done several at a time, and kept."""

from __future__ import annotations

import json
import multiprocessing
import os
from collections.abc import Callable, Iterable
from concurrent.futures import ProcessPoolExecutor, as_completed
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from recipes.run import run
from recipes.settings import Settings

VIT = Settings(init="xavier", learning_rate=1e-2, weight_decay=0.05)
SWIN = replace(VIT, model="swin", steps=150, batch_size=16)
GPT2 = Settings(
    model="gpt2", data="stdlib", init="xavier", learning_rate=3e-2, weight_decay=0.1,
    adam_beta2=0.95, batch_size=16,
)  # fmt: skip
STD_VIT = Settings(learning_rate=1e-2)
"""With transformers' N(0, 0.02) and no weight decay: the set-up that shows sigmaReparam."""

ADAMW2 = dict(optim="adamw2", optim_args="tau=0.004")
SIGMA = dict(patch="sigma_reparam")


@dataclass(frozen=True)
class Variant:
    """One line of a table: a name and what it sets."""

    name: str
    settings: Settings


def do_runs(
    variants: Iterable[Variant],
    seeds: Iterable[int],
    folder: Path,
    *,
    workers: int,
    on_done: Callable[[str, int, int], None],
) -> dict[str, list[dict[str, Any]]]:
    """Do what is not done yet; return the results by variant, one per seed.

    A result is kept in `folder`, and taken from there if its settings are the same.
    """
    work = {}
    for variant in variants:
        for seed in seeds:
            output = folder / variant.name.replace(" ", "_").replace("/", "-") / f"seed{seed}"
            work[variant.name, seed] = replace(variant.settings, seed=seed, output=str(output))
    results = {key: found for key, s in work.items() if (found := _kept(s)) is not None}
    missing = {key: settings for key, settings in work.items() if key not in results}
    context = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(workers, mp_context=context, initializer=_quiet) as pool:
        pending = {pool.submit(run, settings): key for key, settings in missing.items()}
        for future in as_completed(pending):
            results[pending[future]] = future.result()
            on_done(pending[future][0], len(results), len(work))
    names = dict.fromkeys(name for name, _ in work)
    return {name: [results[key] for key in work if key[0] == name] for name in names}


def _kept(settings: Settings) -> dict[str, Any] | None:
    path = Path(settings.output) / "results.json"
    if not path.is_file():
        return None
    result = json.loads(path.read_text())
    # Settings that came later have their defaults in results from before.
    return result if Settings(**result["settings"]) == settings else None


def _quiet() -> None:
    import warnings

    os.environ["HF_HUB_OFFLINE"] = "1"
    warnings.simplefilter("ignore")
