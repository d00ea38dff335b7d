"""Full-scale recipes: their settings, their data, and a dry run of each."""

from __future__ import annotations

import itertools
import json
import math
import re
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from datasets import Dataset
from PIL import Image
from torch.utils.data import DataLoader

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

from recipes import augmentation, full_scale  # noqa: E402
from recipes.full_scale import gpu_hours  # noqa: E402
from recipes.models import build_empty  # noqa: E402
from recipes.run import main, training_arguments  # noqa: E402
from recipes.settings import Settings, read_yaml  # noqa: E402

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
    (tmp_path / "data").mkdir()
    for shard in range(NUM_SHARDS):
        first = shard * TEXTS_IN_SHARD
        texts = [f"<{first + number}>" * TIMES for number in range(TEXTS_IN_SHARD)]
        # datasets sleeps for five seconds after shuffled shards of parquet.
        name = f"train-{shard:05d}-of-{NUM_SHARDS:05d}.jsonl"
        Dataset.from_dict({"text": texts}).to_json(tmp_path / "data" / name)
    full_scale._local_tokenizer().save_pretrained(tmp_path / "tokenizer")
    return Settings(
        model="gpt2", model_config={"n_positions": CONTEXT}, data=str(tmp_path / "data"),
        text_column="text", tokenizer=str(tmp_path / "tokenizer"),
    )  # fmt: skip


def numbers_in(windows, tokenizer, workers=0):
    """The numbers of the texts that windows are from, in order."""
    batches = DataLoader(windows, batch_size=128, num_workers=workers)
    rows = (row for batch in batches for row in batch["input_ids"])
    texts = ("".join(tokenizer.convert_ids_to_tokens(row)) for row in rows)
    found = (re.findall(r"<(\d+)>", text) for text in texts)
    return [int(number) for numbers in found for number in dict.fromkeys(numbers)]


@pytest.mark.parametrize("workers", [0, 2])
def test_no_text_is_both_trained_and_tested_on(shards, workers):
    task = full_scale.load(shards)
    tokenizer = full_scale._tokenizer(shards.tokenizer)
    tested = set(numbers_in(task.test, tokenizer))
    in_order = numbers_in(task.train, tokenizer, workers)
    trained = set(in_order)
    assert tested and not tested & trained
    # No other text is lost, but at the end of what each worker reads.
    missing = set(range(NUM_SHARDS * TEXTS_IN_SHARD)) - tested - trained
    assert len(missing) <= max(1, workers) + 1
    held_out = {n for n in missing | tested if full_scale.is_held_out(f"<{n}>" * TIMES, 256)}
    assert held_out >= tested
    task.train.set_epoch(1)
    again = numbers_in(task.train, tokenizer, workers)
    assert again != in_order and not tested & set(again)
    assert set(numbers_in(full_scale.load(replace(shards, seed=1)).test, tokenizer)) == tested


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
