"""Full-scale recipes: their settings, their data, and a dry run of each."""

from __future__ import annotations

import itertools
import json
import math
import re
import shutil
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from datasets import Dataset
from gloo_ranks import run_ranks
from PIL import Image
from tiny_models import tiny_batch, tiny_model
from torch.utils.data import DataLoader
from transformers import Trainer, TrainerCallback, TrainingArguments

ROOT = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(ROOT))

from recipes import augmentation, full_scale, full_texts  # noqa: E402
from recipes.arguments import training_arguments  # noqa: E402
from recipes.full_scale import gpu_hours  # noqa: E402
from recipes.models import build_empty  # noqa: E402
from recipes.run import main, run  # noqa: E402
from recipes.settings import Settings, read_yaml  # noqa: E402
from recipes.streaming import Place, PlaceError, StreamingTrainer  # noqa: E402

FULL = sorted((ROOT / "recipes" / "full").glob("*.yaml"))


@pytest.mark.parametrize("path", FULL, ids=lambda path: path.stem)
def test_every_full_recipe_is_a_whole_setting(path):
    settings = Settings(**read_yaml(path))
    assert settings.data.count("/") == 1 and settings.output == f"recipe-output/{path.stem}"
    assert settings.warmup == 0 and settings.bf16
    processes = settings.global_batch / (settings.batch_size * settings.gradient_accumulation_steps)
    assert processes in (8, 32)
    assert 10 < gpu_hours(build_empty(settings), settings) < 50_000
    with pytest.raises(ValueError, match="1 processes with .* but the recipe is for"):
        training_arguments(settings, Path("out"))
    arguments = training_arguments(replace(settings, global_batch=0), Path("out"))
    # Weights and Adam's two averages of a ViT-g are 12 GB: two checkpoints, not 150.
    assert arguments.save_total_limit == 2
    assert arguments.logging_steps == 50
    assert settings.save_steps % 50 == settings.monitor_every % 50 == 0  # no mean is cut short
    comment = " ".join(line[2:] for line in path.read_text().splitlines() if line[0] == "#")
    assert settings.model == "gpt2" or re.search(r"bf16 (is|are|and .* are) ours", comment)


@pytest.mark.parametrize("path", FULL, ids=lambda path: path.stem)
def test_every_full_recipe_has_its_papers_settings(path):
    settings = Settings(**read_yaml(path))
    arguments = training_arguments(replace(settings, global_batch=0), Path("out"))
    ends = settings.lr_scheduler_kwargs and settings.lr_scheduler_kwargs["min_lr"]
    if settings.model == "gpt2":  # nanoGPT
        assert ends == pytest.approx(settings.learning_rate / 10) and settings.max_grad_norm == 1
        assert settings.global_batch == 480 and settings.adam_beta2 == 0.95
    elif settings.model == "swin":  # Liu et al. 2021
        assert ends == 1e-5 and settings.random_erasing == 0.25 and settings.max_grad_norm == 5
    else:
        assert ends is None and settings.random_erasing == 0
    kind = "linear" if settings.model == "bert" else "cosine_with_min_lr" if ends else "cosine"
    assert arguments.lr_scheduler_type == kind and arguments.lr_scheduler_kwargs == (
        settings.lr_scheduler_kwargs
    )
    if settings.image_column:
        assert (settings.randaugment, settings.randaugment_std) == (9, 0.5)


@pytest.mark.slow
@pytest.mark.parametrize("path", FULL, ids=lambda path: path.stem)
def test_full_recipes_run_dry(path, tmp_path, capsys):
    main([str(path), "--dry-run", "--threads", "1", "--output", str(tmp_path)])
    assert "GPU hours" in capsys.readouterr().out
    result = json.loads((tmp_path / "dry-run" / "results.json").read_text())
    assert len(result["losses"]) == 2 and all(math.isfinite(loss) for loss in result["losses"])
    assert math.isfinite(result["test_loss"]) and result["probes"]
    assert not (tmp_path / "results.json").exists()


