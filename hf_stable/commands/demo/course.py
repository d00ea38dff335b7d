"""The demo's course: train without warmup, save folded, reload with stock transformers, report."""

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
from importlib.metadata import version
from pathlib import Path

import torch
from safetensors.torch import load_file

from hf_stable._json import to_json
from hf_stable.checkpoints.saving import check_writable
from hf_stable.commands.demo.digits import load_digits, require_recipes
from hf_stable.commands.demo.parts import PARTS, DemoPart
from hf_stable.commands.demo.results import DemoResult, Reload
from hf_stable.commands.demo.runs import DemoRun, RunResult, run_folder, train
from hf_stable.report import write_report

__all__ = ["run_demo"]


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
    (output / "results.json").write_text(to_json(result.to_dict(), indent=2) + "\n")
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
