"""`hf-stable fold`, `export` and `push`: the plain model of a saved one, for other programs."""

from __future__ import annotations

import contextlib
import sys
from dataclasses import asdict
from pathlib import Path
from typing import Annotated

import typer

from hf_stable.commands.conventions import SUCCESS, Debug, Json, examples
from hf_stable.commands.terminal import print_json, print_lines, show_progress

__all__ = ["room"]

room = typer.Typer()


@room.command(
    epilog=examples(
        "hf-stable fold runs/checkpoint-500 plain-model",
        "hf-stable fold fsdp-run/checkpoint-500 plain-model --config openai-community/gpt2",
    )
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
        print_lines(f"{report.num_layers} patched layers are plain in {report.output}:")
        print_lines(*(f"  {name}" for name in report.files))
        if report.lacks_norms:
            print_lines("Removed LayerNorms stay removed: load it with trust_remote_code=True.")
    return SUCCESS


SavedModel = Annotated[
    Path, typer.Argument(metavar="DIR", help="Folder of a model, or checkpoint.")
]
Dtype = Annotated[
    str | None, typer.Option(help="Cast the weights: fp32, fp16 or bf16; by default as they are.")
]
ShardSize = Annotated[str, typer.Option(help="Largest size of a weights file.")]
DryRun = Annotated[
    bool, typer.Option("--dry-run", help="List the files and their sizes, and do nothing.")
]


@room.command(epilog=examples("hf-stable export runs/checkpoint-500 exported --dtype bf16"))
def export(
    source: SavedModel,
    output: Annotated[Path, typer.Argument(metavar="OUT", help="Folder to write.")],
    dtype: Dtype = None,
    max_shard_size: ShardSize = "50GB",
    dry_run: DryRun = False,
    as_json: Json = False,
    debug: Debug = False,
) -> int:
    """Write the folder to publish, with a model card.

    It has plain weights, the tokenizer, and code of its own where LayerNorms were removed: then it
    loads with trust_remote_code=True. What only serves to continue the training stays behind. The
    card in OUT, or else that in DIR, is amended.
    """
    from hf_stable.checkpoints.saved_models import export_saved

    if dry_run:
        return _list(source, dtype, max_shard_size, as_json)
    with show_progress("Exporting"), contextlib.redirect_stdout(sys.stderr):
        files = export_saved(source, output, dtype=dtype, max_shard_size=max_shard_size)
    if as_json:
        print_json({"source": str(source), "output": str(output), "files": files})
    else:
        print_lines(f"{output} can be published:")
        print_lines(*(f"  {name}" for name in files))
    return SUCCESS


@room.command(epilog=examples("hf-stable push runs/checkpoint-500 me/my-model --private"))
def push(
    source: SavedModel,
    repo: Annotated[str, typer.Argument(help="Repository on the Hub: name, or owner/name.")],
    dtype: Dtype = None,
    max_shard_size: ShardSize = "50GB",
    private: Annotated[
        bool | None, typer.Option("--private/--public", help="Of a new repository.")
    ] = None,
    dry_run: DryRun = False,
    as_json: Json = False,
    debug: Debug = False,
) -> int:
    """Upload to the Hub what export writes.

    The repository's card is amended. Uses the token that `hf auth login` stored, or HF_TOKEN.
    """
    from hf_stable.checkpoints.saved_models import push_saved

    if dry_run:
        return _list(source, dtype, max_shard_size, as_json)
    with show_progress("Uploading"), contextlib.redirect_stdout(sys.stderr):
        url = push_saved(source, repo, private=private, dtype=dtype, max_shard_size=max_shard_size)
    if as_json:
        print_json({"source": str(source), "url": url})
    else:
        print_lines(url)
    return SUCCESS


def _list(source: Path, dtype: str | None, max_shard_size: str, as_json: bool) -> int:
    """Show what would be written or uploaded."""
    from hf_stable.checkpoints.saved_models import list_published

    with show_progress("Looking"), contextlib.redirect_stdout(sys.stderr):
        files = list_published(source, dtype=dtype, max_shard_size=max_shard_size)
    if as_json:
        print_json({"source": str(source), "files": files})
    else:
        print_lines(f"{source} would be published as:")
        print_lines(*(f"  {name}  {size:,} bytes" for name, size in files.items()))
    return SUCCESS
