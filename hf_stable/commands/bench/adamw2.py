"""What AdamW2 costs: its step against torch's AdamW, a whole training step, depth and memory.

Beside the baseline, torch's fused AdamW, stands a second one (the ratio that noise alone makes),
torch's foreach form, and the paper's algorithm written down plainly.
"""

from __future__ import annotations

import os
from collections import defaultdict
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from typing import Any

import torch
from rich.console import Console
from torch import Tensor, nn
from torch.optim import Optimizer

from hf_stable.adamw2.model_optimizer import ModelAdamW2
from hf_stable.adamw2.optimizer import AdamW2
from hf_stable.commands.bench.models import build_gpt2, build_vit, make_tokens
from hf_stable.commands.bench.timing import (
    PeakBytes,
    PhaseClock,
    Summary,
    alternate,
    print_summaries,
    summarise,
    write_results,
)
from hf_stable.kernels.choosing import SWITCH, chosen

__all__ = ["BASELINE", "AdamW2BenchSizes", "bench_adamw2", "measure_memory"]

BASELINE = "AdamW fused"

TORCH_ALONE = "AdamW2 by torch alone"
"""The subject that uses no kernels."""

Subject = Callable[[], dict[str, float]]


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


def bench_adamw2(
    *,
    output: str | os.PathLike[str] | None = None,
    rounds: int = 10,
    sizes: AdamW2BenchSizes | None = None,
    device: torch.device | str = "cpu",
    only: str = "",
    console: Console | None = None,
) -> list[Summary]:
    """Measure AdamW2 against torch's AdamW, print a table and write JSON.

    Steps of the optimizer alone run on one thread and on all of torch's; a whole training step
    and the depths on all.

    Args:
        output: JSON file to write.
        rounds: repetitions of every optimizer of every case, alternated.
        sizes: models and inputs.
        device: where to run.
        only: run the cases whose name contains this text.
        console: where to print.

    Returns:
        The summaries that were printed, one per case, optimizer and phase.

    Raises:
        ValueError: if `only` matches no case, or `rounds` is less than 1.
        OSError: if `output` cannot be written.
    """
    sizes, device = sizes or AdamW2BenchSizes(), torch.device(device)
    console = console or Console()
    summaries: list[Summary] = []
    memory: dict[str, dict[str, float]] = {}
    cases = _cases(sizes, device)
    for name, (threads, prepare) in cases.items():
        if only not in name:
            continue
        with _threads(threads):
            subjects = prepare()
            summaries += summarise(name, alternate(subjects, rounds=rounds), BASELINE)
    if not summaries:
        raise ValueError(f"no case has {only!r} in its name; the cases are {', '.join(cases)}")
    if only in "memory":
        memory = measure_memory(_gpt2(sizes.layers, sizes.hidden, sizes).to(device))
        for subject, shares in memory.items():
            text = ", ".join(f"{name} {share:.2%}" for name, share in shares.items())
            console.print(f"memory, share of the parameters' bytes: {subject}: {text}")
    print_summaries(f"AdamW2, {rounds} rounds, ratio to {BASELINE}", summaries, console)
    if output is not None:
        settings = {"benchmark": "adamw2", "rounds": rounds, "memory": memory, **asdict(sizes)}
        write_results(output, map(asdict, summaries), {"settings": settings}, device)
    return summaries


def measure_memory(model: nn.Module) -> dict[str, dict[str, float]]:
    """Return state beside the moments and working memory of a step, by optimizer.

    Both are shares of the bytes of the parameters. The third step is measured: the first one
    creates the state, and kernels make room for their work in the second. That room counts, for it
    stays.
    """
    _set_gradients(model)
    total = sum(param.nbytes for param in model.parameters())
    shares = {}
    for name, optimizer in _optimizers(model).items():
        if name == "naive loop":
            continue
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


class _NaiveAdamW2(Optimizer):
    """Algorithm 1 as one would write it first: weight by weight, three cold power iterations."""

    def __init__(self, params: Any, lr: float = 1e-3, tau: float = 0.01) -> None:
        super().__init__(params, dict(lr=lr, tau=tau))

    @torch.no_grad()
    def step(self, closure: Any = None) -> Any:
        for group in self.param_groups:
            for param in group["params"]:
                state = self.state[param]
                if not state:
                    state.update(t=0, m=torch.zeros_like(param), v=torch.zeros_like(param))
                state["t"] += 1
                state["m"].lerp_(param.grad, 0.1)
                state["v"].mul_(0.999).addcmul_(param.grad, param.grad, value=0.001)
                root = (state["v"] / (1 - 0.999 ** state["t"])).sqrt() + 1e-8
                update = state["m"] / (1 - 0.9 ** state["t"]) / root
                bound = group["tau"] * self._sigma(param) / self._sigma(update)
                rate = min(group["lr"], bound) if bound > 0 else group["lr"]
                param.sub_(rate * update + rate * 0.01 * param)

    def _sigma(self, weight: Tensor) -> float:
        matrix = weight.flatten(1) if weight.ndim > 1 else weight.unsqueeze(1)
        v = torch.randn(matrix.shape[1], device=matrix.device)
        for _ in range(3):
            u = nn.functional.normalize(matrix @ v, dim=0)
            v = matrix.T @ u
            sigma = v.norm()
            v = v / (sigma + 1e-30)
        return sigma.item()


