"""AdamW2 on DeepSpeed's flat partitions, against the paper's algorithm with exact spectra."""

from __future__ import annotations

import importlib.util
from pathlib import Path

import pytest
import torch
from deepspeed_runs import settings, told_accelerator  # noqa: F401  (a fixture for all tests here)
from gloo_ranks import run_ranks
from torch import nn

from hf_stable.adamw2.optimizer import AdamW2
from hf_stable.measures.parts import Parts

pytest.importorskip("deepspeed")
pytestmark = [pytest.mark.slow, pytest.mark.xdist_group("deepspeed")]

_spec = importlib.util.spec_from_file_location(
    "adamw2_paper", Path(__file__).parents[1] / "support" / "reference" / "adamw2_paper.py"
)
paper = importlib.util.module_from_spec(_spec)
_spec.loader.exec_module(paper)

STAGES = (1, 2, 3)
STEPS = 3
FUSED = {"fused": (18, 8)}
OTHERS = {
    "square": (12, 12), "tall": (20, 7), "wide": (5, 24), "kernel": (6, 3, 2, 2), "gain": (9,),
    "scalar": (1,), "one": (1,),
}  # fmt: skip
"""Those of tests/adamw2/test_optimizer.py, but of a scalar, which ZeRO-3 cannot take."""
OPTIONS = dict(lr=2e-2, betas=(0.9, 0.99), eps=1e-8, weight_decay=0.1, tau=0.02)
OF_FUSED = OPTIONS | dict(tau=0.004)
ACCURACY = 1e-4
"""Relative error of a rate, as allowed there for the same spectra."""


class Weights(nn.Module):
    """Weights whose gradients are what the forward is given. Partitions cut rows of them."""

    def __init__(self):
        super().__init__()
        weights = random(0)
        weights[0].chunk(3)[1].mul_(10)  # a part whose rate is not the others'
        for name, weight in zip(FUSED | OTHERS, weights, strict=True):
            self.register_parameter(name, nn.Parameter(weight))

    def forward(self, grads):
        return sum((p * g).sum() for p, g in zip(self.parameters(), grads, strict=True))


def random(seed):
    """A tensor for each weight; the fused one's do not depend on there being others."""
    found = []
    for shapes in (FUSED, OTHERS):
        generator = torch.Generator().manual_seed(seed)
        found += [
            torch.randn(shape, generator=generator, dtype=torch.float64).float()
            for shape in shapes.values()
        ]
    return found


def grads_of(step):
    return random(1000 + step)


def on_ranks():
    """Weights before and after each step, and the rates, by stage."""
    import deepspeed

    deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False
    return {stage: stepped(stage) for stage in STAGES}


def stepped(stage):
    import deepspeed

    model = Weights()
    named = dict(model.named_parameters())
    groups = [
        dict(params=[("fused", named["fused"])], parts=Parts((1, 1, 1)), tau=OF_FUSED["tau"]),
        dict(params=[(name, named[name]) for name in OTHERS]),
    ]
    optimizer = AdamW2(groups, power_iterations=100, **OPTIONS)
    config = settings(stage=stage) | {
        "train_micro_batch_size_per_gpu": 1, "gradient_accumulation_steps": 1,
        "gradient_clipping": 0.0, "zero_allow_untested_optimizer": True,
    }  # fmt: skip
    engine, *_ = deepspeed.initialize(model=model, optimizer=optimizer, config=config)
    found = {"weights": [weights_of(engine)], "rates": []}
    for step in range(STEPS):
        engine.backward(engine(grads_of(step)))
        engine.step()
        found["weights"].append(weights_of(engine))
        found["rates"].append(optimizer.effective_lr())
    return found


def weights_of(engine):
    import deepspeed

    with deepspeed.zero.GatheredParameters(list(engine.module.parameters())):
        return [param.detach().clone() for param in engine.module.parameters()]


@pytest.fixture(scope="module")
def ran():
    return run_ranks(on_ranks, 2)


def by_the_paper():
    """Rates by name, updates and weights of each step, each part of the fused weight apart."""
    fused, *others = (param.detach() for param in Weights().parameters())
    references = (
        paper.PaperAdamW2([fused], blocks=3, **OF_FUSED), paper.PaperAdamW2(others, **OPTIONS)
    )  # fmt: skip
    for step in range(STEPS):
        first, *rest = grads_of(step)
        references[0].step([first])
        references[1].step(rest)
        rates, updates, weights = (
            [value for each in references for value in getattr(each, what)]
            for what in ("rates", "updates", "weights")
        )
        yield rates, updates, [weight.clone() for weight in weights]


@pytest.mark.parametrize("stage", STAGES)
def test_each_step_is_the_one_of_the_paper(stage, ran):
    found, other = ran[0][stage], ran[1][stage]
    assert found["rates"] == other["rates"]
    clipped, of_parts = 0, []
    for step, (rates, _, weights) in enumerate(by_the_paper()):
        for at, name in enumerate(FUSED | OTHERS):
            given = found["rates"][step][name]
            given = given if isinstance(given, list) else [given]
            assert given == pytest.approx(rates[at], rel=ACCURACY), name
            # An entry moves by about a rate, 2e-2 at most, whose error is ACCURACY: three steps
            # differ by 6e-6.
            torch.testing.assert_close(
                found["weights"][step + 1][at].double(), weights[at], rtol=0, atol=1e-5
            )
            assert torch.equal(found["weights"][step + 1][at], other["weights"][step + 1][at])
            clipped += sum(rate < OPTIONS["lr"] for rate in rates[at])
            of_parts += rates[at] if name == "fused" else []
    assert 0 < clipped < STEPS * (3 + len(OTHERS))
    assert max(of_parts) > 1.3 * min(of_parts)


@pytest.mark.parametrize("stage", STAGES)
def test_no_step_is_larger_than_tau_allows(stage, ran):
    found, reached = ran[0][stage], 0
    for step, (_, updates, _) in enumerate(by_the_paper()):
        for at, name in enumerate(FUSED | OTHERS):
            given = found["rates"][step][name]
            given = given if isinstance(given, list) else [given]
            tau = (OF_FUSED if name == "fused" else OPTIONS)["tau"]
            before = found["weights"][step][at].chunk(len(given))
            for rate, update, weight in zip(
                given, updates[at].chunk(len(given)), before, strict=True
            ):
                share = rate * paper.sigma1(update) / paper.sigma1(weight) / tau
                assert share <= 1 + ACCURACY, name
                reached += share > 1 - ACCURACY
    assert reached  # it is the bound that held some of them back
