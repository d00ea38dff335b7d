"""Groups of a model's parameters for AdamW2, in a loop without the Trainer."""

from __future__ import annotations

import pytest
import torch
from tiny_models import tiny_batch, tiny_model

import hf_stable


def test_a_bias_that_left_zero_trains_on():
    """A new optimizer on a young model: what its biases are is no scale for their steps."""
    model = tiny_model("gpt2")
    bias = model.transformer.h[0].mlp.c_fc.bias
    with torch.no_grad():
        bias.fill_(1e-4)
    model(**tiny_batch(model)).loss.backward()
    optimizer = hf_stable.AdamW2(hf_stable.parameter_groups(model), lr=1e-2)
    optimizer.step()
    assert (bias - 1e-4).abs().max().item() == pytest.approx(1e-2, rel=1e-3)
    assert optimizer.effective_lr()["transformer.h.0.mlp.c_fc.weight"] < 0.9e-2
