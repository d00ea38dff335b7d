"""What a page shows of the batches that were kept at alarms, and of many events."""

from __future__ import annotations

import json
import math
import re

import numpy as np
import pytest
import torch
from report_runs import FALLING, alarm, calm, write_run
from safetensors.numpy import save_file
from tiny_models import tiny_model
from tiny_training import make_trainer
from tokenizers import Tokenizer, models
from transformers import PreTrainedTokenizerFast, Trainer

from hf_stable import StabilityCallback
from hf_stable._file_names import BATCH_FOLDER, BATCH_KEY
from hf_stable.monitor.log_file import StabilityLog
from hf_stable.report import write_report
from hf_stable.report.kept_batches import worst_samples
from hf_stable.report.reading import read_run

BAD = 21


def train(folder, model, *, spoil=None, trainer_class=Trainer, processing_class=None):
    """A run that stops at a batch with the sample BAD, and keeps it."""
    monitor = StabilityCallback(every=50, on_collapse="stop", keep_batches="auto")
    trainer = make_trainer(
        model, folder, callbacks=[monitor], save_strategy="no", trainer_class=trainer_class
    )
    if spoil is not None:
        spoil(trainer.train_dataset[BAD])
    trainer.processing_class = trainer.callback_handler.processing_class = processing_class
    trainer.train()
    return trainer


def spoil(sample):
    sample["pixel_values"][0, 2, 2] = math.inf


def page_of(*runs):
    output = runs[0] / "report.html"
    write_report(list(runs), output)
    return output.read_text()


def test_the_sample_that_did_it_comes_first_with_its_picture(tmp_path):
    train(tmp_path, tiny_model("vit"), spoil=spoil)
    (shown,) = worst_samples(read_run(tmp_path))
    first, *others = shown.samples
    assert (first.loss, first.position) == ("not finite", str(BAD))
    losses = [float(sample.loss) for sample in others]
    assert losses == sorted(losses, reverse=True) and len(losses) > 5
    assert any("1 not finite" in words for words in first.tensors)
    text = page_of(tmp_path)
    assert "nonfinite at step" in shown.title and shown.title in text
    write_report([tmp_path], tmp_path / "report.json", format="json")
    ((in_json,),) = (
        run["batches"] for run in json.loads((tmp_path / "report.json").read_text())["runs"]
    )
    assert in_json["title"] == shown.title
    assert in_json["samples"] == [
        {k: list(v) if k == "tensors" else v for k, v in s._asdict().items() if k != "picture"}
        for s in shown.samples
    ]
    pictures = re.findall(r'<img src="data:image/png;base64,([^"]+)"', text)
    assert len(pictures) == len(shown.samples) and len(set(pictures)) == len(pictures)


class DividesByNothing(Trainer):
    """Loses the loss of batches that hold a token."""

    def compute_loss(self, model, inputs, *args, **kwargs):
        loss = super().compute_loss(model, inputs, *args, **kwargs)
        return loss * math.nan if (inputs["input_ids"] == 3).any() else loss


@pytest.mark.parametrize("has_tokenizer", [True, False])
def test_texts_are_shown_as_such_and_cannot_break_the_page(has_tokenizer, tmp_path):
    model = tiny_model("gpt2")
    words = {f"w{i}": i for i in range(model.config.vocab_size)}
    words = {("</td><script>alert(1)</script>" if i == 3 else word): i for word, i in words.items()}
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=Tokenizer(models.WordLevel(words, unk_token="w0")), unk_token="w0"
    )

    trainer = train(
        tmp_path, model, trainer_class=DividesByNothing,
        processing_class=tokenizer if has_tokenizer else None,
    )  # fmt: skip
    (shown,) = worst_samples(read_run(tmp_path))
    ids = trainer.train_dataset[int(shown.samples[0].position)]["input_ids"]
    assert shown.samples[0].loss == "not finite" and (ids == 3).any()
    text = page_of(tmp_path)
    if has_tokenizer:
        assert shown.samples[0].text == tokenizer.decode(ids)
        assert "<script>alert(1)" not in text and "&lt;script&gt;alert(1)" in text
    else:
        assert shown.samples[0].text == "token ids " + " ".join(map(str, ids.tolist()))


def line_with(folder, **content):
    log = StabilityLog(folder)
    log.write("batches", 0, 50, {"kind": "spike", "steps": [49, 50], "left_out": 2} | content)
    return folder


