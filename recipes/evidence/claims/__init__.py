"""The claims, a module for each or for those that share their runs."""

from __future__ import annotations

from recipes.evidence.claim import Claim
from recipes.evidence.claims import (
    ablations,
    causes,
    collapse,
    combinations,
    decoder,
    effective_rates,
    modes,
    open_questions,
    picks,
    rate_windows,
    rivals,
    sequences,
    sharpness,
    sigma,
    tau_range,
    warmup,
)

_ALL = (
    warmup.CLAIM,
    tau_range.CLAIM,
    effective_rates.CLAIM,
    collapse.CLAIM,
    modes.CLAIM,
    sigma.CLAIM,
    rate_windows.CLAIM,
    ablations.CLAIM,
    open_questions.CLAIM,
    sharpness.CLAIM,
    rivals.CLAIM,
    combinations.CLAIM,
    *sequences.CLAIMS,
    decoder.CLAIM,
    *picks.CLAIMS,
    *causes.CLAIMS,
)

CLAIMS: dict[str, Claim] = {
    claim.key: claim for claim in sorted(_ALL, key=lambda claim: int(claim.key.split("-")[0]))
}
"""All of them by their names on the command line, in the order of the page."""
