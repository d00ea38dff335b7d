"""What the monitor costs: a Trainer's step with StabilityCallback beside it against one without.

The calls are those of the Trainer's loop, in its order; the loop is ours, so that subjects can take
turns step by step.
"""

from __future__ import annotations

import copy
import tempfile
from dataclasses import asdict, dataclass
from functools import partial
from typing import Any, Literal, Unpack

import torch
from rich.console import Console
from torch import Tensor
from transformers import TrainerControl, TrainerState, TrainingArguments

from hf_stable.commands.bench.cases import Case, NewClock, Options, Subject, run_cases
from hf_stable.commands.bench.models import build_gpt2, build_vit, make_images, make_tokens
from hf_stable.commands.bench.timing import TOTAL, PeakBytes, Samples, Summary
from hf_stable.measures.entropy import attention_entropy, attention_entropy_from_qk
from hf_stable.monitor.callback import StabilityCallback

__all__ = ["BASELINE", "TINY", "MonitorBenchSizes", "bench_monitor", "measure_entropy_memory"]

BASELINE = "no monitor"

EVERY = 50
"""Steps from probe to probe for which the whole cost is worked out; the callback's default."""

AMORTISED = f"monitor, every={EVERY}"


@dataclass(frozen=True)
class MonitorBenchSizes:
    """Models and inputs of the benchmark.

    Attributes:
        layers: blocks of GPT-2 and of the ViT.
        hidden: width; heads are 64 wide.
        batch: sequences, images.
        sequence: tokens of GPT-2.
        image: pixels on a side.
        patch: pixels of a patch on a side.
        vocabulary: tokens known to GPT-2.
        keys: sequence length at which the memory of entropy is measured.
    """

    layers: int = 12
    hidden: int = 256
    batch: int = 4
    sequence: int = 256
    image: int = 224
    patch: int = 16
    vocabulary: int = 4096
    keys: int = 4096


TINY = MonitorBenchSizes(
    layers=2, hidden=16, batch=2, sequence=12, image=8, patch=4, vocabulary=37, keys=512
)
"""To try the benchmark itself."""


def bench_monitor(
    *, sizes: MonitorBenchSizes | None = None, **options: Unpack[Options]
) -> list[Summary]:
    """Measure steps with and without the monitor, print a table and write JSON.

    Subjects: no monitor, twice; the monitor at a step that it does not probe; at one that it probes
    for the default terms, and for all; eager attention that returns its maps, and their entropy, at
    every step, as one would do without a probe. What `every=50` costs is 49 times the second and
    once the third, in the same round.

    Args:
        sizes: models and inputs.
        **options: of `Options`; 10 rounds.

    Returns:
        The summaries that were printed.

    Raises:
        ValueError: if `only` matches no case, or `rounds` is less than 1.
        OSError: if `output` cannot be written.
    """
    sizes = sizes or MonitorBenchSizes()
    device = torch.device(options.get("device", "cpu"))

    def memory(console: Console) -> dict[str, Any]:
        shares = measure_entropy_memory(sizes.keys)
        text = ", ".join(f"{name} {share:.1%}" for name, share in shares.items())
        console.print(f"entropy at T = {sizes.keys}, peak as a share of one T x T matrix: {text}")
        return {"memory": shares}

    with tempfile.TemporaryDirectory() as folder:

        def compare(build: Any, new_clock: NewClock) -> dict[str, Subject]:
            model, inputs = build(sizes)
            inputs = {key: value.to(device) for key, value in inputs.items()}
            return _subjects(model.to(device), inputs, new_clock, folder)

        cases = [Case(f"{name} step", partial(compare, build)) for name, build in MODELS.items()]
        return run_cases(
            "monitor", cases, BASELINE, options, rounds=10, about=asdict(sizes),
            derive=_with_amortised, measure_more=memory,
        )  # fmt: skip


