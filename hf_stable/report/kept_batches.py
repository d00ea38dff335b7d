"""The micro-batches that a monitor kept at alarms: their worst samples, as a page shows them."""

from __future__ import annotations

import base64
import io
import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

from hf_stable._file_names import BATCH_FILE, BATCH_FOLDER, BATCH_KEY
from hf_stable._json import from_json
from hf_stable.report.events import KeptFiles
from hf_stable.report.run_records import RunRecords
from hf_stable.report.values import to_number, to_step, to_text

__all__ = ["MOST_ALARMS", "MOST_SAMPLES", "ShownBatches", "ShownSample", "worst_samples"]

MOST_ALARMS, MOST_SAMPLES, MOST_TENSORS = 6, 12, 6
"""Shown of a run, of an alarm, and of a sample."""

MOST_ROWS = 1 << 16
"""Samples that a file may say it has: a shape with a zero in it says any number and holds none."""

MOST_ENTRIES = 1 << 24
"""Entries of a sample's tensor that is looked at."""

PICTURE_SIDE = 64
"""Pixels of a picture, whose longer side is shrunk to that."""

NUM_IDS = 48
"""Token ids that stand for a text that nobody has decoded."""


class ShownSample(NamedTuple):
    """A sample as it is shown.

    Attributes:
        loss: as text; "" where it was not computed.
        place: step, process and micro-batch.
        position: in the data set, or why it is not known.
        text: its beginning, or token ids; "" for none.
        picture: as a data URI; "" for none.
        tensors: what is in each, in words.
    """

    loss: str
    place: str
    position: str
    text: str
    picture: str
    tensors: tuple[str, ...]


@dataclass(frozen=True)
class ShownBatches:
    """What was kept at an alarm.

    Attributes:
        run: name.
        title: of the alarm.
        samples: the worst first.
        notes: what is missing, in sentences.
    """

    run: str
    title: str
    samples: tuple[ShownSample, ...]
    notes: tuple[str, ...]


class _Found(NamedTuple):
    """A sample in a file, by how bad it is."""

    badness: float
    path: Path
    about: Mapping[str, Any]
    number: int


def worst_samples(run: RunRecords) -> list[ShownBatches]:
    """Return for the last alarms of a run the samples with the highest losses."""
    folder = run.log.parent / BATCH_FOLDER
    return [_shown(run.name, folder, kept) for kept in run.batches[-MOST_ALARMS:]]


def _shown(run: str, folder: Path, kept: KeptFiles) -> ShownBatches:
    notes, unread, found = [], 0, []
    for name in kept.files:
        try:
            found += list(_samples_in(folder, name))
        except Exception as error:  # whatever a damaged file makes its reader raise
            unread += 1
            if unread <= MOST_SAMPLES:
                notes.append(f"{to_text(name)} could not be read ({type(error).__name__}).")
    if unread > MOST_SAMPLES:
        notes.append(f"Nor could {unread - MOST_SAMPLES:,} more files.")
    if kept.left_out:
        notes.append(f"{kept.left_out:,} micro-batches were not kept: there was no room.")
    if why := {to_text(each.about.get("no_sample_losses")) for each in found} - {""}:
        notes.append(f"Losses by sample are missing: {'; '.join(sorted(why))}.")
    found.sort(key=lambda each: -each.badness)  # stable: of equals the first comes first
    if len(found) > MOST_SAMPLES:
        notes.append(f"{len(found) - MOST_SAMPLES:,} samples with lower losses are not shown.")
    steps = ", ".join(map(str, kept.steps[:MOST_SAMPLES]))
    title = f"{kept.kind} at step {kept.step}; suspicious are the batches of steps {steps}"
    return ShownBatches(run, title, tuple(map(_show, found[:MOST_SAMPLES])), tuple(notes))


def _samples_in(folder: Path, name: str) -> Iterator[_Found]:
    """Yield the samples of a file, of which only the head is read.

    Raises:
        ValueError: if it is none of a monitor's.
        Exception: if it cannot be read.
    """
    path = folder / name
    if not BATCH_FILE.fullmatch(name) or path.is_symlink():
        raise ValueError("no file of a monitor")
    with _opened(path) as file:
        about = from_json((file.metadata() or {})[BATCH_KEY])
        shapes = [file.get_slice(key).get_shape() for key in list(file.keys())]
    lengths = [shape[0] for shape in shapes if shape]
    if not isinstance(about, dict):
        raise ValueError("no description")
    if lengths and lengths[0] > MOST_ROWS:
        raise ValueError("more samples than a micro-batch has")
    losses = about.get("sample_losses")
    of_batch = to_number(about.get("loss"))
    for number in range(lengths[0] if lengths else 0):
        loss = of_batch
        if isinstance(losses, list) and number < len(losses):
            loss = to_number(losses[number])
        yield _Found(loss if math.isfinite(loss) else math.inf, path, about, number)


