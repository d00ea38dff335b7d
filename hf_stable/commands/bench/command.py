"""The commands below `hf-stable bench`: costs measured here, and worked out for elsewhere."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from hf_stable.commands.conventions import Debug, Json, Wide, examples
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
    strategy: Annotated[
        str, typer.Option(help="fsdp2, ddp, or zero1 to zero3 (DeepSpeed); for --plan.")
    ] = "fsdp2",
    tensor_parallel: Annotated[
        int, typer.Option(min=1, help="GPUs that cut each matrix; for --plan.")
    ] = 1,
    replicas: Annotated[
        int, typer.Option(min=1, help="Copies of what fsdp2 shards (HSDP); for --plan.")
    ] = 1,
    machine: Annotated[str, typer.Option(help="a100 or h100; for --plan.")] = "h100",
    sequence: Annotated[
        int | None, typer.Option(min=1, help="Tokens per sequence; for --plan.")
    ] = None,
    wide: Wide = False,
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
        tensor_parallel=tensor_parallel,
        replicas=replicas,
    )
    print_json(made.to_dict()) if as_json else print_plan(made, make_console(wide=wide))


BenchOutput = Annotated[Path | None, typer.Option(help="JSON file to write as well.")]
MEASURED = {
    "sigma": "Time sigmaReparam against the plain model and against torch's spectral_norm.",
    "adamw2": "Time AdamW2 against torch's AdamW, its peers and a naive loop.",
    "monitor": "Time StabilityCallback against the same steps without it.",
}
"""The benchmarks that take the same options, and what each is for."""


def _add(name: str, purpose: str) -> None:
    """Add the command of a benchmark."""

    @bench.command(name, help=purpose, epilog=examples(f"hf-stable bench {name} --output r.json"))
    def measure(
        output: BenchOutput = None,
        rounds: Annotated[
            int | None, typer.Option(min=1, help="Alternated repetitions of every case, at most.")
        ] = None,
        only: Annotated[str, typer.Option(help="Only cases with this text in their name.")] = "",
        device: Annotated[str, typer.Option(help="Where to run: cpu, cuda ...")] = "cpu",
        seconds: Annotated[
            float, typer.Option(min=0, help="About how long a case may take; five rounds at least.")
        ] = 20.0,
        threads: Annotated[
            int | None, typer.Option(min=1, help="Not on one thread and on all, but on so many.")
        ] = None,
        cpu_time: Annotated[
            bool, typer.Option(help="Count processor time: for one thread on a busy machine.")
        ] = False,
        tiny: Annotated[
            bool, typer.Option(help="Small models: to try the benchmark itself.")
        ] = False,
        wide: Wide = False,
        as_json: Json = False,
        debug: Debug = False,
    ) -> None:
        # The table goes to stderr where JSON goes to stdout.
        benchmark, small = _benchmark(name)
        options = dict(
            output=output, only=only, device=device, seconds=seconds, threads=threads,
            cpu_time=cpu_time, console=make_console(stderr=as_json, wide=wide),
        )  # fmt: skip
        if rounds is not None:
            options["rounds"] = rounds
        summaries = benchmark(sizes=small if tiny else None, **options)
        if as_json:
            print_json({"results": [asdict(summary) for summary in summaries]})


for _name, _purpose in MEASURED.items():
    _add(_name, _purpose)


def _benchmark(name: str) -> tuple[Callable[..., list[Summary]], Any]:
    """Return the function of a benchmark and its smallest sizes; imports torch."""
    from hf_stable.commands.bench import adamw2, monitor, sigma

    known: dict[str, tuple[Any, Any]] = {
        "sigma": (sigma.bench_sigma, sigma.TINY),
        "adamw2": (adamw2.bench_adamw2, adamw2.TINY),
        "monitor": (monitor.bench_monitor, monitor.TINY),
    }
    return known[name]


@bench.command(epilog=examples("hf-stable bench scale --output scale.json"))
def scale(
    output: BenchOutput = None,
    rounds: Annotated[int, typer.Option(min=1, help="Alternated repetitions of every case.")] = 10,
    wide: Wide = False,
    as_json: Json = False,
    debug: Debug = False,
) -> None:
    """Check what --plan rests on: predict steps of this machine from others, and time them."""
    from hf_stable.commands.bench.scale import bench_scale

    console = make_console(stderr=as_json, wide=wide)
    found = bench_scale(output=output, rounds=rounds, console=console)
    if as_json:
        print_json({"results": [asdict(each) | {"error": each.error} for each in found]})
