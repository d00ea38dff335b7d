"""All claims by their names on the command line."""

from recipes.evidence import causes, comparisons, from_the_papers, sequences
from recipes.evidence.claim import Claim

CLAIMS: dict[str, Claim] = {
    claim.key: claim
    for claim in (
        *from_the_papers.CLAIMS,
        *comparisons.CLAIMS,
        *sequences.CLAIMS,
        *causes.CLAIMS,
    )
}
"""In the order of the page."""
