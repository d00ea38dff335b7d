"""The main job on embedded data: train without warmup, save folded, reload with stock transformers.

What is compared with what, the new process, and the sentences that follow from the figures; the
runs themselves are in `demo_runs`.
"""

from __future__ import annotations

import contextlib
import json
import os
import platform
import shutil
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file

from hf_stable._json import as_json_value
from hf_stable.checkpoints.saving import check_writable
from hf_stable.commands.demo.runs import (
    DemoRun,
    RunResult,
    load_digits,
    require_recipes,
    run_folder,
    train,
)
from hf_stable.report import write_report

__all__ = ["PARTS", "DemoPart", "DemoResult", "Reload", "run_demo"]


@dataclass(frozen=True)
class DemoPart:
    """Runs that stand in one table, and which of them is to beat which.

    Attributes:
        title: heading of the table.
        runs: the runs, in order.
        baseline: name of the run that is expected to suffer.
        challenger: name of the run that is expected to do better.
    """

    title: str
    runs: tuple[DemoRun, ...]
    baseline: str
    challenger: str

    def is_won(self, results: list[RunResult]) -> bool:
        """Say whether the challenger beats the baseline."""
        by_name = {result.name: result for result in results}
        return by_name[self.challenger].beats(by_name[self.baseline])


PARTS = (
    DemoPart(
        title="sigmaReparam: AdamW at learning rate 1e-2, no warmup",
        runs=(
            DemoRun("plain", init="std"),
            DemoRun("sigmaReparam", init="std", patched=True),
        ),
        baseline="plain",
        challenger="sigmaReparam",
    ),
    DemoPart(
        title="AdamW2: learning rate 1e-2, weight decay 0.05; warmup over 20 % of the steps",
        runs=(
            DemoRun("AdamW", init="xavier", weight_decay=0.05),
            DemoRun("AdamW with warmup", init="xavier", weight_decay=0.05, warmup=0.2),
            DemoRun(
                "AdamW2",
                init="xavier",
                weight_decay=0.05,
                optim="adamw2",
                optim_args="tau=0.004",
            ),
            DemoRun(
                "AdamW at 1e-3",
                init="xavier",
                weight_decay=0.05,
                learning_rate=1e-3,
                remark="what AdamW2 buys is robustness to the rate, not a better optimum",
            ),
        ),
        baseline="AdamW",
        challenger="AdamW2",
    ),
)


@dataclass(frozen=True)
class Reload:
    """What a process without hf_stable found in the saved model.

    Attributes:
        accuracy: on the test images, computed there.
        expected_accuracy: the patched model's own, computed here.
        max_difference: largest absolute difference of a logit.
        max_logit: largest absolute logit.
        key_problems: missing and unexpected keys.
        imported_hf_stable: whether hf_stable found its way into that process after all.
    """

    accuracy: float
    expected_accuracy: float
    max_difference: float
    max_logit: float
    key_problems: list[str]
    imported_hf_stable: bool

    @property
    def agrees(self) -> bool:
        """Return whether it is the same model: equal accuracy, logits equal to rounding."""
        return (
            self.accuracy == self.expected_accuracy
            # gamma / sigma * W is rounded once per weight, 2**-24 relative: the logits of a model
            # of this depth then move by some 1e-6 of their size.
            and self.max_difference <= 1e-4 * max(1.0, self.max_logit)
            and not self.key_problems
            and not self.imported_hf_stable
        )


@dataclass(frozen=True)
class DemoResult:
    """Everything the demo measured, and what follows from it.

    Attributes:
        runs: results by the title of their part.
        reload: the saved model in a new process.
        quick: whether the runs were cut to a few steps.
        seed: seed of the split, the weights and the order of the data.
        seconds: wall time of everything.
        output: folder with the model, the reload script and results.json.
        report: the page on all runs.
        versions: versions of what took part.
    """

    runs: dict[str, list[RunResult]]
    reload: Reload
    quick: bool
    seed: int
    seconds: float
    output: str
    report: str
    versions: dict[str, str]

    @property
    def passed(self) -> bool:
        """Return whether the reload agrees and, unless `quick`, both challengers won."""
        won = all(part.is_won(self.runs[part.title]) for part in PARTS)
        return self.reload.agrees and (self.quick or won)

    @property
    def findings(self) -> list[str]:
        """Return what the figures show, in sentences; quick runs are not compared."""
        parts = () if self.quick else PARTS
        compared = [line for part in parts for line in _compare(part, self.runs[part.title])]
        return [*compared, _judge(self.reload)]

    def to_dict(self) -> dict[str, Any]:
        """Return plain data for JSON; NaN and infinity become None."""
        reload = asdict(self.reload) | {"agrees": self.reload.agrees}
        verdict = {"passed": self.passed, "findings": self.findings, "reload": reload}
        return as_json_value(asdict(self) | verdict)


