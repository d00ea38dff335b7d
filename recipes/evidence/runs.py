"""The runs behind the evidence: settings by name, done several at a time, and kept."""

from __future__ import annotations

import hashlib
import json
import multiprocessing
import os
import shutil
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import ProcessPoolExecutor, as_completed
from dataclasses import asdict, dataclass, replace
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
NO_NORMS = "remove_pre_layernorm"
NO_NORMS_SIGMA = "remove_pre_layernorm,sigma_reparam"
SGD = dict(optim="torch:SGD", optim_args='{"momentum": 0.9}')

SHORT = 150
"""Steps of a run where there are many."""


@dataclass(frozen=True)
class Variant:
    """One line of a table: a name and what it sets."""

    name: str
    settings: Settings


def changes(settings: Settings) -> dict[str, Any]:
    """Return what settings say that is not the default, but for seed and output folder."""
    defaults = asdict(Settings())
    return {
        key: value
        for key, value in asdict(settings).items()
        if value != defaults[key] and key not in ("seed", "output")
    }


def do_runs(
    variants: Iterable[Variant],
    seeds: Iterable[int],
    folder: Path,
    *,
    workers: int,
    on_done: Callable[[str, int, int], None],
) -> dict[str, list[dict[str, Any]]]:
    """Do what is not done yet; return the results by variant, one per seed.

    Args:
        variants: under whatever names; equal settings are run once.
        seeds: of each.
        folder: results are kept in it, and whatever lies in it with the same settings is taken.
        workers: processes; a single one is this one.
        on_done: hears the name of each run that came to its end, how many are there, and of how
            many.
    """
    variants, seeds = tuple(variants), tuple(seeds)
    names, work = _work(variants, seeds, folder)
    kept = {key: json.loads(path.read_text()) for key, path in _kept(folder)}
    results = {key: kept[key] for key in work if key in kept}
    missing = {key: settings for key, settings in work.items() if key not in results}
    for key, result in _done(missing, workers):
        results[key] = result
        name = next(name for (name, _), each in names.items() if each == key)
        on_done(name, len(results), len(work))
    return {v.name: [results[names[v.name, seed]] for seed in seeds] for v in variants}


def forget(variants: Iterable[Variant], seeds: Iterable[int], folder: Path) -> None:
    """Remove what `do_runs` would take for done, or go on with: results and checkpoints."""
    _, work = _work(tuple(variants), tuple(seeds), folder)
    for key, path in _kept(folder):
        if key in work:
            path.unlink()
    for settings in work.values():
        shutil.rmtree(settings.output, ignore_errors=True)


def _work(
    variants: Sequence[Variant], seeds: Sequence[int], folder: Path
) -> tuple[dict[tuple[str, int], str], dict[str, Settings]]:
    """Return the keys of runs by variant and seed, and their settings by key."""
    names: dict[tuple[str, int], str] = {}
    work: dict[str, Settings] = {}
    for variant in variants:
        for seed in seeds:
            settings = replace(variant.settings, seed=seed)
            key = key_of(settings)
            output = folder / f"{_file_name(variant.name)}-{key[:8]}" / f"seed{seed}"
            work.setdefault(key, replace(settings, output=str(output)))
            names[variant.name, seed] = key
    return names, work


def _done(work: Mapping[str, Settings], workers: int) -> Iterator[tuple[str, dict[str, Any]]]:
    """Yield the results of runs as they come, by the keys of their settings."""
    if workers == 1:  # a process of its own would import everything again
        _quiet()
        for key, settings in work.items():
            yield key, run(settings)
        return
    context = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(workers, mp_context=context, initializer=_quiet) as pool:
        pending = {pool.submit(run, settings): key for key, settings in work.items()}
        for future in as_completed(pending):
            yield pending[future], future.result()


def key_of(settings: Settings) -> str:
    """Return a short text that equal settings have in common, seed included, output folder not."""
    # By what is not the default: settings that came later do not make other runs of old ones.
    content = changes(settings) | {"seed": settings.seed}
    return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()


def _kept(folder: Path) -> Iterator[tuple[str, Path]]:
    """Yield the settings' key and the file of all results in a folder, but of settings gone."""
    for path in sorted(folder.rglob("results.json")):
        try:
            settings = Settings(**json.loads(path.read_text())["settings"])
        except TypeError:
            continue
        yield key_of(settings), path


def _file_name(name: str) -> str:
    return name.replace(" ", "_").replace("/", "-")


def _quiet() -> None:
    import warnings

    os.environ["HF_HUB_OFFLINE"] = "1"
    os.environ["CUDA_VISIBLE_DEVICES"] = ""  # what is committed was run on CPUs
    warnings.simplefilter("ignore")
