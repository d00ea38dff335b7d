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
import math
import os
import statistics
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple, NoReturn

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # where it is run from must not matter

import torch
from transformers import HfArgumentParser, Trainer, TrainerCallback, TrainingArguments
from transformers.trainer_callback import PrinterCallback
from transformers.trainer_utils import get_last_checkpoint

import hf_stable
from hf_stable.measures.loss_curves import lost_step
from recipes import data, models, streaming
from recipes.settings import Settings, read_yaml

__all__ = ["run"]

OTHER = ("pytorch_optimizer:", "torch:")
"""In front of the name of an optimizer that this package has; its options are JSON then."""

MUON = "torch:Muon"
"""For the matrices of blocks; AdamW has the rest: see `recipes.muon`."""

FREE_TO_CHANGE = ("output", "threads", "save_total_limit")
"""Settings that do not make another run of one that goes on."""

FEWEST_KEPT = 2
"""Checkpoints that are kept: the last, and one in case that it was not saved to its end."""

SCORES = ("bleu", "chrf", "copied_bleu", "copied_chrf", "word_error_rate", "character_error_rate")
"""Of translations and transcripts, where a task has them."""

PAUSE = 300.0
"""Seconds between lines that say how far a run is, where there is no terminal for a bar."""


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
    _check(settings)
    task = _task(settings, dry_run=dry_run)
    output = Path(settings.output)
    goes_on = _goes_on(settings, output)
    model = models.build(settings, task)
    watching: list[TrainerCallback] = [_EndsWhatIsDone(), _SaysHowFarItIs()]
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
        **_other_optimizer(settings, model),
    )
    trainer.remove_callback(PrinterCallback)
    return _Prepared(settings, task, trainer, goes_on)


def _train(prepared: _Prepared) -> dict[str, Any]:
    settings, task, trainer, goes_on = prepared
    output = Path(settings.output)
    started = time.perf_counter()
    with contextlib.suppress(_Done):
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
        "test_loss": _finite(metrics["eval_loss"]),
        "accuracy": metrics["eval_accuracy"],
        "reference": round(task.reference, 4),
        "lost_step": _first_step(steps, lost_step(losses)),
        "seconds": round(seconds, 1),
        "losses": [_finite(loss) for loss in losses],
        # Each is a mean of the steps since the one before it.
        **({"loss_steps": steps} if settings.logging_steps > 1 else {}),
        **_watched(output if settings.monitor_every else None),
        **(generalisation(trainer.model, task) if task.image_size and task.is_small else {}),
        **(task.score(trainer.model) if task.score else {}),
    }
    if trainer.is_world_process_zero():
        (output / "results.json").write_text(json.dumps(result) + "\n")
    return result


def _first_step(steps: Sequence[int], record: int | None) -> int | None:
    """Return the first step of a record, counted from 1; `steps` has the last step of each."""
    return record and (steps[record - 2] if record > 1 else 0) + 1


def _goes_on(settings: Settings, output: Path) -> bool:
    """Return whether a folder has a checkpoint; where it has none, note whose folder it is now.

    Raises:
        ValueError: if the checkpoint is that of another run.
    """
    last = get_last_checkpoint(output) if output.is_dir() else None
    note = output / "settings.json"
    new = dataclasses.asdict(settings)
    if last is None:
        if int(os.environ.get("RANK", 0)) == 0:
            output.mkdir(parents=True, exist_ok=True)
            note.write_text(json.dumps(new, indent=1) + "\n")
        return False
    if not note.is_file():
        raise ValueError(
            f"{last} is a checkpoint without {note.name} beside it, so it may be of any run; give "
            "another --output, or remove the folder"
        )
    # Settings that came later have their defaults in files from before.
    old = dataclasses.asdict(Settings(**json.loads(note.read_text())))
    changed = [key for key in new if new[key] != old[key] and key not in FREE_TO_CHANGE]
    if changed:
        values = ", ".join(f"{key} {old[key]!r} and not {new[key]!r}" for key in changed)
        raise ValueError(
            f"{output} has a checkpoint of a run with {values}; give another --output, or remove "
            "the folder"
        )
    return True


class _Done(Exception):
    """There is nothing left to train."""


