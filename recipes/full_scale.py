"""Data of the full-scale recipes: streamed from the Hub, through the papers' own preprocessing.

A dry run puts a handful of local images or texts through the same code, on any machine.
"""

from __future__ import annotations

import functools
import itertools
import math
import sysconfig
import tempfile
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy
import torch
import transformers
from datasets import Dataset, load_dataset
from torch import Tensor
from torch.utils.data import IterableDataset
from torch.utils.flop_counter import FlopCounterMode

from hf_stable.cost_model import MACHINES
from recipes.data import Task
from recipes.settings import Settings

DRY_STEPS, DRY_BATCH, DRY_BLOCKS, DRY_EXAMPLES = 2, 2, 2, 16
BUFFER = 10_000
"""Examples among which a stream is shuffled."""

MASKED = 0.15
"""Share of BERT's tokens to guess (Devlin et al. 2019)."""


def load(settings: Settings, *, dry_run: bool = False) -> Task:
    """Return the task of a full-scale recipe, streaming.

    Args:
        settings: `data` names a data set of the Hub or a local folder of one.
        dry_run: take local digits, as image files, or the standard library's source instead.

    Raises:
        ImportError: if there are images and no kornia.
        ValueError: if it is not said which column has what.
    """
    if not settings.text_column and not (settings.image_column and settings.label_column):
        raise ValueError(
            f"data {settings.data!r} is not embedded (digits and stdlib are); of a data set of the "
            "Hub, name image_column and label_column, or text_column"
        )
    if settings.image_column:
        return _images(settings, _local_images() if dry_run else _stream(settings))
    return _texts(settings, _local_texts() if dry_run else _stream(settings), dry_run=dry_run)


def shrink(settings: Settings) -> Settings:
    """Return a recipe cut down for a dry run: two steps, small batches, two blocks."""
    config = dict(settings.model_config or {})
    for name in ("num_hidden_layers", "n_layer"):
        if name in config:
            config[name] = DRY_BLOCKS
    if "depths" in config:
        config["depths"] = [DRY_BLOCKS] * len(config["depths"])
    return replace(
        settings, model_config=config, steps=DRY_STEPS, batch_size=DRY_BATCH, workers=0,
        gradient_accumulation_steps=1, global_batch=0, bf16=False, save_steps=0,
        monitor_every=min(1, settings.monitor_every),
    )  # fmt: skip


def gpu_hours(model: Any, settings: Settings) -> float:
    """Return the hours of one H100 that a recipe takes, at the rate that `bench --plan` assumes.

    Args:
        model: on the device "meta"; the operations of a forward are counted there, and a backward
            is twice a forward.
        settings: of the recipe.
    """
    config = model.config
    if settings.image_column:
        pixels = torch.empty(1, 3, config.image_size, config.image_size, device="meta")
        inputs = {"pixel_values": pixels}
    else:
        ids = torch.zeros(1, _context(settings), dtype=torch.long, device="meta")
        inputs = {"input_ids": ids}
    with FlopCounterMode(display=False) as counter:
        model(**inputs)
    flops = 3 * counter.get_total_flops() * settings.global_batch * settings.steps
    return flops / MACHINES["h100"].flops / 3600


def _stream(settings: Settings) -> Callable[[str], Any]:
    def stream(split: str) -> Any:
        found = load_dataset(settings.data, settings.data_config, split=split, streaming=True)
        return found.shuffle(settings.seed, buffer_size=BUFFER) if split == "train" else found

    return stream


# Images


