"""What AdamW2 costs: its step against torch's AdamW, a whole training step, depth and memory."""

from __future__ import annotations

import os
from collections import defaultdict
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from functools import partial
from typing import Any, Unpack

import torch
from rich.console import Console
from torch import nn
from torch.optim import Optimizer

from hf_stable.commands.bench.cases import Case, NewClock, Options, Subject, run_cases
from hf_stable.commands.bench.models import build_gpt2, build_vit, make_tokens
from hf_stable.commands.bench.optimizers import (
    BASELINE,
    TORCH_ALONE,
    make_optimizers,
    make_peers,
)
from hf_stable.commands.bench.timing import PeakBytes, Summary
from hf_stable.kernels.choosing import SWITCH, chosen

__all__ = ["BASELINE", "TINY", "AdamW2BenchSizes", "bench_adamw2", "measure_memory"]


@dataclass(frozen=True)
class AdamW2BenchSizes:
    """The models and inputs of the benchmark.

    Attributes:
        layers: blocks of GPT-2 and of the ViT.
        hidden: width of both; heads are 64 wide.
        vocabulary: tokens of GPT-2.
        batch: sequences in a GPT-2 training step.
        sequence: tokens in each of them.
        narrow: (width, blocks) of GPT-2s whose step is many calls and few bytes; their vocabulary
            is a hundredth.
        depths: numbers of blocks of the GPT-2s that show how the step grows with depth.
        depth_hidden: their width; their vocabulary is a hundredth.
    """

    layers: int = 12
    hidden: int = 768
    vocabulary: int = 50257
    batch: int = 4
    sequence: int = 256
    narrow: tuple[tuple[int, int], ...] = ((32, 12), (32, 128), (128, 12))
    depths: tuple[int, ...] = (12, 24, 48, 96)
    depth_hidden: int = 256


TINY = AdamW2BenchSizes(
    layers=1,
    hidden=64,
    vocabulary=300,
    batch=1,
    sequence=4,
    narrow=((16, 2),),
    depths=(1, 2),
    depth_hidden=64,
)
"""To try the benchmark itself."""


def bench_adamw2(
    *, sizes: AdamW2BenchSizes | None = None, **options: Unpack[Options]
) -> list[Summary]:
    """Measure AdamW2 against torch's AdamW and its peers, print a table and write JSON.

    Args:
        sizes: models and inputs.
        **options: of `Options`; 10 rounds.

    Returns:
        The summaries that were printed.

    Raises:
        ValueError: if `only` matches no case, or `rounds` is less than 1.
        OSError: if `output` cannot be written.
    """
    sizes = sizes or AdamW2BenchSizes()
    device = torch.device(options.get("device", "cpu"))

    def memory(console: Console) -> dict[str, Any]:
        shares = measure_memory(_gpt2(sizes, sizes.layers, sizes.hidden, 1).to(device))
        for subject, of in shares.items():
            text = ", ".join(f"{name} {share:.2%}" for name, share in of.items())
            console.print(f"memory, share of the parameters' bytes: {subject}: {text}")
        return {"memory": shares}

    return run_cases(
        "adamw2", _cases(sizes, device), BASELINE, options, rounds=10, about=asdict(sizes),
        measure_more=memory,
    )  # fmt: skip


def measure_memory(model: nn.Module) -> dict[str, dict[str, float]]:
    """Return state beside the moments and working memory of a step, by optimizer.

    Both are shares of the bytes of the parameters. The third step is measured: the first one
    creates the state, and kernels make room for their work in the second. That room counts, for it
    stays.
    """
    _set_gradients(model)
    total = sum(param.nbytes for param in model.parameters())
    shares = {}
    for name, optimizer in make_optimizers(model).items():
        optimizer.step()
        optimizer.step()
        entries = [item for state in optimizer.state.values() for item in state.items()]
        extra = sum(value.nbytes for key, value in entries if not key.startswith("exp_avg"))
        with PeakBytes() as peak:
            optimizer.step()
        # What kernels keep between steps is no state, but memory all the same.
        workspaces = getattr(optimizer, "_workspaces", {}).values()
        kept = sum(getattr(workspace, "nbytes", 0) for workspace in workspaces)
        working = (peak.most + kept) / total
        shares[name] = {"extra state": extra / total, "working memory": working}
    return shares


