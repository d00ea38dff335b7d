"""Do the verdicts hold past a toy's size? Two sets of runs that are ready to be made.

    python recipes/evidence/larger.py                 # ten times the size, claims 1, 6 and 7
    python recipes/evidence/larger.py 6               # one claim of these
    python recipes/evidence/larger.py --gpu           # ViT-S and GPT-2 small, for one GPU
    python recipes/evidence/larger.py --gpu --dry-run # two steps of each run, cut small

They take one seed each. Runs are kept in --work, and one that was stopped goes on from its last
checkpoint. With --minutes, 6 with --gpu, no run begins after that time. What was made is judged as
the small ones are and written to larger.json in --work. A claim that was made whole, and not dry,
goes into larger.json beside this file too, and onto the page.
"""

from __future__ import annotations

import argparse
import json
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from statistics import mean
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))  # where it is run from must not matter

from recipes.evidence import records
from recipes.evidence.claim import WORSE, Results, losses, of, short, window
from recipes.evidence.claims import CLAIMS
from recipes.evidence.claims.rate_windows import SWEEP, sweep_name
from recipes.evidence.claims.sigma import PATCHED, PLAIN_MODEL
from recipes.evidence.claims.warmup import CONTROL, CONTROLS, MODELS, OURS, PLAIN, TAUS, WARMUP
from recipes.evidence.runs import NO_NORMS, NO_NORMS_SIGMA, STD_VIT, VIT, Variant
from recipes.evidence.windows import window_text
from recipes.run import run
from recipes.settings import Fields

RESULTS = Path(__file__).resolve().parent / "larger.json"
"""By the set and the claim: what runs say, how long they took, and the runs."""

SEED = 0
SAVED = 50
"""Steps from checkpoint to checkpoint."""

GPU_MINUTES = 6.0

VIT_TI = Fields(
    dict(
        patch_size=4,
        hidden_size=192,
        num_hidden_layers=9,
        num_attention_heads=3,
        intermediate_size=768,
    )
)
"""ViT-Ti's width with three quarters of its layers, 4 M parameters; digits have 49 patches."""

WIDE_GPT2 = Fields(dict(n_embd=192, n_layer=9, n_head=3))
"""4 M parameters."""

VIT_S = Fields(
    dict(
        patch_size=4,
        hidden_size=384,
        num_hidden_layers=12,
        num_attention_heads=6,
        intermediate_size=1536,
    )
)
GPT2_SMALL = Fields(dict(n_embd=768, n_layer=12, n_head=12))
GPU_BATCH, GPU_STEPS = 256, 610
"""Windows of 64 tokens: 10 M tokens."""

DRY = {"hidden_size": 24, "intermediate_size": 48, "num_hidden_layers": 2, "n_embd": 24,
       "n_layer": 2}  # fmt: skip
DRY_RUN = dict(steps=2, batch_size=2, bf16=False, monitor_every=1, save_steps=0)

SWEPT = ("AdamW", "AdamW2", "sigmaReparam")
RATES = (3e-4, 1e-3, 3e-3, 1e-2, 3e-2)
ORIGINAL = "xavier init, batch 32"


def _warmup(model: str, changes: Mapping[str, Any]) -> tuple[Variant, ...]:
    """Return claim 1's runs of a model of another size."""
    plain = replace(MODELS[model], **changes)
    kinds = {
        PLAIN: plain,
        WARMUP: replace(plain, warmup=0.2),
        OURS: replace(plain, optim="adamw2", optim_args=TAUS[model]),
        CONTROL: replace(plain, learning_rate=CONTROLS[model].learning_rate),
    }
    return of({f"{model}, {kind}": settings for kind, settings in kinds.items()})


def _without_norms(changes: Mapping[str, Any]) -> tuple[Variant, ...]:
    """Return a set-up of claim 6 of another size."""
    setup = "no block norms, lr 1e-2"
    kinds = {PLAIN_MODEL: NO_NORMS, PATCHED: NO_NORMS_SIGMA}
    return of(
        {
            f"{setup}, {kind}": replace(STD_VIT, patch=patch, **changes)
            for kind, patch in kinds.items()
        }
    )


def _sweep(changes: Mapping[str, Any]) -> tuple[Variant, ...]:
    """Return a coarse sweep of rates, as claim 7 has a fine one."""
    return of(
        {
            sweep_name(method, rate, ORIGINAL): replace(
                VIT, learning_rate=rate, **(SWEEP[method] | dict(changes))
            )
            for method in SWEPT
            for rate in RATES
        }
    )


_TI = dict(model_config=VIT_TI)
_ON_GPU = dict(model_config=VIT_S, bf16=True, batch_size=256)
_SMALL = dict(model_config=GPT2_SMALL, bf16=True, batch_size=GPU_BATCH, steps=GPU_STEPS)

TEN_TIMES: dict[str, tuple[Variant, ...]] = {
    "1": (*_warmup("ViT", _TI), *_warmup("GPT-2", dict(model_config=WIDE_GPT2))),
    "6": _without_norms(_TI),
    "7": _sweep(_TI | dict(steps=150, monitor_every=0)),
}
ON_GPU: dict[str, tuple[Variant, ...]] = {
    "1": (*_warmup("ViT", _ON_GPU), *_warmup("GPT-2", _SMALL)),
    "6": _without_norms(_ON_GPU),
}
"""By the claim whose question they ask."""


