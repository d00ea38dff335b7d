"""`hf-stable preflight` on the command line."""

from __future__ import annotations

import shlex
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer
from rich.console import Console

from hf_stable.commands.conventions import (
    NO,
    SUCCESS,
    Debug,
    Json,
    Module,
    Register,
    Script,
    Wide,
    examples,
)
from hf_stable.commands.launch.scripts import read_command
from hf_stable.commands.terminal import make_console, make_table, print_json

if TYPE_CHECKING:
    from hf_stable.commands.preflight.judging import Outcome
    from hf_stable.commands.preflight.legs import Settings
    from hf_stable.commands.preflight.result import PreflightResult
    from hf_stable.commands.preflight.running import Plan

__all__ = ["room"]

room = typer.Typer()

Rates = Annotated[str, typer.Option(help="Multiples of the script's own rate, with commas.")]
Remedies = Annotated[
    str | None,
    typer.Option(
        help="With commas: none, warmup, clip, adamw2, a patch method, optim:NAME; options "
        "behind colons (adamw2:tau=0.01), joined by +.  [default: none,warmup,clip,adamw2,"
        "sigma_reparam,adamw2+sigma_reparam]",
        show_default=False,
    ),
]
Steps = Annotated[int, typer.Option(help="Optimizer steps of each leg.")]
Seeds = Annotated[int, typer.Option(help="Seeds to take each leg under.")]
Bisect = Annotated[
    bool, typer.Option("--bisect", help="Narrow the highest rate that survives to 1.5 times.")
]
AllRates = Annotated[
    bool, typer.Option("--all-rates", help="Also rates above one at which a remedy was lost.")
]
Jobs = Annotated[int, typer.Option(help="Legs at once.")]
Launcher = Annotated[
    str, typer.Option(help='What starts the processes of a leg: the words before "-m".')
]
Output = Annotated[
    Path, typer.Option(help="Folder; one that holds this preflight already is gone on with.")
]


@room.command(
    # Everything from the script's name on is the script's own, options and "--" included.
    context_settings={"allow_interspersed_args": False},
    epilog=examples(
        "hf-stable preflight train.py --output_dir out --learning_rate 1e-3",
        "hf-stable preflight --rates 1,3 --remedies none,adamw2:tau=0.01 --bisect train.py",
        'hf-stable preflight --launcher "torchrun --nproc-per-node 8" train.py --output_dir out',
    ),
)
def preflight(
    script: Script = None,
    rates: Rates = "0.3,1,3,10",
    remedies: Remedies = None,
    steps: Steps = 100,
    seeds: Seeds = 1,
    bisect: Bisect = False,
    all_rates: AllRates = False,
    jobs: Jobs = 1,
    launcher: Launcher = "",
    output: Output = Path("preflight-output"),
    module: Module = False,
    register: Register = None,
    wide: Wide = False,
    as_json: Json = False,
    debug: Debug = False,
) -> int:
    """Find the learning rate that a run survives, before the run.

    Runs the script as it is for its first steps, once for each pair of remedy and rate; the
    schedule stays that of the whole run, and evaluation, saving, pushing and trackers are off.
    Writes preflight.html and preflight.json. Exit code 0 if the planned rate has a margin of two or
    more, 1 if it has not.
    """
    from hf_stable.commands.preflight.flying import DEFAULT_REMEDIES, PROBES
    from hf_stable.commands.preflight.legs import Settings
    from hf_stable.commands.preflight.page import write_page
    from hf_stable.commands.preflight.remedies import parse_remedies
    from hf_stable.commands.preflight.running import Plan
    from hf_stable.commands.registering import register_from
    from hf_stable.report.page import require_page_packages

    command = read_command(script, module)
    chosen = parse_remedies(DEFAULT_REMEDIES if remedies is None else remedies)
    plan = Plan(_numbers(rates), chosen, seeds, bisect, not all_rates)
    own = tuple(str(Path(file).resolve()) for file in register or ())
    register_from(own)  # what does not register is said before any leg
    settings = Settings(command, steps, max(1, steps // PROBES), tuple(shlex.split(launcher)), own)
    require_page_packages()  # not after an hour of legs
    result = _fly(plan, settings, output, jobs)
    page = write_page(result, output)
    if as_json:
        print_json(result.to_dict() | {"page": str(page)})
    else:
        _print_result(result, page, make_console(wide=wide))
    return SUCCESS if result.passed else NO


def _fly(plan: Plan, settings: Settings, output: Path, jobs: int) -> PreflightResult:
    """Fly all legs, and print a line about each that ends, or what a leg that failed printed."""
    from hf_stable.commands.preflight.flying import fly
    from hf_stable.commands.preflight.processes import LegFailed

    console = make_console(stderr=True)
    try:
        return fly(
            plan, settings, output, jobs=jobs, on_leg=lambda outcome: console.print(_line(outcome))
        )
    except LegFailed as failure:
        if failure.output:
            console.print(failure.output)
        raise


def _numbers(text: str) -> tuple[float, ...]:
    try:
        return tuple(float(part) for part in text.split(","))
    except ValueError:
        raise ValueError(f"--rates takes numbers with commas between them, got {text!r}") from None


def _line(outcome: Outcome) -> str:
    loss = "" if outcome.loss is None else f", loss {outcome.loss:.3g}"
    alarm = f", alarm at step {outcome.alarm['step']}" if outcome.alarm is not None else ""
    reason = f" ({outcome.reason})" if outcome.reason else ""
    return f"{outcome.leg.name}: {outcome.kind}{loss}{alarm}{reason}"


def _print_result(result: PreflightResult, page: Path, console: Console) -> None:
    from hf_stable.commands.preflight.page import heat_map

    columns, rows = heat_map(result.outcomes)
    table = make_table("remedy", *columns)
    for label, cells in rows:
        table.add_row(label, *(cell.text for cell in cells))
    console.print(table)
    for sentence in result.sentences:
        console.print(f"- {sentence}")
    console.print(result.command)
    console.print(str(page))