def test_images_of_a_full_recipe_are_augmented_and_mixed():
    settings = Settings(**read_yaml(ROOT / "recipes" / "full" / "vit_b.yaml"))
    task = full_scale.load(settings, dry_run=True)
    first, again = (list(itertools.islice(task.train, 4)) for _ in range(2))
    assert not torch.equal(first[0]["pixel_values"], again[0]["pixel_values"])
    batch = task.collate(first)
    assert batch["labels"].shape == (4, 1000) and batch["labels"].is_floating_point()
    torch.testing.assert_close(batch["labels"].sum(1), torch.ones(4))
    calm, calm_again = (list(itertools.islice(task.test, 4)) for _ in range(2))
    assert torch.equal(calm[0]["pixel_values"], calm_again[0]["pixel_values"])
    assert task.collate(calm)["labels"].shape == (4,)


def test_mixing_keeps_the_share_that_it_says():
    black_and_white = torch.stack([torch.zeros(3, 32, 32), torch.ones(3, 32, 32)])
    for mix in (augmentation.mix_up, augmentation.cut_mix):
        mixed, share = mix(black_and_white, 0.7)
        assert mixed[1].mean() == pytest.approx(share, abs=1e-6) and 0.5 < share < 1
        assert mixed[0].mean() == pytest.approx(1 - share, abs=1e-6)


def test_windows_of_a_full_recipe_hold_every_token_once():
    settings = Settings(**read_yaml(ROOT / "recipes" / "full" / "gpt2_small.yaml"))
    task = full_scale.load(settings, dry_run=True)
    windows = list(itertools.islice(task.train, 3))
    assert all(len(window["input_ids"]) == 1024 for window in windows)
    assert not torch.equal(windows[0]["input_ids"], windows[1]["input_ids"])
    masked = full_scale.load(
        Settings(**read_yaml(ROOT / "recipes" / "full" / "bert_base.yaml")), dry_run=True
    )
    labels = masked.collate(list(itertools.islice(masked.train, 4)))["labels"]
    assert 0.1 < (labels != -100).float().mean() < 0.2


NUM_SHARDS, TEXTS_IN_SHARD, TIMES, CONTEXT = 4, 250, 12, 16


@pytest.fixture
def shards(tmp_path):
    """Settings of a data set in shards, each of whose texts is its own number over and over."""
    return write_shards(tmp_path)


def write_shards(tmp_path, num_shards=NUM_SHARDS):
    (tmp_path / "data").mkdir()
    for shard in range(num_shards):
        first = shard * TEXTS_IN_SHARD
        texts = [f"<{first + number}>" * TIMES for number in range(TEXTS_IN_SHARD)]
        # datasets sleeps for five seconds after shuffled shards of parquet.
        name = f"train-{shard:05d}-of-{num_shards:05d}.jsonl"
        Dataset.from_dict({"text": texts}).to_json(tmp_path / "data" / name)
    full_texts.local_tokenizer().save_pretrained(tmp_path / "tokenizer")
    return Settings(
        model="gpt2", model_config={"n_positions": CONTEXT}, data=str(tmp_path / "data"),
        text_column="text", tokenizer=str(tmp_path / "tokenizer"),
    )  # fmt: skip


def numbers_in(windows, tokenizer, workers=0):
    """The numbers of the texts that windows are from, in order."""
    batches = DataLoader(windows, batch_size=128, num_workers=workers)
    return numbers_of((row for batch in batches for row in batch["input_ids"]), tokenizer)


def numbers_of(rows, tokenizer):
    texts = ("".join(tokenizer.convert_ids_to_tokens(row)) for row in rows)
    found = (re.findall(r"<(\d+)>", text) for text in texts)
    return [int(number) for numbers in found for number in dict.fromkeys(numbers)]


