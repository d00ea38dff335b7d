"""Augmentation of the full-scale image recipes: timm's rules, on PIL's and kornia's operations."""

from __future__ import annotations

import math
from typing import Any

import kornia.augmentation as augment
import numpy
import torch
from kornia.augmentation.auto import RandAugment
from kornia.augmentation.auto.rand_augment.rand_augment import default_policy
from PIL import Image, ImageOps
from torch import Tensor, nn

from recipes.settings import Settings

__all__ = ["Transform", "collate", "cut_mix", "mix_up", "soft_loss"]

MEAN, DEVIATION = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
"""Of ImageNet, as timm and the original code of Swin use them."""

CROP = 224 / 256
"""Share of an image's shorter side that is tested on."""

AREAS, RATIOS, TRIALS = (0.08, 1.0), (3 / 4, 4 / 3), 10
"""Of random crops (Szegedy et al. 2015), and how often to try for one within the image."""

OPERATIONS, CHANCE, STRONGEST, TRANSLATION = 2, 0.5, 10, 0.45
"""Of timm's RandAugment: how many, how likely each, the end of its scale, share of a side."""

KORNIA_STRONGEST = 30


class Transform:
    """From an image of PIL to pixels (channels, size, size), at random where it is to train on."""

    def __init__(self, settings: Settings, size: int, *, train: bool) -> None:
        """Build the steps that the settings name; only `train` has random ones."""
        self.size, self.train = size, train
        steps: list[nn.Module] = []
        if train:
            steps.append(augment.RandomHorizontalFlip())
            if settings.randaugment:
                steps.append(_TimmRandAugment(settings.randaugment, settings.randaugment_std))
        steps.append(augment.Normalize(torch.tensor(MEAN), torch.tensor(DEVIATION)))
        if train and settings.random_erasing:
            steps.append(_NoiseErasing(settings.random_erasing))
        self.steps = nn.Sequential(*steps)

    def __call__(self, image: Image.Image) -> Tensor:
        """Cut and resize by PIL, antialiased and bicubic, then do the steps."""
        image = image.convert("RGB")
        image = _random_crop(image, self.size) if self.train else _middle(image, self.size)
        pixels = torch.from_numpy(numpy.array(image)).permute(2, 0, 1)[None].float() / 255
        return self.steps(pixels)[0]


def _middle(image: Image.Image, size: int, share: float = CROP) -> Image.Image:
    square = (size, size)
    return ImageOps.fit(image, square, Image.Resampling.BICUBIC, bleed=(1 - share) / 2)


def _random_crop(image: Image.Image, size: int) -> Image.Image:
    for _ in range(TRIALS):
        area = image.width * image.height * _uniform(*AREAS)
        ratio = math.exp(_uniform(*map(math.log, RATIOS)))
        width, height = round(math.sqrt(area * ratio)), round(math.sqrt(area / ratio))
        if 0 < width <= image.width and 0 < height <= image.height:
            left = int(torch.randint(image.width - width + 1, ()))
            top = int(torch.randint(image.height - height + 1, ()))
            box = (left, top, left + width, top + height)
            return image.resize((size, size), Image.Resampling.BICUBIC, box=box)
    return _middle(image, size, share=1.0)


def _uniform(low: float, high: float) -> float:
    return float(torch.empty(()).uniform_(low, high))


class _TimmRandAugment(nn.Module):
    """RandAugment (Cubuk et al. 2020) as timm has it, "rand-m9-mstd0.5" say.

    Two operations, either of them left out half the time, each of a strength drawn for it. Kornia
    does every operation, at one strength, on a scale that ends at 30 and not at 10.
    """

    def __init__(self, magnitude: float, std: float) -> None:
        super().__init__()
        self.magnitude, self.std = magnitude, std
        policy = [
            [(name, -TRANSLATION, TRANSLATION)] if name.startswith("translate") else [(name, *ends)]
            for ((name, *ends),) in default_policy
        ]
        self.operation = RandAugment(n=1, m=KORNIA_STRONGEST - 1, policy=policy)

    def forward(self, images: Tensor) -> Tensor:
        for _ in range(OPERATIONS):
            if _uniform(0, 1) < CHANCE:
                drawn = self.magnitude + self.std * float(torch.randn(()))
                strength = min(max(drawn, 0.0), STRONGEST) / STRONGEST
                self.operation.m = strength * KORNIA_STRONGEST
                images = self.operation(images)
        return images


