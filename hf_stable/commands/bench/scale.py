"""How far the cost model is right where we can measure.

The rates of this machine are fitted at some sizes of GPT-2 and ViT and predict others, by the sum
that plans use too (`Machine.seconds`); a table puts both times side by side.
"""

from __future__ import annotations

import copy
import json
import math
import os
import tempfile
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from statistics import median

import torch
import torch.distributed as dist
import torch.multiprocessing
import transformers
from rich.console import Console
from transformers import PreTrainedModel

from hf_stable._json import to_json
from hf_stable.adamw2.groups import ModelAdamW2
from hf_stable.commands.bench.cost_model import Cost, measure_shape, step_costs
from hf_stable.commands.bench.machines import Machine
from hf_stable.commands.bench.timing import PhaseClock, alternate, describe_machine
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

CALLS = 20
"""Times that one sample of it is repeated: a single one takes a fraction of a millisecond."""


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
    sizes = (*fitted, *checked)
    models = {size.name: _build(size) for size in sizes}
    samples = alternate(
        {size.name: _subject(models[size.name], size) for size in sizes}, rounds=rounds
    )
    costs = {size.name: _costs(models[size.name], size, 1) for size in sizes}
    measured = {(name, part): median(samples[name][part]) for name in costs for part in costs[name]}
    exchanged = {
        size.name: _costs(models[size.name], size, num_processes)["AdamW2"] for size in sizes
    }
    exchange = _time_exchange(exchanged, num_processes, rounds) if num_processes > 1 else {}
    known = {size.name for size in fitted}
    machine = Machine.fit(
        "this machine",
        [
            (costs[name][part], seconds)
            for (name, part), seconds in measured.items()
            if name in known
        ],
        [(exchanged[n], num_processes, seconds) for n, seconds in exchange.items() if n in known],
    )
    found = [
        Prediction(name, part, seconds, machine.seconds(costs[name][part], 1)[0], name in known)
        for (name, part), seconds in measured.items()
    ] + [
        Prediction(
            name,
            EXCHANGE,
            seconds,
            machine.seconds(exchanged[name], num_processes)[1],
            name in known,
        )
        for name, seconds in exchange.items()
    ]
    found.sort(key=lambda each: [*costs[each.size], EXCHANGE].index(each.part))
    _print_predictions(found, console)
    if output is not None:
        content = {
            "machine": describe_machine(),
            "rates": {
                name: rate
                for name, rate in asdict(machine).items()
                if name != "name" and math.isfinite(rate)  # infinite: not needed to explain them
            },
            "rounds": rounds,
            "num_processes": num_processes,
            "results": [asdict(each) | {"error": each.error} for each in found],
        }
        Path(output).write_text(to_json(content, indent=2) + "\n")
    return found


def _time_exchange(costs: Mapping[str, Cost], num_processes: int, rounds: int) -> dict[str, float]:
    """Return the seconds that the collectives of each cost take between processes started here."""
    calls = {
        name: [int(each.bytes / each.count) for each in cost.collectives for _ in range(each.count)]
        for name, cost in costs.items()
    }
    with tempfile.TemporaryDirectory() as folder:
        torch.multiprocessing.spawn(
            _exchange, (folder, num_processes, calls, rounds), nprocs=num_processes
        )
        return json.loads((Path(folder) / "seconds.json").read_text())


def _exchange(
    rank: int, folder: str, num_processes: int, calls: Mapping[str, Sequence[int]], rounds: int
) -> None:
    torch.set_num_threads(1)
    dist.init_process_group(
        "gloo", init_method=f"file://{folder}/store", rank=rank, world_size=num_processes
    )
    tensors = {name: [torch.zeros(size // 4) for size in sizes] for name, sizes in calls.items()}

    def exchange(name: str) -> Mapping[str, float]:
        dist.barrier()
        start = time.perf_counter()
        for _ in range(CALLS):
            for tensor in tensors[name]:
                dist.all_reduce(tensor)
        return {EXCHANGE: (time.perf_counter() - start) / CALLS}

    samples = alternate({name: partial(exchange, name) for name in calls}, rounds=rounds)
    if rank == 0:
        seconds = {name: median(samples[name][EXCHANGE]) for name in calls}
        (Path(folder) / "seconds.json").write_text(to_json(seconds))
    dist.barrier()
    dist.destroy_process_group()


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
            activation_function="gelu_pytorch_tanh",  # in one kernel, as ViT's
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
