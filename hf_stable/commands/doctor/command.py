"""`hf-stable doctor` on the command line."""

from __future__ import annotations

from dataclasses import asdict
from typing import TYPE_CHECKING

import typer

from hf_stable.commands.conventions import NO, SUCCESS, Debug, Json, Wide, examples
from hf_stable.commands.terminal import make_console, make_table, print_json

if TYPE_CHECKING:
    from hf_stable.commands.doctor.diagnosis import Diagnosis

__all__ = ["room"]

room = typer.Typer()


@room.command(epilog=examples("hf-stable doctor --json"))
def doctor(wide: Wide = False, as_json: Json = False, debug: Debug = False) -> int:
    """Show what a report of a bug needs.

    Versions, the machine, what is supported, and all that hf_stable changes in a process.
    Exit code 1 if something that hf_stable needs is missing or of a version that it does not fit.
    """
    from hf_stable.commands.doctor.diagnosis import diagnose

    report = diagnose()
    if as_json:
        print_json(asdict(report) | {"is_healthy": report.is_healthy})
    else:
        _print_diagnosis(report, wide)
    return SUCCESS if report.is_healthy else NO


def _print_diagnosis(report: Diagnosis, wide: bool) -> None:
    console = make_console(wide=wide)
    versions = make_table("package", "installed", "needed", "verdict")
    for row in report.packages:
        versions.add_row(row.name, row.installed or "not installed", row.needed, row.verdict)
    console.print("Versions", versions, "", sep="\n")
    machine = make_table("machine", "")
    for name, value in report.machine.items():
        machine.add_row(name, value)
    console.print("Here", machine, "", sep="\n")
    changes = make_table("what", "by", "in place", "why", least=("by",))
    for change in report.changes:
        in_place = "yes" if change.active else "no"
        changes.add_row(change.target, change.made_by, in_place, change.reason)
    console.print("What hf_stable changes in a process, by what", changes, "", sep="\n")
    for name, values in report.supported.items():
        console.print(f"{name}: {', '.join(values)}")
