"""What the demo compares: runs that differ in one thing, and which is to beat which."""

from __future__ import annotations

from dataclasses import dataclass

from hf_stable.commands.demo.runs import DemoRun, RunResult

__all__ = ["PARTS", "DemoPart"]


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
