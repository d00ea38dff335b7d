"""How far the cost model is right where we can measure.

The rates of this machine are fitted at some sizes of GPT-2 and ViT and predict others, by the sum
that plans use too (`Machine.seconds`); a table puts both times side by side.
"""

from __future__ import annotations

import copy
import math
import os
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from statistics import median

import torch
from rich.console import Console
from transformers import PreTrainedModel

from hf_stable.adamw2.model_optimizer import ModelAdamW2
from hf_stable.commands.bench.collectives import time_collectives
from hf_stable.commands.bench.cost_model import Cost, measure_shape, step_costs
from hf_stable.commands.bench.machines import Machine
from hf_stable.commands.bench.models import build_gpt2, build_vit, make_images, make_tokens
from hf_stable.commands.bench.timing import PhaseClock, alternate, write_results
from hf_stable.commands.terminal import make_console, make_table
from hf_stable.methods.patching import patch
from hf_stable.methods.sigma_reparam.method import sigma_layers
from hf_stable.methods.sigma_reparam.steps import refresh

__all__ = ["CHECKED", "FITTED", "Prediction", "Size", "bench_scale"]


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

EXCHANGE = "all-reduces of AdamW2"
"""The part that takes several processes: what AdamW2 exchanges under FSDP2, here over gloo."""


@dataclass(frozen=True)
class Prediction:
    """One part of a step at one size.

    Attributes:
        size: the model.
        part: as in `step_costs`, or `EXCHANGE`.
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
    num_processes: int = 2,
    console: Console | None = None,
) -> list[Prediction]:
    """Fit this machine's rates at some sizes, predict all, print and write both times.

    One machine, of five rates or fewer, has to explain the model's forward and backward, AdamW,
    AdamW2 and the refresh of sigma at every size; two more what processes exchange.

    Args:
        output: JSON file to write.
        rounds: repetitions, the sizes alternated.
        fitted: sizes to fit, at least two.
        checked: sizes that the fit does not see.
        num_processes: that exchange, started for it; 1 leaves that part out.
        console: where to print.

    Returns:
        All predictions.

    Raises:
        ValueError: if `rounds` is less than 1.
        OSError: if `output` cannot be written.
    """
    sizes, known = (*fitted, *checked), {size.name for size in fitted}
    models = {size: _build(size) for size in sizes}
    timings = _time_parts(models, rounds)
    order = list(dict.fromkeys(timing.part for timing in timings))
    if num_processes > 1:
        timings += _time_exchanges(models, num_processes, rounds)
        order.append(EXCHANGE)
    machine = _fit([timing for timing in timings if timing.size in known])
    found = [
        Prediction(
            timing.size, timing.part, timing.seconds, timing.predict(machine), timing.size in known
        )
        for timing in sorted(timings, key=lambda timing: order.index(timing.part))
    ]
    _print_predictions(found, console)
    if output is not None:
        finite = {n: v for n, v in asdict(machine).items() if n != "name" and math.isfinite(v)}
        results = [asdict(each) | {"error": each.error} for each in found]
        about = {"rates": finite, "rounds": rounds, "num_processes": num_processes}
        write_results(output, results, about)
    return found


@dataclass(frozen=True)
class _Timing:
    """What one part of a step took at one size, and the cost that is to explain it."""

    size: str
    part: str
    cost: Cost
    num_processes: int
    seconds: float

    def predict(self, machine: Machine) -> float:
        computing, communicating = machine.seconds(self.cost, self.num_processes)
        return communicating if self.part == EXCHANGE else computing


def _fit(timings: Sequence[_Timing]) -> Machine:
    """Return the machine that explains the timings; rates that it does without are infinite."""
    alone = [(each.cost, each.seconds) for each in timings if each.part != EXCHANGE]
    between = [
        (each.cost, each.num_processes, each.seconds) for each in timings if each.part == EXCHANGE
    ]
    return Machine.fit("this machine", alone, between)


def _time_parts(models: Mapping[Size, PreTrainedModel], rounds: int) -> list[_Timing]:
    samples = alternate({s.name: _subject(m, s) for s, m in models.items()}, rounds=rounds)
    return [
        _Timing(size.name, part, cost, 1, median(samples[size.name][part]))
        for size, model in models.items()
        for part, cost in _costs(model, size, 1).items()
    ]


def _time_exchanges(
    models: Mapping[Size, PreTrainedModel], num_processes: int, rounds: int
) -> list[_Timing]:
    costs = {s.name: _costs(m, s, num_processes)["AdamW2"] for s, m in models.items()}
    seconds = time_collectives(costs, num_processes, rounds)
    return [_Timing(n, EXCHANGE, costs[n], num_processes, seconds[n]) for n in costs]


def _build(size: Size) -> PreTrainedModel:
    if size.model_type == "vit":
        return build_vit(size.hidden, size.layers, image=IMAGE, patch=PATCH)
    return build_gpt2(
        size.hidden,
        size.layers,
        vocabulary=VOCABULARY,
        positions=SEQUENCE,
        activation_function="gelu_pytorch_tanh",  # in one kernel, as ViT's
    )


def _subject(model: PreTrainedModel, size: Size) -> Callable[[], Mapping[str, float]]:
    if size.model_type == "vit":
        inputs = make_images(size.batch, IMAGE)
    else:
        inputs = make_tokens(size.batch, SEQUENCE, VOCABULARY)
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


def _costs(model: PreTrainedModel, size: Size, num_processes: int) -> dict[str, Cost]:
    shape = measure_shape(model)
    tokens = size.batch * shape.sequence * num_processes
    return step_costs(shape, num_processes=num_processes, tokens=tokens)


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
