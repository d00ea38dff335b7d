"""`hf-stable run` on the command line: a training script as it is, with hf_stable attached to it.

Also as `python -m hf_stable.run`, and so under `torchrun -m hf_stable.run` and `accelerate launch
-m hf_stable.run`. Nothing here knows how a model is patched or watched.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from hf_stable.commands.conventions import BAD_INPUT, Debug, Module, Register, Script, complain
from hf_stable.commands.launch.scripts import read_command, run_script, show_the_scripts_trace_only

if TYPE_CHECKING:
    from hf_stable.commands.launch.options import RunOptions

__all__ = ["Launch", "room"]

EPILOG = """\
\b
Examples:
  hf-stable run --patch sigma_reparam --monitor 50 train.py --optim adamw2
  hf-stable run --config stable.yaml -m my_package.train --output_dir out
  torchrun --nproc-per-node 8 -m hf_stable.run --monitor-every 50 train.py

Options stand before the script's name; everything after it is the script's own. Under torchrun
write --monitor-every: it takes --monitor for a short form of its own --monitor-interval. A --config
file holds any of the options by name; the command line goes before it. transformers is imported
before the script starts, so variables that it reads then (HF_HOME, ...) have to be set in the
shell, not in the script.
"""

room = typer.Typer()


@dataclass(frozen=True)
class Launch:
    """A script that can be run, and what is to be attached to it.

    Attributes:
        options: what to attach to each Trainer.
        command: `script.py ARGS...`, `folder ARGS...` or `-m package.module ARGS...`.
        debug: whether to show the trace of a model that is refused.
    """

    options: RunOptions
    command: tuple[str, ...]
    debug: bool = False

    def start(self) -> None:
        """Attach hf_stable and run the script as `__main__`.

        Exceptions, Ctrl-C and exit codes of the script pass through. That a model or an option
        does not fit, which is no fault of the script, ends the process with one line and code 2.
        """
        from hf_stable.commands.launch.attaching import attach

        attachment = attach(self.options, " ".join(self.command[: 1 + (self.command[0] == "-m")]))
        show_the_scripts_trace_only()
        try:
            run_script(self.command)
        except SystemExit as end:
            if end.code in (None, 0):
                attachment.conclude()
            raise
        except Exception as error:
            if error is not attachment.refusal or self.debug:
                raise
            complain(f"{error} (--debug shows the trace)")
            raise SystemExit(BAD_INPUT) from error
        attachment.conclude()


Patch = Annotated[
    str | None,
    typer.Option(
        metavar="METHODS",
        help="Of sigma_reparam, remove_pre_layernorm, remove_layernorm; several with commas.",
    ),
]
PatchConfig = Annotated[
    Path | None,
    typer.Option(
        metavar="FILE",
        help="YAML: the method's options by name, or several methods with their options.",
    ),
]
Monitor = Annotated[
    str | None,
    typer.Option(
        "--monitor-every", "--monitor", metavar="N", help="Probe stability every N steps."
    ),
]
OnCollapse = Annotated[
    str | None, typer.Option(metavar="ACTION", help="One of warn, stop, checkpoint, rollback.")
]
KeepBatches = Annotated[
    str | None,
    typer.Option(
        metavar="N",
        help="Batches written down at an alarm: a number or auto; 0, the default, writes none.",
    ),
]
SkipBatches = Annotated[
    bool,
    typer.Option("--skip-batches", help="After a rollback skip the batches of suspicious steps."),
]
Terms = Annotated[
    str | None,
    typer.Option(metavar="NAMES", help="What it records: default, all, or names with commas."),
]
Console = Annotated[
    str | None, typer.Option(metavar="HOW", help="What it prints: short, full or off.")
]
Thresholds = Annotated[
    str | None,
    typer.Option(metavar="NAME=NUMBER", help="Of its alarms, several with commas."),
]
FoldAtEnd = Annotated[
    bool, typer.Option("--fold-at-end", help="Fold the model when Trainer.train returns.")
]
Config = Annotated[
    Path | None, typer.Option(metavar="FILE", help="YAML: any of these options by name.")
]


@room.command(
    # Everything from the script's name on is the script's own, options and "--" included.
    context_settings={"allow_interspersed_args": False},
    epilog=EPILOG,
)
def run(
    script: Script = None,
    patch: Patch = None,
    patch_config: PatchConfig = None,
    monitor: Monitor = None,
    terms: Terms = None,
    console: Console = None,
    thresholds: Thresholds = None,
    on_collapse: OnCollapse = None,
    keep_batches: KeepBatches = None,
    skip_batches: SkipBatches = False,
    fold_at_end: FoldAtEnd = False,
    register: Register = None,
    config: Config = None,
    module: Module = False,
    debug: Debug = False,
) -> Launch:
    """Run a training script with hf_stable attached.

    Every Trainer that the script builds has its model patched and the monitor among its callbacks;
    the script is not edited.
    """
    from hf_stable.commands.launch.options import read_options
    from hf_stable.commands.registering import register_from

    given = {
        "patch": patch,
        "patch_config": patch_config and str(patch_config),
        "monitor": monitor,
        "terms": terms,
        "console": console,
        "thresholds": thresholds,
        "on_collapse": on_collapse,
        "keep_batches": keep_batches,
        "skip_batches": skip_batches or None,
        "fold_at_end": fold_at_end or None,
        "register": register or None,
    }
    options = read_options(given, config)
    command = read_command(script, module)
    register_from(options.register)
    return Launch(options, command, debug)
