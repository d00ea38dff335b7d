"""Speech: utterances as examples of a model, and how a transcript is scored."""

from __future__ import annotations

import functools
import math
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from recipes.data import Task, unigram_entropy
from recipes.sequences import IGNORED, collate
from recipes.utterances import RATE, Utterance, recordings, spoken_numbers

BATCH = 64
PAD, EOS, START = 0, 1, 2
FIRST_LETTER = 3

FRAMES_A_SECOND = 100
"""Of Whisper's spectrogram; its encoder halves them."""

MEL_BINS = 40
"""Of small models, half as many as Whisper has."""


@functools.cache
def spoken(name: str, *, model: str) -> Task:
    """Return utterances as a task for a model: letters by CTC, or one after the other.

    Args:
        name: "espeak", or a folder.
        model: wav2vec2, or whisper.

    Raises:
        ValueError: for another model.
    """
    if model not in ("wav2vec2", "whisper"):
        raise ValueError(f"speech is for models wav2vec2 and whisper, not for {model!r}")
    utterances = spoken_numbers() if name == "espeak" else recordings(Path(name))
    letters = sorted({letter for each in utterances for letter in each.text})
    seconds = math.ceil(max(len(each.samples) for each in utterances) / RATE)
    columns = columns_for(model, seconds=seconds)
    train, test = (
        [columns(each, letters) for each in utterances if each.is_test == is_test]
        for is_test in (False, True)
    )
    labels = torch.cat([example["labels"] for example in train])
    size = FIRST_LETTER + len(letters)
    texts = [each.text for each in utterances if each.is_test]
    return Task(
        train, test, num_labels=size, vocabulary=size, reference=unigram_entropy(labels),
        collate=collate, sizes=sizes_for(model, seconds=seconds),
        metrics=exactly_right if model == "wav2vec2" else None,
        score=functools.partial(score, examples=test, texts=texts, letters=letters),
    )  # fmt: skip


def columns_for(
    model: str, *, seconds: int, mel_bins: int = MEL_BINS
) -> Callable[[Utterance, Sequence[str]], dict[str, Tensor]]:
    """Return what makes a model's example of an utterance, by the letters that there are."""
    if model == "wav2vec2":
        return _by_ctc
    return functools.partial(_in_turn, seconds=seconds, mel_bins=mel_bins)


def sizes_for(model: str, *, seconds: int, mel_bins: int = MEL_BINS) -> dict[str, Any]:
    """Return the fields of a model's config that go with such examples."""
    sizes: dict[str, Any] = dict(pad_token_id=PAD, eos_token_id=EOS, bos_token_id=START)
    if model == "whisper":
        sizes |= dict(
            num_mel_bins=mel_bins, max_source_positions=seconds * FRAMES_A_SECOND // 2,
            decoder_start_token_id=START, suppress_tokens=None, begin_suppress_tokens=None,
        )  # fmt: skip
    return sizes


def _ids(text: str, letters: Sequence[str]) -> list[int]:
    return [FIRST_LETTER + letters.index(letter) for letter in text]


def text_of(ids: Sequence[int], letters: Sequence[str]) -> str:
    """Return the letters of ids up to the first end, without what stands for none."""
    found = []
    for each in ids:
        if each == EOS:
            break
        if each >= FIRST_LETTER:
            found.append(letters[each - FIRST_LETTER])
    return "".join(found)


def _by_ctc(utterance: Utterance, letters: Sequence[str]) -> dict[str, Tensor]:
    samples = torch.from_numpy(utterance.samples)
    return {
        "input_values": (samples - samples.mean()) / (samples.std() + 1e-7),
        "labels": torch.tensor(_ids(utterance.text, letters)),
    }


def _in_turn(
    utterance: Utterance, letters: Sequence[str], *, seconds: int, mel_bins: int
) -> dict[str, Tensor]:
    features = _extractor(seconds, mel_bins)(
        utterance.samples, sampling_rate=RATE, return_tensors="pt"
    )
    return {
        "input_features": features["input_features"][0],
        "labels": torch.tensor([*_ids(utterance.text, letters), EOS]),
    }


@functools.cache
def _extractor(seconds: int, mel_bins: int) -> Any:
    from transformers import WhisperFeatureExtractor

    return WhisperFeatureExtractor(feature_size=mel_bins, chunk_length=seconds)


def collapsed(path: Sequence[int]) -> list[int]:
    """Return what a path of CTC says: repeats are one, blanks (`PAD`) are none."""
    kept = [each for each, before in zip(path, [PAD, *path], strict=False) if each != before]
    return [each for each in kept if each != PAD]


def exactly_right(prediction: Any) -> dict[str, float]:
    """Return the share of utterances whose letters are all right."""
    pairs = zip(prediction.predictions.tolist(), prediction.label_ids.tolist(), strict=True)
    right = [
        collapsed([each for each in path if each != IGNORED])
        == [each for each in labels if each != IGNORED]
        for path, labels in pairs
    ]
    return {"accuracy": sum(right) / len(right)}


@torch.no_grad()
def score(
    model: Any, *, examples: Sequence[dict[str, Tensor]], texts: Sequence[str],
    letters: Sequence[str],
) -> dict[str, float]:  # fmt: skip
    """Transcribe the test, greedily.

    Returns:
        `word_error_rate` and `character_error_rate` by jiwer, 1 and more for nonsense.
    """
    import jiwer

    model.eval()
    found: list[str] = []
    for start in range(0, len(examples), BATCH):
        part = [{k: v for k, v in e.items() if k != "labels"} for e in examples[start:][:BATCH]]
        batch = {name: each.to(model.device) for name, each in collate(part).items()}
        if "input_values" in batch:
            paths = model(**batch).logits.argmax(-1).tolist()
            found += [text_of(collapsed(path), letters) for path in paths]
        else:
            longest = max(map(len, texts)) + 2
            ids = model.generate(
                **batch, max_new_tokens=longest, num_beams=1, do_sample=False,
            )  # fmt: skip
            found += [text_of(row, letters) for row in ids[:, 1:].tolist()]
    rates = {"word": jiwer.wer(list(texts), found), "character": jiwer.cer(list(texts), found)}
    return {f"{unit}_error_rate": float(f"{rate:.4g}") for unit, rate in rates.items()}
