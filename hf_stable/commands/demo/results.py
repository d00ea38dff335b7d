"""What the demo measured, and the sentences that follow from the figures."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import Any

from hf_stable._json import as_json_value
from hf_stable.commands.demo.parts import PARTS, DemoPart
from hf_stable.commands.demo.runs import RunResult

__all__ = ["DemoResult", "Reload"]


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
