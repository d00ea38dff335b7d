"""Utterances: numbers that eSpeak NG speaks, or recordings in a folder.

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
from pathlib import Path
from typing import Any, NamedTuple

import numpy

__all__ = ["RATE", "Utterance", "read_audio", "recordings", "spoken_numbers"]

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


class Utterance(NamedTuple):
    """A waveform at `RATE`, what is said in it, and by whom."""

    samples: numpy.ndarray
    text: str
    is_test: bool


# eSpeak NG


class _Synthesiser:
    """eSpeak NG, called by its C interface; there is one in a process."""

    SYNCHRONOUS, UTF8, RATE_PARAMETER, PITCH_PARAMETER = 2, 1, 1, 3

    def __init__(self) -> None:
        """Load the library.

        Raises:
            ImportError: without espeakng-loader.
            RuntimeError: if the library does not start.
        """
        import espeakng_loader

        self.library = ctypes.CDLL(espeakng_loader.get_library_path())
        folder = str(espeakng_loader.get_data_path()).encode()
        self.rate = self.library.espeak_Initialize(self.SYNCHRONOUS, 0, folder, 0)
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