class _NoiseErasing(nn.Module):
    """Random erasing (Zhong et al. 2020) with noise in the hole, as timm's mode "pixel"."""

    def __init__(self, probability: float) -> None:
        super().__init__()
        self.erase = augment.RandomErasing((0.02, 1 / 3), (0.3, 1 / 0.3), p=probability)

    def forward(self, images: Tensor) -> Tensor:
        kept = self.erase(torch.ones_like(images))
        return images * kept + torch.randn_like(images) * (1 - kept)


def collate(
    examples: list[dict[str, Any]], *, settings: Settings, num_labels: int
) -> dict[str, Tensor]:
    """Batch images.

    Those to train on are mixed and their labels smoothed, which makes shares (batch, classes) of
    them; the labels (batch,) of those to test on stay what they are.
    """
    pixels = torch.stack([example["pixel_values"] for example in examples])
    labels = torch.tensor([example["labels"] for example in examples])
    if not examples[0]["train"]:
        return {"pixel_values": pixels, "labels": labels}
    targets = torch.nn.functional.one_hot(labels, num_labels).float()
    kinds = [
        (mix, alpha)
        for mix, alpha in ((mix_up, settings.mixup), (cut_mix, settings.cutmix))
        if alpha
    ]
    if kinds:
        mix, alpha = kinds[int(torch.randint(len(kinds), ()))]
        pixels, share = mix(pixels, float(torch.distributions.Beta(alpha, alpha).sample()))
        targets = share * targets + (1 - share) * targets.flip(0)
    smoothing = settings.label_smoothing
    return {"pixel_values": pixels, "labels": (1 - smoothing) * targets + smoothing / num_labels}


def mix_up(images: Tensor, share: float) -> tuple[Tensor, float]:
    """Blend each image with the one opposite in the batch (Zhang et al. 2018); return its share."""
    return share * images + (1 - share) * images.flip(0), share


def cut_mix(images: Tensor, share: float) -> tuple[Tensor, float]:
    """Paste a box of the opposite image into each (Yun et al. 2019); return what is left of it."""
    sides = images.shape[-2:]
    middle = [int(torch.randint(side, ())) for side in sides]
    reach = [side * math.sqrt(1 - share) / 2 for side in sides]
    rows, columns = (
        slice(max(0, round(m - r)), min(side, round(m + r)))
        for m, r, side in zip(middle, reach, sides, strict=True)
    )
    mixed = images.clone()
    mixed[..., rows, columns] = images.flip(0)[..., rows, columns]
    pasted = (rows.stop - rows.start) * (columns.stop - columns.start)
    return mixed, 1 - pasted / (sides[0] * sides[1])


def soft_loss(outputs: Any, labels: Tensor, num_items_in_batch: Any = None) -> Tensor:
    """Return the cross entropy with labels (batch,) or shares of them (batch, classes).

    Args:
        outputs: of the model.
        labels: of this batch.
        num_items_in_batch: what the Trainer counted in the labels of all batches of a step, of all
            processes: examples, or of shares each one. Where it is given, the losses of a step are
            parts of one mean: the Trainer adds those of batches up, and takes each process's times
            the number of processes, whose gradients are averaged.
    """
    cross_entropy = torch.nn.functional.cross_entropy
    if num_items_in_batch is None:
        return cross_entropy(outputs["logits"], labels)
    examples = num_items_in_batch / (labels.shape[1] if labels.ndim == 2 else 1)
    return cross_entropy(outputs["logits"], labels, reduction="sum") / examples
