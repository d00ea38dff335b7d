"""What translation and speech have in common: batches of sequences of unequal length."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence

__all__ = ["IGNORED", "collate"]

IGNORED = -100
"""Label of what is no part of a target."""

FILLERS = {"labels": IGNORED, "input_values": 0.0}
"""What sequences are filled up with; 0 where nothing stands here."""


def collate(examples: Sequence[dict[str, Tensor]]) -> dict[str, Tensor]:
    """Make a batch of examples, filled up to the longest of each column.

    `input_ids` and `input_values`, whose columns vary in length, come with an `attention_mask`;
    what has more than one dimension (`input_features`) is of one size already.
    """
    batch: dict[str, Tensor] = {}
    for name in examples[0]:
        columns = [example[name] for example in examples]
        if columns[0].ndim == 1:
            filler = FILLERS.get(name, 0)
            batch[name] = pad_sequence(columns, batch_first=True, padding_value=filler)
        else:
            batch[name] = torch.stack(columns)
        if name in ("input_ids", "input_values"):
            lengths = torch.tensor([len(column) for column in columns])
            positions = torch.arange(int(lengths.max()))
            batch["attention_mask"] = (positions < lengths[:, None]).long()
    return batch
