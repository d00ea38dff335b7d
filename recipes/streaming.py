"""Endless streams of batches for the Trainer: each process has its own, and resumes it exactly.

accelerate would have the first process load the examples of all, and the Trainer takes a data set
without a length for one epoch as long as the run: on resume it would load again, tokenised or
augmented, whatever had been trained on, in the order of the first epoch.
"""

from __future__ import annotations

import contextlib
import hashlib
import itertools
import json
import random
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

import numpy
import torch
from torch.utils.data import DataLoader, IterableDataset, get_worker_info
from transformers import Trainer, TrainerCallback

__all__ = ["PlaceError", "Streamed", "StreamingTrainer", "one_of_each", "share"]


class PlaceError(ValueError):
    """It is not known where the data of a checkpoint were left."""


class Place(NamedTuple):
    """How far a stream has come.

    Attributes:
        epoch: passes that are over.
        read: stored examples that this pass has read.
        left: of these, what no example was made of yet: tokens.
        batches: given since the start.
    """

    epoch: int = 0
    read: int = 0
    left: tuple[int, ...] | list[int] = ()
    batches: int = 0


Stream = Callable[[str, int | None, int, int], Iterable[Any]]
"""Opens what one process of several reads of a split: shuffled anew for each epoch, or for None in
the order in which it is stored. The last two are the process and how many there are."""

Making = Callable[[Iterable[Any], list[int]], Iterator[tuple[Any, list[int]]]]
"""Makes examples of stored ones and of what was left, and says beside each what is left then."""


def one_of_each(prepare: Callable[[Any], Any]) -> Making:
    """Return what makes one example of each stored one, and has nothing left."""
    return lambda stored, left: ((prepare(example), left) for example in stored)


def share(dataset: Any, rank: int, num_ranks: int) -> Any:
    """Return what one process reads of a data set of `datasets`: whole files where they suffice.

    Where there are fewer files than processes, each of these reads all and keeps one in so many.
    `split_dataset_by_node` alone would do so too where the files do not divide evenly, as the 294
    of ImageNet by 8. An endless stream has no need of shares of one size.
    """
    from datasets.distributed import split_dataset_by_node

    if num_ranks == 1:
        return dataset
    if getattr(dataset, "num_shards", 1) >= num_ranks:
        return dataset.shard(num_ranks, rank)
    return split_dataset_by_node(dataset, rank, num_ranks)


class Streamed(IterableDataset):
    """A split whose stored examples are made into others; passed over once, or without end."""

    def __init__(
        self, stream: Stream, split: str, making: Making, *, shuffles: bool = True
    ) -> None:
        """Keep what opens the split and what makes examples of it."""
        super().__init__()
        self.stream, self.split, self.making, self.shuffles = stream, split, making, shuffles
        self.epoch = 0

    def set_epoch(self, epoch: int) -> None:
        """Have the next pass in another order."""
        self.epoch = epoch

    def __iter__(self) -> Iterator[Any]:
        """Pass over the whole split once."""
        stored = self.stream(self.split, self.epoch if self.shuffles else None, 0, 1)
        return (example for example, _ in self.making(stored, []))

    def endless(self, place: Place, rank: int, num_ranks: int) -> Iterator[tuple[Any, Place]]:
        """Yield the examples of one process from a place on, pass after pass.

        What the pass has read before is read again, but nothing is made of it: images are not
        decoded, texts not tokenised.

        Yields:
            Examples, and the place after each, whose `left` changes with the next. There is no end
            but for a pass that gives nothing.
        """
        for epoch in itertools.count(place.epoch):
            stored = _Counted(self.stream(self.split, epoch, rank, num_ranks), place.read)
            starts, gave = not place.read, False
            for example, left in self.making(stored, list(place.left)):
                gave = True
                yield example, Place(epoch, stored.read, left)
            if starts and not gave:
                return
            place = Place()


class _Counted:
    """Stored examples from one on, and how many have been read."""

    def __init__(self, stored: Iterable[Any], read: int) -> None:
        self.stored, self.read = stored, read

    def __iter__(self) -> Iterator[Any]:
        for example in itertools.islice(self.stored, self.read, None):
            self.read += 1
            yield example


class _Batches(IterableDataset):
    """The batches of one process, or of one worker of it, from where each was left."""

    def __init__(
        self,
        streamed: Streamed,
        collate: Callable[[list[Any]], Any],
        *,
        batch_size: int,
        seed: int,
        rank: int,
        num_ranks: int,
    ) -> None:
        super().__init__()
        self.streamed, self.collate, self.batch_size = streamed, collate, batch_size
        self.seed, self.rank, self.num_ranks = seed, rank, num_ranks
        self.places: dict[int, Place] = {}
        self.last = -1

    def __iter__(self) -> Iterator[tuple[int, Place, Any] | None]:
        worker = get_worker_info()
        number = worker.id if worker else 0
        place = self.places.get(number, Place())
        if number <= self.last:
            yield None  # workers take turns, and this one had its turn before the place was kept
        examples = self.streamed.endless(place, self.rank, self.num_ranks)
        for given in itertools.count(place.batches):
            # By its number, so that a batch is the same whatever was drawn before it.
            with _drawing_from(self.seed, self.rank, number, given):
                drawn = list(itertools.islice(examples, self.batch_size))
                if len(drawn) < self.batch_size:
                    return
                batch = self.collate([example for example, _ in drawn])
            after = drawn[-1][1]
            yield number, after._replace(left=list(after.left), batches=given + 1), batch


