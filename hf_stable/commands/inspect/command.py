"""`hf-stable inspect` on the command line."""

from __future__ import annotations

from typing import Annotated

import typer

from hf_stable.commands.conventions import NO, SUCCESS, Debug, Json, Register, Wide, examples
from hf_stable.commands.terminal import print_json, show_progress

__all__ = ["room"]

room = typer.Typer()


@room.command(
    epilog=examples(
        "hf-stable inspect demo-output/model",
        "hf-stable inspect openai-community/gpt2",
        "hf-stable inspect runs/checkpoint-500 runs/checkpoint-1000 --json",
    )
)
def inspect(
    source: Annotated[
        str, typer.Argument(metavar="PATH", help="Folder, safetensors file, or Hub id owner/name.")
    ],
    other: Annotated[
        str | None, typer.Argument(metavar="[OTHER]", help="A second one, to be compared.")
    ] = None,
    register: Register = None,
    wide: Wide = False,
    as_json: Json = False,
    debug: Debug = False,
) -> int:
    """Show the spectra of a checkpoint, or how two differ.

    Per matrix sigma, stable rank and, of patched models, gamma; per head sigma and energy
    concentration of Wq^T Wk; gains of norms; what stands out. Streamed from safetensors, sharded or
    not: one tensor in memory at a time, no model is built. Exit code 1 if a tensor has NaN or
    infinite entries, or the sidecar belongs to another save; of two, if any tensor differs.
    """
    from hf_stable.commands.registering import register_from

    register_from(register or ())
    if other is None:
        return _inspect(source, as_json, wide)
    return _compare(source, other, as_json, wide)


def _inspect(source: str, as_json: bool, wide: bool) -> int:
    from hf_stable.checkpoints.hub_files import local_files
    from hf_stable.commands.inspect.drawing import print_inspection
    from hf_stable.commands.inspect.inspection import inspect_checkpoint

    with show_progress("Reading") as on_layer:
        report = inspect_checkpoint(local_files(source), on_layer=on_layer)
    print_json(report.to_dict()) if as_json else print_inspection(report, wide=wide)
    return SUCCESS if report.is_healthy else NO


def _compare(source: str, other: str, as_json: bool, wide: bool) -> int:
    from hf_stable.checkpoints.hub_files import local_files
    from hf_stable.commands.inspect.comparison import compare_checkpoints
    from hf_stable.commands.inspect.drawing import print_comparison

    with show_progress("Reading") as on_layer:
        first, second = local_files(source), local_files(other)
        comparison = compare_checkpoints(first, second, on_layer=on_layer)
    print_json(comparison.to_dict()) if as_json else print_comparison(comparison, wide=wide)
    return SUCCESS if comparison.is_same else NO
