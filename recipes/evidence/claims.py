"""All claims by their names on the command line."""

from recipes.evidence import causes, comparisons, from_the_papers, sequences, todays
from recipes.evidence.claim import Claim

_MODULES = (from_the_papers, comparisons, sequences, todays, causes)

CLAIMS: dict[str, Claim] = {
    claim.key: claim
    for claim in sorted(
        (claim for module in _MODULES for claim in module.CLAIMS),
        key=lambda claim: int(claim.key.split("-")[0]),
    )
}
"""In the order of the page, by number."""
