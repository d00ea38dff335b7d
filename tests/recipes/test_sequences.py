"""Translation and speech: what is tested was not trained on, and scores say how far it is right."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import wave
from dataclasses import asdict, replace
from pathlib import Path
from types import SimpleNamespace

import numpy
import pytest
import torch
from transformers import TrainerCallback

ROOT = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(ROOT))

from recipes import data, speech, translation, utterances  # noqa: E402
from recipes.run import run  # noqa: E402
from recipes.sequences import collate  # noqa: E402
from recipes.settings import Settings, read_yaml  # noqa: E402


def test_sequences_are_filled_up_and_what_is_filler_is_masked():
    batch = collate(
        [
            {"input_ids": torch.tensor([5, 6, 7]), "labels": torch.tensor([1])},
            {"input_ids": torch.tensor([8]), "labels": torch.tensor([2, 3])},
        ]
    )
    assert batch["input_ids"].tolist() == [[5, 6, 7], [8, 0, 0]]
    assert batch["attention_mask"].tolist() == [[1, 1, 1], [1, 0, 0]]
    assert batch["labels"].tolist() == [[1, -100], [2, 3]]


def test_a_decoder_starts_with_padding_and_goes_on_with_its_labels():
    pairs = [
        {"input_ids": torch.tensor([5, 1]), "labels": torch.tensor([7, 8, 1])},
        {"input_ids": torch.tensor([5, 1]), "labels": torch.tensor([9, 1])},
    ]
    batch = translation.collate_pairs(pairs)
    assert batch["decoder_input_ids"].tolist() == [[0, 7, 8], [0, 9, 1]]
    assert batch["labels"].tolist() == [[7, 8, 1], [9, 1, -100]]


class Says:
    """A model that gives fixed ids for each example."""

    device = torch.device("cpu")
    config = SimpleNamespace()

    def __init__(self, rows):
        self.rows = rows

    def eval(self):
        return self

    def generate(self, **inputs):
        width = max(map(len, self.rows)) + 1
        return torch.tensor([[0, *row] + [0] * (width - 1 - len(row)) for row in self.rows])


@pytest.mark.slow
def test_messages_of_the_test_are_in_no_language_trained_on():
    task = translation.messages()
    pairs = translation.pairs()
    assert {pair.language for pair in pairs} == set(translation.LANGUAGES)
    tested = {pair.source for pair in pairs if translation.is_for_the_test(pair.source)}
    trained = {pair.source for pair in pairs} - tested
    assert 0.05 < len(tested) / len(trained) < 0.2
    assert len(task.test) == translation.TEST_PAIRS and len(task.train) > 2000
    # Without its tag a message is the same in every language.
    train, test = (
        {tuple(example["input_ids"][1:].tolist()) for example in examples}
        for examples in (task.train, task.test)
    )
    assert train.isdisjoint(test)
    assert max(len(example["labels"]) for example in task.train) <= translation.LONGEST
    right = [example["labels"].tolist() for example in task.test[: translation.BATCH]]
    inputs = task.score.keywords["inputs"][: translation.BATCH]
    given = (
        task.score.keywords
        | {"inputs": inputs}
        | {
            name: task.score.keywords[name][: translation.BATCH]
            for name in ("sources", "references")
        }
    )
    scores = translation.score(Says(right), **given)
    assert scores["bleu"] == scores["chrf"] == 100 and scores["copied_chrf"] < 30
    wrong = translation.score(Says(right[1:] + right[:1]), **given)
    assert wrong["chrf"] < 40 and wrong["copied_chrf"] == scores["copied_chrf"]


def test_a_path_of_ctc_is_collapsed():
    assert speech.collapsed([0, 5, 5, 0, 5, 6, 6, 0]) == [5, 5, 6]
    assert speech.text_of([3, 4, 1, 3], "ab") == "ab"
    prediction = type("P", (), {})()
    prediction.predictions = numpy.array([[0, 5, 5, 0, 5], [6, 0, 0, 0, -100]])
    prediction.label_ids = numpy.array([[5, 5, -100], [6, 7, -100]])
    assert speech.exactly_right(prediction) == {"accuracy": 0.5}


@pytest.mark.slow
def test_numbers_are_spoken_by_voices_of_which_some_are_for_the_test():
    code = (
        "import hashlib; from recipes.utterances import spoken_numbers; "
        "print(hashlib.sha256(b''.join(u.samples for u in spoken_numbers(30))).hexdigest())"
    )
    said = [
        subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=ROOT)
        for _ in range(2)
    ]
    assert said[0].stdout == said[1].stdout != ""
    first = utterances.spoken_numbers(30)
    assert {each.is_test for each in first} == {True, False}
    assert {word for each in first for word in each.text.split()} == set(utterances.UNITS)
    for each in first:
        assert 0.1 < len(each.samples) / utterances.RATE < 2 and abs(each.samples).max() > 0.05
    say = utterances._synthesiser().say
    one, other = (say("one", voice, rate=170, pitch=50) for voice in ("en+m1", "en+f2"))
    assert not numpy.array_equal(one, other)
    with pytest.raises(RuntimeError, match="no voice 'nobody'"):
        say("one", "nobody", rate=170, pitch=50)


def write_recordings(folder, rate=8000):
    """Twenty tones under names, each its own number of letters long."""
    folder.mkdir(parents=True)
    for number in range(20):
        samples = numpy.sin(numpy.arange(rate // 4) * (0.1 + number / 50)) * 2**14
        with wave.open(str(folder / f"{number}.wav"), "wb") as file:
            file.setnchannels(1)
            file.setsampwidth(2)
            file.setframerate(rate)
            file.writeframes(samples.astype("<i2").tobytes())


def test_recordings_are_read_in_both_forms_and_speakers_are_kept_apart(tmp_path):
    ljspeech, audio = tmp_path / "lj", tmp_path / "audio"
    write_recordings(ljspeech / "wavs")
    lines = [f"{number}|Number {number}|number {'a' * (number % 3 + 1)}" for number in range(20)]
    (ljspeech / "metadata.csv").write_text("\n".join(lines) + "\n")
    found = utterances.recordings(ljspeech)
    assert len(found) == 20 and found[1].text == "number aa"
    assert len(found[0].samples) == utterances.RATE // 4 and 0 < sum(e.is_test for e in found) < 20
    write_recordings(audio)
    rows = [f'{number}.wav,"Yes, {number}",reader{number // 2}' for number in range(20)]
    (audio / "metadata.csv").write_text("\n".join(["file_name,text,speaker", *rows]) + "\n")
    found = utterances.recordings(audio)
    assert found[3].text == "yes, 3"
    assert all(a.is_test == b.is_test for a, b in zip(found[::2], found[1::2], strict=True))
    assert data.is_folder_of_recordings(str(audio)) and not data.is_folder_of_recordings("espeak")
    (audio / "metadata.csv").write_text("file_name,words\n0.wav,one\n")
    with pytest.raises(ValueError, match="columns file_name, words; name the one"):
        utterances.recordings(audio)
    (audio / "metadata.csv").write_text("0.wav\n")
    with pytest.raises(ValueError, match="neither a header with file_name nor lines"):
        utterances.recordings(audio)
    (ljspeech / "metadata.csv").write_text(lines[0] + "\n")
    with pytest.raises(ValueError, match="has 1 recordings, and one speaker in 10"):
        utterances.recordings(ljspeech)
    with pytest.raises(ValueError, match="wav2vec2 and whisper, not for 'vit'"):
        data.load("espeak", model="vit")


def record(folder):
    """Recordings of twenty tones."""
    write_recordings(folder / "wavs")
    lines = [f"{number}|{'ab' * (number % 3 + 1)}" for number in range(20)]
    (folder / "metadata.csv").write_text("\n".join(lines) + "\n")


@pytest.mark.slow
def test_speech_recipes_run_on_a_folder_and_go_on_from_their_checkpoint(tmp_path):
    record(tmp_path)
    for recipe in ("wav2vec2_espeak", "whisper_espeak"):
        path = ROOT / "recipes" / "small" / f"{recipe}.yaml"
        settings = Settings(
            **read_yaml(path)
            | dict(data=str(tmp_path), batch_size=4, steps=2, save_steps=2)
            | dict(output=str(tmp_path / recipe))
        )
        first = run(settings)
        speech.spoken.cache_clear()  # as another process would read the folder again
        again = run(settings)  # it has nothing left to train
        assert 0 <= first["character_error_rate"] and first["word_error_rate"] > 0
        assert len(first["losses"]) == 2 and first | {"seconds": 0} == again | {"seconds": 0}


TINY = {
    "marian_django": dict(model_config=dict(d_model=16, encoder_layers=1, decoder_layers=1)),
    "llama_stdlib": dict(model_config=dict(num_hidden_layers=1)),
    "wav2vec2_espeak": dict(model_config=dict(num_hidden_layers=1)),
    "whisper_espeak": dict(model_config=dict(encoder_layers=1, decoder_layers=1)),
}
RECORDED = {"wav2vec2_espeak", "whisper_espeak"}
"""Those that hear recordings here, which eSpeak NG would take seconds to say."""


def tiny(recipe, folder):
    """A small recipe with a tiny model, six steps and a checkpoint after three."""
    settings = Settings(**read_yaml(ROOT / "recipes" / "small" / f"{recipe}.yaml"))
    short = dict(steps=6, batch_size=4, save_steps=3, monitor_every=3, warmup=0.0)
    source = dict(data=str(folder / "recordings")) if recipe in RECORDED else {}
    return replace(settings, output=str(folder / recipe), **short, **source, **TINY[recipe])


class InterruptsAt4(TrainerCallback):
    def on_step_end(self, args, state, control, **kwargs):
        if state.global_step == 4:
            raise InterruptedError


@pytest.mark.slow
@pytest.mark.parametrize("recipe", ["marian_django", "wav2vec2_espeak", "whisper_espeak"])
def test_translation_and_speech_that_were_interrupted_go_on_as_if_they_were_not(recipe, tmp_path):
    record(tmp_path / "recordings")
    settings = tiny(recipe, tmp_path)
    whole = run(replace(settings, output=str(tmp_path / "whole")))
    assert len(set(whole["losses"])) == 6 and whole["probes"]
    with pytest.raises(InterruptedError):
        run(settings, callbacks=[InterruptsAt4()])
    assert not (Path(settings.output) / "results.json").exists()
    resumed = run(settings)
    for made in (whole, resumed):
        del made["settings"], made["seconds"]
    assert resumed == whole


@pytest.mark.slow
def test_translation_speech_and_llama_train_on_two_processes(tmp_path):
    """Both end with one model, of which each has seen examples of its own."""
    record(tmp_path / "recordings")
    given = {
        recipe: asdict(replace(tiny(recipe, tmp_path), steps=3, save_steps=0)) for recipe in TINY
    }
    (tmp_path / "given.json").write_text(json.dumps(given))
    script = ROOT / "tests" / "support" / "scripts" / "train_recipes.py"
    done = subprocess.run(
        [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2",
         str(script), str(tmp_path / "given.json"), str(tmp_path)],
        capture_output=True, text=True, cwd=tmp_path,
        env=os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)},
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-3000:]
    ranks = [json.loads((tmp_path / f"rank{rank}.json").read_text()) for rank in range(2)]
    for recipe in TINY:
        result = json.loads((tmp_path / recipe / "results.json").read_text())
        assert len(result["losses"]) == 3 and all(result["losses"]) and result["test_loss"] > 0
        first, second = (rank[recipe] for rank in ranks)
        assert first["weights"] == second["weights"] and first["examples"] != second["examples"]
