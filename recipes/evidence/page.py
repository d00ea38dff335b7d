"""The page of the evidence, from what is committed alone."""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Any

from recipes.evidence import larger, preflights, records, tau
from recipes.evidence.claim import VERDICTS, Claim, Results, failures, losses, text_of
from recipes.settings import Settings

HEADER = """# Evidence

The two papers make claims, and this page tests them. Each claim has runs, a rule that judges them
and a verdict. What did not show is here too.

The data are embedded everywhere: scikit-learn's digits, and the source of Python's standard
library; for translation the messages of Django, and for speech numbers that the voices of eSpeak NG
say. The models are small, with 0.2 to 1.3 M parameters, and each run has one CPU thread. So a
verdict holds at this scale only.

`python recipes/evidence/run.py` does the runs and writes this page; nothing in it is edited by
hand. With `--quick` it does a few runs of claims 1, 4 and 6 on one seed, and says whether they show
what the whole shows. A claim can be run alone, and `--jobs` says how many runs go on at once. The
last column has the minutes that the runs of a claim took, one after the other, on machines that
others used as well.

`python recipes/evidence/larger.py` has set-ups of claims 1, 6 and 7 with 3 to 5 M parameters, and
with `--gpu` ViT-S and GPT-2 small for six minutes of one GPU. What was run of them stands
[below](#beside-the-claims), each beside the verdict on the small models; the rest was tried dry.
One run of a kind is a sign of whether that verdict holds past their scale, and no verdict itself.
"""

RUNS = [
    "| run | test loss | accuracy | failed | lowest entropy share |",
    "|---|---|---|---|---|",
]

SETUPS = "<details><summary>Set-ups: what is not the default of `recipes/settings.py`</summary>"


def page(claims: Mapping[str, Claim]) -> str:
    """Return the table of all claims, what its words mean, and the runs of each claim."""
    lines = [HEADER, "| claim | verdict | in one sentence | minutes |", "|---|---|---|---|"]
    details: list[str] = []
    for key, claim in claims.items():
        found = records.read(claim)
        if found is None:
            lines.append(f"| {key}. {claim.title} | not run | | |")
            continue
        link = f"[{key}. {claim.title}](#claim-{key})"
        minutes = f"{found['seconds_of_runs'] / 60:.0f}"
        lines.append(f"| {link} | {found['verdict']} | {found['sentence']} | {minutes} |")
        details += _details(claim, found)
    words = [f"- **{word}**: {meaning}." for word, meaning in VERDICTS.items()]
    said = ["## What a verdict says", "", *words, ""]
    return "\n".join([*lines, "", *said, *details, *_beside()]) + "\n"


def _beside() -> list[str]:
    """Return what is measured beside the claims: about preflight, and about short runs."""
    flown = json.loads(preflights.RESULTS.read_text())
    short = json.loads(tau.RESULTS.read_text())
    counted = preflights.said(preflights.summary(flown["rows"]))
    return [
        "## Beside the claims",
        "",
        "**Is preflight right?** Runs at four rates each, and what their beginnings say: "
        f"`{flown['command']}`, seed {', '.join(map(str, flown['seeds']))}, which no threshold "
        f"was fixed on; {flown['seconds_of_runs'] / 60:.0f} minutes of runs.",
        "",
        *(f"- {sentence}" for sentence in counted),
        "",
        "**tau of short runs.** Mean test loss over three seeds, and accuracy: "
        f"`{short['command']}`, {short['seconds_of_runs'] / 60:.0f} minutes of runs.",
        "",
        *tau.table(short["reported"]),
        "",
        "**Larger models.** One run of a kind, with 3 to 5 M parameters, judged as the small ones "
        "are:",
        "",
        *larger.section(),
    ]


def _details(claim: Claim, found: dict[str, Any]) -> list[str]:
    lines = [
        f"## Claim {claim.key}",
        "",
        f"**{claim.title}.** {claim.text}.",
        "",
        f"Verdict: {found['verdict']}. {found['sentence']}",
        "",
        *(f"- {finding}" for finding in found["findings"]),
        "",
        f"`{found['command']}`, seeds {', '.join(map(str, found['seeds']))}; "
        f"{found['seconds_of_runs'] / 60:.0f} minutes of runs on {found['machine']}.",
        "",
    ]
    if claim.figure is not None:
        seeds = ", ".join(
            f"{name}: {found['variants'][name]['course']['seed']}"
            for row in claim.figure.rows
            for name in row
        )
        lines += [
            f"![Courses of runs](figures/claim{claim.key}.svg)",
            "",
            f"Of each variant the seed that ended best ({seeds}); of layers and heads the worst.",
            "",
        ]
    by_name = records.runs_of(found)
    lines += (claim.rows or _rows)(by_name)
    if claim.appendix is not None:
        lines += ["", *claim.appendix()]
    return [*lines, "", SETUPS, "", *_setups(found["variants"]), "", "</details>", ""]


def _rows(by_name: Results) -> list[str]:
    """Return a table with a row for each variant."""
    lines = list(RUNS)
    for name, runs in by_name.items():
        entropies = [r["lowest_entropy"] for r in runs if r["lowest_entropy"] is not None]
        cells = (
            text_of(losses(by_name, name)),
            text_of([r["accuracy"] for r in runs]),
            f"{failures(by_name, name)} of {len(runs)}",
            text_of(entropies, 2) if entropies else "-",
        )
        lines.append(f"| {name} | {' | '.join(cells)} |")
    return lines


def _setups(variants: Mapping[str, Any]) -> list[str]:
    """Return a line for each set-up; those that differ by their rate alone share one."""
    groups: dict[str, dict[str, dict[str, Any]]] = {}
    for name, entry in variants.items():
        others = {key: value for key, value in entry["changes"].items() if key != "learning_rate"}
        groups.setdefault(_compact(others), {})[name] = entry["changes"]
    lines = []
    for by_name in groups.values():
        names = list(by_name)
        shown = " to ".join((names[0], names[-1])) if len(names) > 2 else " and ".join(names)
        changes = dict(by_name[names[0]])
        if len(names) > 1:
            rates = (each.get("learning_rate", Settings.learning_rate) for each in by_name.values())
            changes["learning_rate"] = ", ".join(f"{rate:g}" for rate in rates)
        lines.append(f"- {shown}: {_compact(changes)}")
    return lines


def _compact(changes: Mapping[str, Any]) -> str:
    """Return settings as one would write them on the command line, without the dashes."""
    parts = []
    for key, value in changes.items():
        if isinstance(value, Mapping):
            value = ",".join(f"{name}:{each}" for name, each in value.items())
        parts.append(f"`{key}={value}`")
    return " ".join(parts) or "none"
