"""`hf-stable watch`: a run that goes on, on a terminal."""

from __future__ import annotations

import math
import sys
import time
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer
from rich.console import Group, RenderableType
from rich.live import Live

from hf_stable.commands.conventions import NO, SUCCESS, Debug, Json, Wide, examples
from hf_stable.commands.terminal import (
    indented,
    make_console,
    make_table,
    print_json,
    tell_waiting,
)

if TYPE_CHECKING:
    from hf_stable.report.glance import Glance

__all__ = ["room"]

room = typer.Typer()

CURVE_WIDTH = 60

Every = Annotated[float, typer.Option(help="Seconds from look to look.")]


@room.command(epilog=examples("hf-stable watch runs/first", "hf-stable watch runs/first --once"))
def watch(
    run: Annotated[Path, typer.Argument(metavar="RUN", help="The Trainer's output folder.")],
    every: Every = 5.0,
    once: Annotated[bool, typer.Option("--once", help="Print what there is, and end.")] = False,
    wide: Wide = False,
    as_json: Json = False,
    debug: Debug = False,
) -> int:
    """Show a run on the terminal as it goes on.

    Ends with the run; Ctrl-C ends it before. Without a terminal the view is printed whenever it has
    changed; --json prints one object, as --once does. Exit code 1 if the run failed.
    """
    from hf_stable.report.following import LONGEST, FollowedRuns
    from hf_stable.report.glance import glance_at

    if not 0 < every <= LONGEST:
        raise ValueError(
            f"--every is a number of seconds above zero, {LONGEST:g} at most, got {every}"
        )
    followed = FollowedRuns([run])
    console, seen, told = make_console(wide=wide), None, ""
    with Live(console=console, auto_refresh=False, transient=False) as live:
        while True:
            changed = followed.read_if_changed()
            if changed is not None:
                seen = glance_at(changed[0])
                view = _view(seen)
                if as_json:
                    pass
                elif sys.stdout.isatty():
                    live.update(view, refresh=True)
                else:
                    console.print(view, "", sep="\n")
                if changed[0].has_ended:
                    break
            if once or as_json:
                break
            if followed.lacking not in ("", told):
                told = followed.lacking
                tell_waiting(told)
            time.sleep(every)
    if seen is None:
        raise ValueError(f"{run} holds no log and no state of a training yet")
    if as_json:
        print_json(_as_data(seen))
    return NO if seen.verdict.state == "failed" else SUCCESS


def _view(seen: Glance) -> RenderableType:
    from hf_stable.report.events import describe_event
    from hf_stable.report.glance import sparkline

    planned = f" of {seen.max_steps}" if seen.max_steps else ""
    parts: list[RenderableType] = [
        f"{seen.name}: step {seen.num_steps}{planned}. {seen.verdict.headline}."
    ]
    finite = [(step, loss) for step, loss in seen.losses if math.isfinite(loss)]
    if finite:
        best_step, best = min(finite, key=lambda entry: entry[1])
        last_step, last = seen.losses[-1]
        now = f"{last:.4g}" if math.isfinite(last) else "not finite"
        parts += [
            f"loss {sparkline([loss for _, loss in seen.losses], CURVE_WIDTH)}",
            f"     {finite[0][1]:.4g} at step {finite[0][0]}, best {best:.4g} at step {best_step}, "
            f"now {now} at step {last_step}",
        ]
    if seen.heads:
        table = make_table("lowest entropy", "share of its largest", "sigma1(Wq^T Wk)", "map")
        for head in seen.heads:
            sigma = f"{head.sigma_qk:.4g}" if math.isfinite(head.sigma_qk) else "-"
            table.add_row(head.place, f"{head.share:.0%}", sigma, head.mode or "-")
        parts += [f"heads at step {seen.probe_step}", table]
    parts.append(f"alarms: {seen.num_alarms}")
    told = [f"step {each.step}, {each.kind}: {describe_event(each)}" for each in seen.alarms]
    return Group(*parts, *indented(told), *seen.notes)


def _as_data(seen: Glance) -> dict[str, object]:
    return {
        "run": seen.name,
        "step": seen.num_steps,
        "max_steps": seen.max_steps,
        "state": seen.verdict.state,
        "headline": seen.verdict.headline,
        "loss": seen.losses[-1][1] if seen.losses else None,
        "heads": [head._asdict() for head in seen.heads],
        "alarms": seen.num_alarms,
        "notes": list(seen.notes),
    }