def _images(settings: Settings, stream: Callable[[str], Any]) -> Task:
    import kornia.augmentation as augment
    from kornia.augmentation.auto import RandAugment

    config = settings.model_config or {}
    size, num_labels = config.get("image_size", 224), config.get("num_labels", 1000)
    # Means and deviations of ImageNet, as timm and the original code of Swin use them.
    finish = augment.Normalize(
        torch.tensor([0.485, 0.456, 0.406]), torch.tensor([0.229, 0.224, 0.225])
    )
    changes = [augment.RandomResizedCrop((size, size)), augment.RandomHorizontalFlip()]
    if settings.randaugment:
        changes.append(RandAugment(n=2, m=settings.randaugment))
    train = torch.nn.Sequential(*changes, finish)
    test = torch.nn.Sequential(
        augment.Resize(size * 256 // 224, side="short"), augment.CenterCrop(size), finish
    )

    def prepare(example: dict[str, Any], transform: Any) -> dict[str, Any]:
        pixels = numpy.array(example[settings.image_column].convert("RGB"))
        image = torch.from_numpy(pixels).permute(2, 0, 1)[None].float() / 255
        label = int(example[settings.label_column])
        return {"pixel_values": transform(image)[0], "labels": label, "mixed": transform is train}

    examples = [
        _Mapped(functools.partial(stream, split), functools.partial(prepare, transform=transform))
        for split, transform in (("train", train), ("validation", test))
    ]
    return Task(
        *examples,
        num_labels=num_labels,
        image_size=size,
        num_channels=3,
        reference=math.log(num_labels),
        is_small=False,
        collate=functools.partial(_collate, settings=settings, num_labels=num_labels),
        loss=functools.partial(_soft_loss, smoothing=settings.label_smoothing),
    )


def _collate(
    examples: list[dict[str, Any]], settings: Settings, num_labels: int
) -> dict[str, Tensor]:
    """Batch images; mix those that are trained on, which makes labels (batch, classes)."""
    pixels = torch.stack([example["pixel_values"] for example in examples])
    labels = torch.tensor([example["labels"] for example in examples])
    kinds = [
        (mix, alpha)
        for mix, alpha in ((mix_up, settings.mixup), (cut_mix, settings.cutmix))
        if alpha
    ]
    if kinds and examples[0]["mixed"]:
        mix, alpha = kinds[int(torch.randint(len(kinds), ()))]
        share = float(torch.distributions.Beta(alpha, alpha).sample())
        pixels, share = mix(pixels, share)
        targets = torch.nn.functional.one_hot(labels, num_labels).float()
        labels = share * targets + (1 - share) * targets.flip(0)
    return {"pixel_values": pixels, "labels": labels}


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


def _soft_loss(
    outputs: Any, labels: Tensor, num_items_in_batch: Any = None, *, smoothing: float
) -> Tensor:
    """Cross entropy with labels (batch,) or shares (batch, classes), smoothed."""
    return torch.nn.functional.cross_entropy(outputs["logits"], labels, label_smoothing=smoothing)


def _local_images() -> Callable[[str], Any]:
    """Return scikit-learn's digits as image files in folders by class, as ImageNet's are."""
    from PIL import Image
    from sklearn.datasets import load_digits

    images, labels = load_digits(return_X_y=True)
    folder = Path(tempfile.mkdtemp(prefix="dry-run-"))
    for number, (image, label) in enumerate(zip(images[:DRY_EXAMPLES], labels, strict=False)):
        path = folder / str(label) / f"{number}.png"
        path.parent.mkdir(exist_ok=True)
        pixels = (image.reshape(8, 8) * 15).astype("uint8")
        Image.fromarray(pixels).resize((320, 240)).save(path)
    return lambda split: load_dataset("imagefolder", data_dir=str(folder), split="train")


# Text


def _texts(settings: Settings, stream: Callable[[str], Any], *, dry_run: bool) -> Task:
    tokenizer = _local_tokenizer() if dry_run else _tokenizer(settings.tokenizer)
    length = _context(settings)
    pack = functools.partial(
        _windows, tokenizer=tokenizer, column=settings.text_column, length=length
    )
    collate: Any = transformers.default_data_collator
    if settings.model == "bert":
        collate = transformers.DataCollatorForLanguageModeling(tokenizer, mlm_probability=MASKED)
    # OpenWebText has a train split alone: its first texts are kept for the test.
    test = list(itertools.islice(pack(stream("train")), 256 if not dry_run else DRY_BATCH))
    return Task(
        _Packed(functools.partial(stream, "train"), pack, skip=0 if dry_run else len(test)),
        test,
        num_labels=len(tokenizer),
        vocabulary=len(tokenizer),
        reference=math.log(len(tokenizer)),
        is_small=False,
        collate=collate,
    )


def _windows(
    stream: Any, *, tokenizer: Any, column: str, length: int
) -> Iterator[dict[str, Tensor]]:
    """Cut a stream of texts, joined by the end-of-text token, into windows of `length` tokens."""
    tokens: list[int] = []
    for example in stream:
        tokens += [*tokenizer(example[column])["input_ids"], tokenizer.eos_token_id]
        while len(tokens) >= length:
            window = torch.tensor(tokens[:length])
            del tokens[:length]
            yield {"input_ids": window, "labels": window.clone()}


def _context(settings: Settings) -> int:
    config = settings.model_config or {}
    return int(config.get("n_positions") or config.get("max_position_embeddings") or 512)


def _tokenizer(name: str) -> Any:
    tokenizer = transformers.AutoTokenizer.from_pretrained(name)
    if tokenizer.eos_token_id is None:
        tokenizer.eos_token = tokenizer.sep_token
    return tokenizer


def _local_texts() -> Callable[[str], Any]:
    files = sorted(Path(sysconfig.get_paths()["stdlib"]).glob("*.py"))[:DRY_EXAMPLES]
    texts = [file.read_text(encoding="utf-8", errors="replace") for file in files]
    return lambda split: Dataset.from_dict({"text": texts})


def _local_tokenizer() -> Any:
    from tokenizers import Tokenizer, models, pre_tokenizers, trainers

    special = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]"]
    tokenizer = Tokenizer(models.BPE(unk_token="[UNK]"))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    texts = (example["text"] for example in _local_texts()("train"))
    trainer = trainers.BpeTrainer(vocab_size=500, special_tokens=special, show_progress=False)
    tokenizer.train_from_iterator(texts, trainer)
    return transformers.PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, pad_token="[PAD]", unk_token="[UNK]", cls_token="[CLS]",
        sep_token="[SEP]", mask_token="[MASK]", eos_token="[SEP]",
    )  # fmt: skip


class _Mapped(IterableDataset):
    """A stream of examples, each put through a function."""

    def __init__(self, open_stream: Callable[[], Any], function: Callable[[Any], Any]) -> None:
        super().__init__()
        self.open_stream, self.function = open_stream, function

    def __iter__(self) -> Iterator[Any]:
        return map(self.function, self.open_stream())


class _Packed(IterableDataset):
    """A stream of texts cut into windows, the first `skip` of them left out."""

    def __init__(
        self, open_stream: Callable[[], Any], pack: Callable[[Any], Any], skip: int
    ) -> None:
        super().__init__()
        self.open_stream, self.pack, self.skip = open_stream, pack, skip

    def __iter__(self) -> Iterator[Any]:
        return itertools.islice(self.pack(self.open_stream()), self.skip, None)