@contextlib.contextmanager
def _drawing_from(*key: int) -> Iterator[None]:
    """Draw random numbers of a seed made from numbers; the process draws its own on afterwards."""
    seed = int.from_bytes(hashlib.blake2b(repr(key).encode(), digest_size=4).digest())
    kept = random.getstate(), numpy.random.get_state(), torch.get_rng_state()
    random.seed(seed)
    numpy.random.seed(seed)
    torch.default_generator.manual_seed(seed)  # torch.manual_seed would seed the GPUs as well
    try:
        yield
    finally:
        random.setstate(kept[0])
        numpy.random.set_state(kept[1])
        torch.set_rng_state(kept[2])


class Loader:
    """Gives the Trainer the batches of its process, and keeps the places of their streams."""

    def __init__(self, batches: _Batches, *, workers: int, pins_memory: bool) -> None:
        """Load in so many processes beside this one."""
        self.batches, self.workers, self.pins_memory = batches, workers, pins_memory

    def __iter__(self) -> Iterator[Any]:
        """Go on from the places.

        Raises:
            ValueError: if there is nothing to go on with.
        """
        loader = DataLoader(
            self.batches,
            batch_size=None,  # they are batches already
            collate_fn=_as_it_is,
            num_workers=self.workers,
            pin_memory=self.pins_memory,
            generator=torch.Generator(),  # the process's own would be elsewhere after a resume
        )
        for given in loader:
            if given is not None:
                self.batches.last, place, batch = given
                self.batches.places[self.batches.last] = place
                yield batch
        raise ValueError(
            f"process {self.batches.rank} of {self.batches.num_ranks} has no "
            f"{self.batches.batch_size} examples to train on; take more data, or fewer processes "
            f"or workers (here {self.workers})"
        )

    def begin(self) -> None:
        """Go to where every stream starts."""
        self.batches.places, self.batches.last = {}, -1

    def save(self, folder: Path) -> None:
        """Write the places to a checkpoint."""
        content = {
            "processes": self.batches.num_ranks,
            "last": self.batches.last,
            "places": {str(number): place for number, place in self.batches.places.items()},
        }
        folder.mkdir(parents=True, exist_ok=True)
        (folder / self._file_name).write_text(json.dumps(content) + "\n")

    def load(self, folder: Path) -> None:
        """Go to where a checkpoint left the streams.

        Raises:
            PlaceError: if it does not say, or says so for another number of processes.
        """
        path, wanted = folder / self._file_name, self.batches.num_ranks
        files = sorted(folder.glob("stream_*.json"))
        written_by = json.loads(files[0].read_text())["processes"] if files else wanted
        if written_by != wanted:
            raise PlaceError(
                f"{folder} was written by {written_by} processes and these are {wanted}; their "
                "streams cannot be divided anew, so start as many as then"
            )
        if not path.is_file():
            raise PlaceError(
                f"{folder} has no {path.name}, which says where its data were left: it is of an "
                "earlier version; give another --output, or remove the folder"
            )
        content = json.loads(path.read_text())
        self.batches.last = content["last"]
        self.batches.places = {int(key): Place(*place) for key, place in content["places"].items()}

    @property
    def _file_name(self) -> str:
        return f"stream_{self.batches.rank}.json"


def _as_it_is(given: Any) -> Any:
    return given


class _TakesItsPlace(TrainerCallback):
    """Has a run start its streams where its checkpoint left them."""

    def __init__(self, loader: Loader) -> None:
        self.loader = loader

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Look at the step that the checkpoint was written at."""
        if state.global_step:
            self.loader.load(_checkpoint(args.output_dir, state.global_step))
        else:
            self.loader.begin()

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Say what share of the run is over; the Trainer counts from where it started last."""
        state.epoch = state.global_step / state.max_steps


class StreamingTrainer(Trainer):
    """A Trainer whose `train_dataset` is `Streamed`: each process loads its own batches of it."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        """Take what the Trainer takes."""
        super().__init__(*args, **kwargs)
        self.args.ignore_data_skip = True  # the loader knows its place
        batches = _Batches(
            self.train_dataset,
            self.data_collator,
            batch_size=self.args.per_device_train_batch_size,
            seed=self.args.seed,
            rank=self.args.process_index,
            num_ranks=self.args.world_size,
        )
        self._loader = Loader(
            batches,
            workers=self.args.dataloader_num_workers,
            pins_memory=self.args.dataloader_pin_memory and torch.cuda.is_available(),
        )
        self.add_callback(_TakesItsPlace(self._loader))

    def get_train_dataloader(self) -> Any:
        """Return the batches of this process, which accelerate is not to divide once more."""
        return self._loader

    def _save_checkpoint(self, model: Any, trial: Any) -> None:
        # First, as trainer_state.json, which says that a checkpoint is whole, comes last.
        self._loader.save(_checkpoint(self.args.output_dir, self.state.global_step))
        super()._save_checkpoint(model, trial)


def _checkpoint(folder: str, step: int) -> Path:
    return Path(folder, f"checkpoint-{step}")