def measure_entropy_memory(num_keys: int) -> dict[str, float]:
    """Return the peak bytes of entropy from q and k, as a share of one float32 T x T matrix.

    Args:
        num_keys: T; one head of width 64, causal.
    """
    generator = torch.Generator().manual_seed(0)
    q, k = torch.randn(2, 1, 1, num_keys, 64, generator=generator)
    shares = {}
    kinds: dict[str, Literal["all"] | int] = {"all rows": "all", "64 rows": 64}
    for name, queries in kinds.items():
        with PeakBytes() as peak:
            attention_entropy_from_qk(q, k, is_causal=True, queries=queries)
        shares[name] = peak.most / (4 * num_keys**2)
    with PeakBytes() as peak:
        logits = (q @ k.mT) / 8
        mask = torch.ones(num_keys, num_keys, dtype=torch.bool).tril()
        attention_entropy(logits.masked_fill(~mask, -torch.inf).softmax(-1))
    shares["from the whole map"] = peak.most / (4 * num_keys**2)
    return shares


def _with_amortised(samples: Samples) -> Samples:
    off, probed = (samples[f"monitor, {kind}"][TOTAL] for kind in ("no probe", "default terms"))
    whole = [((EVERY - 1) * a + b) / EVERY for a, b in zip(off, probed, strict=True)]
    return samples | {AMORTISED: {TOTAL: whole}}


def _gpt2(sizes: MonitorBenchSizes) -> tuple[Any, dict[str, Tensor]]:
    model = build_gpt2(
        sizes.hidden, sizes.layers, vocabulary=sizes.vocabulary, positions=sizes.sequence
    )
    return model, make_tokens(sizes.batch, sizes.sequence, sizes.vocabulary)


def _vit(sizes: MonitorBenchSizes) -> tuple[Any, dict[str, Tensor]]:
    model = build_vit(sizes.hidden, sizes.layers, image=sizes.image, patch=sizes.patch)
    return model, make_images(sizes.batch, sizes.image)


MODELS = {"gpt2": _gpt2, "vit": _vit}


def _subjects(
    model: Any, inputs: dict[str, Tensor], new_clock: NewClock, folder: str
) -> dict[str, Subject]:
    def plain(variant: Any) -> Subject:
        return _Loop(variant, inputs, new_clock, folder).step

    def monitored(every: int, terms: Any) -> Subject:
        monitor = StabilityCallback(every=every, terms=terms)
        return _Loop(copy.deepcopy(model), inputs, new_clock, folder, monitor).step

    eager = copy.deepcopy(model)
    eager.set_attn_implementation("eager")
    return {
        BASELINE: plain(copy.deepcopy(model)),
        f"{BASELINE}, again": plain(copy.deepcopy(model)),
        "monitor, no probe": monitored(10**9, "default"),
        "monitor, default terms": monitored(1, "default"),
        "monitor, all terms": monitored(1, "all"),
        "eager maps and their entropy": _Loop(eager, inputs, new_clock, folder, maps=True).step,
    }


class _Loop:
    """Training steps on one batch, with the calls to a callback that the Trainer makes."""

    def __init__(
        self,
        model: Any,
        inputs: dict[str, Tensor],
        new_clock: NewClock,
        folder: str,
        monitor: StabilityCallback | None = None,
        *,
        maps: bool = False,
    ) -> None:
        self.model, self.inputs, self.new_clock = model.train(), inputs, new_clock
        self.monitor, self.maps = monitor, maps
        # A rate at which nothing moves: the work is the same in every round.
        self.optimizer = torch.optim.AdamW(model.parameters(), lr=1e-12, fused=True)
        self.args = TrainingArguments(tempfile.mkdtemp(dir=folder), report_to=[])
        self.state, self.control = TrainerState(), TrainerControl()
        # Far from the early steps 1, 2, 4, ... that are probed whatever `every` says.
        self.state.global_step = 10
        self._tell("on_train_begin")

    def _tell(self, event: str) -> None:
        if self.monitor is not None:
            getattr(self.monitor, event)(
                self.args, self.state, self.control, model=self.model, optimizer=self.optimizer,
                lr_scheduler=None,
            )  # fmt: skip

    def step(self) -> dict[str, float]:
        clock = self.new_clock()
        self._tell("on_step_begin")
        output = self.model(**self.inputs, output_attentions=self.maps)
        if self.maps:
            for attention in output.attentions:
                attention_entropy(attention).mean((0, 2))
        output.loss.backward()
        if self.monitor is not None:
            self.monitor.observe_loss(output.loss)
        self._tell("on_pre_optimizer_step")
        self.optimizer.step()
        self._tell("on_optimizer_step")
        self.optimizer.zero_grad()
        self._tell("on_step_end")
        clock.lap("step")
        return clock.seconds
