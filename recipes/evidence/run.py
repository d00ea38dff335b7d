"""Test the papers' claims: do the runs, judge them, write results, figures and the table.

    python recipes/evidence/run.py                 # what the committed results do not have yet
    python recipes/evidence/run.py 1 4 --again     # two claims anew, three seeds
    python recipes/evidence/run.py 1 --seeds 5     # more seeds
    python recipes/evidence/run.py 16 --jobs 8     # eight runs at once; each claim can run alone
    python recipes/evidence/run.py --quick         # signs of claims 1, 4 and 6, seed 0
    python recipes/evidence/run.py --table         # judge, draw and write anew what is committed

Runs are kept in --work and not done twice; what was stopped goes on with the runs that are missing.
Results of whole claims go to recipes/evidence/results, figures to recipes/evidence/figures, the
table to recipes/evidence/README.md. A variant whose settings, seed by seed, are those of committed
results is taken over from there, unless the claim asks for figures that they lack. With --again
neither these nor the runs in --work are taken: the latter are removed first.
"""

from __future__ import annotations

import argparse
import contextlib
import importlib.util
import os
import platform
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict
from importlib.metadata import version
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))  # where it is run from must not matter

from rich.console import Console
from rich.progress import Progress

from recipes.evidence import figures, records
from recipes.evidence.claim import SHOWN, Claim, Verdict
from recipes.evidence.claims import CLAIMS
from recipes.evidence.page import page
from recipes.evidence.runs import Variant, do_runs, forget, key_of
from recipes.settings import Settings

PAGE = Path(__file__).resolve().parent / "README.md"
QUICK_SEED = 0
FEWEST_SEEDS = 3
OTHER_PACKAGE = "pytorch_optimizer"