def windows(results: Results) -> list[str]:
    """Return a sentence for each method of the sweep: at which rates its loss is near its best."""
    found = []
    for method in SWEPT:
        by_rate = {
            rate: mean(losses(results, sweep_name(method, rate, ORIGINAL))) for rate in RATES
        }
        best = min(by_rate.values())
        width = window_text(window(by_rate, WORSE * best), RATES)
        each = ", ".join(f"{short(loss)} at {rate:g}" for rate, loss in by_rate.items())
        found.append(f"{method}: test loss {each}; within 5 % of its best over {width}.")
    return found


def said(key: str, results: Results) -> list[str]:
    """Return what runs say: by the claim's own judge, or as windows of rates."""
    if key == "7":
        return windows(results)
    word, sentence, findings = CLAIMS[key].judge(results)
    return [f"{word}: {sentence}", *findings]


def make(
    variants: Sequence[Variant], folder: Path, *, is_dry: bool, may_begin: Callable[[], bool]
) -> dict[str, list[dict[str, Any]]]:
    """Do the runs that are missing; return what is committed of runs, by name.

    Args:
        variants: to run.
        folder: of the results, where those that are there are taken from.
        is_dry: cut them small, and take two steps.
        may_begin: is asked before each run.
    """
    found = {}
    for number, variant in enumerate(variants):
        output = folder / str(number)
        path = output / "results.json"
        settings = replace(variant.settings, seed=SEED, save_steps=SAVED, output=str(output))
        if is_dry:
            settings = replace(settings, **DRY_RUN, model_config=_cut(settings.model_config))
        if not path.is_file() and may_begin():
            run(settings)
        if path.is_file():
            found[variant.name] = [records.summary(json.loads(path.read_text()))]
            print(f"{variant.name}: test loss {found[variant.name][0]['test_loss']}", flush=True)
    return found


def _cut(config: Mapping[str, Any] | None) -> Fields:
    return Fields({name: DRY.get(name, size) for name, size in (config or {}).items()})


def main(arguments: Sequence[str] | None = None) -> int:
    """Do the runs of a set and say what they show; 1 if some were not made."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("names", nargs="*", metavar="CLAIM", help=f"of {', '.join(TEN_TIMES)}")
    parser.add_argument("--gpu", action="store_true", help="the set for one GPU")
    parser.add_argument("--dry-run", action="store_true", help="two steps of small models")
    parser.add_argument("--minutes", type=float, help="after which no run begins")
    parser.add_argument("--work", type=Path, default=Path("evidence-output/larger"))
    args = parser.parse_args(arguments)
    chosen = ON_GPU if args.gpu else TEN_TIMES
    if unknown := [name for name in args.names if name not in chosen]:
        parser.error(f"there is no claim {unknown[0]!r} in this set; it has {', '.join(chosen)}")
    minutes = args.minutes or (GPU_MINUTES if args.gpu else float("inf"))
    until = time.monotonic() + 60 * minutes
    work = args.work / ("gpu" if args.gpu else "cpu") / ("dry-run" if args.dry_run else "")
    content, is_whole = {}, True
    for key in args.names or chosen:
        results = make(
            chosen[key], work / key, is_dry=args.dry_run,
            may_begin=lambda: time.monotonic() < until,
        )  # fmt: skip
        missing = [each.name for each in chosen[key] if each.name not in results]
        is_whole &= not missing
        content[key] = {
            "said": [] if missing else said(key, results),
            "missing": missing,
            "seconds": round(sum(run["seconds"] for runs in results.values() for run in runs)),
            "runs": results,
        }
        if not args.dry_run and not missing:
            _keep("gpu" if args.gpu else "cpu", key, content[key])
        work.mkdir(parents=True, exist_ok=True)
        (work / "larger.json").write_text(json.dumps(content, indent=1) + "\n")
        print(f"claim {key}: {' '.join(content[key]['said']) or f'not made: {missing}'}")
    return 0 if is_whole else 1


def _keep(where: str, key: str, made: Mapping[str, Any]) -> None:
    """Put a claim's runs among those that are committed."""
    kept = json.loads(RESULTS.read_text()) if RESULTS.is_file() else {}
    kept.setdefault(where, {})[key] = made
    RESULTS.write_text(json.dumps(kept, indent=1) + "\n")


def section() -> list[str]:
    """Return what is committed of larger models, for the page."""
    kept = json.loads(RESULTS.read_text()) if RESULTS.is_file() else {}
    lines = []
    for where, by_claim in kept.items():
        flag = "--gpu " * (where == "gpu")
        for key, made in by_claim.items():
            command = f"python recipes/evidence/larger.py {flag}{key}"
            took = f"seed {SEED}, {made['seconds'] / 60:.0f} minutes"
            lines.append(
                f"- Claim {key} (`{command}`, {took}; small models: {_small_verdict(key)}): "
                f"{' '.join(made['said'])}"
            )
    return lines


def _small_verdict(key: str) -> str:
    content = records.read(CLAIMS[key])
    return content["verdict"] if content else "not run"


if __name__ == "__main__":
    raise SystemExit(main())
