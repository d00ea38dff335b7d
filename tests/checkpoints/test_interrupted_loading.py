"""Out of memory and Ctrl-C at points of `load`: nothing half made stays, and it loads after."""

from __future__ import annotations

import gc

import pytest
import torch
from faults import OutOfMemoryAt, count_lines, count_operations, interrupt_at
from tiny_models import sgd_steps, tiny_model
from tiny_training import same_state
from trained_models import logits_of

import hf_stable
from hf_stable.methods.sigma_reparam.steps import live_layers

POINTS = 12
"""Points of each fault, evenly spread."""


def settings():
    """What a load sets for its own time, for the whole process."""
    return torch.get_default_dtype(), torch.is_grad_enabled(), torch.empty(0).device


def numbers():
    return {layer.serial_number for layer in live_layers()}


def contents(folder):
    return {path.name: path.read_bytes() for path in folder.iterdir()}


# torch.asarray, by which safetensors hands out a view of its file, says this of any error in it.
SWALLOWED = "could not determine the shape of object type 'torch.storage.UntypedStorage'"


@pytest.mark.slow
@pytest.mark.parametrize(
    ("count", "inject"),
    [(count_operations, OutOfMemoryAt), (count_lines, interrupt_at)],
    ids=["out of memory", "Ctrl-C"],
)
def test_a_fault_leaves_nothing_half_made_and_a_second_load_works(count, inject, tmp_path):
    model = hf_stable.patch(tiny_model("gpt2"), ["sigma_reparam", "remove_pre_layernorm"])
    sgd_steps(model)
    model.eval().save_pretrained(tmp_path)

    def load():
        return hf_stable.load(type(model), tmp_path)

    load()  # imports what it needs
    num_points = count(load)
    gc.collect()
    before, live, files = settings(), numbers(), contents(tmp_path)
    expected = logits_of(model)
    for point in range(1, num_points + 1, num_points // POINTS):
        faults = (torch.OutOfMemoryError, KeyboardInterrupt, ValueError)
        with pytest.raises(faults, match=f"injected|{SWALLOWED}"), inject(point):
            load()
        gc.collect()
        assert numbers() == live and settings() == before, point
        assert contents(tmp_path) == files, point
        again = load()
        assert numbers() > live  # a model that stayed would be seen
        assert same_state(again, model) and torch.equal(logits_of(again), expected), point
        del again
