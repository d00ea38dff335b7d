"""Data of the full-scale recipes: streamed from the Hub, through the papers' own preprocessing.

A dry run puts a handful of local images or texts through the same code, on any machine.
"""

from __future__ import annotations

import functools
import math
import tempfile
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from datasets import Image, load_dataset
from torch.utils.flop_counter import FlopCounterMode

from hf_stable.commands.bench.machines import MACHINES
from recipes import full_sequences, full_texts, utterances
from recipes.data import EMBEDDED, Task
from recipes.full_sequences import DRY_EXAMPLES
from recipes.settings import Settings
from recipes.streaming import Stream, Streamed, one_of_each, share

DRY_STEPS, DRY_BATCH, DRY_BLOCKS, DRY_CONTEXT = 2, 2, 2, 128
BUFFER = 10_000
"""Examples among which a stream is shuffled."""


def load(settings: Settings, *, dry_run: bool = False) -> Task:
    """Return the task of a full-scale recipe, streaming.

    Args:
        settings: `data` names a data set of the Hub or a local folder of one.
        dry_run: take local digits, as image files, or the standard library's source instead.

    Raises:
        ImportError: if there are images and no kornia.
        ValueError: if it is not said which column has what, or there are too few texts.
    """
    is_translated = settings.source_column and settings.target_column
    if not (settings.text_column or is_translated) and not (
        settings.image_column and settings.label_column
    ):
        raise ValueError(
            f"data {settings.data!r} is not embedded ({', '.join(EMBEDDED)} are); of a data set of "
            "the Hub, name image_column and label_column, source_column and target_column, "
            "audio_column and text_column, or text_column"
        )
    hub = functools.partial(_from_the_hub, settings=settings)
    if is_translated:
        return full_sequences.translations(
            settings,
            full_sequences.local_pairs(settings) if dry_run else hub,
            full_texts.local_tokenizer()
            if dry_run
            else full_texts.tokenizer_of(settings.tokenizer),
            length=_context(settings),
            dry_run=dry_run,
        )
    if settings.audio_column:
        stream = full_sequences.local_speech(settings) if dry_run else hub
        return full_sequences.transcripts(settings, stream, dry_run=dry_run)
    if settings.image_column:
        return _images(settings, _local_images() if dry_run else hub)
    stream = full_texts.local_texts if dry_run else hub
    return full_texts.texts(settings, stream, length=_context(settings), dry_run=dry_run)


def shrink(settings: Settings) -> Settings:
    """Return a recipe cut down for a dry run: two steps, small batches, two blocks, little context.

    Its results go to a folder below those of the recipe, which they must not overwrite.
    """
    config = dict(settings.model_config or {})
    sizes = {
        "num_hidden_layers": DRY_BLOCKS, "n_layer": DRY_BLOCKS, "encoder_layers": DRY_BLOCKS,
        "decoder_layers": DRY_BLOCKS, "num_layers": DRY_BLOCKS, "num_decoder_layers": DRY_BLOCKS,
        "n_positions": DRY_CONTEXT, "max_position_embeddings": DRY_CONTEXT,
    }  # fmt: skip
    config |= {name: size for name, size in sizes.items() if name in config}
    if "depths" in config:
        config["depths"] = [DRY_BLOCKS] * len(config["depths"])
    return replace(
        settings, model_config=config, steps=DRY_STEPS, batch_size=DRY_BATCH, workers=0,
        gradient_accumulation_steps=1, global_batch=0, bf16=False, save_steps=0,
        logging_steps=1, monitor_every=min(1, settings.monitor_every),
        output=str(Path(settings.output, "dry-run")),
    )  # fmt: skip


def gpu_hours(model: Any, settings: Settings) -> float:
    """Return the hours of one H100 that a recipe takes, at the rate that `bench --plan` assumes.

    Args:
        model: on the device "meta"; the operations of a forward are counted there, and a backward
            is twice a forward.
        settings: of the recipe.
    """
    inputs = _inputs_of_one(model.config, settings)
    if settings.source_column:
        model.set_attn_implementation("eager")  # the other one looks at the mask, which has no data
    with FlopCounterMode(display=False) as counter:
        model(**inputs)
    flops = 3 * counter.get_total_flops() * settings.global_batch * settings.steps
    return flops / MACHINES["h100"].flops / 3600


