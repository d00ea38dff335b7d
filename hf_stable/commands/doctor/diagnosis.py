"""What `hf-stable doctor` says: versions, the machine, what is supported, what was changed."""

from __future__ import annotations

import os
import platform
from collections.abc import Sequence
from dataclasses import dataclass
from importlib.metadata import PackageNotFoundError, requires, version

import torch
from packaging.requirements import Requirement

import hf_stable.commands.launch.attaching  # noqa: F401  (has changes of its own on the list)
import hf_stable.commands.preflight.child  # noqa: F401  (likewise)
from hf_stable.architectures import supported_architectures
from hf_stable.kernels.choosing import describe_paths
from hf_stable.methods.patching import METHODS
from hf_stable.trainer.changes import is_in_place, listed
from hf_stable.trainer.optimizer import OPTIMIZER_NAME

__all__ = [
    "ChangeRow",
    "Diagnosis",
    "PackageRow",
    "changes_as_markdown",
    "diagnose",
    "list_changes",
]

EXTRAS = ("", "report", "fast", "recipes")
"""Extras whose packages are looked for; "" stands for what hf_stable cannot do without."""

BESIDE = ("numpy", "tokenizers", "triton", "deepspeed", "bitsandbytes", "trl", "lightning")
"""Packages that hf_stable does not ask for, but that a fault may come from; named where they are
installed."""


@dataclass(frozen=True)
class PackageRow:
    """A package that hf_stable uses, or that a model may meet beside it.

    Attributes:
        name: its name.
        installed: its version, or None.
        needed: the versions that fit.
        verdict: `"ok"`, `"does not fit"`, `"missing"`, `"optional"` where it is not there but
            only an extra needs it, or `"beside it"` where hf_stable does not ask for it.
    """

    name: str
    installed: str | None
    needed: str
    verdict: str


@dataclass(frozen=True)
class ChangeRow:
    """Something that hf_stable changes in a process.

    Attributes:
        target: `module:qualified.name` of what is wrapped or added to.
        reason: why.
        made_by: what makes the change: the import of hf_stable, or a command.
        active: whether the change is in place in this process now.
    """

    target: str
    reason: str
    made_by: str
    active: bool


@dataclass(frozen=True)
class Diagnosis:
    """What `diagnose` found.

    Attributes:
        packages: hf_stable itself, Python, then what it requires and what is beside it.
        machine: system, processor and accelerators, by what they are.
        changes: the closed list of changes.
        supported: names that may be used, by kind.
    """

    packages: tuple[PackageRow, ...]
    machine: dict[str, str]
    changes: tuple[ChangeRow, ...]
    supported: dict[str, list[str]]

    @property
    def is_healthy(self) -> bool:
        """Return whether all that hf_stable needs is there in a version that fits."""
        return all(row.verdict not in ("missing", "does not fit") for row in self.packages)


def diagnose() -> Diagnosis:
    """Look at this process and its environment.

    Raises:
        PackageNotFoundError: if hf_stable is imported without being installed.
    """
    supported = {
        "architectures": supported_architectures(),
        "patch methods": list(METHODS),
        "optimizers": [OPTIMIZER_NAME],
    }
    return Diagnosis(_packages(), _machine(), list_changes(), supported)


def list_changes() -> tuple[ChangeRow, ...]:
    """Return all that hf_stable changes in a process."""
    return tuple(
        ChangeRow(wrap.target, wrap.reason, wrap.made_by, is_in_place(wrap)) for wrap in listed()
    )


def changes_as_markdown(changes: Sequence[ChangeRow]) -> str:
    """Return the list of changes as the table that the guide shows."""
    rows = [f"| `{change.target}` | {change.made_by} | {change.reason} |" for change in changes]
    return "\n".join(["| What | By | Why |", "|---|---|---|", *rows]) + "\n"


def _packages() -> tuple[PackageRow, ...]:
    rows = [
        PackageRow("hf-stable", version("hf-stable"), "", "ok"),
        PackageRow("python", platform.python_version(), "", "ok"),
    ]
    asked = {
        requirement.name: requirement
        for requirement in map(Requirement, requires("hf-stable") or ())
        if requirement.name != "hf-stable"  # an extra that includes another one
        and (
            requirement.marker is None
            or any(requirement.marker.evaluate({"extra": extra}) for extra in EXTRAS)
        )
    }
    rows += map(_package_row, asked.values())
    for name in BESIDE:
        installed = _version(name)
        if installed is not None and name not in asked:
            rows.append(PackageRow(name, installed, "", "beside it"))
    return tuple(rows)


def _package_row(requirement: Requirement) -> PackageRow:
    needed, installed = str(requirement.specifier), _version(requirement.name)
    if installed is None:
        optional = requirement.marker is not None
        return PackageRow(requirement.name, None, needed, "optional" if optional else "missing")
    fits = requirement.specifier.contains(installed, prereleases=True)
    return PackageRow(requirement.name, installed, needed, "ok" if fits else "does not fit")


def _version(name: str) -> str | None:
    try:
        return version(name)
    except PackageNotFoundError:
        return None


def _machine() -> dict[str, str]:
    return {
        "system": platform.platform(),
        "processor": platform.processor() or platform.machine(),
        "cores": f"{os.cpu_count()}, torch uses {torch.get_num_threads()}",
        "accelerators": ", ".join(_accelerators()) or "none",
        "CUDA of torch": torch.version.cuda or "none",
        **describe_paths(),
    }


def _accelerators() -> list[str]:
    kind = torch.accelerator.current_accelerator(check_available=True)
    if kind is None:
        return []
    count = torch.accelerator.device_count()
    if kind.type == "cuda":
        return [torch.cuda.get_device_name(index) for index in range(count)]
    return [f"{count} x {kind.type}"]
