"""How often the report's verdict is right: runs whose end is known, and what is said of them.

    python recipes/evidence/verdicts.py    # does the runs that are missing, writes verdicts.json

The set-ups are those of `alarms.py`, four architectures that train or do not, and runs as example
scripts make them: usual rates, clipping, a linear schedule. The rules were fixed on seed 0. What
counts is seed 2.

What a run is, its test says, which the report does not read: it *knows nothing* if its test loss is
not finite, or within 3 % of the loss of someone who knows only how frequent each label is
(`claim.stands_at_chance`). A verdict is right on it if it says that the loss was lost, never came
down, or hardly moved; and on any other run if it says none of these.

Each run is judged four times: as it was logged, at every step, and as if its Trainer had logged
means over ten steps; with what the monitor saw, and without.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Iterable, Sequence
from dataclasses import replace
from pathlib import Path
from statistics import mean
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))  # where it is run from must not matter

from hf_stable.report.reading import read_run
from hf_stable.report.run_records import RunRecords
from hf_stable.report.verdict import judge
from recipes.evidence.alarms import BERT, SETUPS, SHORT_GPT2, SHORT_VIT
from recipes.evidence.checking import do_as_asked, seconds_of, write_rows
from recipes.evidence.claim import of, stands_at_chance
from recipes.evidence.runs import SWIN, Variant

RESULTS = Path(__file__).resolve().parent / "verdicts.json"

FIXED_ON, REPORTED_ON = (0,), (2,)
"""Seeds."""

LOGGED_EVERY = (1, 10)
"""Steps whose mean loss is a record."""

USUAL = dict(
    init="default", weight_decay=0.01, adam_beta2=0.999, max_grad_norm=1.0,
    lr_scheduler_type="linear",
)  # fmt: skip
"""What example scripts of transformers leave as it is, or set."""

EXAMPLES = of(
    {
        "GPT-2, an example, 1e-3": replace(SHORT_GPT2, **USUAL, learning_rate=1e-3),
        "GPT-2, an example, 3e-4, warmup": replace(
            SHORT_GPT2, **USUAL, learning_rate=3e-4, warmup=0.1
        ),
        "GPT-2, an example, 40 steps": replace(SHORT_GPT2, **USUAL, learning_rate=1e-3, steps=40),
        "ViT, an example, 1e-3": replace(SHORT_VIT, **USUAL, learning_rate=1e-3),
        "ViT, an example, 3e-4": replace(SHORT_VIT, **USUAL, learning_rate=3e-4),
        "ViT, an example, smoothed labels": replace(
            SHORT_VIT, **USUAL, learning_rate=1e-3, label_smoothing=0.1
        ),
        "ViT, an example, 40 steps": replace(SHORT_VIT, **USUAL, learning_rate=1e-3, steps=40),
        "Swin, an example, 1e-3": replace(SWIN, **USUAL, learning_rate=1e-3),
        "BERT, an example, 1e-3": replace(BERT, **USUAL, learning_rate=1e-3),
        "BERT, an example, 3e-4": replace(BERT, **USUAL, learning_rate=3e-4),
        "BERT, an example, 3e-5": replace(BERT, **USUAL, learning_rate=3e-5),
    }
)


def variants() -> tuple[Variant, ...]:
    """Return all set-ups, each with a checkpoint at its end, as runs have one."""
    return tuple(
        replace(each, settings=replace(each.settings, save_steps=each.settings.steps))
        for each in (*SETUPS, *EXAMPLES)
    )


def rows_of(name: str, result: dict[str, Any], folder: Path) -> list[dict[str, Any]]:
    """Return what is said of a run, and what it is, for each way in which it may be logged.

    Args:
        name: of its set-up.
        result: what `recipes.run.run` returned.
        folder: of the run.
    """
    run = read_run(folder)
    rows = []
    for every in LOGGED_EVERY:
        for is_watched in (True, False):
            verdict = judge(logged(run, every, is_watched=is_watched))
            rows.append(
                {
                    "run": name,
                    "model": result["settings"]["model"],
                    "seed": result["settings"]["seed"],
                    "test_loss": result["test_loss"],
                    "reference": result["reference"],
                    "knows_nothing": stands_at_chance(result),
                    "logged_every": every,
                    "watched": is_watched,
                    "state": verdict.state,
                    "headline": verdict.headline,
                    "said_to_have_learnt": verdict.has_learnt,
                }
            )
    return rows


def logged(run: RunRecords, every: int, *, is_watched: bool) -> RunRecords:
    """Return a run as its records would be had it been logged otherwise.

    Args:
        run: logged at every step.
        every: steps whose mean is a record.
        is_watched: whether what the monitor saw is kept; losses of single steps only if `every` is
            one.
    """
    losses = run.logged("loss")
    means = [losses[end - every : end] for end in range(every, len(losses) + 1, every)]
    history = tuple({"step": each[-1][0], "loss": mean(v for _, v in each)} for each in means)
    probes = run.probes if every == 1 else tuple(replace(p, loss=None) for p in run.probes)
    return replace(
        run,
        history=history,
        probes=probes if is_watched else (),
        events=run.events if is_watched else (),
    )


def rates(rows: Iterable[dict[str, Any]]) -> dict[str, Any]:
    """Return how often verdicts were right, and the two ways in which they were wrong.

    Returns:
        `runs`, and of them `right`; `know_nothing`, and of those `missed`, which were said to have
        learnt; `know_something`, and of those `accused`, which were said not to have, and `failed`,
        which were said to have failed.
    """
    rows = list(rows)
    nothing = [row for row in rows if row["knows_nothing"]]
    something = [row for row in rows if not row["knows_nothing"]]
    missed = sum(row["said_to_have_learnt"] for row in nothing)
    accused = sum(not row["said_to_have_learnt"] for row in something)
    return {
        "runs": len(rows),
        "right": len(rows) - missed - accused,
        "know_nothing": len(nothing),
        "missed": missed,
        "know_something": len(something),
        "accused": accused,
        "failed": sum(row["state"] == "failed" for row in something),
    }


def summary(rows: Sequence[dict[str, Any]]) -> dict[str, Any]:
    """Return the rates of both halves, by how runs were logged and whether they were watched."""
    return {
        half: {
            f"{'watched' if is_watched else 'not watched'}, logged every {every}": rates(
                row
                for row in rows
                if row["seed"] in seeds
                and row["logged_every"] == every
                and row["watched"] == is_watched
            )
            for every in LOGGED_EVERY
            for is_watched in (True, False)
        }
        for half, seeds in (("fixed_on", FIXED_ON), ("reported", REPORTED_ON))
    }


def main() -> None:
    """Do the runs, judge them, print the rates and write all of it."""
    found = do_as_asked(__doc__, "verdicts", variants(), FIXED_ON + REPORTED_ON)
    rows = [
        row
        for name, results in found.items()
        for result in results
        for row in rows_of(name, result, Path(result["settings"]["output"]))
    ]
    content = {
        "command": "python recipes/evidence/verdicts.py",
        "seconds_of_runs": seconds_of(found),
        "seeds": {"fixed_on": FIXED_ON, "reported_on": REPORTED_ON},
        **summary(rows),
    }
    write_rows(RESULTS, content, {"rows": rows})
    print(json.dumps(content, indent=1))


if __name__ == "__main__":
    main()