def _cases(sizes: AdamW2BenchSizes, device: torch.device) -> Iterator[Case]:
    """Yield the cases; a model exists only while its case runs."""

    def gpt2(layers: int, hidden: int, share: int, new_clock: NewClock) -> dict[str, Subject]:
        return _steps(_gpt2(sizes, layers, hidden, share).to(device), make_optimizers, new_clock)

    def vit(new_clock: NewClock) -> dict[str, Subject]:
        model = build_vit(sizes.hidden, sizes.layers, image=224, patch=16, num_labels=1000)
        # Here and not with GPT-2, whose size they would multiply: each keeps two moments.
        return _steps(model.to(device), lambda m: make_optimizers(m) | make_peers(m), new_clock)

    def depth(layers: int, new_clock: NewClock) -> dict[str, Subject]:
        subjects = gpt2(layers, sizes.depth_hidden, 100, new_clock)
        return {name: subjects[name] for name in (BASELINE, "AdamW2")}

    yield Case("gpt2 step alone", partial(gpt2, sizes.layers, sizes.hidden, 1))
    yield Case("vit step alone", vit)
    for hidden, layers in sizes.narrow:
        name = f"gpt2 {hidden} wide, {layers} blocks, step alone"
        yield Case(name, partial(gpt2, layers, hidden, 100))
    for layers in sizes.depths:
        yield Case(f"gpt2 of {layers} blocks", partial(depth, layers))
    yield Case("gpt2 training step", partial(_training_steps, sizes, device))


def _gpt2(sizes: AdamW2BenchSizes, layers: int, hidden: int, share: int) -> nn.Module:
    """Return a GPT-2 that knows the n-th part of the vocabulary."""
    positions = max(1024, sizes.sequence)
    return build_gpt2(hidden, layers, vocabulary=sizes.vocabulary // share, positions=positions)


def _set_gradients(model: nn.Module) -> None:
    torch.manual_seed(0)
    for param in model.parameters():
        param.grad = torch.randn_like(param)


def _steps(model: nn.Module, make: Any, new_clock: NewClock) -> dict[str, Subject]:
    """Return a step of each optimizer that a function makes for a model."""
    _set_gradients(model)
    by_shape: defaultdict[torch.Size, list[nn.Parameter]] = defaultdict(list)
    for param in model.parameters():
        by_shape[param.shape].append(param)

    def subject(name: str, optimizer: Optimizer) -> Subject:
        def step() -> dict[str, float]:
            _pass_gradients_on(by_shape.values())
            with _kernels("torch" if name == TORCH_ALONE else chosen()):
                clock = new_clock()
                optimizer.step()
                clock.lap("step")
            return clock.seconds

        return step

    return {name: subject(name, optimizer) for name, optimizer in make(model).items()}


def _pass_gradients_on(alike: Iterable[Sequence[nn.Parameter]]) -> None:
    """Give each parameter the gradient of the next of its shape: no two steps are alike."""
    for params in alike:
        grads = [param.grad for param in params]
        for param, grad in zip(params, [*grads[1:], grads[0]], strict=True):
            param.grad = grad


@contextmanager
def _kernels(choice: str) -> Iterator[None]:
    before = os.environ.get(SWITCH)
    os.environ[SWITCH] = choice
    try:
        yield
    finally:
        os.environ.pop(SWITCH)
        if before is not None:
            os.environ[SWITCH] = before


def _training_steps(
    sizes: AdamW2BenchSizes, device: torch.device, new_clock: NewClock
) -> dict[str, Subject]:
    model = _gpt2(sizes, sizes.layers, sizes.hidden, 1).to(device).train()
    tokens = make_tokens(sizes.batch, sizes.sequence, sizes.vocabulary)["input_ids"].to(device)

    def subject(optimizer: Optimizer) -> Subject:
        def step() -> dict[str, float]:
            clock = new_clock()
            model(input_ids=tokens, labels=tokens).loss.backward()
            clock.lap("forward and backward")
            optimizer.step()
            clock.lap("step")
            optimizer.zero_grad()
            return clock.seconds

        return step

    kept = (BASELINE, "AdamW fused, again", "AdamW2")
    optimizers = make_optimizers(model)
    return {name: subject(optimizers[name]) for name in kept}
