"""All claims by their names on the command line."""

from recipes.evidence import causes, comparisons, from_the_papers, todays
from recipes.evidence.claim import Claim

_ALL = (*from_the_papers.CLAIMS, *comparisons.CLAIMS, *todays.CLAIMS, *causes.CLAIMS)

CLAIMS: dict[str, Claim] = {
    claim.key: claim for claim in sorted(_ALL, key=lambda claim: int(claim.key.split("-")[0]))
}
"""In the order of the page, by number."""
