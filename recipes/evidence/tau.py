"""Which tau short runs need: fixed ones, and the one of `tau="auto"`, beside AdamW.

    python recipes/evidence/tau.py    # does the runs that are missing, writes tau.json

`hf_stable.adamw2.planning` derives tau from the number of steps. Its constant was fixed on the runs
of `FIXED_ON`, a ViT and a BERT. What counts are those of `REPORTED_ON`, which were done after it:
other seeds, rates and lengths, and a GPT-2. Runs of 450 steps and more under a linear schedule need
no test: tau is 0.01 there, the default, and the run the same bit for bit. The models and what they
learn are those of `short_runs`.
"""

from __future__ import annotations

import json
import math
import platform
import sys
import warnings
from collections.abc import Iterable, Sequence
from pathlib import Path
from statistics import mean
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))  # where it is run from must not matter

import torch
import transformers

from recipes.evidence.checking import parser_of, write_rows
from recipes.evidence.short_runs import PLAIN, PLANNED, WARM, Method, Setup, run

RESULTS = Path(__file__).resolve().parent / "tau.json"


def fixed(*taus: float) -> tuple[Method, ...]:
    """Return AdamW2 under some values of tau."""
    return tuple(Method(f"tau={tau:g}", tau) for tau in taus)


DEFAULT = Method("tau=0.01", 0.01)

_VIT = [
    Setup("ViT", start, rate, steps)
    for start, rate, steps in (
        ("scratch", 1e-3, 40), ("scratch", 1e-3, 200), ("scratch", 1e-2, 200),
        ("fine-tuned", 1e-3, 40), ("fine-tuned", 1e-3, 200),
        ("fine-tuned", 5e-3, 40), ("fine-tuned", 5e-3, 200),
    )
]  # fmt: skip
_BERT = [Setup("BERT", "fine-tuned", 1e-3, steps) for steps in (40, 200)]
TRIED = (PLAIN, WARM, *fixed(0.01, 0.02, 0.04, 0.08, 0.16))
FIXED_ON = [
    *((setup, method, seed) for seed in (0, 1) for setup in _VIT for method in TRIED),
    *((setup, method, 0) for setup in _BERT for method in TRIED),
]
"""The runs that the constant was fixed on."""

TESTED = (
    Setup("ViT", "fine-tuned", 2e-3, 40),
    Setup("ViT", "scratch", 5e-3, 200),
    Setup("BERT", "fine-tuned", 2e-3, 40),
    Setup("BERT", "fine-tuned", 5e-3, 100),
    Setup("GPT-2", "scratch", 1e-3, 40),
    Setup("GPT-2", "fine-tuned", 1e-3, 40),
    Setup("GPT-2", "scratch", 1e-2, 200),
    # Added when the others had been run: an easy task, which AdamW learns in few steps.
    Setup("ViT", "two classes", 3e-4, 40),
    Setup("ViT", "two classes", 1e-3, 40),
    Setup("BERT", "two classes", 1e-3, 40),
)
COMPARED = (PLAIN, WARM, *fixed(0.01, 0.03, 0.1), PLANNED)
SEEDS = (10, 11, 12)
REPORTED_ON = [(setup, method, seed) for seed in SEEDS for setup in TESTED for method in COMPARED]
"""The runs that count."""

WORSE = 1.05
"""A mean loss beyond this times another is worse than it."""


def do(work: Path, runs: Iterable[tuple[Setup, Method, int]]) -> list[dict[str, Any]]:
    """Do the runs that a file does not hold yet; return them all, in order."""
    lines = work.read_text().splitlines() if work.is_file() else []
    done = {(r["setup"], r["method"], r["seed"]): r for r in map(json.loads, lines)}
    work.parent.mkdir(parents=True, exist_ok=True)
    rows = []
    with work.open("a") as file:
        for setup, method, seed in runs:
            key = (setup.name, method.name, seed)
            if key not in done:
                done[key] = run(setup, method, seed)
                print(json.dumps(done[key]), file=file, flush=True)
                print(key, file=sys.stderr, flush=True)
            rows.append(done[key])
    return rows


def thinned(rows: Iterable[dict[str, Any]]) -> list[dict[str, Any]]:
    """Return a row for each set-up and method, with what its seeds came to side by side."""
    found: dict[tuple[str, str], dict[str, Any]] = {}
    for row in rows:
        start = {"setup": row["setup"], "method": row["method"], "tau": row["tau"]}
        entry = found.setdefault(
            (row["setup"], row["method"]), start | {"seeds": [], "losses": [], "accuracies": []}
        )
        for key, name in (("seed", "seeds"), ("loss", "losses"), ("accuracy", "accuracies")):
            entry[name].append(row[key])
    return list(found.values())


def means(entries: Iterable[dict[str, Any]]) -> dict[str, dict[str, float]]:
    """Return the mean test loss by set-up and method; infinite where a run ended in NaN."""
    found: dict[str, dict[str, float]] = {}
    for entry in entries:
        losses = [math.inf if loss is None else loss for loss in entry["losses"]]
        found.setdefault(entry["setup"], {})[entry["method"]] = mean(losses)
    return found


def verdict(entries: Sequence[dict[str, Any]]) -> dict[str, Any]:
    """Return in how many set-ups the planned tau is better or worse than each other method.

    Returns:
        Method, or "best fixed tau" of a set-up -> `better` and `worse` by more than `WORSE`,
        `lower`, where the mean loss is lower by anything, and `of`, how many set-ups.
    """
    by_setup = means(entries)
    others = [m.name for m in COMPARED if m != PLANNED]
    found = {}
    for name in (*others, "best fixed tau"):
        pairs = []
        for losses in by_setup.values():
            best = min(loss for key, loss in losses.items() if key.startswith("tau=0"))
            pairs.append((losses[PLANNED.name], losses.get(name, best)))
        found[name] = {
            "better": sum(WORSE * own < other for own, other in pairs),
            "worse": sum(own > WORSE * other for own, other in pairs),
            "lower": sum(own < other for own, other in pairs),
            "of": len(pairs),
        }
    return found


def table(entries: Sequence[dict[str, Any]]) -> list[str]:
    """Return the table of the method card: mean test loss and accuracy of what counts."""
    names = [method.name for method in COMPARED]
    head = f"| model, start, rate | {' | '.join(names)} |"
    lines = [head, "|---" * (len(names) + 1) + "|"]
    for setup, losses in means(entries).items():
        cells = []
        for name in names:
            entry = next(e for e in entries if (e["setup"], e["method"]) == (setup, name))
            accuracy = f"{mean(entry['accuracies']):.2f}".removeprefix("0")
            cells.append(f"{losses[name]:.3g} ({accuracy})")
        lines.append(f"| {setup} | {' | '.join(cells)} |")
    return lines


def main() -> None:
    """Do the runs, and write what they came to."""
    args = parser_of(__doc__, "tau.jsonl").parse_args()
    torch.set_num_threads(1)
    transformers.logging.set_verbosity_error()
    warnings.simplefilter("ignore")
    rows = {"fixed_on": do(args.work, FIXED_ON), "reported": do(args.work, REPORTED_ON)}
    entries = {half: thinned(each) for half, each in rows.items()}
    content = {
        "command": "python recipes/evidence/tau.py",
        "machine": f"{platform.machine()}, one thread",
        "seconds_of_runs": round(sum(row["seconds"] for each in rows.values() for row in each)),
        "verdict": verdict(entries["reported"]),
    }
    write_rows(RESULTS, content, entries)
    print("\n".join(table(entries["reported"])))


if __name__ == "__main__":
    main()
