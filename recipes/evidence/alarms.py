"""How often the monitor's alarms are right: healthy and collapsing runs, and its rule on them.

    python recipes/evidence/alarms.py    # does the runs that are missing, writes alarms.json

Four architectures, each in set-ups that train and in set-ups that do not, four seeds each. The
thresholds of `hf_stable.monitor.alarms.Thresholds` were fixed on seeds 0 and 1; what counts are
seeds 2 and 3. What a run is, its end and its attention say, and not the rule:

- it *failed* if its test loss kept too much of the loss of someone who knows only how frequent the
  labels are (`claim.failures`: 0.7 of it, of GPT-2's next tokens 0.97) or is not finite;
- it *collapsed* if it failed and the entropy of some head fell below half of its largest value; a
  run that failed with attention spread out counts neither way;
- it is *healthy* if it did not fail.

Its loss is *lost* where `hf_stable.measures.loss_curves.lost_step` says; the lead is the number of
steps from the first alarm to it. Most collapses here are stalls, which lose nothing that they had:
for those the share of the run that was still to come at the alarm is what the alarm could save.
"""

from __future__ import annotations

import json
import math
import sys
from collections.abc import Iterable
from dataclasses import asdict, replace
from pathlib import Path
from statistics import median
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))  # where it is run from must not matter

from hf_stable.measures.loss_curves import lost_step
from hf_stable.monitor.alarms import AlarmRules, Thresholds
from recipes.evidence.checking import do_as_asked, seconds_of
from recipes.evidence.claim import ROWS_SPARSE, failures, of
from recipes.evidence.runs import ADAMW2, GPT2, SWIN, VIT

RESULTS = Path(__file__).resolve().parent / "alarms.json"

FIXED_ON, REPORTED_ON = (0, 1), (2, 3)
"""Seeds."""

SHORT_VIT = replace(VIT, steps=120, batch_size=16, model_config=dict(num_hidden_layers=4))
SHORT_GPT2 = replace(GPT2, steps=150, batch_size=8, model_config=dict(n_layer=3))
BERT = replace(GPT2, model="bert", steps=120, learning_rate=3e-3)

FASTER = dict(optim="adamw2", optim_args="tau=0.01")
WITHOUT_NORMS = dict(init="default", patch="remove_pre_layernorm", learning_rate=1e-2)

SETUPS = of(
    {
        "GPT-2, AdamW2 at 3e-2": replace(SHORT_GPT2, **FASTER),
        "GPT-2, 3e-2": SHORT_GPT2,
        "GPT-2, 3e-2, warmup": replace(SHORT_GPT2, warmup=0.2),
        "GPT-2 in full, 3e-2, warmup": replace(GPT2, warmup=0.2),
        "GPT-2, 3e-3": replace(SHORT_GPT2, learning_rate=3e-3),
        "GPT-2, no block norms": replace(SHORT_GPT2, **WITHOUT_NORMS),
        "GPT-2, no block norms, 3e-2": replace(
            SHORT_GPT2, **(WITHOUT_NORMS | dict(learning_rate=3e-2))
        ),
        "GPT-2, no norms": replace(SHORT_GPT2, **WITHOUT_NORMS, patch_scope="all"),
        "ViT, AdamW2 at 1e-2": replace(SHORT_VIT, **FASTER),
        "ViT, AdamW2 at 5e-3": replace(SHORT_VIT, **FASTER, learning_rate=5e-3),
        "ViT, 2e-3": replace(SHORT_VIT, learning_rate=2e-3),
        "ViT, 1e-3": replace(SHORT_VIT, learning_rate=1e-3),
        "ViT, 1e-2": SHORT_VIT,
        "ViT, 3e-2": replace(SHORT_VIT, learning_rate=3e-2),
        "ViT, no block norms": replace(SHORT_VIT, **WITHOUT_NORMS, weight_decay=0.0),
        "Swin, AdamW2 at 1e-2": replace(SWIN, **ADAMW2),
        "Swin, AdamW2 at 3e-3": replace(SWIN, **FASTER, learning_rate=3e-3),
        "Swin, 1e-2": SWIN,
        "Swin, no block norms": replace(SWIN, **WITHOUT_NORMS),
        "BERT, AdamW2 at 3e-3": replace(BERT, **ADAMW2),
        "BERT, AdamW2 at 1e-2": replace(BERT, **ADAMW2, learning_rate=1e-2),
        "BERT, 1e-2": replace(BERT, learning_rate=1e-2),
        "BERT, 3e-2": replace(BERT, learning_rate=3e-2),
    }
)


