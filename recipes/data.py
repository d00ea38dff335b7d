"""Data of the recipes: digits and text that every machine has; the tasks that are made of them."""

from __future__ import annotations

import functools
import math
import sysconfig
from collections.abc import Callable, Mapping
from pathlib import Path
from types import MappingProxyType
from typing import Any, NamedTuple

import numpy
import torch
from sklearn.datasets import load_digits
from torch import Tensor
from torch.utils.data import Dataset

NUM_TEST_IMAGES = 360
TEXT_VOCABULARY = 1000
CONTEXT = 64
NUM_MODULES = 10
TEST_WINDOWS = 256


class Task(NamedTuple):
    """What a run trains on and is tested on.

    Attributes:
        train: examples, as the Trainer takes them.
        test: likewise.
        num_labels: classes, or tokens.
        vocabulary: tokens known; 0 for images.
        image_size: pixels on a side; 0 for text.
        num_channels: 1 or 3; 0 for text.
        reference: the loss of someone who knows only how frequent each label is, nats.
        is_small: whether models of a toy's size are meant.
        collate: what makes a batch of examples; None for the Trainer's own way.
        loss: what makes a loss of outputs and labels; None for the model's own.
        sizes: fields of the model's config that the data decide.
        metrics: what makes figures, `accuracy` among them, of answers to the test; None for the
            share of right labels.
        score: figures of a trained model beyond its loss and accuracy, on the test.
    """

    train: Any
    test: Any
    num_labels: int
    vocabulary: int = 0
    image_size: int = 0
    num_channels: int = 0
    reference: float = math.nan
    is_small: bool = True
    collate: Any = None
    loss: Any = None
    sizes: Mapping[str, Any] = MappingProxyType({})
    metrics: Callable[[Any], dict[str, float]] | None = None
    score: Callable[[Any], dict[str, float]] | None = None


class Examples(Dataset):
    """Examples held in memory, as dicts of tensors."""

    def __init__(self, **columns: Tensor) -> None:
        """Keep columns of equal length."""
        self.columns = columns

    def __len__(self) -> int:
        """Return the number of examples."""
        return len(next(iter(self.columns.values())))

    def __getitem__(self, index: int) -> dict[str, Tensor]:
        """Return one example."""
        return {name: column[index] for name, column in self.columns.items()}


@functools.cache
def digits(size: int = 28) -> Task:
    """Return scikit-learn's handwritten digits, enlarged to `size`, normalised.

    The split is the same for every seed: 1437 to train on, 360 to test on.
    """
    images, labels = load_digits(return_X_y=True)
    pixels = torch.from_numpy(images).float().view(-1, 1, 8, 8)
    pixels = torch.nn.functional.interpolate(pixels, size=(size, size), mode="bilinear")
    pixels = (pixels - pixels.mean()) / pixels.std()
    order = torch.randperm(len(pixels), generator=torch.Generator().manual_seed(0))
    test, train = order[:NUM_TEST_IMAGES], order[NUM_TEST_IMAGES:]
    targets = torch.from_numpy(labels)
    return Task(
        Examples(pixel_values=pixels[train], labels=targets[train]),
        Examples(pixel_values=pixels[test], labels=targets[test]),
        num_labels=10, image_size=size, num_channels=1, reference=math.log(10),
    )  # fmt: skip


@functools.cache
def _stdlib_tokens() -> tuple[list[Tensor], int]:
    """Tokenize the standard library's own modules with a BPE trained on them, longest first."""
    from tokenizers import Tokenizer, models, pre_tokenizers, trainers

    files = sorted(Path(sysconfig.get_paths()["stdlib"]).glob("*.py"))
    texts = [file.read_text(encoding="utf-8", errors="replace") for file in files]
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    trainer = trainers.BpeTrainer(
        vocab_size=TEXT_VOCABULARY, special_tokens=["[PAD]", "[CLS]"], show_progress=False
    )
    tokenizer.train_from_iterator(texts, trainer)
    modules = [torch.tensor(text.ids) for text in tokenizer.encode_batch(texts) if text.ids]
    return sorted(modules, key=len, reverse=True), tokenizer.get_vocab_size()


