"""Names of files that several rooms read or write."""

from __future__ import annotations

import re

__all__ = ["BATCH_FILE", "BATCH_FOLDER", "BATCH_KEY", "SIDECAR_FILE", "TRAINER_STATE_FILE"]

SIDECAR_FILE = "hf_stable_state.safetensors"
"""The file beside a checkpoint's plain weights that holds raw W, gamma, sigma, u and v."""

TRAINER_STATE_FILE = "trainer_state.json"
"""The file with the Trainer's log and progress, which it writes last of a checkpoint."""

BATCH_FOLDER = "_batches"
"""In an output folder, with the micro-batches of alarms. The Trainer pushes nothing with "_"."""

BATCH_FILE = re.compile(
    r"step-\d{1,15}-attempt-\d{1,9}-rank-(?P<rank>\d{1,9})-micro-\d{1,9}\.safetensors"
)
"""What files in it are called: by optimizer step, rollbacks so far, process and micro-batch."""

BATCH_KEY = "hf_stable_batch"
"""In the metadata of a file in it: what it is, as JSON."""
