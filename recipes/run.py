"""Run a recipe: a YAML file of settings, any of which the command line overrides.

    python recipes/run.py recipes/small/vit_digits.yaml --learning_rate 0.03 --optim adamw2
    python recipes/run.py recipes/full/vit_b.yaml --dry-run
    torchrun --nproc-per-node 2 recipes/run.py recipes/small/gpt2_stdlib.yaml --output out

Results are written to OUTPUT/results.json. A run with `save_steps` that was interrupted goes on
from its last checkpoint when it is started again with the same settings; one that was trained to
the end is tested again.
"""

from __future__ import annotations

import argparse
import contextlib
import dataclasses
import functools
import json
import os
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple, NoReturn

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # where it is run from must not matter

import torch
from transformers import HfArgumentParser, Trainer, TrainerCallback
from transformers.trainer_callback import PrinterCallback

import hf_stable
from hf_stable.measures.loss_curves import lost_step
from recipes import data, models, streaming
from recipes.arguments import check, other_optimizer, training_arguments
from recipes.progress import SaysHowFarItIs
from recipes.results import finite, first_step, generalisation, watched
from recipes.resuming import Done, EndsWhatIsDone, goes_on_from
from recipes.settings import Settings, read_yaml

__all__ = ["run"]

SCORES = ("bleu", "chrf", "copied_bleu", "copied_chrf", "word_error_rate", "character_error_rate")
"""Of translations and transcripts, where a task has them."""


def run(
    settings: Settings, *, dry_run: bool = False, callbacks: Sequence[TrainerCallback] = ()
) -> dict[str, Any]:
    """Train and test as the settings say, and write OUTPUT/results.json.

    Args:
        settings: of the run.
        dry_run: of a full-scale recipe, take two steps on local data with two blocks.
        callbacks: for the Trainer, beside the monitor.

    Returns:
        Settings, test loss and accuracy, the training losses, what the monitor saw (per layer the
        worst head at each probe), its alarms, and the step at which the loss was lost, if it was.
        With `logging_steps` each loss is a mean, and `loss_steps` has the last step of each.

    Raises:
        ValueError: for settings that do not exist, a global batch that does not come about, several
            GPUs for one process, or an output folder with a checkpoint of a run with other settings
            or of another number of processes.
    """
    return _train(_prepare(settings, dry_run=dry_run, callbacks=callbacks))


class _Prepared(NamedTuple):
    """A run of which nothing is trained yet."""

    settings: Settings
    task: data.Task
    trainer: Trainer
    goes_on: bool


def _prepare(
    settings: Settings, *, dry_run: bool, callbacks: Sequence[TrainerCallback] = ()
) -> _Prepared:
    """Build what is to be trained; raises what `run` says of settings, in this order."""
    if settings.threads:
        torch.set_num_threads(settings.threads)
    settings = _shrunk(settings) if dry_run else settings
    check(settings)
    task = _task(settings, dry_run=dry_run)
    output = Path(settings.output)
    goes_on = goes_on_from(settings, output)
    model = models.build(settings, task)
    watching: list[TrainerCallback] = [EndsWhatIsDone(), SaysHowFarItIs()]
    if settings.monitor_every:
        monitor = hf_stable.StabilityCallback(
            every=settings.monitor_every,
            on_collapse=settings.on_collapse,
            sharpness_every=settings.sharpness_every or None,
        )
        watching.append(monitor)
    if settings.intervention:
        from recipes.evidence.interventions import Intervening

        # First, so that what the monitor sees at a step is what was done before it.
        watching.insert(0, Intervening(model, settings.intervention))
    streams = isinstance(task.train, streaming.Streamed)
    trainer = (streaming.StreamingTrainer if streams else Trainer)(
        model,
        training_arguments(settings, output, smooths=task.loss is None),
        train_dataset=task.train,
        data_collator=task.collate,
        compute_loss_func=task.loss,
        eval_dataset=task.test,
        callbacks=[*watching, *callbacks],
        compute_metrics=task.metrics
        or functools.partial(data.accuracy, next_token=settings.model in models.DECODERS),
        preprocess_logits_for_metrics=data.answers,
        **other_optimizer(settings, model),
    )
    trainer.remove_callback(PrinterCallback)
    return _Prepared(settings, task, trainer, goes_on)


