"""Patched models that have been trained for a few steps, and what they compute."""

from __future__ import annotations

import torch
from tiny_models import sgd_steps, tiny_batch, tiny_model

import hf_stable


def trained(model_type: str, **options):
    """A patched model whose weights, sigma and gamma have moved, in evaluation mode."""
    model = hf_stable.patch(tiny_model(model_type), "sigma_reparam", **options)
    sgd_steps(model)
    return model.eval()


def logits_of(model):
    inputs = {key: value for key, value in tiny_batch(model).items() if key != "labels"}
    with torch.no_grad():
        return model(**inputs).logits
