"""Test the papers' claims: do the runs, judge them, write the results and the table.

    python recipes/evidence/run.py                 # everything, three seeds
    python recipes/evidence/run.py 1 4 --seeds 5   # two claims
    python recipes/evidence/run.py --quick         # signs of claims 1, 4 and 6, one seed
    python recipes/evidence/run.py --table         # the table from the committed results

Runs are kept in --work and not done twice. Results of whole claims go to recipes/evidence/results,
the table to recipes/evidence/README.md.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import sys
import time
from dataclasses import replace
from importlib.metadata import version
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))  # where it is run from must not matter

from recipes.evidence.claim import Claim, failures, losses, text_of
from recipes.evidence.claims import CLAIMS
from recipes.evidence.runs import do_runs

HERE = Path(__file__).resolve().parent
RESULTS = HERE / "results"
QUICK_STEPS = 80


def main() -> int:
    """Parse the command line and do what it says; 1 if a quick sign does not show."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("names", nargs="*", metavar="NAME", help=f"of {', '.join(CLAIMS)}")
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--quick", action="store_true")
    parser.add_argument("--table", action="store_true")
    parser.add_argument("--workers", type=int, default=os.cpu_count())
    parser.add_argument("--work", type=Path, default=Path("evidence-output"))
    args = parser.parse_args()
    if unknown := [name for name in args.names if name not in CLAIMS]:
        parser.error(f"there is no claim {unknown[0]!r}; claims are {', '.join(CLAIMS)}")
    if args.quick:
        return quick(args)
    if not args.table:
        for name in args.names or CLAIMS:
            test(CLAIMS[name], args)
    (HERE / "README.md").write_text(table())
    return 0


def test(claim: Claim, args: argparse.Namespace) -> None:
    """Do the runs of a claim and write its results."""
    started = time.perf_counter()
    seeds = range(max(args.seeds, claim.seeds))
    found = do_runs(
        claim.variants, seeds, args.work, workers=args.workers, on_done=_progress(claim.key)
    )
    verdict, sentence = claim.judge(found)
    content = {
        "claim": claim.text,
        "command": f"python recipes/evidence/run.py {claim.key}",
        "verdict": verdict,
        "sentence": sentence,
        "seeds": list(seeds),
        "machine": f"{platform.machine()}, {os.cpu_count()} cores, one thread a run",
        "seconds_of_runs": round(sum(r["seconds"] for runs in found.values() for r in runs)),
        "versions": {n: version(n) for n in ("hf-stable", "torch", "transformers")},
        "runs": {name: [_summary(run) for run in runs] for name, runs in found.items()},
    }
    RESULTS.mkdir(exist_ok=True)
    (RESULTS / f"claim{claim.key}.json").write_text(json.dumps(content, indent=1) + "\n")
    print(f"claim {claim.key}: {verdict} ({time.perf_counter() - started:.0f} s). {sentence}")


def quick(args: argparse.Namespace) -> int:
    """Do a few short runs of claims 1, 4 and 6 and say whether their signs show."""
    missed = 0
    for claim in CLAIMS.values():
        if not claim.quick or (args.names and claim.key not in args.names):
            continue
        variants = [
            replace(v, name=f"quick {v.name}", settings=replace(v.settings, steps=QUICK_STEPS))
            for v in claim.variants
            if v.name in claim.quick
        ]
        found = do_runs(
            variants, [0], args.work, workers=args.workers, on_done=_progress(claim.key)
        )
        found = {name.removeprefix("quick "): runs for name, runs in found.items()}
        verdict, sentence = claim.judge(found)
        missed += verdict not in ("reproduced", "partly")
        print(f"claim {claim.key}, {QUICK_STEPS} steps, one seed: {verdict}. {sentence}")
    return 1 if missed else 0


def table() -> str:
    """Return the page of the evidence, from the committed results alone."""
    lines = [
        "# Evidence",
        "",
        "What the two papers claim, tested on data that is embedded everywhere: scikit-learn's",
        "digits, and the source of Python's standard library. Models of 0.3 to 0.4 M parameters,",
        "one CPU thread a run. This page is written by `python recipes/evidence/run.py`.",
        "",
        "| claim | verdict | what was measured |",
        "|---|---|---|",
    ]
    known = {path.stem.removeprefix("claim"): path for path in RESULTS.glob("claim*.json")}
    details = []
    for key, claim in CLAIMS.items():
        if key in known:
            found = json.loads(known[key].read_text())
            lines.append(f"| {key}. {found['claim']} | {found['verdict']} | {found['sentence']} |")
            details += _details(key, found)
        else:
            lines.append(f"| {key}. {claim.text} | not run | |")
    return "\n".join([*lines, "", *details]) + "\n"


def _details(key: str, found: dict[str, Any]) -> list[str]:
    lines = [
        f"## Claim {key}",
        "",
        f"`{found['command']}`, seeds {', '.join(map(str, found['seeds']))}; "
        f"{found['seconds_of_runs'] / 60:.0f} minutes of runs on {found['machine']}.",
        "",
        "| run | test loss | accuracy | failed | alarms | lowest entropy share |",
        "|---|---|---|---|---|---|",
    ]
    for name, runs in found["runs"].items():
        by_name = {name: runs}
        entropies = [r["lowest_entropy"] for r in runs if r["lowest_entropy"] is not None]
        cells = (
            text_of(losses(by_name, name)),
            text_of([r["accuracy"] for r in runs]),
            f"{failures(by_name, name)} of {len(runs)}",
            str(sum(bool(r["alarms"]) for r in runs)),
            text_of(entropies, 2) if entropies else "-",
        )
        lines.append(f"| {name} | {' | '.join(cells)} |")
    return [*lines, ""]


def _summary(run: dict[str, Any]) -> dict[str, Any]:
    """Return what of a run is committed."""
    shares = [v for p in run["probes"] for v in p["entropy_normalised"] if v is not None]
    return {
        "settings": {k: run["settings"][k] for k in ("model", "data", "seed")},
        "lowest_entropy": min(shares, default=None),
        **{
            key: run[key]
            for key in ("test_loss", "accuracy", "reference", "lost_step", "seconds", "alarms")
        },
    }


def _progress(key: str) -> Any:
    def show(name: str, done: int, total: int) -> None:
        print(f"claim {key}: {done} of {total} runs, last {name}", file=sys.stderr, flush=True)

    return show


if __name__ == "__main__":
    raise SystemExit(main())
