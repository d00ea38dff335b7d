"""Translation on text that a wheel brings: the message catalogues of Django, and how it is scored.

Messages go from English into several languages, which a token in front of the message names. One in
ten messages is kept for the test, in every language, so that none of them was seen in any.
"""

from __future__ import annotations

import functools
import hashlib
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

from recipes.data import Task, unigram_entropy
from recipes.sequences import IGNORED, collate

LANGUAGES = ("ru", "uk", "bg", "mk", "sr", "be")
"""Written in another script than English, so that a copy of the message is far off."""
PAD, EOS = 0, 1
VOCABULARY = 1500
LONGEST = 24
"""Tokens of a message and of its translation; longer ones, of help texts, are left out."""

TEST_ONE_IN = 10
TEST_PAIRS = 256
BATCH = 64


class Pair(NamedTuple):
    """A message, the language that it goes into, and its translation."""

    source: str
    language: str
    target: str


@functools.cache
def pairs() -> tuple[Pair, ...]:
    """Return the messages of Django's catalogues that `LANGUAGES` have, placeholders as they are.

    Raises:
        ImportError: without Django or babel.
    """
    import django
    from babel.messages.mofile import read_mo

    found: dict[tuple[str, str], str] = {}
    for language in LANGUAGES:
        root = Path(django.__file__).parent
        for path in sorted(root.glob(f"**/locale/{language}/LC_MESSAGES/django.mo")):
            with path.open("rb") as file:
                for message in read_mo(file):
                    # Plurals are tuples, and the header has no text of its own.
                    if message.id and isinstance(message.id, str) and message.string:
                        found.setdefault((message.id, language), message.string)
    return tuple(Pair(source, language, found[source, language]) for source, language in found)


def is_for_the_test(source: str) -> bool:
    """Say whether a message is for the test: one in ten, by its hash, whatever the language."""
    digest = hashlib.blake2b(source.lower().encode(), digest_size=8).digest()
    return int.from_bytes(digest) % TEST_ONE_IN == 0


@functools.cache
def messages() -> Task:
    """Return Django's messages as a task of translation."""
    tokenizer = _tokenizer()
    tags = {language: tokenizer.token_to_id(f"<{language}>") for language in LANGUAGES}
    examples: dict[bool, list[dict[str, Tensor]]] = {True: [], False: []}
    tested: list[Pair] = []
    order = torch.randperm(len(pairs()), generator=torch.Generator().manual_seed(0))
    for pair in (pairs()[index] for index in order.tolist()):
        source = [tags[pair.language], *tokenizer.encode(pair.source).ids, EOS]
        target = [*tokenizer.encode(pair.target).ids, EOS]
        if max(len(source), len(target)) > LONGEST:
            continue
        is_test = is_for_the_test(pair.source)
        if is_test and len(tested) == TEST_PAIRS:
            continue
        examples[is_test].append(
            {"input_ids": torch.tensor(source), "labels": torch.tensor(target)}
        )
        if is_test:
            tested.append(pair)
    labels = torch.cat([example["labels"] for example in examples[False]])
    size = tokenizer.get_vocab_size()
    return Task(
        examples[False], examples[True], num_labels=size, vocabulary=size,
        reference=unigram_entropy(labels), collate=collate_pairs,
        sizes=dict(
            pad_token_id=PAD, eos_token_id=EOS, decoder_start_token_id=PAD, bos_token_id=None
        ),
        score=functools.partial(
            score, inputs=[example["input_ids"] for example in examples[True]],
            sources=[pair.source for pair in tested], references=[pair.target for pair in tested],
            decode=tokenizer.decode,
        ),
    )  # fmt: skip


def collate_pairs(examples: Sequence[dict[str, Tensor]]) -> dict[str, Tensor]:
    """Make a batch whose decoder starts with `PAD` and goes on with its labels.

    The model would do so itself, but does not get the labels where the Trainer smooths them.
    """
    batch = collate(examples)
    shifted = batch["labels"].roll(1, 1)
    shifted[:, 0] = PAD
    return batch | {"decoder_input_ids": shifted.masked_fill(shifted == IGNORED, PAD)}


def _tokenizer() -> Any:
    """Train a BPE on the messages to train on, and their translations."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    special = ["[PAD]", "[EOS]", *(f"<{language}>" for language in LANGUAGES)]
    trainer = trainers.BpeTrainer(
        vocab_size=VOCABULARY, special_tokens=special, show_progress=False
    )
    own = [pair for pair in pairs() if not is_for_the_test(pair.source)]
    texts = [text for pair in own for text in (pair.source, pair.target)]
    tokenizer.train_from_iterator(texts, trainer)
    return tokenizer


@torch.no_grad()
def score(
    model: Any,
    *,
    inputs: Sequence[Tensor],
    sources: Sequence[str],
    references: Sequence[str],
    decode: Callable[[list[int]], str],
) -> dict[str, float]:
    """Translate greedily, and compare with the references, and with a copy of the source.

    Args:
        model: of a sequence to a sequence.
        inputs: token ids of the sources.
        sources: their texts.
        references: right translations.
        decode: text of token ids.

    Returns:
        `bleu` and `chrf` by sacrebleu, from 0 to 100, and `copied_bleu` and `copied_chrf`, of
        someone who leaves the messages as they are.
    """
    import sacrebleu

    model.eval()
    found: list[str] = []
    for start in range(0, len(inputs), BATCH):
        part = collate([{"input_ids": ids} for ids in inputs[start : start + BATCH]])
        longest = 2 * part["input_ids"].shape[1]
        if positions := getattr(model.config, "max_position_embeddings", None):
            longest = min(longest, positions - 1)
        output = model.generate(
            **{name: each.to(model.device) for name, each in part.items()},
            max_new_tokens=longest, num_beams=1, do_sample=False,
        )  # fmt: skip
        found += [decode(row).strip() for row in output[:, 1:].tolist()]
    scores = {}
    for prefix, texts in (("", found), ("copied_", list(sources))):
        scores[f"{prefix}bleu"] = sacrebleu.corpus_bleu(texts, [list(references)]).score
        scores[f"{prefix}chrf"] = sacrebleu.corpus_chrf(texts, [list(references)]).score
    return {name: float(f"{value:.4g}") for name, value in scores.items()}