def run_demo(
    output: str | os.PathLike[str],
    *,
    seed: int = 0,
    quick: bool = False,
    on_run: Callable[[DemoRun], None] = lambda run: None,
    on_part: Callable[[DemoPart, list[RunResult]], None] = lambda part, results: None,
) -> DemoResult:
    """Train every run of `PARTS`, save the patched model folded, reload it, write a report.

    The Trainer shows progress bars on a terminal and prints its log lines elsewhere.

    Args:
        output: folder for the model, the reload script, the runs' logs, report.html and
            results.json; made if it does not exist.
        seed: seed of the split, the weights and the order of the data.
        quick: a few steps of a two-block model, to see that all of it works; the comparisons
            then mean nothing and are not judged.
        on_run: called before each run.
        on_part: called with the results of each part.

    Returns:
        What was measured; the same is in `output`/results.json.

    Raises:
        ModuleNotFoundError: if the `recipes` extra is not installed.
        OSError: if `output` cannot be written.
        RuntimeError: if the reloading process fails.
    """
    start = time.perf_counter()
    require_recipes()
    output = Path(output)
    check_writable(output / "runs")
    (output / "results.json").unlink(missing_ok=True)  # what stays after a failure is no result
    data = load_digits(seed, quick)
    runs: dict[str, list[RunResult]] = {part.title: [] for part in PARTS}
    with _one_thread():
        for part in PARTS:
            for run in part.runs:
                on_run(run)
                runs[part.title].append(train(run, data, output, seed=seed, quick=quick))
            on_part(part, runs[part.title])
    folders = [run_folder(run, output) for part in PARTS for run in part.runs]
    report = write_report(folders, output / "report.html").files[0]
    result = DemoResult(
        runs=runs,
        reload=_reload(output),
        quick=quick,
        seed=seed,
        seconds=time.perf_counter() - start,
        output=str(output),
        report=str(report),
        versions={"python": platform.python_version()}
        | {name: version(name) for name in ("torch", "transformers", "hf-stable")},
    )
    (output / "results.json").write_text(json.dumps(result.to_dict(), indent=2) + "\n")
    return result


@contextlib.contextmanager
def _one_thread() -> Iterator[None]:
    """Run on one thread: products of this size only wait for each other on more."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(before)


def _reload(output: Path) -> Reload:
    """Run the reload script, which knows nothing of hf_stable, in a process of its own."""
    script = output / "reload.py"
    shutil.copyfile(Path(__file__).with_name("reload.py"), script)
    done = subprocess.run([sys.executable, str(script)], capture_output=True, text=True)
    if done.returncode:
        raise RuntimeError(
            f"{script} failed with exit code {done.returncode}: "
            f"{done.stderr.strip().splitlines()[-1]}"
        )
    saved = load_file(output / "test_digits.safetensors")
    logits = saved["logits"]
    accuracy = (logits.argmax(-1) == saved["labels"]).float().mean().item()
    return Reload(
        expected_accuracy=accuracy,
        max_logit=logits.abs().max().item(),
        **json.loads(done.stdout.splitlines()[-1]),
    )


def _compare(part: DemoPart, results: list[RunResult]) -> list[str]:
    """Say in words what the figures of a part show, whichever way they point."""
    by_name = {result.name: result for result in results}
    baseline, challenger = by_name[part.baseline], by_name[part.challenger]
    verb = "beats" if part.is_won(results) else "does not beat"
    lines = [f"{_figures(challenger)} {verb} {_figures(baseline)}."]
    for run in part.runs:
        if run.name not in (part.baseline, part.challenger):
            better = by_name[run.name].loss < challenger.loss
            remark = f": {run.remark}" if better and run.remark else ""
            relation = "better" if better else "no better"
            lines.append(
                f"{_figures(by_name[run.name])} does {relation} than {challenger.name}{remark}."
            )
    return lines


def _figures(result: RunResult) -> str:
    return f"{result.name} (test loss {result.loss:.3f}, accuracy {result.accuracy:.1%})"


def _judge(reload: Reload) -> str:
    """Say in words what the new process found."""
    if reload.imported_hf_stable:
        return "The reloading process imported hf_stable, so it shows nothing."
    verdict = "it is the same model" if reload.agrees else "it is NOT the same model"
    problems = f"; missing or unexpected: {reload.key_problems}" if reload.key_problems else ""
    return (
        f"Reloaded by transformers alone, in a new process, {verdict}: accuracy "
        f"{reload.accuracy:.1%} against {reload.expected_accuracy:.1%} before saving, largest "
        f"difference of a logit {reload.max_difference:.1e}{problems}."
    )
