"""The command line, `hf-stable`: which commands there are, and how each of them ends.

Results go to stdout, progress and errors to stderr. Each command has a room of its own in this
folder, which imports the library only when the command runs, so that help comes at once.
"""

from __future__ import annotations

import contextlib
import io
import os
import sys
import traceback
from collections.abc import Iterator, Sequence
from typing import Annotated, Any

import typer

from hf_stable import __version__
from hf_stable.commands import publishing, reporting, watching
from hf_stable.commands.bench import command as bench
from hf_stable.commands.conventions import (
    BAD_INPUT,
    BROKEN_PIPE,
    CRASH,
    INTERRUPTED,
    SUCCESS,
    Debug,
    complain,
)
from hf_stable.commands.demo import command as demo
from hf_stable.commands.doctor import command as doctor
from hf_stable.commands.inspect import command as inspect
from hf_stable.commands.launch import command as launch
from hf_stable.commands.preflight import command as preflight

__all__ = ["app", "main"]

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
    context_settings={"help_option_names": ["-h", "--help"]},
)
for _commands in (demo, launch, preflight, inspect, reporting, watching, publishing, bench, doctor):
    app.add_typer(_commands.room)


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command line and return its exit code.

    What a script raises that `hf-stable run` runs passes through, as it does through python.

    Args:
        argv: arguments; by default those of this process.
    """
    answer = _answer(list(sys.argv[1:] if argv is None else argv))
    if isinstance(answer, launch.Launch):
        answer.start()
        return SUCCESS
    return answer


def _answer(argv: list[str]) -> int | launch.Launch:
    """Do what a command line asks for, explain what goes wrong, and return the exit code.

    Of `hf-stable run` the script is not run yet.
    """
    try:
        with _any_text_on_stdout():
            code = app(argv, prog_name="hf-stable", standalone_mode=False)
            sys.stdout.flush()
        return SUCCESS if code is None else code
    except (BrokenPipeError, SystemExit) as end:
        # click and rich make an exit with code 1 of a pipe that nobody reads.
        if isinstance(end, SystemExit) and not isinstance(end.__context__, BrokenPipeError):
            raise
        # Python flushes once more at its end, and would complain.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return BROKEN_PIPE
    except (KeyboardInterrupt, typer.Abort):
        complain("interrupted")
        return INTERRUPTED
    except Exception as error:
        if "--debug" in argv:
            traceback.print_exc()
        message, code = _explain(error)
        complain(message)
        return code


@contextlib.contextmanager
def _any_text_on_stdout() -> Iterator[None]:
    """Spell out what the encoding of stdout lacks; a script that runs later finds it as it was."""
    stdout = sys.stdout
    if not isinstance(stdout, io.TextIOWrapper):
        yield
        return
    before = stdout.errors
    stdout.reconfigure(errors="backslashreplace")
    try:
        yield
    finally:
        stdout.reconfigure(errors=before)


def _explain(error: Exception) -> tuple[str, int]:
    """Return what to say about an error, and the exit code."""
    if isinstance(error, _ClickException):
        context = getattr(error, "ctx", None)
        hint = f" (see {context.command_path} --help)" if context is not None else ""
        return f"{error.format_message()}{hint}", BAD_INPUT
    if isinstance(error, OSError | ValueError | TypeError | ImportError):
        return str(error) or type(error).__name__, BAD_INPUT
    return f"{type(error).__name__}: {error} (--debug shows the trace)", CRASH


@app.callback(invoke_without_command=True)
def _root(
    context: typer.Context,
    version: Annotated[bool, typer.Option("--version", help="Print the version.")] = False,
    debug: Debug = False,
) -> None:
    if version:
        print(f"hf-stable {__version__}")
        raise typer.Exit
    if context.invoked_subcommand is None:
        print(context.get_help())


if __name__ == "__main__":
    sys.exit(main())
