"""Speech: numbers that eSpeak NG speaks, or recordings in a folder; how a transcript is scored.

The voices of the wheel `espeakng-loader` are synthetic, but their waveforms are real ones. Those of
the test are not trained on.
"""

from __future__ import annotations

import csv
import ctypes
import functools
import hashlib
import math
import random
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy
import torch
from torch import Tensor

from recipes.data import Task, unigram_entropy
from recipes.sequences import IGNORED, collate

RATE = 16_000
"""Samples a second, of all speech models of transformers."""

SPOKEN = 1200
"""Utterances of eSpeak NG."""

VARIANTS = ("m1", "m2", "m3", "m4", "m5", "m6", "m7", "f1", "f2", "f3", "f4", "f5")
ACCENTS = ("en", "en-us", "en-gb-scotland", "en-gb-x-rp", "en-029")
TEST_VARIANTS = ("m4", "f3")
RATES, PITCHES = (150, 230), (30, 70)
"""Words a minute, and pitch on eSpeak's scale to 100, between which utterances are."""

UNITS = "zero one two three four five six seven eight nine".split()
MOST_DIGITS = 3
TEST_ONE_IN = 10
BATCH = 64
PAD, EOS, START = 0, 1, 2
FIRST_LETTER = 3

FRAMES_A_SECOND = 100
"""Of Whisper's spectrogram; its encoder halves them."""

MEL_BINS = 40
"""Of small models, half as many as Whisper has."""


class Utterance(NamedTuple):
    """A waveform at `RATE`, what is said in it, and by whom."""

    samples: numpy.ndarray
    text: str
    is_test: bool


# eSpeak NG


class _Synthesiser:
    """eSpeak NG, called by its C interface; there is one in a process."""

    RETRIEVAL, UTF8, RATE_PARAMETER, PITCH_PARAMETER = 1, 1, 1, 3

    def __init__(self) -> None:
        """Load the library.

        Raises:
            ImportError: without espeakng-loader.
            RuntimeError: if the library does not start.
        """
        import espeakng_loader

        self.library = ctypes.CDLL(espeakng_loader.get_library_path())
        folder = str(espeakng_loader.get_data_path()).encode()
        self.rate = self.library.espeak_Initialize(self.RETRIEVAL, 0, folder, 0)
        if self.rate <= 0:
            raise RuntimeError(f"eSpeak NG did not start with the data in {folder.decode()}")
        self.heard: list[numpy.ndarray] = []
        samples = ctypes.POINTER(ctypes.c_short)
        # Kept, since the library calls it later on.
        self.callback = ctypes.CFUNCTYPE(ctypes.c_int, samples, ctypes.c_int, ctypes.c_void_p)(
            self._hear
        )
        self.library.espeak_SetSynthCallback(self.callback)

    def _hear(self, samples: Any, count: int, events: Any) -> int:
        if samples and count > 0:
            self.heard.append(numpy.ctypeslib.as_array(samples, (count,)).copy())
        return 0

    def say(self, text: str, voice: str, *, rate: int, pitch: int) -> numpy.ndarray:
        """Return the waveform of a text, float32 in [-1, 1], at `self.rate`.

        Raises:
            RuntimeError: if there is no such voice, or nothing was heard.
        """
        self.heard.clear()
        if self.library.espeak_SetVoiceByName(voice.encode()):
            raise RuntimeError(f"eSpeak NG has no voice {voice!r}")
        self.library.espeak_SetParameter(self.RATE_PARAMETER, rate, 0)
        self.library.espeak_SetParameter(self.PITCH_PARAMETER, pitch, 0)
        self.library.espeak_ng_SetRandSeed(ctypes.c_long(1))  # it would go by the clock
        content = text.encode()
        self.library.espeak_Synth(content, len(content) + 1, 0, 0, 0, self.UTF8, None, None)
        self.library.espeak_Synchronize()
        if not self.heard:
            raise RuntimeError(f"eSpeak NG said nothing for {text!r} with the voice {voice!r}")
        return numpy.concatenate(self.heard).astype(numpy.float32) / 2**15


