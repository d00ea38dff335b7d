"""Test the papers' claims: do the runs, judge them, write results, figures and the table.

    python recipes/evidence/run.py                 # what the committed results do not have yet
    python recipes/evidence/run.py 1 4 --again     # two claims anew, three seeds
    python recipes/evidence/run.py 1 --seeds 5     # more seeds
    python recipes/evidence/run.py --quick         # signs of claims 1, 4 and 6, one seed
    python recipes/evidence/run.py --table         # judge, draw and write anew what is committed

Runs are kept in --work and not done twice; a run that was stopped goes on where it was. Results of
whole claims go to recipes/evidence/results, figures to recipes/evidence/figures, the table to
recipes/evidence/README.md. A variant whose settings, seed by seed, are those of committed results
is taken over from there, unless the claim asks for figures that they lack.
"""

from __future__ import annotations

import argparse
import contextlib
import os
import platform
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import asdict, replace
from importlib.metadata import version
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))  # where it is run from must not matter

from rich.console import Console
from rich.progress import Progress

from recipes.evidence import figures, records
from recipes.evidence.claim import Claim
from recipes.evidence.claims import CLAIMS
from recipes.evidence.page import page
from recipes.evidence.runs import do_runs, key_of
from recipes.settings import Settings

PAGE = Path(__file__).resolve().parent / "README.md"
QUICK_STEPS, QUICK_SEED = 80, 1


def main() -> int:
    """Parse the command line and do what it says; 1 if a quick sign does not show."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("names", nargs="*", metavar="NAME", help=f"of {', '.join(CLAIMS)}")
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--again", action="store_true", help="take nothing that is committed")
    parser.add_argument("--quick", action="store_true")
    parser.add_argument("--table", action="store_true")
    parser.add_argument("--workers", type=int, default=os.cpu_count())
    parser.add_argument("--work", type=Path, default=Path("evidence-output"))
    args = parser.parse_args()
    if unknown := [name for name in args.names if name not in CLAIMS]:
        parser.error(f"there is no claim {unknown[0]!r}; claims are {', '.join(CLAIMS)}")
    if args.quick:
        return quick(args)
    for name in args.names or CLAIMS:
        if not args.table:
            test(CLAIMS[name], args)
        publish(CLAIMS[name])
    PAGE.write_text(page(CLAIMS))
    return 0


def test(claim: Claim, args: argparse.Namespace) -> None:
    """Do the runs of a claim that are not there yet, and write its results."""
    started = time.perf_counter()
    seeds = range(max(args.seeds, claim.seeds))
    known = {} if args.again else records.committed(CLAIMS.values())
    entries = {
        variant.name: entry
        for variant in claim.variants
        if (entry := known.get(key_of(variant.settings)))
        and records.serves(entry, claim, variant, seeds)
    }
    missing = [variant for variant in claim.variants if variant.name not in entries]
    with _progress(f"claim {claim.key}") as show:
        found = do_runs(missing, seeds, args.work, workers=args.workers, on_done=show)
    names = ("hf-stable", "torch", "transformers")
    made_with = ", ".join(f"{name} {version(name)}" for name in names)
    drawn = claim.figure.names if claim.figure else frozenset()
    for variant in missing:
        entries[variant.name] = records.entry_of(
            variant, found[variant.name], made_with, drawn=variant.name in drawn
        )
    entries = {variant.name: entries[variant.name] for variant in claim.variants}
    verdict, sentence = claim.judge({name: entry["runs"] for name, entry in entries.items()})
    content = {
        "claim": claim.text,
        "command": f"python recipes/evidence/run.py {claim.key} --again --seeds {len(seeds)}",
        "verdict": verdict,
        "sentence": sentence,
        "seeds": list(seeds),
        "machine": f"{platform.machine()}, {os.cpu_count()} cores, one thread a run",
        "seconds_of_runs": round(
            sum(run["seconds"] for entry in entries.values() for run in entry["runs"])
        ),
        "defaults": asdict(Settings()),
        "variants": entries,
    }
    records.write(claim, content)
    print(
        f"claim {claim.key}: {verdict} ({len(missing)} of {len(entries)} variants run, "
        f"{time.perf_counter() - started:.0f} s). {sentence}"
    )


def publish(claim: Claim) -> None:
    """Judge what is committed of a claim and draw its figure."""
    content = records.read(claim)
    if content is None:
        return
    content["claim"] = claim.text
    content["verdict"], content["sentence"] = claim.judge(records.runs_of(content))
    records.write(claim, content)
    if claim.figure is not None:
        entries = content["variants"]
        courses = {name: entries[name]["course"] for name in claim.figure.names}
        figures.draw(claim.key, claim.figure, courses)


def quick(args: argparse.Namespace) -> int:
    """Do a few short runs of claims 1, 4 and 6 and say whether their signs show."""
    started, missed = time.perf_counter(), 0
    for claim in CLAIMS.values():
        if not claim.quick or (args.names and claim.key not in args.names):
            continue
        variants = [
            replace(v, settings=replace(v.settings, steps=QUICK_STEPS))
            for v in claim.variants
            if v.name in claim.quick
        ]
        with _progress(f"claim {claim.key}") as show:
            found = do_runs(variants, [QUICK_SEED], args.work, workers=args.workers, on_done=show)
        verdict, sentence = claim.judge(
            {name: [records.summary(run) for run in runs] for name, runs in found.items()}
        )
        missed += verdict not in ("reproduced", "partly")
        print(f"claim {claim.key}, {QUICK_STEPS} steps, one seed: {verdict}. {sentence}")
    print(f"{time.perf_counter() - started:.0f} s on {args.workers} processes")
    return 1 if missed else 0


@contextlib.contextmanager
def _progress(label: str) -> Iterator[Callable[[str, int, int], None]]:
    """Show a bar on a terminal, and a line for each run elsewhere."""
    console = Console(stderr=True)
    with Progress(console=console, transient=True, disable=not console.is_terminal) as bar:
        task = bar.add_task(label, total=None)

        def show(name: str, done: int, total: int) -> None:
            bar.update(task, completed=done, total=total, description=f"{label}, last {name}")
            if not console.is_terminal:
                print(f"{label}: {done} of {total} runs, last {name}", file=sys.stderr, flush=True)

        yield show


if __name__ == "__main__":
    raise SystemExit(main())