def main() -> int:
    """Parse the command line and do what it says; 1 if a quick sign is another than in full."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("names", nargs="*", metavar="NAME", help=f"of {', '.join(CLAIMS)}")
    parser.add_argument("--seeds", type=int, default=FEWEST_SEEDS, help="three or more")
    parser.add_argument("--again", action="store_true", help="take nothing that is there already")
    parser.add_argument("--quick", action="store_true")
    parser.add_argument("--table", action="store_true")
    parser.add_argument(
        "--jobs", "--workers", dest="workers", type=int, default=os.cpu_count(), metavar="N",
        help="runs at once, one thread each",
    )  # fmt: skip
    parser.add_argument("--work", type=Path, default=Path("evidence-output"))
    args = parser.parse_args()
    if refusal := refused(args):
        parser.error(refusal)
    if args.quick:
        return quick(args)
    claims = [CLAIMS[name] for name in args.names or CLAIMS]
    if args.again and not args.table:
        # All before the first run: what claims have in common is done once.
        forget([v for claim in claims for v in claim.variants], _seeds(args, claims), args.work)
    for claim in claims:
        if not args.table:
            test(claim, args)
        publish(claim)
    PAGE.write_text(page(CLAIMS))
    return 0


def refused(args: argparse.Namespace) -> str | None:
    """Return why a command line cannot be followed, if it cannot, before anything is run."""
    if unknown := [name for name in args.names if name not in CLAIMS]:
        return f"there is no claim {unknown[0]!r}; claims are {', '.join(CLAIMS)}"
    if args.quick:
        with_one = [key for key, claim in CLAIMS.items() if claim.quick]
        if without := [name for name in args.names if name not in with_one]:
            return f"claim {without[0]} has no quick set; claims {', '.join(with_one)} have"
        return None
    if args.seeds < FEWEST_SEEDS:
        return f"--seeds {args.seeds} are too few for a verdict, which takes {FEWEST_SEEDS} or more"
    if args.table or importlib.util.find_spec(OTHER_PACKAGE) is not None:
        return None
    for name in args.names or CLAIMS:
        todo = missing(CLAIMS[name], known(args), _seeds(args, [CLAIMS[name]]))
        if any(variant.settings.optim.startswith(f"{OTHER_PACKAGE}:") for variant in todo):
            return f'claim {name} needs {OTHER_PACKAGE}: pip install -e ".[evidence]"'
    return None


def known(args: argparse.Namespace) -> dict[str, dict[str, Any]]:
    """Return the committed entries that may be taken over, by `key_of` their settings."""
    return {} if args.again else records.committed(CLAIMS.values())


def missing(
    claim: Claim, entries: Mapping[str, Mapping[str, Any]], seeds: Sequence[int]
) -> list[Variant]:
    """Return the variants of a claim that no committed entry serves."""
    return [
        variant
        for variant in claim.variants
        if (entry := entries.get(key_of(variant.settings))) is None
        or not records.serves(entry, claim, variant, seeds)
    ]


def _seeds(args: argparse.Namespace, claims: Sequence[Claim]) -> range:
    return range(max([args.seeds, *(claim.seeds for claim in claims)]))


def test(claim: Claim, args: argparse.Namespace) -> None:
    """Do the runs of a claim that are not there yet, and write its results."""
    started = time.perf_counter()
    seeds = _seeds(args, [claim])
    there = known(args)
    todo = missing(claim, there, seeds)
    entries = {
        variant.name: there[key_of(variant.settings)]
        for variant in claim.variants
        if variant not in todo
    }
    with _progress(f"claim {claim.key}") as show:
        found = do_runs(todo, seeds, args.work, workers=args.workers, on_done=show)
    names = ("hf-stable", "torch", "transformers")
    made_with = ", ".join(f"{name} {version(name)}" for name in names)
    drawn = claim.figure.names if claim.figure else frozenset()
    for variant in todo:
        entries[variant.name] = records.entry_of(
            variant, found[variant.name], made_with, drawn=variant.name in drawn
        )
    entries = {variant.name: entries[variant.name] for variant in claim.variants}
    verdict = claim.judge({name: entry["runs"] for name, entry in entries.items()})
    content = {
        "claim": claim.text,
        "command": f"python recipes/evidence/run.py {claim.key} --again --seeds {len(seeds)}",
        **_as_json(verdict),
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
        f"claim {claim.key}: {verdict.word} ({len(todo)} of {len(entries)} variants run, "
        f"{time.perf_counter() - started:.0f} s). {verdict.sentence}"
    )


def _as_json(verdict: Verdict) -> dict[str, Any]:
    word, sentence, findings = verdict
    return {"verdict": word, "sentence": sentence, "findings": list(findings)}


def publish(claim: Claim) -> None:
    """Judge what is committed of a claim and draw its figure."""
    content = records.read(claim)
    if content is None:
        return
    judged = _as_json(claim.judge(records.runs_of(content)))
    records.write(claim, {**content, "claim": claim.text, **judged})
    if claim.figure is not None:
        entries = content["variants"]
        courses = {name: entries[name]["course"] for name in claim.figure.names}
        figures.draw(claim.key, claim.figure, courses)


def quick(args: argparse.Namespace) -> int:
    """Do a few runs of claims 1, 4 and 6 and say whether what shows is what shows in full.

    They are those of the claims themselves, seed 0: shorter ones are other set-ups, in which AdamW
    with warmup does not train, say.
    """
    started, missed = time.perf_counter(), 0
    chosen = {
        claim.key: [variant for variant in claim.variants if variant.name in claim.quick]
        for claim in CLAIMS.values()
        if claim.quick and (not args.names or claim.key in args.names)
    }
    variants = [variant for of_claim in chosen.values() for variant in of_claim]
    if args.again:
        forget(variants, [QUICK_SEED], args.work)
    with _progress("quick set") as show:
        found = do_runs(variants, [QUICK_SEED], args.work, workers=args.workers, on_done=show)
    for key, of_claim in chosen.items():
        verdict = CLAIMS[key].judge(
            {v.name: [records.summary(run) for run in found[v.name]] for v in of_claim}
        )
        in_full = (records.read(CLAIMS[key]) or {"verdict": "not run"})["verdict"]
        missed += (verdict.word in SHOWN) != (in_full in SHOWN)
        said = " ".join((verdict.sentence, *verdict.findings))
        print(f"claim {key}, seed {QUICK_SEED}: {verdict.word} (in full: {in_full}). {said}")
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
