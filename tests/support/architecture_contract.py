"""What every shipped entry owes to every method, and what it comes to.

    python tests/support/architecture_contract.py [MODEL ...]    # writes the results

A check takes the name of a tiny model and an empty folder. It raises where something is wrong. What
it returns is "yes", or what the product itself says that it leaves out. The results stand beside
the tests, which compare them, and the page of supported models is made from them.
"""

from __future__ import annotations

import json
import re
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import transformers
from contract_checks import (
    adapted,
    checkpointed,
    folded,
    generated,
    in_bfloat16,
    patched,
    resumed,
)
from contract_measures import bounded, exported, probed, without_norms
from contract_models import fresh, trained
from tiny_architectures import MODELS

import hf_stable
from hf_stable.architectures.coverage import find_uncovered
from hf_stable.architectures.finding import find_regions
from hf_stable.methods.sigma_reparam.method import sigma_layers

RESULTS = Path(__file__).parents[1] / "architectures" / "contract.json"

CHECKS: dict[str, Callable[[str, Path], str]] = {
    "patch": patched,
    "fold": folded,
    "generate": generated,
    "LoRA": adapted,
    "resume": resumed,
    "bfloat16": in_bfloat16,
    "checkpointing": checkpointed,
    "probe": probed,
    "norms": without_norms,
    "AdamW2": bounded,
}


def pinned(name: str) -> list[str]:
    """The layers that a patch changes, by names without numbers."""
    return sorted({without_numbers(path) for path, _ in sigma_layers(trained(name).model)})


def versions(name: str) -> str:
    """The versions of transformers that the entries of a model fit; "" for all."""
    entries = {region.architecture.transformers for region in find_regions(fresh(name))}
    return ",".join(sorted(entries - {""}))


def unpatched(name: str) -> dict[str, str]:
    """The same of what the patch leaves as it is, each with the reason that the product gives."""
    return left_out(trained(name).model)


def left_out(model) -> dict[str, str]:
    """What a patched model has that the patch left as it was, and why; heads and ties aside."""
    rows = hf_stable.describe(model).layers
    skipped = {row.name: row.skipped for row in rows if row.skipped is not None}
    skipped |= {each.name: each.reason for each in find_uncovered(model)}
    ordinary = ("tied", "a head")
    return {
        without_numbers(path): reason
        for path, reason in skipped.items()
        if not reason.startswith(ordinary)
    }


def without_numbers(path: str) -> str:
    """A name of a module with a star for every number."""
    return re.sub(r"\.\d+(?=\.|$)", ".*", path)


def record(name: str, folder: Path) -> dict[str, Any]:
    """Run every check of a model but that of the other process, and return what is kept of it."""
    checks = {}
    for check, run in CHECKS.items():
        place = folder / check
        place.mkdir()
        checks[check] = run(name, place)
    return {
        "transformers": versions(name),
        "layers": pinned(name),
        "left out": unpatched(name),
        "checks": checks,
    }


def main(names: list[str]) -> None:
    """Write the results of some models, or of all."""
    transformers.utils.logging.set_verbosity_error()
    for name in names or MODELS:
        with tempfile.TemporaryDirectory() as folder:
            results = record(name, Path(folder))
            ((_, way),) = exported([name], Path(folder)).items()
        if "Traceback" in way:
            raise AssertionError(f"{name}: {way}")
        results["checks"]["export"] = way
        write(name, results)


def write(name: str, results: dict[str, Any]) -> None:
    """Put the results of a model in their place among those of others."""
    known = json.loads(RESULTS.read_text()) if RESULTS.is_file() else {}
    known[name] = results
    ordered = {each: known[each] for each in MODELS if each in known}
    RESULTS.write_text(json.dumps(ordered, indent=1) + "\n")


if __name__ == "__main__":
    main(sys.argv[1:])