def test_what_is_damaged_or_gone_is_said_and_no_other_file_is_opened(tmp_path):
    run = write_run(tmp_path / "run", FALLING, {1: calm(1)}, [("alarm", 50, alarm())])
    (tmp_path / "secret.safetensors").write_bytes(b"secret")
    folder = run / BATCH_FOLDER
    folder.mkdir()
    names = [f"step-{step}-attempt-0-rank-0-micro-0.safetensors" for step in (48, 49, 50)]
    (folder / names[0]).write_bytes(b"\xff" * 64)
    (folder / names[1]).symlink_to(tmp_path / "secret.safetensors")
    files = [*names, "../../secret.safetensors", 7]
    (shown,) = worst_samples(read_run(line_with(run, files=files)))
    assert shown.samples == ()
    for name in (*names, "../../secret.safetensors"):
        assert any(note.startswith(f"{name} could not be read") for note in shown.notes)
    assert "2 micro-batches were not kept: there was no room." in shown.notes
    assert names[0] in page_of(run)
    (bare,) = worst_samples(read_run(line_with(write_run(tmp_path / "x", FALLING, {1: calm(1)}))))
    assert bare.samples == ()


def test_a_file_that_says_it_has_any_number_of_samples_is_refused_at_once(tmp_path):
    run = write_run(tmp_path / "run", FALLING, {1: calm(1)}, [("alarm", 50, alarm())])
    (folder := run / BATCH_FOLDER).mkdir()
    name = "step-{}-attempt-0-rank-0-micro-0.safetensors"
    about = {BATCH_KEY: json.dumps({"step": 49, "loss": 2.0})}
    save_file({"x": np.zeros((10**12, 0), np.float32)}, folder / name.format(49), about)
    save_file({"x": np.ones((2, 3), np.float32)}, folder / name.format(50), about)
    gone = [name.format(step) for step in range(100, 600)]
    files = [name.format(49), name.format(50), *gone]
    (shown,) = worst_samples(read_run(line_with(run, files=files)))
    assert len(shown.samples) == 2
    assert shown.notes[0] == f"{files[0]} could not be read (ValueError)."
    assert len(shown.notes) < 20 and f"Nor could {len(gone) + 1 - 12:,} more files." in shown.notes


def test_what_was_kept_is_no_damage_and_skips_are_told(tmp_path):
    run = write_run(
        tmp_path / "run", FALLING, {1: calm(1)},
        [("alarm", 50, alarm()), ("rollback", 50, {"to_step": 40, "lr_scale": 1.0, "skips": [49]})],
    )  # fmt: skip
    StabilityLog(run).write("skip", 1, 49, {})
    records = read_run(line_with(run, files=[]))
    assert records.notes == ()
    text = page_of(run)
    assert "went back to step 40, rates times 1, without the batches of steps 49" in text
    assert "its batches were skipped" in text and "stopped: " not in text


def test_many_events_are_bounded_and_what_is_left_out_is_said(tmp_path):
    def size(count):
        events = [("alarm", step, alarm()) for step in range(1, count + 1)]
        text = page_of(write_run(tmp_path / str(count), FALLING, {1: calm(1)}, events))
        payload = re.search(r'id="payload">(.*?)</script>', text, re.DOTALL)[1]
        return len(text), len(json.loads(payload)["runs"][0]["marks"]), text

    few, many = size(60), size(3000)
    assert few[1] == many[1] == 60
    # A sentence more, and two more digits of each step where the table and the marks have it.
    assert many[0] - few[0] < 300 + 60 * 2 * 4
    assert "has 3000 events: the first and the last are listed, 2940 between" in many[2]
    assert "between them are left out" not in few[2]


def test_a_model_of_bfloat16_inputs_is_shown_without_pictures(tmp_path):
    trainer_samples = []

    class InHalves(Trainer):
        def get_batch_samples(self, *args):
            batches, count = super().get_batch_samples(*args)
            for batch in batches:
                batch["pixel_values"] = batch["pixel_values"].bfloat16()
                trainer_samples.append(batch)
            return batches, count

    train(tmp_path, tiny_model("vit").bfloat16(), spoil=spoil, trainer_class=InHalves)
    (shown,) = worst_samples(read_run(tmp_path))
    assert trainer_samples[0]["pixel_values"].dtype == torch.bfloat16
    assert shown.samples[0].picture == "" and shown.samples[0].position == str(BAD)
    assert any("of a type that is not shown" in words for words in shown.samples[0].tensors)
