"""How far the cost model is right where we can measure.

Rates of this machine are fitted at some sizes of GPT-2 and ViT and predict others; a table puts
both times side by side.
"""

from __future__ import annotations

import copy
import json
import os
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from statistics import median

import torch
import transformers
from rich.console import Console
from transformers import PreTrainedModel

from hf_stable.adamw2_groups import ModelAdamW2
from hf_stable.bench import PhaseClock, alternate, describe_machine
from hf_stable.cost_model import measure_shape, step_costs
from hf_stable.patching import patch
from hf_stable.refreshing import refresh
from hf_stable.sigma_reparam import sigma_layers
from hf_stable.terminal import make_console, make_table

__all__ = ["CHECKED", "FITTED", "Prediction", "Size", "bench_scale", "fit"]


@dataclass(frozen=True)
class Size:
    """A model to time."""

    model_type: str
    hidden: int
    layers: int
    batch: int

    @property
    def name(self) -> str:
        """How the table calls it."""
        return f"{self.model_type} {self.hidden} x {self.layers}, batch {self.batch}"


FITTED = (
    Size("gpt2", 192, 4, 2),
    Size("gpt2", 384, 4, 2),
    Size("vit", 256, 6, 2),
    Size("vit", 512, 4, 2),
)
CHECKED = (
    Size("gpt2", 256, 8, 2),
    Size("gpt2", 512, 6, 2),
    Size("gpt2", 768, 4, 1),
    Size("vit", 384, 4, 4),
    Size("vit", 640, 4, 2),
)
SEQUENCE, IMAGE, PATCH, VOCABULARY = 196, 224, 16, 2048


@dataclass(frozen=True)
class Prediction:
    """One part of a step at one size.

    Attributes:
        size: the model.
        part: as in `step_costs`.
        measured: seconds, median.
        predicted: seconds.
        fitted: whether the rates were fitted to this size too.
    """

    size: str
    part: str
    measured: float
    predicted: float
    fitted: bool

    @property
    def error(self) -> float:
        """Predicted over measured, less one."""
        return self.predicted / self.measured - 1


def bench_scale(
    *,
    output: str | os.PathLike[str] | None = None,
    rounds: int = 10,
    fitted: Sequence[Size] = FITTED,
    checked: Sequence[Size] = CHECKED,
    console: Console | None = None,
) -> list[Prediction]:
    """Fit this machine's rates at some sizes, predict all, print and write both times.

    Each part takes `work / rate + calls * overhead`: flops and blocks of the model for forward and
    backward, bytes and matrices for the rest.

    Args:
        output: JSON file to write.
        rounds: repetitions, the sizes alternated.
        fitted: sizes to fit, at least two.
        checked: sizes that the fit does not see.
        console: where to print.

    Returns:
        All predictions.

    Raises:
        ValueError: if `rounds` is less than 1.
        OSError: if `output` cannot be written.
    """
    sizes = (*fitted, *checked)
    models = {size.name: _build(size) for size in sizes}
    samples = alternate(
        {size.name: _subject(models[size.name], size) for size in sizes}, rounds=rounds
    )
    work = {size.name: _work(models[size.name], size) for size in sizes}
    found = []
    for part in ("model", "AdamW", "AdamW2", "sigmaReparam"):
        measured = {size.name: median(samples[size.name][part]) for size in sizes}
        rates = fit([(*work[size.name][part], measured[size.name]) for size in fitted])
        found += [
            Prediction(
                size.name,
                part,
                measured[size.name],
                sum(r * amount for r, amount in zip(rates, work[size.name][part], strict=True)),
                size in fitted,
            )
            for size in sizes
        ]
    _print_predictions(found, console)
    if output is not None:
        content = {
            "machine": describe_machine(),
            "rounds": rounds,
            "results": [asdict(each) | {"error": each.error} for each in found],
        }
        Path(output).write_text(json.dumps(content, indent=2) + "\n")
    return found