def _split(windows: Tensor, **columns: Tensor) -> list[Examples]:
    """Shuffle windows and their columns alike; 90 % to train on, some of the rest to test on."""
    order = torch.randperm(len(windows), generator=torch.Generator().manual_seed(0))
    cut = len(windows) // 10
    columns = {"input_ids": windows, **columns}
    parts = (order[cut:], order[: min(cut, TEST_WINDOWS)])
    return [Examples(**{name: column[part] for name, column in columns.items()}) for part in parts]


@functools.cache
def next_tokens() -> Task:
    """Return the standard library's text in windows of `CONTEXT` tokens: predict the next token."""
    modules, vocabulary = _stdlib_tokens()
    tokens = torch.cat(modules)
    windows = tokens[: len(tokens) // CONTEXT * CONTEXT].view(-1, CONTEXT)
    reference = unigram_entropy(tokens)
    train, test = _split(windows, labels=windows)
    return Task(train, test, num_labels=vocabulary, vocabulary=vocabulary, reference=reference)


def unigram_entropy(tokens: Tensor) -> float:
    """Return the loss of someone who knows only how frequent each token is, nats."""
    counts = tokens.bincount().double()
    shares = counts[counts > 0] / len(tokens)
    return -(shares * shares.log()).sum().item()


@functools.cache
def which_module() -> Task:
    """Return windows of the standard library's `NUM_MODULES` longest modules: say which it is.

    Masked tokens would be BERT's own task, but a small BERT learns nothing beyond their frequencies
    in a few hundred steps, so that nothing could be told apart.
    """
    modules, vocabulary = _stdlib_tokens()
    modules = modules[:NUM_MODULES]
    shortest = len(modules[-1]) // (CONTEXT - 1)
    windows = torch.cat(
        [tokens[: shortest * (CONTEXT - 1)].view(shortest, CONTEXT - 1) for tokens in modules]
    )
    windows = torch.nn.functional.pad(windows, (1, 0), value=1)  # [CLS] in front
    labels = torch.arange(NUM_MODULES).repeat_interleave(shortest)
    train, test = _split(windows, labels=labels)
    return Task(
        train, test, num_labels=NUM_MODULES, vocabulary=vocabulary, reference=math.log(NUM_MODULES)
    )


EMBEDDED = ("digits", "stdlib", "django", "espeak")


def load(name: str, *, model: str) -> Task:
    """Return an embedded task by name, or recordings in a folder of the user's own.

    Raises:
        ValueError: for another name.
    """
    if name == "digits":
        return digits()
    if name == "stdlib":
        return which_module() if model == "bert" else next_tokens()
    # Each needs packages of its own.
    if name == "django":
        from recipes import translation

        return translation.messages()
    if name == "espeak" or is_folder_of_recordings(name):
        from recipes import speech

        return speech.spoken(name, model=model)
    raise ValueError(
        f"data {name!r} is not embedded; embedded are {', '.join(EMBEDDED)}, and a folder of "
        "recordings has a metadata.csv"
    )


def is_folder_of_recordings(name: str) -> bool:
    """Say whether data are recordings with their texts in a metadata.csv."""
    return Path(name, "metadata.csv").is_file()


def answers(logits: Any, labels: Tensor) -> Tensor:
    """Reduce logits to answers, before the Trainer gathers them."""
    logits = logits[0] if isinstance(logits, tuple) else logits
    return logits.argmax(-1)


def accuracy(prediction: Any, *, next_token: bool) -> dict[str, float]:
    """Return the share of right answers; of the tokens to come if `next_token`."""
    found, labels = prediction.predictions, prediction.label_ids
    if next_token:
        found, labels = found[:, :-1], labels[:, 1:]
    return {"accuracy": float(numpy.mean((found == labels)[labels != -100]))}