@functools.cache
def _synthesiser() -> _Synthesiser:
    return _Synthesiser()


@functools.cache
def spoken_numbers(count: int = SPOKEN) -> tuple[Utterance, ...]:
    """Return numbers, digit by digit, in many voices; once in a process.

    eSpeak NG goes on where its last utterance left its noise: said again, a number is a few samples
    another. A process says its first ones as every other does, so that a run can go on.
    """
    draw = random.Random(0)
    found = []
    for _ in range(count):
        text = " ".join(draw.choice(UNITS) for _ in range(draw.randint(1, MOST_DIGITS)))
        variant = draw.choice(VARIANTS)
        samples = _synthesiser().say(
            text, f"{draw.choice(ACCENTS)}+{variant}",
            rate=draw.randint(*RATES), pitch=draw.randint(*PITCHES),
        )  # fmt: skip
        found.append(
            Utterance(_resampled(samples, _synthesiser().rate), text, variant in TEST_VARIANTS)
        )
    return tuple(found)


def _resampled(samples: numpy.ndarray, rate: int) -> numpy.ndarray:
    from scipy.signal import resample_poly

    if rate == RATE:
        return samples
    common = math.gcd(rate, RATE)
    return resample_poly(samples, RATE // common, rate // common).astype(numpy.float32)


# Recordings in a folder


def recordings(folder: Path) -> tuple[Utterance, ...]:
    """Return the recordings of a folder with a `metadata.csv`.

    It is that of an AudioFolder of `datasets` (a header, `file_name`, and the text as
    `transcription`, `text` or `sentence`; where there is a `speaker`, those of the test are not
    trained on), or that of LJSpeech (`name|text|text with numbers written out`, recordings in
    `wavs`). Without speakers one recording in ten is for the test, by the hash of its name.

    Raises:
        ImportError: without soundfile.
        ValueError: for a metadata.csv that is neither, or if all or none of the recordings are for
            the test.
    """
    rows = _audio_folder(folder) or _ljspeech(folder)
    found = tuple(
        Utterance(read_audio(path), text.lower(), _is_for_the_test(speaker or path.name))
        for path, text, speaker in rows
    )
    if len({utterance.is_test for utterance in found}) < 2:
        raise ValueError(
            f"{folder} has {len(found)} recordings, and one speaker in {TEST_ONE_IN}, or one "
            "recording where no speaker is named, is for the test by its hash: that leaves none to "
            "train on, or none to test; take more recordings or speakers"
        )
    return found


def _audio_folder(folder: Path) -> list[tuple[Path, str, str]]:
    with (folder / "metadata.csv").open(newline="", encoding="utf-8") as file:
        rows = list(csv.DictReader(file))
    if not rows or "file_name" not in rows[0]:
        return []
    texts = [name for name in ("transcription", "text", "sentence") if name in rows[0]]
    if not texts:
        raise ValueError(
            f"{folder / 'metadata.csv'} has the columns {', '.join(rows[0])}; name the one that "
            "has the text transcription, text or sentence"
        )
    return [(folder / row["file_name"], row[texts[0]], row.get("speaker") or "") for row in rows]


def _ljspeech(folder: Path) -> list[tuple[Path, str, str]]:
    path = folder / "metadata.csv"
    with path.open(newline="", encoding="utf-8") as file:
        rows = list(csv.reader(file, delimiter="|", quoting=csv.QUOTE_NONE))
    if not rows or any(len(row) < 2 for row in rows):
        raise ValueError(
            f"{path} has neither a header with file_name nor lines of the form name|text"
        )
    return [(folder / "wavs" / f"{row[0]}.wav", row[-1], "") for row in rows]


def read_audio(file: Any) -> numpy.ndarray:
    """Return the waveform of an audio file, a path or an open file, one channel at `RATE`."""
    import soundfile

    samples, rate = soundfile.read(file, dtype="float32", always_2d=True)
    return _resampled(samples.mean(1), rate)


def _is_for_the_test(name: str) -> bool:
    digest = hashlib.blake2b(name.encode(), digest_size=8).digest()
    return int.from_bytes(digest) % TEST_ONE_IN == 0


# Tasks


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
