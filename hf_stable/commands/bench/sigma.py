"""What sigmaReparam costs: training steps, evaluation and generation against the plain model.

Beside the plain model stand a second plain one (the ratio that noise alone makes) and torch's own
`parametrizations.spectral_norm` on the same layers.
"""

from __future__ import annotations

import copy
import os
import time
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from functools import partial
from typing import Any

import torch
from rich.console import Console
from torch import Tensor, nn
from torch.nn.utils.parametrizations import spectral_norm

from hf_stable.commands.bench.models import build_gpt2, build_vit, make_images, make_tokens
from hf_stable.commands.bench.timing import (
    PhaseClock,
    Summary,
    alternate,
    print_summaries,
    summarise,
    write_results,
)
from hf_stable.methods.patching import is_patched, patch
from hf_stable.methods.sigma_reparam.method import sigma_layers

__all__ = ["BASELINE", "SigmaBenchSizes", "bench_sigma"]

BASELINE = "plain"

Subject = Callable[[], dict[str, float]]


@dataclass(frozen=True)
class SigmaBenchSizes:
    """The models and inputs of the benchmark.

    Attributes:
        hidden: width of both models.
        layers: number of blocks of both.
        heads: number of attention heads.
        image: side of a ViT's input in pixels.
        patch: side of a ViT's patch in pixels.
        vocabulary: tokens that GPT-2 knows; its tied head is plain in every variant.
        sequence: tokens in a GPT-2 training sequence.
        batches: batch sizes of training steps and evaluation.
        prompt: tokens in a prompt to generate from.
        new_tokens: tokens that each generation adds.
    """

    hidden: int = 384
    layers: int = 4
    heads: int = 6
    image: int = 224
    patch: int = 16
    vocabulary: int = 4096
    sequence: int = 197
    batches: tuple[int, ...] = (2, 16)
    prompt: int = 32
    new_tokens: int = 32


def bench_sigma(
    *,
    output: str | os.PathLike[str] | None = None,
    rounds: int = 20,
    sizes: SigmaBenchSizes | None = None,
    device: torch.device | str = "cpu",
    only: str = "",
    seconds: float = 20.0,
    cpu_time: bool = False,
    console: Console | None = None,
) -> list[Summary]:
    """Measure sigmaReparam against the plain model, print a table and write JSON.

    The number of threads is torch's (`torch.set_num_threads`, `OMP_NUM_THREADS`).

    Args:
        output: JSON file to write.
        rounds: most repetitions of every variant of every case, alternated.
        sizes: models and inputs.
        device: where to run.
        only: run the cases whose name contains this text.
        seconds: about how long one case may take; at least five rounds are run.
        cpu_time: count the processor time of this process, not the time on the clock: what the
            work costs while other programs use the machine. Says little with several threads,
            which wait for each other by spinning.
        console: where to print.

    Returns:
        The summaries that were printed, one per case, variant and phase.

    Raises:
        ValueError: if `only` matches no case, or `rounds` is less than 1.
        OSError: if `output` cannot be written.
    """
    sizes = sizes or SigmaBenchSizes()
    device = torch.device(device)
    summaries: list[Summary] = []
    names = []
    new_clock = partial(PhaseClock, device, time.process_time if cpu_time else time.perf_counter)
    for name, prepare in _cases(sizes, device, new_clock):
        names.append(name)
        if only in name:
            samples = alternate(prepare(), rounds=rounds, seconds=seconds)
            summaries += summarise(name, samples, BASELINE)
    if not summaries:
        raise ValueError(f"no case has {only!r} in its name; the cases are {', '.join(names)}")
    timer = "processor time" if cpu_time else "time on the clock"
    title = f"sigmaReparam: {timer}, {torch.get_num_threads()} threads, ratio to plain"
    print_summaries(title, summaries, console)
    if output is not None:
        settings = {"benchmark": "sigma", "timer": timer, "only": only, **asdict(sizes)}
        write_results(output, map(asdict, summaries), {"settings": settings}, device)
    return summaries