def _train(prepared: _Prepared) -> dict[str, Any]:
    settings, task, trainer, goes_on = prepared
    output = Path(settings.output)
    started = time.perf_counter()
    with contextlib.suppress(Done):
        # True is for the last checkpoint that was saved to the end.
        trainer.train(resume_from_checkpoint=goes_on or None)
    seconds = time.perf_counter() - started
    trainer.label_smoother = None  # the Trainer would smooth the labels of the test as well
    metrics = trainer.evaluate()
    trainer.save_state()
    records = [record for record in trainer.state.log_history if "loss" in record]
    losses, steps = ([record[key] for record in records] for key in ("loss", "step"))
    result = {
        "settings": dataclasses.asdict(settings),
        "test_loss": finite(metrics["eval_loss"]),
        "accuracy": metrics["eval_accuracy"],
        "reference": round(task.reference, 4),
        "lost_step": first_step(steps, lost_step(losses)),
        "seconds": round(seconds, 1),
        "losses": [finite(loss) for loss in losses],
        # Each is a mean of the steps since the one before it.
        **({"loss_steps": steps} if settings.logging_steps > 1 else {}),
        **watched(output if settings.monitor_every else None),
        **(generalisation(trainer.model, task) if task.image_size and task.is_small else {}),
        **(task.score(trainer.model) if task.score else {}),
    }
    if trainer.is_world_process_zero():
        (output / "results.json").write_text(json.dumps(result) + "\n")
    return result


def _shrunk(settings: Settings) -> Settings:
    if _is_at_hand(settings):
        raise ValueError(f"data {settings.data!r} is embedded: there is nothing to try dry")
    from recipes import full_scale

    return full_scale.shrink(settings)


def _is_at_hand(settings: Settings) -> bool:
    """Say whether data are embedded, or recordings in a folder: small models are meant."""
    return settings.data in data.EMBEDDED or data.is_folder_of_recordings(settings.data)


def _task(settings: Settings, *, dry_run: bool) -> data.Task:
    if _is_at_hand(settings):
        return data.load(settings.data, model=settings.model)
    from recipes import full_scale

    return full_scale.load(settings, dry_run=dry_run)


class _Formatter(argparse.RawDescriptionHelpFormatter, argparse.ArgumentDefaultsHelpFormatter):
    """Keeps the lines of the description, and shows what the recipe sets."""


def parse(arguments: Sequence[str]) -> tuple[Settings, bool]:
    """Return the settings of a recipe with the overrides of a command line, and whether to run dry.

    Raises:
        SystemExit: after `--help`, and for arguments that cannot be; the latter are named.
    """
    parser = HfArgumentParser(
        Settings, description=__doc__, formatter_class=_Formatter, allow_abbrev=False
    )
    parser.add_argument("recipe", type=Path, help="YAML file of settings")
    parser.add_argument(
        "--dry-run", "--dry_run", action="store_true",
        help="take two steps of a full-scale recipe, on local data and with two blocks",
    )  # fmt: skip
    if others := [each for each in arguments if each not in ("-h", "--help")]:
        recipe = parser.parse_known_args(others)[0].recipe
        try:
            parser.set_defaults(**read_yaml(recipe))
        except (OSError, ValueError) as error:
            parser.error(str(error))
    settings, rest = parser.parse_args_into_dataclasses(list(arguments))
    if rest.dry_run and settings.data in data.EMBEDDED:
        parser.error(
            f"--dry-run is for recipes whose data is on the Hub; that of {rest.recipe} is embedded "
            f"({settings.data}), so run it with --steps 2"
        )
    return settings, rest.dry_run


def main(arguments: Sequence[str] | None = None) -> None:
    """Read the recipe and the overrides, and run.

    Raises:
        SystemExit: for settings that cannot be, which are named, as `parse` does.
    """
    settings, dry_run = parse(sys.argv[1:] if arguments is None else arguments)
    try:
        if dry_run:
            from recipes.full_scale import gpu_hours

            hours = gpu_hours(models.build_empty(settings), settings)
            print(f"{settings.output}: about {hours:.0f} GPU hours on H100s; now two steps of it")
        prepared = _prepare(settings, dry_run=dry_run)
    except ValueError as error:
        _refuse(error)
    try:
        result = _train(prepared)
    except streaming.PlaceError as error:  # any other would be a mistake of ours
        _refuse(error)
    if int(os.environ.get("RANK", 0)) == 0:
        keys = ("test_loss", "accuracy", *SCORES, "lost_step", "seconds", "alarms")
        shown = {key: result[key] for key in keys if key in result}
        print(json.dumps(shown, indent=1))


def _refuse(error: ValueError) -> NoReturn:
    """End as argparse does, in one line and not in a traceback."""
    print(f"{Path(sys.argv[0]).name}: error: {' '.join(str(error).split())}", file=sys.stderr)
    raise SystemExit(2) from error


if __name__ == "__main__":
    main()
