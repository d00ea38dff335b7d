"""Data of the full-scale recipes of translation and speech, streamed from the Hub or dry."""

from __future__ import annotations

import functools
import io
import itertools
import math
import tempfile
import wave
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from recipes import speech, translation, utterances
from recipes.data import Task
from recipes.sequences import collate
from recipes.settings import Settings
from recipes.streaming import Stream, Streamed, one_of_each, share

TEST_EXAMPLES = 256
"""Of the test, how many are translated or transcribed."""

DRY_EXAMPLES = 4
SECONDS = 30
"""Of Whisper's window."""

MEAN_SECONDS = 12
"""Of LibriSpeech's recordings: 960 hours of 281,241."""

MEL_BINS = 80
LETTERS = " 'abcdefghijklmnopqrstuvwxyz"
"""Of LibriSpeech's transcripts, in small letters."""


def _first(stream: Stream, split: str, count: int) -> list[Any]:
    stored: Iterable[Any] = stream(split, None, 0, 1)
    return list(itertools.islice(stored, count))


def column_of(example: Any, path: str) -> Any:
    """Return what stands in a column, or in a field of one: `translation.en`."""
    for name in path.split("."):
        example = example[name]
    return example


def translations(
    settings: Settings, stream: Stream, tokenizer: Any, *, length: int, dry_run: bool
) -> Task:
    """Return a task of translation whose pairs are streamed.

    Args:
        settings: of the recipe.
        stream: opens a split.
        tokenizer: of both languages, with tokens for padding, its first, and the end.
        length: tokens that a source or target has at most.
        dry_run: whether few examples are tested.
    """
    source, target = str(settings.source_column), str(settings.target_column)

    def ids(text: str) -> Tensor:
        found = tokenizer(text, add_special_tokens=False, truncation=True, max_length=length - 1)
        return torch.tensor([*found["input_ids"], tokenizer.eos_token_id])

    def prepare(example: Any) -> dict[str, Tensor]:
        return {
            "input_ids": ids(column_of(example, source)),
            "labels": ids(column_of(example, target)),
        }

    tested = _first(stream, settings.test_split, DRY_EXAMPLES if dry_run else TEST_EXAMPLES)
    return Task(
        Streamed(stream, settings.train_split, one_of_each(prepare)),
        Streamed(stream, settings.test_split, one_of_each(prepare), shuffles=False),
        num_labels=len(tokenizer), vocabulary=len(tokenizer),
        reference=math.log(len(tokenizer)), is_small=False, collate=translation.collate_pairs,
        sizes=dict(
            pad_token_id=tokenizer.pad_token_id, eos_token_id=tokenizer.eos_token_id,
            decoder_start_token_id=translation.PAD, bos_token_id=None,
        ),
        score=functools.partial(
            translation.score, inputs=[prepare(example)["input_ids"] for example in tested],
            sources=[column_of(example, source) for example in tested],
            references=[column_of(example, target) for example in tested],
            decode=functools.partial(tokenizer.decode, skip_special_tokens=True),
        ),
    )  # fmt: skip


def transcripts(settings: Settings, stream: Stream, *, dry_run: bool) -> Task:
    """Return a task of speech whose recordings are streamed; letters are its tokens.

    Args:
        settings: of the recipe.
        stream: opens a split, with recordings as they are stored.
        dry_run: whether few examples are tested.
    """
    columns = speech.columns_for(settings.model, seconds=SECONDS, mel_bins=MEL_BINS)
    audio, text = str(settings.audio_column), str(settings.text_column)

    def utterance(example: Any) -> utterances.Utterance:
        stored = example[audio]
        file = io.BytesIO(stored["bytes"]) if stored.get("bytes") else stored["path"]
        said = "".join(letter for letter in example[text].lower() if letter in LETTERS)
        return utterances.Utterance(utterances.read_audio(file), said, False)

    def prepare(example: Any) -> dict[str, Tensor]:
        return columns(utterance(example), LETTERS)

    stored = _first(stream, settings.test_split, DRY_EXAMPLES if dry_run else TEST_EXAMPLES)
    tested = [utterance(example) for example in stored]
    size = speech.FIRST_LETTER + len(LETTERS)
    return Task(
        Streamed(stream, settings.train_split, one_of_each(prepare)),
        Streamed(stream, settings.test_split, one_of_each(prepare), shuffles=False),
        num_labels=size, vocabulary=size, reference=math.log(size), is_small=False,
        collate=collate,
        sizes=speech.sizes_for(settings.model, seconds=SECONDS, mel_bins=MEL_BINS),
        metrics=speech.exactly_right if settings.model == "wav2vec2" else None,
        score=functools.partial(
            speech.score, examples=[columns(each, LETTERS) for each in tested],
            texts=[each.text for each in tested], letters=LETTERS,
        ),
    )  # fmt: skip


def local_pairs(settings: Settings) -> Stream:
    """Return messages of Django in the columns of a recipe, whatever the split and epoch."""
    from datasets import Dataset

    (outer, source), (_, target) = (
        str(name).split(".") for name in (settings.source_column, settings.target_column)
    )
    pairs = translation.pairs()[:DRY_EXAMPLES]
    rows = [{outer: {source: pair.source, target: pair.target}} for pair in pairs]
    return _shared(Dataset.from_list(rows))


def local_speech(settings: Settings) -> Stream:
    """Return numbers that eSpeak NG says, as files in the columns of a recipe."""
    from datasets import Dataset

    folder = Path(tempfile.mkdtemp(prefix="dry-run-"))
    rows = []
    for number, each in enumerate(utterances.spoken_numbers(DRY_EXAMPLES)):
        path = folder / f"{number}.wav"
        with wave.open(str(path), "wb") as file:
            file.setnchannels(1)
            file.setsampwidth(2)
            file.setframerate(utterances.RATE)
            file.writeframes((each.samples * (2**15 - 1)).astype("<i2").tobytes())
        stored = {"path": str(path), "bytes": None}
        rows.append({settings.audio_column: stored, settings.text_column: each.text})
    return _shared(Dataset.from_list(rows))


def _shared(dataset: Any) -> Stream:
    return lambda split, epoch, rank=0, num_ranks=1: share(dataset, rank, num_ranks)