def replay(folder: Path, thresholds: Thresholds | None = None) -> dict[str, Any]:
    """Feed a run's losses and probes to the rule; return what the run was and what the rule said.

    Args:
        folder: of the run, with `results.json` and `stability.jsonl`.
        thresholds: other than the defaults.
    """
    result = json.loads((folder / "results.json").read_text())
    lines = [json.loads(line) for line in (folder / "stability.jsonl").read_text().splitlines()]
    probes = {line["step"]: line["quantities"] for line in lines if line["event"] == "probe"}
    losses = [math.nan if loss is None else loss for loss in result["losses"]]
    rules, alarms = AlarmRules(thresholds), []
    for step, loss in enumerate(losses, start=1):
        alarms += rules.observe_loss(step, loss)
        if step in probes:
            alarms += rules.observe_probe(step, probes[step])
    entropies = [v for p in result["probes"] for v in p["entropy_normalised"] if v is not None]
    lowest = min(entropies)
    failed = bool(failures({"run": [result]}, "run"))
    return {
        "model": result["settings"]["model"],
        "seed": result["settings"]["seed"],
        "steps": len(losses),
        "test_loss": result["test_loss"],
        "reference": result["reference"],
        "lowest_entropy": lowest,
        "kind": kind_of(failed, lowest),
        "alarm": alarms[0].step if alarms else None,
        "why": alarms[0].kind if alarms else None,
        "lost": lost_step(losses),
    }


def kind_of(failed: bool, lowest_entropy: float) -> str:
    """Say what a run is, by its end and its attention alone."""
    if not failed:
        return "healthy"
    return "collapsed" if lowest_entropy < ROWS_SPARSE else "failed otherwise"


def rates(runs: Iterable[dict[str, Any]]) -> dict[str, Any]:
    """Return how often the rule was right on some runs, and how early.

    Returns:
        Counts of healthy runs and of those with an alarm, of collapsed ones and of those without;
        `leads`, steps from the alarm to the loss being lost, of the collapsed runs that have both;
        `still_to_come_median`, share of the run that lay ahead at the alarm of collapsed ones.
    """
    runs = list(runs)
    healthy = [run for run in runs if run["kind"] == "healthy"]
    collapsed = [run for run in runs if run["kind"] == "collapsed"]
    caught = [run for run in collapsed if run["alarm"] is not None]
    leads = sorted(run["lost"] - run["alarm"] for run in caught if run["lost"] is not None)
    ahead = [1 - run["alarm"] / run["steps"] for run in caught]
    return {
        "healthy": len(healthy),
        "false_alarms": sum(run["alarm"] is not None for run in healthy),
        "collapsed": len(collapsed),
        "missed": len(collapsed) - len(caught),
        "lost": sum(run["lost"] is not None for run in collapsed),
        "leads": leads,
        "in_time": sum(lead > 0 for lead in leads),
        "still_to_come_median": round(median(ahead), 2) if ahead else None,
    }


def summary(runs: list[dict[str, Any]]) -> dict[str, Any]:
    """Return the rates of both halves, and of each architecture in the half that counts."""
    reported = [run for run in runs if run["seed"] in REPORTED_ON]
    return {
        "fixed_on": rates(run for run in runs if run["seed"] in FIXED_ON),
        "reported": rates(reported),
        "reported_by_model": {
            model: rates(run for run in reported if run["model"] == model)
            for model in sorted({run["model"] for run in runs})
        },
    }


def main() -> None:
    """Do the runs, replay the rule on them, print the rates and write all of it."""
    found = do_as_asked(__doc__, "alarms", SETUPS, FIXED_ON + REPORTED_ON)
    runs = [
        {"run": name, **replay(Path(result["settings"]["output"]))}
        for name, results in found.items()
        for result in results
    ]
    content = {
        "command": "python recipes/evidence/alarms.py",
        "seconds_of_runs": seconds_of(found),
        "thresholds": asdict(Thresholds()),
        "seeds": {"fixed_on": FIXED_ON, "reported_on": REPORTED_ON},
        **summary(runs),
        "runs": runs,
    }
    RESULTS.write_text(json.dumps(content, indent=1) + "\n")
    print(json.dumps({k: v for k, v in content.items() if k != "runs"}, indent=1))


if __name__ == "__main__":
    main()