class _EndsWhatIsDone(TrainerCallback):
    """Ends a training whose checkpoint is that of its last step, with the checkpoint loaded.

    The Trainer would take one step more.
    """

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Look at the step that the checkpoint was written at."""
        if state.global_step >= state.max_steps:
            raise _Done


class _SaysHowFarItIs(TrainerCallback):
    """Prints a line now and then where no bar shows how far a run is: off a terminal."""

    def __init__(self) -> None:
        self.then, self.step = time.perf_counter(), 0

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Take the time."""
        self.then, self.step = time.perf_counter(), state.global_step

    def on_log(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Say how far it is, if it is long enough since the last time."""
        loss, steps = (kwargs.get("logs") or {}).get("loss"), state.global_step - self.step
        seconds = time.perf_counter() - self.then
        shows_bar = not args.disable_tqdm
        if shows_bar or not state.is_world_process_zero or loss is None or steps < 1:
            return
        if seconds >= PAUSE:
            print(
                f"step {state.global_step} of {state.max_steps}, loss {loss:.4g}, "
                f"{seconds / steps:.3g} s a step",
                file=sys.stderr,
                flush=True,
            )
            self.then, self.step = time.perf_counter(), state.global_step


@torch.no_grad()
def generalisation(model: Any, task: data.Task) -> dict[str, Any]:
    """Return the calibration error of a classifier, and its accuracy on noisy test images.

    The error is that of Guo et al. 2017, with 15 bins; the noise has one standard deviation of the
    images, whose own is one.
    """
    model.eval()
    images, labels = (task.test.columns[name] for name in ("pixel_values", "labels"))
    noise = torch.randn(images.shape, generator=torch.Generator().manual_seed(0))
    right, confidence = [], []
    for inputs in (images, images + noise):
        parts = inputs.to(model.device).split(64)
        logits = torch.cat([model(pixel_values=part).logits for part in parts]).cpu()
        values, answers = logits.softmax(-1).max(-1)
        right.append((answers == labels).float())
        confidence.append(values)
    bins = (confidence[0] * 15).long().clamp(max=14)
    gaps = [
        (right[0][bins == each] - confidence[0][bins == each]).sum().abs() for each in range(15)
    ]
    error = float(sum(gaps)) / len(labels)
    return {"calibration_error": _finite(error), "noisy_accuracy": float(right[1].mean())}


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


def _check(settings: Settings) -> None:
    """Refuse what can be known to be wrong before any data are loaded.

    Raises:
        ValueError: if the batches of all processes do not make the global batch, one process would
            use several GPUs, or there will be no checkpoint to go back to.
    """
    gpus = torch.cuda.device_count() if torch.cuda.is_available() else 1
    if gpus > 1 and int(os.environ.get("LOCAL_RANK", -1)) < 0:
        raise ValueError(
            f"there are {gpus} GPUs and one process, which would take a batch of "
            f"{settings.batch_size} on each; start a process for each GPU, torchrun "
            f"--nproc-per-node {gpus} recipes/run.py ..., or show this one a single GPU, "
            "CUDA_VISIBLE_DEVICES=0 python recipes/run.py ..."
        )
    processes = int(os.environ.get("WORLD_SIZE", 1))
    batch = settings.batch_size * settings.gradient_accumulation_steps * processes
    if settings.global_batch and batch != settings.global_batch:
        raise ValueError(
            f"{processes} processes with {settings.gradient_accumulation_steps} batches of "
            f"{settings.batch_size} make {batch} examples a step, but the recipe is for "
            f"{settings.global_batch}; set --gradient_accumulation_steps or --batch_size, or start "
            "as many processes as make it"
        )
    if settings.on_collapse == "rollback" and settings.monitor_every and not settings.save_steps:
        raise ValueError(
            "on_collapse 'rollback' goes back to a checkpoint, and save_steps 0 writes none; set "
            "--save_steps"
        )


def training_arguments(
    settings: Settings, output: Path, *, smooths: bool = True, **options: Any
) -> TrainingArguments:
    """Return the Trainer's arguments for these settings.

    Raises:
        ValueError: for what `_check` refuses.
    """
    _check(settings)
    other = settings.optim.startswith(OTHER)
    return TrainingArguments(
        str(output),
        max_steps=settings.steps,
        per_device_train_batch_size=settings.batch_size,
        per_device_eval_batch_size=64,
        gradient_accumulation_steps=settings.gradient_accumulation_steps,
        learning_rate=settings.learning_rate,
        lr_scheduler_type=settings.lr_scheduler_type,
        lr_scheduler_kwargs=settings.lr_scheduler_kwargs,
        warmup_steps=round(settings.warmup * settings.steps),
        weight_decay=settings.weight_decay,
        optim="adamw_torch" if other else settings.optim,
        optim_args=None if other else settings.optim_args,
        adam_beta2=settings.adam_beta2,
        max_grad_norm=settings.max_grad_norm,
        # A task with a loss of its own has smoothed its labels.
        label_smoothing_factor=settings.label_smoothing if smooths else 0.0,
        dataloader_num_workers=settings.workers,
        remove_unused_columns=False,  # tasks hold what is needed, for the model or to collate
        bf16=settings.bf16,
        logging_steps=settings.logging_steps,
        logging_nan_inf_filter=False,
        save_strategy="steps" if settings.save_steps else "no",
        save_steps=settings.save_steps or 500,
        save_total_limit=_most_kept(settings),
        seed=settings.seed,
        use_cpu=not torch.cuda.is_available(),
        report_to="none",
        disable_tqdm=not sys.stderr.isatty(),
        **options,
    )


def _most_kept(settings: Settings) -> int | None:
    if settings.save_total_limit is not None:
        return settings.save_total_limit or None
    # Which checkpoint is gone back to is not known before: one from before the trouble began.
    return None if settings.on_collapse == "rollback" else FEWEST_KEPT


def _other_optimizer(settings: Settings, model: Any) -> dict[str, Any]:
    """Return what the Trainer takes for an optimizer that it does not have, by name."""
    if not settings.optim.startswith(OTHER):
        return {}
    package, _, name = settings.optim.partition(":")
    options: dict[str, Any] = {"lr": settings.learning_rate, "weight_decay": settings.weight_decay}
    given = json.loads(settings.optim_args or "{}")
    if settings.optim == MUON:
        from recipes.muon import muon_with_adamw

        options["betas"] = (0.9, settings.adam_beta2)
        return {"optimizers": (muon_with_adamw(model, **options | given), None)}
    if package == "torch":
        kind: Any = getattr(torch.optim, name)
    else:
        import pytorch_optimizer

        kind = pytorch_optimizer.load_optimizer(name)
        options["betas"] = (0.9, settings.adam_beta2)
    return {"optimizer_cls_and_kwargs": (kind, options | given)}


def _watched(folder: Path | None) -> dict[str, Any]:
    """Read the monitor's own file: probes with the worst head of each layer, and alarms."""
    if folder is None:
        return {"probes": [], "alarms": []}
    lines = [json.loads(line) for line in (folder / "stability.jsonl").read_text().splitlines()]
    probes = []
    for line in lines:
        if line["event"] != "probe" or not line["quantities"].get("entropy_normalised"):
            continue
        found = line["quantities"]
        probe: dict[str, Any] = {"step": line["step"]}
        for name, worst in (("entropy_normalised", min), ("sec", max), ("sigma_qk", max)):
            layers = found.get(name, {}).values()
            probe[name] = [
                _rounded(worst((v for v in heads if v is not None), default=None))
                for heads in layers
            ]
        modes = [mode for heads in found.get("mode", {}).values() for mode in heads]
        probe["modes"] = {mode: modes.count(mode) for mode in sorted(set(modes))}
        if "effective_lr" in line:
            probe["rates"] = _rates(line["effective_lr"])
        for name in ("sharpness", "sharpness_threshold"):
            if name in line:
                probe[name] = _rounded(line[name])
        probes.append(probe)
    keys = ("kind", "step", "layer", "head", "quantity", "value")
    alarms = [{k: line[k] for k in keys} for line in lines if line["event"] == "alarm"]
    return {"probes": probes, "alarms": alarms}


def _rates(rates: dict[str, Any]) -> dict[str, float]:
    """Return the mean effective rate of the matrices of each block and of each kind of matrix."""
    groups: dict[str, list[float]] = {}
    for name, rate in rates.items():
        # Gains are vectors with rates of their own, many times those of matrices.
        if not name.endswith("weight") or "norm" in name.lower() or ".ln_" in name:
            continue
        values = rate if isinstance(rate, list) else [rate]
        numbers = [part for part in name.split(".") if part.isdigit()]
        if numbers:
            groups.setdefault("block " + ".".join(numbers), []).extend(values)
            groups.setdefault(name.split(numbers[-1] + ".", 1)[1], []).extend(values)
    return {key: _rounded(statistics.mean(values)) for key, values in groups.items()}


def _finite(value: float) -> float | None:
    return _rounded(value) if math.isfinite(value) else None


def _rounded(value: Any) -> Any:
    return None if value is None else float(f"{value:.4g}")


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