@pytest.mark.parametrize("workers", [0, 2])
def test_no_text_is_both_trained_and_tested_on(shards, workers):
    task = full_scale.load(shards)
    tokenizer = full_texts.tokenizer_of(shards.tokenizer)
    tested = set(numbers_in(task.test, tokenizer))
    in_order = numbers_in(task.train, tokenizer, workers)
    trained = set(in_order)
    assert tested and not tested & trained
    # No other text is lost, but at the end of what each worker reads.
    missing = set(range(NUM_SHARDS * TEXTS_IN_SHARD)) - tested - trained
    assert len(missing) <= max(1, workers) + 1
    held_out = {n for n in missing | tested if full_texts.is_held_out(f"<{n}>" * TIMES, 256)}
    assert held_out >= tested
    task.train.set_epoch(1)
    again = numbers_in(task.train, tokenizer, workers)
    assert again != in_order and not tested & set(again)
    assert set(numbers_in(full_scale.load(replace(shards, seed=1)).test, tokenizer)) == tested


def first_pass(settings, workers, folder):
    """The texts that this process reads in a first pass, in order, a window at a time."""
    task = full_scale.load(settings)
    arguments = TrainingArguments(
        str(folder), per_device_train_batch_size=1, dataloader_num_workers=workers, max_steps=1,
        use_cpu=True, report_to="none",
    )  # fmt: skip
    trainer = StreamingTrainer(
        tiny_model("gpt2"), arguments, train_dataset=task.train, data_collator=task.collate
    )
    loader, rows = trainer.get_train_dataloader(), []
    for batch in loader:
        places = loader.batches.places
        if places[loader.batches.last].epoch == 0:
            rows.append(batch["input_ids"][0])
        if len(places) == max(1, workers) and all(place.epoch for place in places.values()):
            break
    return numbers_of(rows, full_texts.tokenizer_of(settings.tokenizer))


@pytest.mark.slow
@pytest.mark.parametrize(("num_shards", "workers"), [(4, 0), (4, 2), (3, 0), (1, 0)])
def test_two_processes_share_a_stream_and_lose_nothing(num_shards, workers, tmp_path):
    settings = write_shards(tmp_path, num_shards)
    seen = run_ranks(first_pass, 2, settings, workers, tmp_path / "out")
    alone = numbers_in(full_scale.load(settings).train, full_texts.tokenizer_of(settings.tokenizer))
    ours, theirs = map(set, seen)
    assert ours and theirs and not ours & theirs
    # But for what does not fill a window at the end of what each worker reads.
    assert len(set(alone) - ours - theirs) <= 2 * max(1, workers) + 1
    # Each text is read once: twice would be 100 % more, unfilled windows are a few numbers less.
    assert sum(map(len, seen)) == pytest.approx(len(alone), rel=0.1)


def noisy(examples):
    """Batches with something random in them, as augmentation and BERT's masks are."""
    batch = torch.stack([example["input_ids"] for example in examples])
    return {"input_ids": batch, "noise": torch.rand(3)}


def loader_of(settings, workers, folder):
    arguments = TrainingArguments(
        str(folder), per_device_train_batch_size=128, dataloader_num_workers=workers, max_steps=1,
        use_cpu=True, report_to="none",
    )  # fmt: skip
    task = full_scale.load(settings)
    trainer = StreamingTrainer(
        tiny_model("gpt2"), arguments, train_dataset=task.train, data_collator=noisy
    )
    return trainer.get_train_dataloader()


@pytest.mark.parametrize("workers", [0, 3])
def test_a_stream_goes_on_where_it_was_left(shards, workers, tmp_path, monkeypatch):
    whole = list(itertools.islice(loader_of(shards, workers, tmp_path), 41))
    interrupted = loader_of(shards, workers, tmp_path)
    before = torch.get_rng_state()
    assert len(list(itertools.islice(interrupted, 37))) == 37
    assert torch.equal(torch.get_rng_state(), before)  # dropout is not to depend on the data
    assert max(place.epoch for place in interrupted.batches.places.values()) > 0
    assert interrupted.batches.last == 0  # not the last worker in turn, where there are several
    interrupted.save(tmp_path / "checkpoint")
    resumed = loader_of(shards, workers, tmp_path)
    resumed.load(tmp_path / "checkpoint")
    tokenised = []
    if not workers:
        kept = full_texts.is_held_out
        monkeypatch.setattr(
            full_texts, "is_held_out", lambda *args: tokenised.append(args) or kept(*args)
        )
    rest = list(itertools.islice(resumed, 4))
    for ours, theirs in zip(whole[37:], rest, strict=True):
        assert torch.equal(ours["input_ids"], theirs["input_ids"])
        assert torch.equal(ours["noise"], theirs["noise"])
    assert len({float(batch["noise"][0]) for batch in whole}) == 41
    assert len(tokenised) < 400  # texts of 4 batches, not of all before


