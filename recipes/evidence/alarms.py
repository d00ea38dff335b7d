"""How often the monitor's alarms are right: its rule, replayed on the runs of the evidence.

    python recipes/evidence/run.py && python recipes/evidence/alarms.py

A run *collapsed* if it failed (see `claims.failures`) and the entropy of some head fell below half
of its largest value; it is *healthy* if it did not fail. Thresholds were fixed on seed 0; what
counts are the other seeds. The lead is the number of steps from the first alarm to the step from
which the loss never came back (`hf_stable.alarms.lost_step`); a run that stalls has none.
"""

from __future__ import annotations

import argparse
import json
import math
import sys
from pathlib import Path
from statistics import median
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))  # where it is run from must not matter

from hf_stable.alarms import AlarmRules, Thresholds, lost_step
from recipes.evidence.claim import ROWS_SPARSE, failures

RESULTS = Path(__file__).resolve().parent / "alarms.json"


def replay(folder: Path, thresholds: Thresholds | None = None) -> dict[str, Any] | None:
    """Feed a run's losses and probes to the rule; None for a run without a monitor."""
    result = json.loads((folder / "results.json").read_text())
    if not result["probes"]:
        return None
    lines = [json.loads(line) for line in (folder / "stability.jsonl").read_text().splitlines()]
    probes = {line["step"]: line["quantities"] for line in lines if line["event"] == "probe"}
    losses = [math.nan if loss is None else loss for loss in result["losses"]]
    rules, alarms = AlarmRules(thresholds), []
    for step, loss in enumerate(losses, start=1):
        alarms += rules.observe_loss(step, loss)
        if step in probes:
            alarms += rules.observe_probe(step, probes[step])
    entropies = [v for p in result["probes"] for v in p["entropy_normalised"] if v is not None]
    failed = bool(failures({"run": [result]}, "run"))
    fell = min(entropies, default=0.0) < ROWS_SPARSE
    return {
        "run": folder.parent.name,
        "model": result["settings"]["model"],
        "seed": result["settings"]["seed"],
        "kind": ("collapsed" if fell else "failed otherwise") if failed else "healthy",
        "alarm": alarms[0].step if alarms else None,
        "why": alarms[0].kind if alarms else None,
        "lost": lost_step(losses),
    }


def rates(runs: list[dict[str, Any]]) -> dict[str, Any]:
    """Return the rates of false alarms and misses, and the leads, of some runs."""
    healthy = [run for run in runs if run["kind"] == "healthy"]
    collapsed = [run for run in runs if run["kind"] == "collapsed"]
    caught = [run for run in collapsed if run["alarm"] is not None]
    leads = [run["lost"] - run["alarm"] for run in caught if run["lost"] is not None]
    return {
        "healthy": len(healthy),
        "false_alarms": sum(run["alarm"] is not None for run in healthy),
        "collapsed": len(collapsed),
        "missed": len(collapsed) - len(caught),
        "alarm_step_median": median(run["alarm"] for run in caught) if caught else None,
        "lead_steps_median": median(leads) if leads else None,
        "alarms_before_loss_was_lost": f"{sum(lead > 0 for lead in leads)} of {len(leads)}",
    }


def main() -> None:
    """Replay all kept runs, print the rates and write them."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--work", type=Path, default=Path("evidence-output"))
    args = parser.parse_args()
    folders = sorted(path.parent for path in args.work.glob("*/seed*/results.json"))
    unique = {}
    for folder in folders:  # claims share set-ups: the same run under two names counts once
        settings = json.loads((folder / "results.json").read_text())["settings"]
        key = json.dumps({k: v for k, v in settings.items() if k != "output"}, sort_keys=True)
        unique.setdefault(key, folder)
    runs = [run for folder in unique.values() if (run := replay(folder)) is not None]
    fixed_on = [run for run in runs if run["seed"] == 0]
    others = [run for run in runs if run["seed"] != 0]
    content = {
        "command": "python recipes/evidence/alarms.py",
        "thresholds": "hf_stable.alarms.Thresholds()",
        "seed 0 (thresholds were fixed on it)": rates(fixed_on),
        "other seeds": rates(others),
        "runs": runs,
    }
    RESULTS.write_text(json.dumps(content, indent=1) + "\n")
    print(json.dumps({k: v for k, v in content.items() if k != "runs"}, indent=1))


if __name__ == "__main__":
    main()
