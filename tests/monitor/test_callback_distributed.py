"""StabilityCallback on two processes: one decision for both, written down once."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from hf_stable.monitor.log_file import read_log

RANK = """
import contextlib, io, json, math, os, sys
sys.path.insert(0, sys.argv[1])
folder, rank = sys.argv[2], int(os.environ["RANK"])
import torch
from transformers import Trainer
import tiny_training
import hf_stable

class DivergesOnOneRank(Trainer):
    seen = []

    def compute_loss(self, model, inputs, *args, **kwargs):
        loss = super().compute_loss(model, inputs, *args, **kwargs)
        rate = self.optimizer.param_groups[0]["lr"]
        if rank == 1 and self.state.global_step + 1 >= 5 and rate > 0.6e-2:
            loss = loss * math.nan
        self.seen.append((self.state.global_step + 1, bool(loss.isfinite())))
        return loss

tiny_training.Trainer = DivergesOnOneRank
monitor = hf_stable.StabilityCallback(every=2, on_collapse="rollback")
trainer = tiny_training.make_trainer(
    hf_stable.patch(tiny_training.dropout_model("gpt2"), "sigma_reparam"),
    os.path.join(folder, "out"), callbacks=[monitor], max_steps=8, save_steps=2,
    per_device_train_batch_size=4, lr_scheduler_type="constant", logging_steps=100,
)
with contextlib.redirect_stderr(io.StringIO()) as said:
    trainer.train()
state = trainer.model.state_dict()
result = {
    "seen": trainer.seen,
    "said": [line for line in said.getvalue().splitlines() if "hf-stable:" in line],
    "rollbacks": monitor.rollbacks.count, "step": trainer.state.global_step,
    "rate": trainer.optimizer.param_groups[0]["lr"],
    "weights": [value.double().sum().item() for value in state.values()],
    "progress": monitor.state()["attributes"]["progress"]["rules"],
}
with open(os.path.join(folder, f"rank{rank}.json"), "w") as file:
    json.dump(result, file)
torch.distributed.barrier()
torch.distributed.destroy_process_group()
"""


@pytest.mark.slow
def test_a_loss_that_is_lost_on_one_process_takes_both_back(tmp_path):
    script = tmp_path / "rank.py"
    script.write_text(RANK)
    done = subprocess.run(
        [
            *(sys.executable, "-m", "torch.distributed.run", "--standalone"),
            *("--nproc_per_node", "2", script, Path(__file__).parents[1] / "support", tmp_path),
        ],
        capture_output=True,
        text=True,
        env={**os.environ, "HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1"},
        timeout=300,
    )
    assert done.returncode == 0, done.stderr[-4000:]
    first, second = (json.loads((tmp_path / f"rank{r}.json").read_text()) for r in (0, 1))
    # The first process never saw a bad loss of its own, and did what the second one did.
    assert all(finite for _, finite in first["seen"])
    assert [step for step, finite in second["seen"] if not finite] == [5]
    assert [step for step, _ in first["seen"]] == [step for step, _ in second["seen"]]
    for key in ("rollbacks", "step", "rate", "weights", "progress"):
        assert first[key] == second[key], key
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