def _inputs_of_one(config: Any, settings: Settings) -> dict[str, Any]:
    """Return the inputs of one example on the device "meta", as long as they may be."""
    ids = torch.zeros(1, _context(settings), dtype=torch.long, device="meta")
    if settings.image_column:
        size = config.image_size
        return {"pixel_values": torch.empty(1, 3, size, size, device="meta")}
    if settings.model == "wav2vec2":
        samples = full_sequences.MEAN_SECONDS * utterances.RATE
        return {"input_values": torch.empty(1, samples, device="meta")}
    if settings.model == "whisper":
        frames = 2 * config.max_source_positions
        features = torch.empty(1, config.num_mel_bins, frames, device="meta")
        return {"input_features": features, "decoder_input_ids": ids}
    if settings.source_column:
        return {"input_ids": ids, "decoder_input_ids": ids}
    return {"input_ids": ids}


def _from_the_hub(
    split: str, epoch: int | None, rank: int = 0, num_ranks: int = 1, *, settings: Settings
) -> Any:
    found = load_dataset(settings.data, settings.data_config, split=split, streaming=True)
    if (settings.image_column or settings.audio_column) and found.features:
        found = found.decode(False)  # what is used is decoded later, and not what is passed over
    found = share(found, rank, num_ranks)
    if epoch is None:
        return found
    shuffled = found.shuffle(settings.seed, buffer_size=BUFFER)
    shuffled.set_epoch(epoch)
    return shuffled


def _images(settings: Settings, stream: Stream) -> Task:
    from recipes import augmentation  # kornia takes seconds to import

    config = settings.model_config or {}
    size, num_labels = config.get("image_size", 224), config.get("num_labels", 1000)

    def examples(split: str, *, train: bool) -> Streamed:
        transform = augmentation.Transform(settings, size, train=train)
        prepare = functools.partial(_prepared, settings=settings, transform=transform)
        return Streamed(stream, split, one_of_each(prepare), shuffles=train)

    return Task(
        examples(settings.train_split, train=True),
        examples(settings.test_split, train=False),
        num_labels=num_labels,
        image_size=size,
        num_channels=3,
        reference=math.log(num_labels),
        is_small=False,
        collate=functools.partial(augmentation.collate, settings=settings, num_labels=num_labels),
        loss=augmentation.soft_loss,
    )


def _prepared(example: dict[str, Any], *, settings: Settings, transform: Any) -> dict[str, Any]:
    image = example[settings.image_column]
    if isinstance(image, dict):  # as it is stored: its bytes, or its path
        image = Image().decode_example(image)
    return {
        "pixel_values": transform(image),
        "labels": int(example[settings.label_column]),
        "train": transform.train,
    }


def _local_images() -> Stream:
    """Return scikit-learn's digits as image files in folders by class, as ImageNet's are."""
    import PIL.Image
    from sklearn.datasets import load_digits

    images, labels = load_digits(return_X_y=True)
    folder = Path(tempfile.mkdtemp(prefix="dry-run-"))
    for number, (image, label) in enumerate(zip(images[:DRY_EXAMPLES], labels, strict=False)):
        path = folder / str(label) / f"{number}.png"
        path.parent.mkdir(exist_ok=True)
        pixels = (image.reshape(8, 8) * 15).astype("uint8")
        PIL.Image.fromarray(pixels).resize((320, 240)).save(path)
    found = load_dataset("imagefolder", data_dir=str(folder), split="train")
    return lambda split, epoch, rank=0, num_ranks=1: share(found, rank, num_ranks)


def _context(settings: Settings) -> int:
    config = settings.model_config or {}
    names = ("n_positions", "max_position_embeddings", "max_target_positions")
    return int(next((config[name] for name in names if name in config), 512))
