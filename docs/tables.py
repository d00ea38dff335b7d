"""Tables of the documents that are made from code and results; each has one source.

    python docs/tables.py    # writes them into the documents

A table stands between `<!-- table: NAME -->` and `<!-- end of table -->`.
"""

from __future__ import annotations

import json
import re
import sys
from collections.abc import Callable
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # where it is run from must not matter
sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "tests" / "support"))

from tiny_architectures import MODELS, build

from hf_stable.architectures.finding import (
    Region,
    find_blocks,
    find_layers,
    find_norms,
    find_regions,
)
from hf_stable.commands.doctor.diagnosis import changes_as_markdown, list_changes
from hf_stable.measures.parts import Parts
from hf_stable.monitor import terms
from hf_stable.trainer.changes import ON_IMPORT
from recipes.evidence import lateness

ROOT = Path(__file__).resolve().parents[1]


def changes() -> list[str]:
    """Return what importing hf_stable and its commands change, and why.

    The order is fixed here: that of the list follows what was imported first.
    """
    rows = sorted(
        list_changes(),
        key=lambda row: (row.made_by != ON_IMPORT, row.made_by, row.target, row.reason),
    )
    return changes_as_markdown(rows).splitlines()


def monitored() -> list[str]:
    """Return every term of the monitor, with the names of what it logs."""
    return terms.table().splitlines()


def late() -> list[str]:
    """Return how late sigma was in training."""
    return lateness.table(json.loads(lateness.RESULTS.read_text())["rows"])


def models() -> list[str]:
    """Return what holds for every model type that an entry is shipped for.

    It is read off a tiny model of each; the contract of the entries holds them to it.
    """
    lines = [
        "| model type | sigmaReparam | fused parts, each with a gamma and a rate | attention "
        "| entropy bound | norms that can go |",
        "|---|---|---|---|---|---|",
    ]
    rows: dict[str, str] = {}
    for name in MODELS:
        model = build(name)
        for region in find_regions(model):
            if region.architecture.blocks:
                rows.setdefault(region.architecture.model_type, _row(region))
    return lines + [rows[name] for name in sorted(rows)]


def _row(region: Region) -> str:
    entry, inside = region.architecture, set(map(id, region.module.modules()))
    layers = [each for each in find_layers(region.module) if id(each.module) in inside]
    blocks = find_blocks(region.module)
    bypassed = any(each.bypassed for each in layers)
    fused = sorted({_parts(each.parts) for each in layers if not each.parts.is_whole})
    by_maps = any(a.returns_maps for b in blocks for _, a in b.attentions())
    bound = all(b.has_plain_logits(a) for b in blocks for _, a in b.attentions())
    placements = {norm.placement for norm in find_norms(region.module)}
    methods = {"pre": "`remove_pre_layernorm`", "post": "`remove_layernorm`",
               "branch": "`remove_layernorm`"}  # fmt: skip
    cells = (
        f"`{entry.model_type}`",
        "all but attention" if bypassed else "yes",
        ", ".join(fused),
        "spectra only" if entry.is_unseen else "by its maps" if by_maps else "yes",
        "yes" if bound and not entry.is_unseen else "",
        ", ".join(sorted({methods[each] for each in placements & methods.keys()})),
    )
    return f"| {' | '.join(cells)} |"


def _parts(parts: Parts) -> str:
    if parts.stacked:
        return "each expert" if len(parts.shares) == 1 else "gate and up of each expert"
    if len(parts.shares) == 2:
        return "gate and up"
    if parts.is_interleaved:
        return "q, k, v per head"
    return "q, k, v"


TABLES: dict[str, tuple[str, Callable[[], list[str]]]] = {
    "changes": ("docs/guides/what-importing-changes.md", changes),
    "terms": ("hf_stable/monitor/README.md", monitored),
    "models": ("docs/guides/supported-models.md", models),
    "lateness": ("hf_stable/methods/sigma_reparam/README.md", late),
}
"""Name -> the document that has the table, and what makes its lines."""


def with_table(document: str, name: str, lines: list[str]) -> str:
    """Return a document with the lines of a table in their place.

    Raises:
        LookupError: if the document has no such place.
    """
    place = re.compile(rf"(<!-- table: {name} -->\n).*?(<!-- end of table -->)", flags=re.S)
    if not place.search(document):
        raise LookupError(f"no place for the table {name!r}")
    return place.sub(lambda found: f"{found[1]}{chr(10).join(lines)}\n{found[2]}", document)


def main() -> None:
    """Write every table into its document."""
    for name, (path, make) in TABLES.items():
        document = ROOT / path
        document.write_text(with_table(document.read_text(), name, make()))


if __name__ == "__main__":
    main()