def _cases(
    sizes: SigmaBenchSizes, device: torch.device, new_clock: Callable[[], PhaseClock]
) -> Iterator[tuple[str, Callable[[], dict[str, Subject]]]]:
    """Yield the name of each case and the function that builds its subjects."""
    for model_type in ("vit", "gpt2"):
        for kind, subject in (("step", _training_step), ("eval", _evaluation)):
            for batch in sizes.batches:

                def prepare(
                    model_type: str = model_type,
                    subject: Callable[..., Subject] = subject,
                    batch: int = batch,
                ) -> dict[str, Subject]:
                    inputs = _inputs(model_type, sizes, batch, device)
                    variants = _variants(_model(model_type, sizes).to(device))
                    return {n: subject(m, inputs, new_clock) for n, m in variants.items()}

                yield f"{model_type} {kind}, batch {batch}", prepare

    def prepare_generation() -> dict[str, Subject]:
        variants = _variants(_model("gpt2", sizes).to(device))
        prompts = torch.randint(1, sizes.vocabulary, (2, sizes.prompt), device=device)
        return {
            name: _generation(model, prompts, sizes.new_tokens, new_clock)
            for name, model in variants.items()
        }

    yield "gpt2 generate, batch 2", prepare_generation


def _model(model_type: str, sizes: SigmaBenchSizes) -> Any:
    if model_type == "vit":
        return build_vit(
            sizes.hidden,
            sizes.layers,
            image=sizes.image,
            patch=sizes.patch,
            num_attention_heads=sizes.heads,
        )
    return build_gpt2(
        sizes.hidden,
        sizes.layers,
        vocabulary=sizes.vocabulary,
        positions=max(sizes.sequence, sizes.prompt + sizes.new_tokens),
        n_head=sizes.heads,
        eos_token_id=None,  # a generation ends at its last token
        pad_token_id=0,
    )


def _inputs(
    model_type: str, sizes: SigmaBenchSizes, batch: int, device: torch.device
) -> dict[str, Tensor]:
    if model_type == "vit":
        inputs = make_images(batch, sizes.image)
    else:
        inputs = make_tokens(batch, sizes.sequence, sizes.vocabulary)
    return {name: value.to(device) for name, value in inputs.items()}


def _variants(model: Any) -> dict[str, Any]:
    """Return the plain model, a copy of it, and the copies with the two methods on it."""
    patched = patch(copy.deepcopy(model), "sigma_reparam")
    for _, layer in sigma_layers(patched):
        # Apart, as training leaves them: blocks of equal scale would share one product.
        layer.gamma.data *= torch.linspace(0.9, 1.1, layer.num_parts, device=layer.gamma.device)
    normalised = copy.deepcopy(model)
    for name, _ in sigma_layers(patched):
        spectral_norm(normalised.get_submodule(name))
    return {
        BASELINE: model,
        "plain again": copy.deepcopy(model),
        "sigma_reparam": patched,
        "torch spectral_norm": normalised,
    }


def _training_step(
    model: nn.Module, inputs: dict[str, Tensor], new_clock: Callable[[], PhaseClock]
) -> Subject:
    """One step with the Trainer's default optimizer; the refresh is a phase of its own."""
    model.train()
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-5, fused=True)
    clock = new_clock()
    # Hooks of the optimizer itself run before the global one, which refreshes.
    optimizer.register_step_post_hook(lambda *_: clock.lap("optimizer"))
    after_step = "refresh" if is_patched(model) else "optimizer"

    def step() -> dict[str, float]:
        nonlocal clock
        clock = new_clock()
        loss = model(**inputs).loss
        clock.lap("forward")
        loss.backward()
        clock.lap("backward")
        optimizer.step()
        clock.lap(after_step)
        optimizer.zero_grad()
        clock.lap("optimizer")
        return clock.seconds

    return step


def _evaluation(
    model: nn.Module, inputs: dict[str, Tensor], new_clock: Callable[[], PhaseClock]
) -> Subject:
    def evaluate() -> dict[str, float]:
        model.eval()
        clock = new_clock()
        with torch.no_grad():
            model(**inputs)
        clock.lap("forward")
        return clock.seconds

    return evaluate


def _generation(
    model: Any, prompts: Tensor, new_tokens: int, new_clock: Callable[[], PhaseClock]
) -> Subject:
    def generate() -> dict[str, float]:
        model.eval()
        clock = new_clock()
        model.generate(
            prompts,
            attention_mask=torch.ones_like(prompts),
            max_new_tokens=new_tokens,
            min_new_tokens=new_tokens,
            do_sample=False,
        )
        clock.lap("generate")
        return clock.seconds

    return generate
