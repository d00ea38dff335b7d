"""Names of files that several rooms read or write."""

from __future__ import annotations

__all__ = ["SIDECAR_FILE", "TRAINER_STATE_FILE"]

SIDECAR_FILE = "hf_stable_state.safetensors"
"""The file beside a checkpoint's plain weights that holds raw W, gamma, sigma, u and v."""

TRAINER_STATE_FILE = "trainer_state.json"
"""The file with the Trainer's log and progress, which it writes last of a checkpoint."""
