"""The command line, `hf-stable`: each command is one library call and the printing of its result.

Results go to stdout, progress and errors to stderr. How results look is in `terminal`.
"""

from __future__ import annotations

import contextlib
import io
import os
import sys
import traceback
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Annotated, Any

import typer

import hf_stable
from hf_stable.commands.bench.command import Debug, Json, bench
from hf_stable.commands.terminal import (
    demo_table,
    indented,
    make_console,
    make_table,
    print_comparison,
    print_diagnosis,
    print_inspection,
    print_json,
    show_progress,
)

__all__ = ["app", "main"]

SUCCESS, NO, BAD_INPUT, CRASH, INTERRUPTED, BROKEN_PIPE = 0, 1, 2, 3, 130, 141

EPILOG = """\
\b
Examples:
  hf-stable demo
  hf-stable run --patch sigma_reparam train.py --output_dir out
  hf-stable inspect out/checkpoint-500
  hf-stable COMMAND --help

\b
Exit codes:
  0  done, and the answer is yes
  1  done, but the answer is no: a demo's claim did not show, a checkpoint or this environment
     has a problem
  2  wrong usage or bad input; the message says what to do
  3  unexpected failure; --debug shows the trace
  130  interrupted
  141  whatever read the output has gone, as head does
"""

# typer carries its own copy of click or uses click itself, depending on its version.
_UsageError: Any = typer.BadParameter.__base__
_ClickException: Any = _UsageError.__base__

