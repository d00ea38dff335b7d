"""The commands below `hf-stable bench`: costs measured here, and worked out for elsewhere."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from hf_stable.commands.conventions import Debug, Json, examples
from hf_stable.commands.terminal import make_console, print_json

if TYPE_CHECKING:
    from hf_stable.commands.bench.timing import Summary

__all__ = ["room"]

room = typer.Typer()
bench = typer.Typer(
    epilog=examples(
        "hf-stable bench sigma --rounds 20",
        "hf-stable bench --plan gpt2-xl --gpus 64 --tokens 524288",
    )
)
room.add_typer(bench, name="bench")


@bench.callback(invoke_without_command=True)
def _bench(
    context: typer.Context,
    plan: Annotated[
        str | None,
        typer.Option(
            metavar="MODEL",
            help="Do not measure: work out what a step of this model costs (gpt2, gpt2-xl, vit-b, "
            "vit-g, 7b; folder, file or Hub id of a config.json).",
        ),
    ] = None,
    gpus: Annotated[int, typer.Option(min=1, help="For --plan.")] = 8,
    tokens: Annotated[int, typer.Option(min=1, help="Per step, of all GPUs; for --plan.")] = 2**19,
    strategy: Annotated[str, typer.Option(help="fsdp2 or ddp; for --plan.")] = "fsdp2",
    machine: Annotated[str, typer.Option(help="a100 or h100; for --plan.")] = "h100",
    sequence: Annotated[
        int | None, typer.Option(min=1, help="Tokens per sequence; for --plan.")
    ] = None,
    as_json: Json = False,
    debug: Debug = False,
) -> None:
    """Measure costs against baselines, or plan them for big runs."""
    if plan is None:
        if context.invoked_subcommand is None:
            print(context.get_help())
        return
    if context.invoked_subcommand is not None:
        raise ValueError(f"--plan measures nothing: leave out {context.invoked_subcommand!r}")
    from hf_stable.commands.bench.planning import make_plan, print_plan

    made = make_plan(
        plan,
        num_processes=gpus,
        tokens=tokens,
        strategy=strategy,  # type: ignore[arg-type]  # checked there
        machine=machine,
        sequence=sequence,
    )
    print_json(made.to_dict()) if as_json else print_plan(made)


BenchOutput = Annotated[Path | None, typer.Option(help="JSON file to write as well.")]
Rounds = Annotated[int, typer.Option(min=1, help="Alternated repetitions of every case.")]
Device = Annotated[str, typer.Option(help="Where to run: cpu, cuda ...")]
Only = Annotated[str, typer.Option(help="Only cases with this text in their name.")]


@bench.command(epilog=examples("hf-stable bench sigma --rounds 20 --output sigma.json"))
def sigma(
    output: BenchOutput = None,
    rounds: Rounds = 20,
    only: Only = "",
    device: Device = "cpu",
    as_json: Json = False,
    debug: Debug = False,
) -> None:
    """Time sigmaReparam against the plain model and against torch's spectral_norm."""
    from hf_stable.commands.bench.sigma import bench_sigma

    _measure(bench_sigma, as_json, output=output, rounds=rounds, only=only, device=device)


@bench.command(epilog=examples("hf-stable bench adamw2 --rounds 10 --output adamw2.json"))
def adamw2(
    output: BenchOutput = None,
    rounds: Rounds = 10,
    only: Only = "",
    device: Device = "cpu",
    as_json: Json = False,
    debug: Debug = False,
) -> None:
    """Time AdamW2 against torch's AdamW, fused and foreach, and a naive loop."""
    from hf_stable.commands.bench.adamw2 import bench_adamw2

    _measure(bench_adamw2, as_json, output=output, rounds=rounds, only=only, device=device)


@bench.command(epilog=examples("hf-stable bench monitor --rounds 10 --output monitor.json"))
def monitor(
    output: BenchOutput = None,
    rounds: Rounds = 10,
    only: Only = "",
    device: Device = "cpu",
    as_json: Json = False,
    debug: Debug = False,
) -> None:
    """Time StabilityCallback against the same steps without it."""
    from hf_stable.commands.bench.monitor import bench_monitor

    _measure(bench_monitor, as_json, output=output, rounds=rounds, only=only, device=device)


def _measure(benchmark: Callable[..., list[Summary]], as_json: bool, **options: Any) -> None:
    """Run a benchmark, which prints a table; with --json the table goes to stderr."""
    summaries = benchmark(console=make_console(stderr=as_json), **options)
    if as_json:
        print_json({"results": [asdict(summary) for summary in summaries]})


@bench.command(epilog=examples("hf-stable bench scale --output scale.json"))
def scale(
    output: BenchOutput = None,
    rounds: Rounds = 10,
    as_json: Json = False,
    debug: Debug = False,
) -> None:
    """Check what --plan rests on: predict steps of this machine from others, and time them."""
    from hf_stable.commands.bench.scale import bench_scale

    found = bench_scale(output=output, rounds=rounds, console=make_console(stderr=as_json))
    if as_json:
        print_json({"results": [asdict(each) | {"error": each.error} for each in found]})