def test_a_checkpoint_without_a_place_is_refused(shards, tmp_path):
    loader = loader_of(shards, 0, tmp_path)
    with pytest.raises(PlaceError, match="has no stream_0.json, which says where its data"):
        loader.load(tmp_path)
    loader.batches.num_ranks = 8
    loader.save(tmp_path)
    loader.batches.num_ranks = 1
    with pytest.raises(PlaceError, match="by 8 processes and these are 1; .* start as many"):
        loader.load(tmp_path)
    loader.batches.places = {0: Place(left=[1] * 5)}
    loader.batches.batch_size = 10**6
    loader.batches.streamed.making = lambda stored, left: iter(())
    with pytest.raises(ValueError, match="process 0 of 1 has no 1000000 examples to train on"):
        next(iter(loader))


class InterruptsAt9(TrainerCallback):
    def on_step_end(self, args, state, control, **kwargs):
        if state.global_step == 9:
            raise KeyboardInterrupt


def test_a_streaming_recipe_resumes_exactly_past_an_epoch(shards, tmp_path):
    settings = replace(
        shards, model_config=dict(n_positions=CONTEXT, n_embd=8, n_layer=1, n_head=1),
        batch_size=256, gradient_accumulation_steps=2, steps=12, save_steps=8, workers=2,
        monitor_every=0,
    )  # fmt: skip
    whole = run(replace(settings, output=str(tmp_path / "whole")))
    place = json.loads((tmp_path / "whole" / "checkpoint-8" / "stream_0.json").read_text())
    assert [epoch for epoch, *_ in place["places"].values()] == [1, 1]
    settings = replace(settings, output=str(tmp_path / "out"))
    with pytest.raises(KeyboardInterrupt):
        run(settings, callbacks=[InterruptsAt9()])
    resumed = run(settings)
    assert resumed["losses"] == whole["losses"] and len(whole["losses"]) == 12
    assert resumed["test_loss"] == whole["test_loss"]
    states = [
        json.loads((tmp_path / name / "trainer_state.json").read_text())
        for name in ("whole", "out")
    ]
    epochs = [[record.get("epoch") for record in state["log_history"]] for state in states]
    assert epochs[0] == epochs[1]


def resumed_on_ranks(settings, folder):
    """Losses of a whole run, and of one that goes on from its checkpoint."""
    whole = run(replace(settings, output=str(folder / "whole")))
    again = folder / "again"
    if dist.get_rank() == 0:
        step = "checkpoint-9"
        shutil.copytree(folder / "whole" / step, again / step)
        shutil.copy(folder / "whole" / "settings.json", again)
    dist.barrier()
    return [whole["losses"], run(replace(settings, output=str(again)))["losses"]]


@pytest.mark.slow
def test_two_processes_resume_a_stream_exactly(shards, tmp_path):
    settings = replace(
        shards, model_config=dict(n_positions=CONTEXT, n_embd=8, n_layer=1, n_head=1),
        batch_size=256, global_batch=512, steps=12, save_steps=9, monitor_every=0,
    )  # fmt: skip
    for whole, resumed in run_ranks(resumed_on_ranks, 2, settings, tmp_path):
        assert whole == resumed and len(whole) == 12 and len(set(whole)) > 8
    for rank in range(2):
        path = tmp_path / "whole" / "checkpoint-9" / f"stream_{rank}.json"
        assert json.loads(path.read_text())["places"]["0"][0] == 1  # past an epoch


