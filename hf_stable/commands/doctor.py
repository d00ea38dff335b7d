"""What `hf-stable doctor` says: versions, what is supported, what changed in this process."""

from __future__ import annotations

import platform
from dataclasses import dataclass
from importlib.metadata import PackageNotFoundError, requires, version

import torch
from packaging.requirements import Requirement

import hf_stable.commands.launch.launcher  # noqa: F401  (has changes of its own on the list)
from hf_stable.architectures import supported_architectures
from hf_stable.methods.patching import METHODS
from hf_stable.trainer.changes import is_in_place, listed
from hf_stable.trainer.optimizer import OPTIMIZER_NAME

__all__ = ["ChangeRow", "Diagnosis", "PackageRow", "diagnose"]

_EXTRA = "recipes"


@dataclass(frozen=True)
class PackageRow:
    """A package that hf_stable uses.

    Attributes:
        name: its name.
        installed: its version, or None.
        needed: the versions that fit.
        verdict: `"ok"`, `"does not fit"`, `"missing"`, or `"optional"` where it is not there but
            only an extra needs it.
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
        packages: hf_stable itself, Python, then what it requires.
        changes: the closed list of changes.
        supported: names that may be used, by kind.
    """

    packages: tuple[PackageRow, ...]
    changes: tuple[ChangeRow, ...]
    supported: dict[str, list[str]]

    @property
    def is_healthy(self) -> bool:
        """Return whether all that hf_stable needs is there in a version that fits."""
        return all(row.verdict in ("ok", "optional") for row in self.packages)


def diagnose() -> Diagnosis:
    """Look at this process and its environment.

    Raises:
        PackageNotFoundError: if hf_stable is imported without being installed.
    """
    packages = [
        PackageRow("hf-stable", version("hf-stable"), "", "ok"),
        PackageRow("python", platform.python_version(), "", "ok"),
    ]
    for line in requires("hf-stable") or ():
        requirement = Requirement(line)
        if requirement.marker is None or requirement.marker.evaluate({"extra": _EXTRA}):
            packages.append(_package_row(requirement))
    changes = tuple(
        ChangeRow(wrap.target, wrap.reason, wrap.made_by, is_in_place(wrap)) for wrap in listed()
    )
    supported = {
        "architectures": supported_architectures(),
        "patch methods": list(METHODS),
        "optimizers": [OPTIMIZER_NAME],
        "devices here": _devices(),
    }
    return Diagnosis(tuple(packages), changes, supported)


def _devices() -> list[str]:
    accelerator = torch.accelerator.current_accelerator(check_available=True)
    return ["cpu"] if accelerator is None else ["cpu", accelerator.type]


def _package_row(requirement: Requirement) -> PackageRow:
    needed = str(requirement.specifier)
    try:
        installed = version(requirement.name)
    except PackageNotFoundError:
        optional = requirement.marker is not None
        return PackageRow(requirement.name, None, needed, "optional" if optional else "missing")
    fits = requirement.specifier.contains(installed, prereleases=True)
    return PackageRow(requirement.name, installed, needed, "ok" if fits else "does not fit")
