"""Where in the data set the samples of each micro-batch stand, as the sampler tells."""

from __future__ import annotations

from collections import deque
from collections.abc import Iterator
from typing import Any

from accelerate.data_loader import DataLoaderDispatcher
from torch.utils.data import IterableDataset

__all__ = ["Positions"]


class Positions:
    """Listens to the batch sampler of a data loader while a training iterates over it.

    Attributes:
        unknown: why positions are not known; "" as long as they are.
    """

    def __init__(self) -> None:
        """Listen to nothing."""
        self.unknown = "no data loader was seen"
        self._heard: _HeardBatchSampler | None = None
        self._queue: deque[tuple[int, list[int]]] = deque()
        self._is_expecting = False

    def listen(self, loader: Any) -> None:
        """Listen to a data loader of torch or accelerate from its next epoch on."""
        self.stop()
        self.unknown = _reason_not_to(loader)
        if self.unknown:
            return
        loader = getattr(loader, "base_dataloader", loader)  # inside accelerate's
        heard = loader.batch_sampler
        if not isinstance(heard, _HeardBatchSampler):
            heard = _HeardBatchSampler(heard)
            # A loader lets nobody set its sampler: what stands there now is the same, heard.
            object.__setattr__(loader, "batch_sampler", heard)
        self._heard = heard
        heard.__dict__["listener"] = self

    def stop(self) -> None:
        """Listen no more; the loader goes on as before."""
        if self._heard is not None:
            self._heard.__dict__["listener"] = None
        self._heard = None
        self._queue.clear()

    def begin_epoch(self) -> None:
        """Take what is iterated over next for the epoch."""
        self._queue.clear()
        self._is_expecting = True

    def take(self, number: int) -> list[int] | None:
        """Return the positions of the epoch's micro-batch of a number, and forget those before."""
        while self._queue and self._queue[0][0] < number:
            self._queue.popleft()
        if self._queue and self._queue[0][0] == number:
            return self._queue.popleft()[1]
        return None

    def hear(self, batches: Iterator[Any]) -> Iterator[Any]:
        """Yield batches of positions as they are, and note those of the epoch."""
        if not self._is_expecting:  # somebody else looks at the data meanwhile
            yield from batches
            return
        self._is_expecting = False
        for number, batch in enumerate(batches):
            if isinstance(batch, list) and all(isinstance(index, int) for index in batch):
                self._queue.append((number, list(batch)))
            yield batch


class _HeardBatchSampler:
    """A batch sampler that tells a listener what it yields; in all else the one that it is."""

    def __init__(self, sampler: Any) -> None:
        self.__dict__.update(inner=sampler, listener=None)

    def __iter__(self) -> Iterator[Any]:
        batches, listener = iter(self.inner), self.__dict__["listener"]
        return batches if listener is None else listener.hear(batches)

    def __len__(self) -> int:
        return len(self.inner)

    def __getattr__(self, name: str) -> Any:
        if name.startswith("__") or "inner" not in self.__dict__:  # of a copy that is being made
            raise AttributeError(name)
        return getattr(self.__dict__["inner"], name)

    def __setattr__(self, name: str, value: Any) -> None:
        setattr(self.__dict__["inner"], name, value)


def _reason_not_to(loader: Any) -> str:
    """Return why a loader's positions cannot be known, or ""."""
    if isinstance(getattr(loader, "dataset", None), IterableDataset):
        return "an IterableDataset has no positions"
    if isinstance(loader, DataLoaderDispatcher):
        return "the first process hands the data out (dispatch_batches)"
    if getattr(loader, "batch_sampler", None) is None:
        return f"{type(loader).__name__} has no batch sampler"
    if not getattr(loader, "in_order", True):
        return "workers hand their batches over out of order (dataloader_in_order=False)"
    return ""