def _opened(path: Path) -> Any:
    from safetensors import safe_open

    return safe_open(path, "np")


def _show(found: _Found) -> ShownSample:
    about, number = found.about, found.number
    losses, previews = (about.get(key) for key in ("sample_losses", "previews"))
    loss = ""
    if isinstance(losses, list) and number < len(losses):
        value = to_number(losses[number])
        loss = f"{value:.4g}" if math.isfinite(value) else "not finite"
    step, rank, micro = (to_step(about.get(key)) for key in ("step", "rank", "micro_batch"))
    text, picture, tensors = _content(found)
    if isinstance(previews, list) and number < len(previews):
        text = to_text(previews[number])
    return ShownSample(
        loss=loss,
        place=f"step {step}, process {rank}, micro-batch {micro}, sample {number}",
        position=_position(about, number),
        text=text,
        picture=picture,
        tensors=tensors,
    )


def _position(about: Mapping[str, Any], number: int) -> str:
    positions = about.get("positions")
    if isinstance(positions, list) and number < len(positions):
        return str(to_step(positions[number]))
    return f"unknown: {to_text(about.get('positions_unknown'))}"


def _content(found: _Found) -> tuple[str, str, tuple[str, ...]]:
    """Return a sample's token ids as text, a picture of it, and its tensors in words."""
    text, picture, said = "", "", []
    with _opened(found.path) as file:
        keys = list(file.keys())
        for key in keys[:MOST_TENSORS]:
            shape = file.get_slice(key).get_shape()
            if not shape or found.number >= shape[0] or math.prod(shape[1:]) > MOST_ENTRIES:
                said.append(f"{to_text(key)}: {_size(shape)}")
                continue
            try:
                sample = file.get_slice(key)[found.number]
            except TypeError:  # numpy has no bfloat16
                said.append(f"{to_text(key)}: {_size(shape[1:])}, of a type that is not shown")
                continue
            said.append(f"{to_text(key)}: {_in_words(sample)}")
            if key == "input_ids" and sample.ndim == 1:
                text = "token ids " + " ".join(map(str, sample[:NUM_IDS].tolist()))
            picture = picture or _picture(sample)
    if len(keys) > MOST_TENSORS:
        said.append(f"and {len(keys) - MOST_TENSORS} more tensors")
    return text, picture, tuple(said)


def _size(shape: Sequence[int]) -> str:
    return " x ".join(map(str, shape)) or "a number"


def _in_words(sample: Any) -> str:
    """Say how large an array is, and between what its entries lie."""
    import numpy as np

    if not sample.size:
        return "empty"
    if not sample.ndim:
        return str(sample.item())
    finite = sample[np.isfinite(sample)]
    lost = sample.size - finite.size
    span = f", {finite.min():.4g} to {finite.max():.4g}" if finite.size else ""
    return f"{_size(sample.shape)}{span}" + (f", {lost:,} not finite" if lost else "")


def _picture(sample: Any) -> str:
    """Return an image as a small PNG in a data URI; "" for what is none."""
    import numpy as np

    if sample.ndim != 3 or sample.dtype == bool or not np.isfinite(sample).any():
        return ""
    if sample.shape[0] in (1, 3):
        sample = np.moveaxis(sample, 0, -1)
    if sample.shape[-1] not in (1, 3) or min(sample.shape) < 1:
        return ""
    from PIL import Image

    if sample.dtype != np.uint8:
        finite = sample[np.isfinite(sample)].astype(np.float64)
        low, high = finite.min(), finite.max()
        scaled = (sample.astype(np.float64) - low) / max(high - low, 1e-30)
        sample = (255 * np.clip(np.nan_to_num(scaled, nan=0, posinf=1, neginf=0), 0, 1)).astype(
            np.uint8
        )
    image = Image.fromarray(sample[..., 0] if sample.shape[-1] == 1 else sample)
    image.thumbnail((PICTURE_SIDE, PICTURE_SIDE))
    file = io.BytesIO()
    image.save(file, "PNG")
    return f"data:image/png;base64,{base64.b64encode(file.getvalue()).decode()}"
