"""The commands below `hf-stable bench`: costs measured here, and worked out for elsewhere."""

from __future__ import annotations

from dataclasses import asdict
from pathlib import Path
from typing import Annotated, Any

import typer

from hf_stable.commands.terminal import make_console, print_json

__all__ = ["Debug", "Json", "bench"]

Debug = Annotated[bool, typer.Option("--debug", help="Show the trace of an error.")]
Json = Annotated[bool, typer.Option("--json", help="Print one JSON object instead of text.")]

bench = typer.Typer(
    epilog="\b\nExamples:\n  hf-stable bench sigma --rounds 20\n"
    "  hf-stable bench --plan gpt2-xl --gpus 64 --tokens 524288",
)


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


BENCHMARKS = {
    "sigma": (20, "Time sigmaReparam against the plain model and against torch's spectral_norm."),
    "adamw2": (10, "Time AdamW2 against torch's AdamW, fused and foreach, and a naive loop."),
    "monitor": (10, "Time StabilityCallback against the same steps without it."),
}
"""What `bench_NAME` of the module `bench_NAME` measures: usual rounds, and the help."""


def _add_benchmark(name: str, usual_rounds: int, summary: str) -> None:
    @bench.command(
        name,
        help=summary,
        epilog=f"\b\nExample:\n  hf-stable bench {name} --rounds {usual_rounds} "
        f"--output {name}.json",
    )
    def benchmark(
        output: BenchOutput = None,
        rounds: Rounds = usual_rounds,
        only: Only = "",
        device: Device = "cpu",
        as_json: Json = False,
        debug: Debug = False,
    ) -> None:
        console = make_console(stderr=as_json)
        summaries = _load_benchmark(name)(
            output=output, rounds=rounds, only=only, device=device, console=console
        )
        if as_json:
            print_json({"results": [asdict(summary) for summary in summaries]})


def _load_benchmark(name: str) -> Any:
    """Import a benchmark when it is run: the models that it builds take seconds to import."""
    if name == "sigma":
        from hf_stable.commands.bench.sigma import bench_sigma

        return bench_sigma
    if name == "adamw2":
        from hf_stable.commands.bench.adamw2 import bench_adamw2

        return bench_adamw2
    from hf_stable.commands.bench.monitor import bench_monitor

    return bench_monitor


for _name, (_rounds, _summary) in BENCHMARKS.items():
    _add_benchmark(_name, _rounds, _summary)


@bench.command("scale", epilog="\b\nExample:\n  hf-stable bench scale --output scale.json")
def _bench_scale(
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
