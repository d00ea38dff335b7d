"""Micro-batches on disk: one safetensors file each, so many at most, with what it is as JSON."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from safetensors.torch import save_file
from torch import Tensor

from hf_stable._file_names import BATCH_FILE, BATCH_FOLDER, BATCH_KEY
from hf_stable._json import to_json
from hf_stable._whole_files import unfinished
from hf_stable.monitor.batches.ring import MicroBatch, copied_to_cpu

__all__ = ["MOST_BYTES", "MOST_FILES", "BatchFolder", "previews_of"]

MOST_FILES, MOST_BYTES = 64, 256 << 20
"""What a process keeps of a run, in files and in bytes of tensors."""

PREVIEW_TOKENS, PREVIEW_CHARACTERS = 128, 300
"""What is decoded of a sample, and shown of that."""


class BatchFolder:
    """The folder of a run's micro-batches, as far as they are of one process.

    Args:
        output: the run's output folder.
        rank: of the process.
    """

    def __init__(self, output: str, rank: int) -> None:
        """Touch nothing yet."""
        self.path = Path(output) / BATCH_FOLDER
        self.rank = rank

    def set_aside(self) -> None:
        """Keep what an earlier run left under the next free number.

        Raises:
            OSError: if that cannot be done.
        """
        if self.path.is_dir():
            number = 1
            while (old := self.path.with_name(f"{BATCH_FOLDER}-{number}")).exists():
                number += 1
            self.path.rename(old)

    def name_of(self, batch: MicroBatch, attempt: int) -> str:
        """Return the name of a micro-batch's file, one of `BATCH_FILE`.

        Args:
            batch: what it holds.
            attempt: how many rollbacks came before.
        """
        return (
            f"step-{batch.step}-attempt-{attempt}-rank-{self.rank}-micro-{batch.number}.safetensors"
        )

    def has_room(self, num_bytes: int, name: str) -> bool:
        """Say whether one more file fits into what a process may keep; one in its place does."""
        others = [path for path in self._own_files() if path.name != name]
        kept = sum(path.stat().st_size for path in others)
        return len(others) < MOST_FILES and kept + num_bytes <= MOST_BYTES

    def write(self, name: str, inputs: Mapping[str, Any], about: Mapping[str, Any]) -> int | None:
        """Write a micro-batch; return how many bytes its tensors take, None if there is no room.

        Args:
            name: of the file.
            inputs: tensors go by their names, those within others by both, with a dot. Numbers and
                texts join `about` under `values`, what is neither is named there under `left_out`.
            about: what the file is, for JSON.

        Raises:
            OSError: if it cannot be written.
        """
        tensors, values, left_out = {}, {}, []
        for key, value in _flat(inputs):
            if isinstance(value, Tensor) and not value.is_sparse:
                tensors[key] = copied_to_cpu(value).contiguous()
            elif value is None or isinstance(value, bool | int | float | str):
                values[key] = value
            else:
                left_out.append(f"{key} ({type(value).__name__})")
        num_bytes = sum(tensor.nbytes for tensor in tensors.values())
        if not self.has_room(num_bytes, name):
            return None
        self.path.mkdir(parents=True, exist_ok=True)
        whole = to_json({**about, "values": values, "left_out": left_out})
        with unfinished(self.path / name) as partial:
            save_file(tensors, partial, metadata={BATCH_KEY: whole})
            partial.chmod(0o600)  # data may be private
        return num_bytes

    def _own_files(self) -> list[Path]:
        if not self.path.is_dir():
            return []
        named = [(path, BATCH_FILE.fullmatch(path.name)) for path in self.path.iterdir()]
        return [path for path, found in named if found and int(found["rank"]) == self.rank]


def previews_of(inputs: Mapping[str, Any], processing_class: Any) -> list[str] | None:
    """Return the beginning of each sample as a processing class decodes it; None without a way.

    Args:
        inputs: of a micro-batch.
        processing_class: of the Trainer; one that decodes nothing gives None.
    """
    ids = inputs.get("input_ids")
    decode = getattr(processing_class, "decode", None)
    if decode is None or not isinstance(ids, Tensor) or ids.ndim != 2 or ids.is_floating_point():
        return None
    rows = ids[:, :PREVIEW_TOKENS].tolist()
    return [str(decode([i for i in row if i >= 0]))[:PREVIEW_CHARACTERS] for row in rows]


def _flat(inputs: Any, before: str = "") -> Iterator[tuple[str, Any]]:
    """Yield what containers within containers hold, with names joined by dots."""
    entries = inputs.items() if isinstance(inputs, Mapping) else enumerate(inputs)
    for key, value in entries:
        name = f"{before}{key}"
        if isinstance(value, Mapping | list | tuple):
            yield from _flat(value, f"{name}.")
        else:
            yield name, value
