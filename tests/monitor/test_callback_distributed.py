"""StabilityCallback on two processes: one decision for both, written down once."""

from __future__ import annotations

import contextlib
import io
import math
import os

import pytest
import torch
from gloo_ranks import run_ranks
from tiny_training import dropout_model, make_trainer
from transformers import Trainer

import hf_stable
from hf_stable.monitor.log_file import read_log


class DivergesOnOneRank(Trainer):
    """Loses the loss of one process as long as the rate is high, and notes what it saw."""

    def compute_loss(self, model, inputs, *args, **kwargs):
        loss = super().compute_loss(model, inputs, *args, **kwargs)
        rate, step = self.optimizer.param_groups[0]["lr"], self.state.global_step + 1
        if os.environ["RANK"] == "1" and step >= 5 and rate > 0.6e-2:
            loss = loss * math.nan
        self.seen.append((step, bool(loss.isfinite())))
        return loss


def train_on_ranks(folder):
    monitor = hf_stable.StabilityCallback(every=2, on_collapse="rollback")
    trainer = make_trainer(
        hf_stable.patch(dropout_model("gpt2"), "sigma_reparam"), folder / "out",
        callbacks=[monitor], max_steps=8, save_steps=2, per_device_train_batch_size=4,
        lr_scheduler_type="constant", logging_steps=100, trainer_class=DivergesOnOneRank,
    )  # fmt: skip
    trainer.seen = []
    with contextlib.redirect_stderr(io.StringIO()) as said:
        trainer.train()
    return {
        "seen": trainer.seen,
        "said": [line for line in said.getvalue().splitlines() if "hf-stable:" in line],
        "rollbacks": monitor.rollbacks.count,
        "step": trainer.state.global_step,
        "rate": trainer.optimizer.param_groups[0]["lr"],
        "weights": dict(trainer.model.state_dict()),
        "progress": monitor.state()["attributes"]["progress"]["rules"],
    }


@pytest.mark.slow
def test_a_loss_that_is_lost_on_one_process_takes_both_back(tmp_path):
    first, second = run_ranks(train_on_ranks, 2, tmp_path)
    # The first process never saw a bad loss of its own, and did what the second one did.
    assert all(finite for _, finite in first["seen"])
    assert [step for step, finite in second["seen"] if not finite] == [5]
    assert [step for step, _ in first["seen"]] == [step for step, _ in second["seen"]]
    for key in ("rollbacks", "step", "rate", "progress"):
        assert first[key] == second[key], key
    for name, weight in first["weights"].items():
        assert torch.equal(second["weights"][name], weight), name
    assert (first["rollbacks"], first["step"], first["rate"]) == (1, 8, pytest.approx(0.5e-2))
    assert any("resuming from step 4" in text for text in first["said"]) and not second["said"]
    lines = [(line["event"], line["attempt"], line["step"]) for line in read_log(tmp_path / "out")]
    assert lines == [
        *(("probe", 0, step) for step in (1, 2, 4)),
        ("alarm", 0, 5),
        ("rollback", 0, 5),
        ("end", 0, 5),
        *(("probe", 1, step) for step in (6, 8)),
        ("end", 1, 8),
    ]