def test_images_are_decoded_from_what_is_stored(tmp_path):
    for split in ("train", "validation"):
        for label in "ab":
            folder = tmp_path / split / label
            folder.mkdir(parents=True)
            Image.new("RGB", (8, 8), (0, 0, 255 if label == "b" else 0)).save(folder / "0.png")
    settings = Settings(
        data=str(tmp_path), image_column="image", label_column="label",
        model_config=dict(image_size=4, num_labels=2),
    )  # fmt: skip
    task = full_scale.load(settings)
    stored = next(iter(task.train.stream("train", 0, 0, 1)))["image"]
    assert set(stored) == {"bytes", "path"}  # what is passed over after a resume is not decoded
    for split in (task.train, task.test):
        examples = list(split)
        blues = {
            example["labels"]: float(example["pixel_values"][2].mean()) for example in examples
        }
        assert blues[1] > blues[0] and examples[0]["pixel_values"].shape == (3, 4, 4)


def test_too_few_texts_for_a_test_are_refused(shards):
    with pytest.raises(ValueError, match="one text in 256 is kept for the test, and these do not"):
        full_scale.load(replace(shards, model_config={"n_positions": 1024}))


def test_labels_to_train_on_are_smoothed_and_those_to_test_on_are_not():
    settings = Settings(label_smoothing=0.1)
    example = {"pixel_values": torch.zeros(3, 2, 2), "labels": 1}
    batches = [
        augmentation.collate([example | {"train": train}] * 2, settings=settings, num_labels=5)
        for train in (True, False)
    ]
    torch.testing.assert_close(batches[0]["labels"][0], torch.tensor([0.02, 0.92, *[0.02] * 3]))
    assert batches[1]["labels"].tolist() == [1, 1]
    logits = torch.tensor([[0.0, 3.0, 0.0, 1.0, 0.0]] * 2)
    smoothed, plain = (augmentation.soft_loss({"logits": logits}, b["labels"]) for b in batches)
    cross_entropy = torch.nn.functional.cross_entropy
    labels = batches[1]["labels"]
    torch.testing.assert_close(smoothed, cross_entropy(logits, labels, label_smoothing=0.1))
    torch.testing.assert_close(plain, cross_entropy(logits, labels))


def soft_run(folder, batch_size, accumulation):
    """Losses and norms of gradients of a classifier whose labels are shares, or numbers."""
    found = {}
    for kind in ("shares", "numbers"):
        model = tiny_model("vit")
        images = tiny_batch(model, size=16)
        labels = images["labels"]
        if kind == "shares":
            draw = torch.Generator().manual_seed(0)
            labels = torch.randn(16, model.config.num_labels, generator=draw).softmax(1)
        examples = [
            {"pixel_values": pixels, "labels": label}
            for pixels, label in zip(images["pixel_values"], labels, strict=True)
        ]
        arguments = TrainingArguments(
            str(folder), max_steps=3, per_device_train_batch_size=batch_size,
            gradient_accumulation_steps=accumulation, learning_rate=1e-2, logging_steps=1,
            save_strategy="no", use_cpu=True, report_to="none", disable_tqdm=True,
            remove_unused_columns=False,
        )  # fmt: skip
        trainer = Trainer(
            model, arguments, train_dataset=examples, eval_dataset=examples[:13],
            compute_loss_func=augmentation.soft_loss,
        )  # fmt: skip
        trainer.train()
        tested = trainer.evaluate()["eval_loss"]
        records = [r for r in trainer.state.log_history if "loss" in r]
        found[kind] = [r[key] for r in records for key in ("loss", "grad_norm")] + [tested]
    return found


def test_losses_do_not_depend_on_how_a_step_is_cut(tmp_path):
    whole, in_parts = soft_run(tmp_path, 8, 1), soft_run(tmp_path, 2, 4)
    for kind, numbers in whole.items():
        # Sums in another order; logs round losses to four decimals.
        assert in_parts[kind] == pytest.approx(numbers, rel=1e-3)
        assert 0.7 < numbers[0] < 2  # of three classes