app = typer.Typer(
    help="Train Hugging Face Transformers that would not train.",
    epilog=EPILOG,
    rich_markup_mode=None,
    pretty_exceptions_enable=False,
    add_completion=False,
    context_settings={"help_option_names": ["-h", "--help"]},
)
app.add_typer(bench, name="bench")


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command line and return its exit code.

    Args:
        argv: arguments; by default those of this process.
    """
    argv = list(sys.argv[1:] if argv is None else argv)
    if argv[:1] == ["run"]:
        # Everything behind the script's name is the script's own, its errors and "--" included.
        from hf_stable.commands.launch import launcher

        launcher.main(argv[1:])
        return SUCCESS
    if isinstance(sys.stdout, io.TextIOWrapper):
        sys.stdout.reconfigure(errors="backslashreplace")  # what its encoding lacks is spelled out
    try:
        code = app(argv, prog_name="hf-stable", standalone_mode=False) or SUCCESS
        sys.stdout.flush()
        return code
    except (BrokenPipeError, SystemExit) as end:
        # click and rich make an exit with code 1 of a pipe that nobody reads.
        if isinstance(end, SystemExit) and not isinstance(end.__context__, BrokenPipeError):
            raise
        # Python flushes once more at its end, and would complain.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return BROKEN_PIPE
    except (KeyboardInterrupt, typer.Abort):
        return _complain("interrupted", INTERRUPTED)
    except Exception as error:
        if "--debug" in argv:
            traceback.print_exc()
        return _complain(*_explain(error))


def _explain(error: Exception) -> tuple[str, int]:
    """Return what to say about an error, and the exit code."""
    if isinstance(error, _ClickException):
        context = getattr(error, "ctx", None)
        hint = f" (see {context.command_path} --help)" if context is not None else ""
        return f"{error.format_message()}{hint}", BAD_INPUT
    if isinstance(error, OSError | ValueError | TypeError | ImportError):
        return str(error) or type(error).__name__, BAD_INPUT
    return f"{type(error).__name__}: {error} (--debug shows the trace)", CRASH


def _complain(message: str, code: int) -> int:
    print(f"hf-stable: error: {' '.join(message.split())}", file=sys.stderr)
    return code


@app.callback(invoke_without_command=True)
def _root(
    context: typer.Context,
    version: Annotated[bool, typer.Option("--version", help="Print the version.")] = False,
    debug: Debug = False,
) -> None:
    if version:
        print(f"hf-stable {hf_stable.__version__}")
        raise typer.Exit
    if context.invoked_subcommand is None:
        print(context.get_help())


@app.command(
    epilog="\b\nExamples:\n  hf-stable demo\n  hf-stable demo --quick --output demo-output --json"
)
def demo(
    output: Annotated[
        Path, typer.Option(help="Folder for the model, the runs' logs and results.json.")
    ] = Path("demo-output"),
    seed: Annotated[int, typer.Option(help="Seed of split, weights and data order.")] = 0,
    quick: Annotated[
        bool, typer.Option("--quick", help="A few steps only: see that it works, claim nothing.")
    ] = False,
    as_json: Json = False,
    debug: Debug = False,
) -> int:
    """Train without warmup, save folded, reload: digits, on CPU.

    Trains a small ViT at a high learning rate with and without sigmaReparam, and with AdamW (with
    and without warmup, and at a lower rate) and AdamW2. Saves the patched model folded and reloads
    it with stock transformers in a new process. About two minutes on two cores. Exit code 0 only
    if the reload agrees and, without --quick, the patched run and the AdamW2 run beat the plain
    ones.
    """
    from hf_stable.commands.demo.claims import run_demo

    console = make_console()

    def show(part: Any, results: Any) -> None:
        if not as_json:
            console.print(part.title, demo_table(results), "", sep="\n")

    # The Trainer prints its log lines: they are progress, not the result.
    with contextlib.redirect_stdout(sys.stderr):
        result = run_demo(
            output,
            seed=seed,
            quick=quick,
            on_run=lambda run: print(f"Training: {run.name}", file=sys.stderr, flush=True),
            on_part=show,
        )
    if as_json:
        print_json(result.to_dict())
    else:
        for finding in result.findings:
            console.print(f"- {finding}")
        if quick:
            console.print("- Quick: too few steps to compare the runs, so nothing is claimed.")
        console.print(f"{result.seconds:.0f} s in all; model and results are in {result.output}")
        console.print(f"What happened in each run, with charts: {result.report}")
    return SUCCESS if result.passed else NO


@app.command(
    epilog="\b\nExamples:\n  hf-stable inspect demo-output/model\n"
    "  hf-stable inspect openai-community/gpt2\n"
    "  hf-stable inspect runs/checkpoint-500 runs/checkpoint-1000 --json"
)
def inspect(
    source: Annotated[
        str, typer.Argument(metavar="PATH", help="Folder, safetensors file, or Hub id owner/name.")
    ],
    other: Annotated[
        str | None, typer.Argument(metavar="[OTHER]", help="A second one, to be compared.")
    ] = None,
    as_json: Json = False,
    debug: Debug = False,
) -> int:
    """Show the spectra of a checkpoint, or how two differ.

    Per matrix sigma, stable rank and, of patched models, gamma; per head sigma and energy
    concentration of Wq^T Wk; gains of norms; what stands out. Streamed from safetensors, sharded or
    not: one tensor in memory at a time, no model is built. Exit code 1 if a tensor has NaN or
    infinite entries, or the sidecar belongs to another save; of two, if any tensor differs.
    """
    from hf_stable.checkpoints.hub_files import local_files
    from hf_stable.commands.inspect.comparison import compare_checkpoints
    from hf_stable.commands.inspect.inspection import inspect_checkpoint

    with show_progress("Reading") as on_layer:
        if other is not None:
            first, second = local_files(source), local_files(other)
            comparison = compare_checkpoints(first, second, on_layer=on_layer)
        else:
            report = inspect_checkpoint(local_files(source), on_layer=on_layer)
    if other is not None:
        print_json(comparison.to_dict()) if as_json else print_comparison(comparison)
        return SUCCESS if comparison.is_same else NO
    print_json(report.to_dict()) if as_json else print_inspection(report)
    return SUCCESS if report.is_healthy else NO


@app.command(
    epilog="\b\nExamples:\n  hf-stable report runs/first\n"
    "  hf-stable report runs/first runs/second --output report.html\n"
    "  hf-stable report runs/first --format png --output figures"
)
def report(
    runs: Annotated[
        list[Path], typer.Argument(metavar="RUN...", help="The Trainer's output folders.")
    ],
    output: Annotated[
        Path | None, typer.Option(help="File to write; a folder for png. By default here.")
    ] = None,
    format: Annotated[
        str, typer.Option(help="html, one page that opens offline; png, json or csv.")
    ] = "html",
    as_json: Json = False,
    debug: Debug = False,
) -> int:
    """Show on one page what happened in runs, and why.

    Reads trainer_state.json and the stability.jsonl of StabilityCallback; a checkpoint stands for
    the run up to it. What is damaged or missing is said and left out. Exit code 1 if a run failed.
    """
    from hf_stable.report import write_report
    from hf_stable.report.summary import TABLE_COLUMNS, table_cells

    with show_progress("Reading runs") as on_run:
        written = write_report(runs, output, format=format, on_run=on_run)
    if as_json:
        rows = [
            asdict(row) | {"notes": [note for run, note in written.notes if run == row.run]}
            for row in written.summaries
        ]
        print_json({"files": list(map(str, written.files)), "runs": rows})
    else:
        console = make_console()
        table = make_table(*TABLE_COLUMNS)
        for row in written.summaries:
            table.add_row(*table_cells(row))
        console.print(table)
        for row in written.summaries:
            console.print(f"{row.run}: {row.verdict.headline}.")
            if row.verdict.state in ("failed", "warned"):
                console.print(*indented(row.verdict.sentences), sep="")
        for run, note in written.notes:
            console.print(f"{run}: {note}")
        console.print(*written.files, sep="\n")
    failed = any(row.verdict.state == "failed" for row in written.summaries)
    return NO if failed else SUCCESS


@app.command(
    epilog="\b\nExamples:\n  hf-stable fold runs/checkpoint-500 plain-model\n"
    "  hf-stable fold fsdp-run/checkpoint-500 plain-model --config openai-community/gpt2"
)
def fold(
    source: Annotated[Path, typer.Argument(metavar="DIR", help="Folder of a patched model.")],
    output: Annotated[Path, typer.Argument(metavar="OUT", help="New folder to write.")],
    config: Annotated[
        str | None,
        typer.Option(help="Folder, file or Hub id of the config.json, for FSDP's shards only."),
    ] = None,
    as_json: Json = False,
    debug: Debug = False,
) -> int:
    """Write the plain model of a patched checkpoint.

    Folded weights, config, tokenizer, no more: it loads with from_pretrained anywhere. What only
    serves to continue the training (sidecar, optimizer, Trainer state) stays behind. Shards that
    FSDP saved (SHARDED_STATE_DICT) are put together, whatever number of processes wrote them.
    """
    from hf_stable.checkpoints.folding import fold_checkpoint

    with show_progress("Folding"):
        report = fold_checkpoint(source, output, config)
    if as_json:
        print_json(asdict(report))
    else:
        print(f"{report.num_layers} patched layers are plain in {report.output}:")
        print(*(f"  {name}" for name in report.files), sep="\n")
        if report.lacks_norms:
            print("Removed LayerNorms stay removed: load it with trust_remote_code=True.")
    return SUCCESS


SavedModel = Annotated[
    Path, typer.Argument(metavar="DIR", help="Folder of a model, or checkpoint.")
]
Dtype = Annotated[
    str | None, typer.Option(help="Cast the weights: fp32, fp16 or bf16; by default as they are.")
]
ShardSize = Annotated[str, typer.Option(help="Largest size of a weights file.")]


@app.command(epilog="\b\nExample:\n  hf-stable export runs/checkpoint-500 exported --dtype bf16")
def export(
    source: SavedModel,
    output: Annotated[Path, typer.Argument(metavar="OUT", help="Folder to write.")],
    dtype: Dtype = None,
    max_shard_size: ShardSize = "50GB",
    as_json: Json = False,
    debug: Debug = False,
) -> int:
    """Write the folder to publish, with a model card.

    It has plain weights, the tokenizer, and code of its own where LayerNorms were removed: then it
    loads with trust_remote_code=True. What only serves to continue the training stays behind. The
    card in OUT, or else that in DIR, is amended.
    """
    from hf_stable.checkpoints.saved_models import export_saved

    with show_progress("Exporting"), contextlib.redirect_stdout(sys.stderr):
        files = export_saved(source, output, dtype=dtype, max_shard_size=max_shard_size)
    if as_json:
        print_json({"source": str(source), "output": str(output), "files": files})
    else:
        print(f"{output} can be published:")
        print(*(f"  {name}" for name in files), sep="\n")
    return SUCCESS


@app.command(epilog="\b\nExample:\n  hf-stable push runs/checkpoint-500 me/my-model --private")
def push(
    source: SavedModel,
    repo: Annotated[str, typer.Argument(help="Repository on the Hub: name, or owner/name.")],
    dtype: Dtype = None,
    max_shard_size: ShardSize = "50GB",
    private: Annotated[
        bool | None, typer.Option("--private/--public", help="Of a new repository.")
    ] = None,
    as_json: Json = False,
    debug: Debug = False,
) -> int:
    """Upload to the Hub what export writes.

    The repository's card is amended. Uses the token that `hf auth login` stored, or HF_TOKEN.
    """
    from hf_stable.checkpoints.saved_models import push_saved

    with show_progress("Uploading"), contextlib.redirect_stdout(sys.stderr):
        url = push_saved(source, repo, private=private, dtype=dtype, max_shard_size=max_shard_size)
    if as_json:
        print_json({"source": str(source), "url": url})
    else:
        print(url)
    return SUCCESS


@app.command(epilog="\b\nExample:\n  hf-stable doctor --json")
def doctor(as_json: Json = False, debug: Debug = False) -> int:
    """Show versions, what is supported, what was changed.

    The last is the list of all that importing hf_stable changes in a process.

    Exit code 1 if something that hf_stable needs is missing or of a version that it does not fit.
    """
    from hf_stable.commands.doctor import diagnose

    report = diagnose()
    if as_json:
        print_json(asdict(report) | {"is_healthy": report.is_healthy})
        return SUCCESS if report.is_healthy else NO
    print_diagnosis(report)
    return SUCCESS if report.is_healthy else NO


@app.command(
    context_settings={"ignore_unknown_options": True, "allow_extra_args": True},
    epilog="\b\nExample:\n  hf-stable run --patch sigma_reparam train.py --warmup_steps 0\n"
    "hf-stable run --help lists its options.",
)
def run() -> None:
    """Run a training script with hf_stable attached."""
    raise AssertionError("main() hands this command to hf_stable.run")


if __name__ == "__main__":
    sys.exit(main())
