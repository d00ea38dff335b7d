"""Texts of the full-scale recipes: streamed, split by their hashes and cut into windows."""

from __future__ import annotations

import functools
import hashlib
import itertools
import math
import sysconfig
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

import torch
import transformers
from datasets import Dataset
from torch import Tensor

from recipes.data import Task
from recipes.full_sequences import DRY_EXAMPLES
from recipes.settings import Settings
from recipes.streaming import Stream, Streamed, share

DRY_WINDOWS, DRY_TEST_ONE_IN = 2, 4
TEST_ONE_IN, TEST_WINDOWS = 256, 256
"""Of texts, the share that is kept for the test, and how many windows of these are used."""

MASKED = 0.15
"""Share of BERT's tokens to guess (Devlin et al. 2019)."""


def texts(settings: Settings, stream: Stream, *, length: int, dry_run: bool) -> Task:
    """Return a task on texts of the Hub.

    Args:
        settings: name the column.
        stream: of stored texts.
        length: tokens of a window.
        dry_run: with a tokenizer of few words, and few windows.

    Raises:
        ValueError: if there are too few texts to test on.
    """
    tokenizer = local_tokenizer() if dry_run else tokenizer_of(settings.tokenizer)
    one_in = DRY_TEST_ONE_IN if dry_run else TEST_ONE_IN
    pack = functools.partial(
        _windows, tokenizer=tokenizer, column=settings.text_column, length=length, one_in=one_in
    )
    collate: Any = transformers.default_data_collator
    if settings.model == "bert":
        collate = transformers.DataCollatorForLanguageModeling(tokenizer, mlm_probability=MASKED)
    held_out = pack(stream("train", None, 0, 1), [], for_test=True)
    windows = (window for window, _ in held_out)
    test = list(itertools.islice(windows, DRY_WINDOWS if dry_run else TEST_WINDOWS))
    if not test:
        raise ValueError(
            f"data {settings.data!r} is too small: one text in {one_in} is kept for the test, and "
            f"these do not fill a window of {length} tokens; take more texts or a shorter context"
        )
    return Task(
        Streamed(stream, "train", functools.partial(pack, for_test=False)),
        test,
        num_labels=len(tokenizer),
        vocabulary=len(tokenizer),
        reference=math.log(len(tokenizer)),
        is_small=False,
        collate=collate,
    )


def is_held_out(text: str, one_in: int) -> bool:
    """Say whether a text is for the test: one in so many, by its hash.

    OpenWebText has a train split alone. By its hash, a text is on the same side in every shard,
    process and epoch, and so are its duplicates.
    """
    digest = hashlib.blake2b(text.encode("utf-8", "surrogatepass"), digest_size=8).digest()
    return int.from_bytes(digest) % one_in == 0


def _windows(
    stored: Iterable[Any],
    tokens: list[int],
    *,
    tokenizer: Any,
    column: str,
    length: int,
    one_in: int,
    for_test: bool,
) -> Iterator[tuple[dict[str, Tensor], list[int]]]:
    """Cut texts of one side, joined by the end-of-text token, into windows of `length` tokens.

    Args:
        stored: what has the texts.
        tokens: what was left of texts before these; changed in place.
        tokenizer: of the texts.
        column: that they are in.
        length: of a window.
        one_in: see `is_held_out`.
        for_test: which side.

    Yields:
        Windows, and `tokens`, which holds what is left after each.
    """
    yield from _cut(tokens, length)
    for example in stored:
        text = example[column]
        if is_held_out(text, one_in) != for_test:
            continue
        tokens += tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"]
        tokens.append(tokenizer.eos_token_id)
        yield from _cut(tokens, length)


def _cut(tokens: list[int], length: int) -> Iterator[tuple[dict[str, Tensor], list[int]]]:
    while len(tokens) >= length:
        window = torch.tensor(tokens[:length])
        del tokens[:length]
        yield {"input_ids": window, "labels": window.clone()}, tokens


def tokenizer_of(name: str) -> Any:
    """Return a tokenizer of the Hub, whose texts have an end."""
    tokenizer = transformers.AutoTokenizer.from_pretrained(name)
    if tokenizer.eos_token_id is None:
        tokenizer.eos_token = tokenizer.sep_token
    return tokenizer


def local_texts(
    split: str = "", epoch: int | None = None, rank: int = 0, num_ranks: int = 1
) -> Any:
    """Return the standard library's own modules, whatever the split and epoch."""
    files = sorted(Path(sysconfig.get_paths()["stdlib"]).glob("*.py"))
    texts = [file.read_text(encoding="utf-8", errors="replace") for file in files]
    return share(Dataset.from_dict({"text": texts}), rank, num_ranks)


def local_tokenizer() -> Any:
    """Return a tokenizer made of a few of the local texts."""
    from tokenizers import Tokenizer, models, pre_tokenizers, trainers

    special = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]"]
    tokenizer = Tokenizer(models.BPE(unk_token="[UNK]"))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    texts = local_texts()["text"][:DRY_EXAMPLES]
    trainer = trainers.BpeTrainer(vocab_size=500, special_tokens=special, show_progress=False)
    tokenizer.train_from_iterator(texts, trainer)
    return transformers.PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, pad_token="[PAD]", unk_token="[UNK]", cls_token="[CLS]",
        sep_token="[SEP]", mask_token="[MASK]", eos_token="[SEP]",
    )  # fmt: skip