def _optimizers(model: nn.Module) -> dict[str, Optimizer]:
    """Return the optimizers to compare, all over the same parameters."""
    params = list(model.parameters())
    return {
        BASELINE: torch.optim.AdamW(params, fused=True),
        "AdamW fused, again": torch.optim.AdamW(params, fused=True),
        "AdamW foreach": torch.optim.AdamW(params, foreach=True),
        "AdamW2": ModelAdamW2([dict(params=params)], structure=model),
        "AdamW2, embeddings too": AdamW2(params),
        TORCH_ALONE: ModelAdamW2([dict(params=params)], structure=model),
        "naive loop": _NaiveAdamW2(params),
    }


def _cases(
    sizes: AdamW2BenchSizes, device: torch.device
) -> dict[str, tuple[int, Callable[[], dict[str, Subject]]]]:
    """Return threads and preparation of each case; a model exists only while its case runs."""
    threads = torch.get_num_threads()
    cases: dict[str, tuple[int, Callable[[], dict[str, Subject]]]] = {}
    for count in dict.fromkeys((1, threads)):
        label = f"step alone, {count} thread{'s' if count > 1 else ''}"
        cases[f"gpt2 {label}"] = (
            count,
            lambda: _steps(_gpt2(sizes.layers, sizes.hidden, sizes).to(device)),
        )
        cases[f"vit {label}"] = count, lambda: _steps(_vit(sizes).to(device))
    for hidden, layers in sizes.narrow:

        def narrow(hidden: int = hidden, layers: int = layers) -> dict[str, Subject]:
            model = _gpt2(layers, hidden, sizes, vocabulary=sizes.vocabulary // 100)
            return _steps(model.to(device))

        cases[f"gpt2 {hidden} wide, {layers} blocks, step alone"] = 1, narrow
    cases["gpt2 training step"] = threads, lambda: _training_steps(sizes, device)
    for depth in sizes.depths:

        def prepare(depth: int = depth) -> dict[str, Subject]:
            model = _gpt2(depth, sizes.depth_hidden, sizes, vocabulary=sizes.vocabulary // 100)
            subjects = _steps(model.to(device))
            return {name: subjects[name] for name in (BASELINE, "AdamW2")}

        cases[f"gpt2 of {depth} blocks"] = threads, prepare
    return cases


def _gpt2(
    layers: int, hidden: int, sizes: AdamW2BenchSizes, vocabulary: int | None = None
) -> nn.Module:
    return build_gpt2(
        hidden,
        layers,
        vocabulary=vocabulary or sizes.vocabulary,
        positions=max(1024, sizes.sequence),
    )


def _vit(sizes: AdamW2BenchSizes) -> nn.Module:
    return build_vit(sizes.hidden, sizes.layers, image=224, patch=16, num_labels=1000)


def _set_gradients(model: nn.Module) -> None:
    torch.manual_seed(0)
    for param in model.parameters():
        param.grad = torch.randn_like(param)


def _steps(model: nn.Module) -> dict[str, Subject]:
    _set_gradients(model)
    device = next(model.parameters()).device

    by_shape: defaultdict[torch.Size, list[nn.Parameter]] = defaultdict(list)
    for param in model.parameters():
        by_shape[param.shape].append(param)

    def subject(name: str, optimizer: Optimizer) -> Subject:
        def step() -> dict[str, float]:
            _pass_gradients_on(by_shape.values())
            with _kernels("torch" if name == TORCH_ALONE else chosen()):
                clock = PhaseClock(device)
                optimizer.step()
                clock.lap("step")
            return clock.seconds

        return step

    return {name: subject(name, optimizer) for name, optimizer in _optimizers(model).items()}


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


def _training_steps(sizes: AdamW2BenchSizes, device: torch.device) -> dict[str, Subject]:
    model = _gpt2(sizes.layers, sizes.hidden, sizes).to(device).train()
    tokens = make_tokens(sizes.batch, sizes.sequence, sizes.vocabulary)["input_ids"].to(device)

    def subject(optimizer: Optimizer) -> Subject:
        def step() -> dict[str, float]:
            clock = PhaseClock(device)
            model(input_ids=tokens, labels=tokens).loss.backward()
            clock.lap("forward and backward")
            optimizer.step()
            clock.lap("step")
            optimizer.zero_grad()
            return clock.seconds

        return step

    kept = (BASELINE, "AdamW fused, again", "AdamW2")
    optimizers = _optimizers(model)
    return {name: subject(optimizers[name]) for name in kept}


@contextmanager
def _threads(count: int) -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(count)
    try:
        yield
    finally:
        torch.set_num_threads(before)