@pytest.mark.slow
def test_losses_do_not_depend_on_the_number_of_processes(tmp_path):
    alone = soft_run(tmp_path, 8, 1)
    for batch_size, accumulation in ((4, 1), (2, 2)):
        for found in run_ranks(soft_run, 2, tmp_path, batch_size, accumulation):
            for kind, numbers in alone.items():
                # Sums of halves in another order; logs round losses to four decimals.
                assert found[kind][:-1] == pytest.approx(numbers[:-1], rel=1e-3)
                # The Trainer takes the mean over batches: 13 examples make others on two processes.
                assert found[kind][-1] == pytest.approx(numbers[-1], rel=0.05)


def test_a_batch_that_cannot_be_is_refused_before_data_are_loaded(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(full_scale, "load", lambda *_, **__: pytest.fail("data are loaded"))
    monkeypatch.setattr("sys.argv", ["run.py"])
    recipe = str(ROOT / "recipes" / "full" / "vit_b.yaml")
    with pytest.raises(SystemExit) as end:
        main([recipe, "--output", str(tmp_path)])
    said = capsys.readouterr().err
    assert end.value.code == 2 and said.count("\n") == 1
    assert said.startswith("run.py: error: 1 processes with 1 batches of 128 make 128 examples")
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 8)
    with pytest.raises(SystemExit) as end:
        main([recipe, "--output", str(tmp_path), "--global_batch", "128"])
    said = capsys.readouterr().err
    assert end.value.code == 2 and said.count("\n") == 1
    assert "there are 8 GPUs and one process" in said and "torchrun --nproc-per-node 8" in said
    assert not any(tmp_path.iterdir())


def test_magnitudes_vary_on_the_scale_of_timm():
    augment = augmentation._TimmRandAugment(9, 0.5)
    strengths, idle = [], 0
    image = torch.rand(1, 3, 16, 16)
    for _ in range(200):
        augment.operation.m = None
        augment(image)
        if augment.operation.m is None:
            idle += 1
        else:
            strengths.append(augment.operation.m / augmentation.KORNIA_STRONGEST)
    assert 25 < idle < 80  # a quarter: both operations left out
    drawn = torch.tensor(strengths)
    assert 0.88 < drawn.mean() < 0.92 and 0.03 < drawn.std() < 0.07 and drawn.max() <= 1


def test_erased_pixels_are_noise():
    images = torch.full((1, 3, 32, 32), 5.0)
    torch.testing.assert_close(augmentation._NoiseErasing(0.0)(images), images)
    holes = [augmentation._NoiseErasing(1.0)(images) != 5 for _ in range(20)]
    shares = torch.tensor([hole.float().mean() for hole in holes])
    assert 0.01 < shares.min() and shares.max() < 0.4 and shares.std() > 0
    erased = torch.cat([augmentation._NoiseErasing(1.0)(images).flatten() for _ in range(20)])
    assert 0.8 < erased[erased != 5].std() < 1.2


def test_crops_to_train_on_are_random_and_to_test_on_the_middle():
    pixels = torch.arange(256).repeat(192, 1).to(torch.uint8)  # from black at the left to white
    image = Image.fromarray(pixels.numpy())
    crops = [augmentation.Transform(Settings(), 32, train=False)(image) for _ in range(2)]
    assert torch.equal(*crops) and crops[0].shape == (3, 32, 32)
    left, right = ((crops[0][0, 16, side] * 0.229 + 0.485) * 255 for side in (0, -1))
    # 7/8 of the shorter side is 168 pixels, from 44 to 212.
    assert left == pytest.approx(46, abs=2) and right == pytest.approx(209, abs=2)
    spans = []
    for _ in range(20):
        row = augmentation.Transform(Settings(), 32, train=True)(image)[0, 16]
        spans.append(float(row[-1] - row[0]))
    assert len(set(spans)) > 10 and min(spans) < 0 < max(spans)  # other boxes, some mirrored