def fit(points: Sequence[tuple[float, float, float]]) -> tuple[float, float]:
    """Return `(a, b)`, none negative, that make `a * work + b * calls` the closest to the seconds.

    Args:
        points: (work, calls, seconds) each; errors count relative to the seconds.
    """
    rows = [(work / seconds, calls / seconds) for work, calls, seconds in points]
    xx, xy, yy = (sum(r[i] * r[j] for r in rows) for i, j in ((0, 0), (0, 1), (1, 1)))
    x, y = (sum(row[i] for row in rows) for i in (0, 1))
    determinant = xx * yy - xy * xy
    a = (x * yy - y * xy) / determinant if determinant else -1.0
    b = (y * xx - x * xy) / determinant if determinant else -1.0
    if a < 0:
        return 0.0, y / yy
    return (x / xx, 0.0) if b < 0 else (a, b)


def _build(size: Size) -> PreTrainedModel:
    heads = size.hidden // 64
    if size.model_type == "vit":
        return transformers.ViTForImageClassification(
            transformers.ViTConfig(
                hidden_size=size.hidden, num_hidden_layers=size.layers, num_attention_heads=heads,
                intermediate_size=4 * size.hidden, image_size=IMAGE, patch_size=PATCH,
            )
        )  # fmt: skip
    return transformers.GPT2LMHeadModel(
        transformers.GPT2Config(
            vocab_size=VOCABULARY, n_positions=SEQUENCE, n_embd=size.hidden, n_layer=size.layers,
            n_head=heads, bos_token_id=0, eos_token_id=0,
        )
    )  # fmt: skip


def _subject(model: PreTrainedModel, size: Size) -> Callable[[], Mapping[str, float]]:
    if size.model_type == "vit":
        inputs = {
            "pixel_values": torch.randn(size.batch, 3, IMAGE, IMAGE),
            "labels": torch.zeros(size.batch, dtype=torch.long),
        }
    else:
        ids = torch.randint(VOCABULARY, (size.batch, SEQUENCE))
        inputs = {"input_ids": ids, "labels": ids}
    layers = [layer for _, layer in sigma_layers(patch(copy.deepcopy(model), "sigma_reparam"))]
    groups = [{"params": list(model.parameters())}]
    adamw = torch.optim.AdamW(model.parameters(), lr=1e-6, fused=True)
    adamw2 = ModelAdamW2(groups, structure=model, lr=1e-6)
    model.train()

    def step() -> Mapping[str, float]:
        clock = PhaseClock()
        model(**inputs).loss.backward()
        clock.lap("model")
        adamw.step()
        clock.lap("AdamW")
        adamw2.step()
        clock.lap("AdamW2")
        refresh(layers)
        clock.lap("sigmaReparam")
        model.zero_grad()
        return clock.seconds

    return step


def _work(model: PreTrainedModel, size: Size) -> dict[str, tuple[float, float]]:
    """Return work and calls of each part on one process."""
    shape = measure_shape(model)
    costs = step_costs(shape, num_processes=1, tokens=size.batch * shape.sequence)
    calls = {
        "model": shape.layers,
        "AdamW": len(shape.bounded),
        "AdamW2": len(shape.bounded),
        "sigmaReparam": len(shape.patched),
    }
    return {part: (cost.bytes or cost.flops, calls[part]) for part, cost in costs.items()}


def _print_predictions(found: Sequence[Prediction], console: Console | None) -> None:
    table = make_table("part", "size", "measured ms", "predicted ms", "error", "")
    for column in table.columns[2:5]:
        column.justify = "right"
    for part in dict.fromkeys(each.part for each in found):
        rows = [each for each in found if each.part == part]
        for each in rows:
            table.add_row(
                part, each.size, f"{1e3 * each.measured:.2f}", f"{1e3 * each.predicted:.2f}",
                f"{each.error:+.0%}", "fitted" if each.fitted else "",
                end_section=each is rows[-1],
            )  # fmt: skip
    worst = max(abs(each.error) for each in found if not each.fitted)
    (console or make_console()).print(
        f"Cost model on this machine, {torch.get_num_threads()} threads",
        table,
        f"Largest error at sizes that were not fitted: {worst:.0%}",
        sep="\n",
    )
