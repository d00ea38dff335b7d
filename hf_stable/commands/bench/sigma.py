"""What sigmaReparam costs: training steps, evaluation and generation against the plain model.

Beside the plain model stand a second plain one (the ratio that noise alone makes) and torch's own
`parametrizations.spectral_norm` on the same layers.
"""

from __future__ import annotations

import copy
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from functools import partial
from typing import Any, Unpack

import torch
from torch import Tensor, nn
from torch.nn.utils.parametrizations import spectral_norm

from hf_stable.commands.bench.cases import Case, NewClock, Options, Subject, run_cases
from hf_stable.commands.bench.models import build_gpt2, build_vit, make_images, make_tokens
from hf_stable.commands.bench.timing import Summary
from hf_stable.methods.patching import is_patched, patch
from hf_stable.methods.sigma_reparam.method import sigma_layers

__all__ = ["BASELINE", "TINY", "SigmaBenchSizes", "bench_sigma"]

BASELINE = "plain"


@dataclass(frozen=True)
class SigmaBenchSizes:
    """The models and inputs of the benchmark.

    Attributes:
        hidden: width of both models.
        narrow: width of models whose step is many calls and few bytes.
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
    narrow: int = 32
    layers: int = 4
    heads: int = 6
    image: int = 224
    patch: int = 16
    vocabulary: int = 4096
    sequence: int = 197
    batches: tuple[int, ...] = (2, 16)
    prompt: int = 32
    new_tokens: int = 32


TINY = SigmaBenchSizes(
    hidden=16,
    narrow=16,
    layers=1,
    heads=2,
    image=8,
    patch=4,
    vocabulary=37,
    sequence=12,
    batches=(2,),
    prompt=3,
    new_tokens=2,
)
"""To try the benchmark itself."""


def bench_sigma(
    *, sizes: SigmaBenchSizes | None = None, **options: Unpack[Options]
) -> list[Summary]:
    """Measure sigmaReparam against the plain model, print a table and write JSON.

    Args:
        sizes: models and inputs.
        **options: of `Options`; 20 rounds.

    Returns:
        The summaries that were printed.

    Raises:
        ValueError: if `only` matches no case, or `rounds` is less than 1.
        OSError: if `output` cannot be written.
    """
    sizes = sizes or SigmaBenchSizes()
    cases = _cases(sizes, torch.device(options.get("device", "cpu")))
    return run_cases("sigma", cases, BASELINE, options, rounds=20, about=asdict(sizes))


def _cases(sizes: SigmaBenchSizes, device: torch.device) -> Iterator[Case]:
    """Yield the cases."""

    def compare(
        model_type: str, subject: Any, batch: int, hidden: int, new_clock: NewClock
    ) -> dict[str, Subject]:
        inputs = _inputs(model_type, sizes, batch, device)
        variants = _variants(_model(model_type, sizes, hidden).to(device))
        return {name: subject(model, inputs, new_clock) for name, model in variants.items()}

    def generate(new_clock: NewClock) -> dict[str, Subject]:
        variants = _variants(_model("gpt2", sizes, sizes.hidden).to(device))
        prompts = torch.randint(1, sizes.vocabulary, (2, sizes.prompt), device=device)
        return {
            name: _generation(model, prompts, sizes.new_tokens, new_clock)
            for name, model in variants.items()
        }

    for model_type in ("vit", "gpt2"):
        for kind, subject in (("step", _training_step), ("eval", _evaluation)):
            for batch in sizes.batches:
                prepare = partial(compare, model_type, subject, batch, sizes.hidden)
                yield Case(f"{model_type} {kind}, batch {batch}", prepare)
        prepare = partial(compare, model_type, _training_step, sizes.batches[0], sizes.narrow)
        yield Case(f"{model_type} {sizes.narrow} wide step, batch {sizes.batches[0]}", prepare)
    yield Case("gpt2 generate, batch 2", generate)


def _model(model_type: str, sizes: SigmaBenchSizes, hidden: int) -> Any:
    heads = min(sizes.heads, max(1, hidden // 16))
    if model_type == "vit":
        return build_vit(
            hidden,
            sizes.layers,
            image=sizes.image,
            patch=sizes.patch,
            num_attention_heads=heads,
        )
    return build_gpt2(
        hidden,
        sizes.layers,
        vocabulary=sizes.vocabulary,
        positions=max(sizes.sequence, sizes.prompt + sizes.new_tokens),
        n_head=heads,
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


def _training_step(model: nn.Module, inputs: dict[str, Tensor], new_clock: NewClock) -> Subject:
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


def _evaluation(model: nn.Module, inputs: dict[str, Tensor], new_clock: NewClock) -> Subject:
    def evaluate() -> dict[str, float]:
        model.eval()
        clock = new_clock()
        with torch.no_grad():
            model(**inputs)
        clock.lap("forward")
        return clock.seconds

    return evaluate


def _generation(model: Any, prompts: Tensor, new_tokens: int, new_clock: NewClock) -> Subject:
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
