"""The demo's data: handwritten digits that scikit-learn carries, and the share of right answers.

What comes from the `recipes` extra is imported when it is needed.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from torch import nn

from hf_stable._wording import extra_needed

__all__ = ["accuracy_metric", "load_digits", "require_recipes"]

NUM_TEST_IMAGES = 360


def require_recipes() -> None:
    """Raise ModuleNotFoundError, saying what to install, unless what the demo needs is there."""
    for name in ("datasets", "evaluate", "plotly", "sklearn"):
        try:
            __import__(name)
        except ModuleNotFoundError as error:
            raise extra_needed("the demo", "recipes", error) from error


def load_digits(seed: int, quick: bool) -> Any:
    """Return a `DatasetDict` of digits, 28 x 28, normalised, split by class."""
    import datasets
    from sklearn.datasets import load_digits

    images, labels = load_digits(return_X_y=True)
    pixels = torch.from_numpy(images).float().view(-1, 1, 8, 8)
    pixels = nn.functional.interpolate(pixels, size=(28, 28), mode="bilinear")
    pixels = (pixels - pixels.mean()) / pixels.std()
    features = datasets.Features(
        {
            "pixel_values": datasets.Array3D(shape=(1, 28, 28), dtype="float32"),
            "labels": datasets.ClassLabel(num_classes=10),
        }
    )
    whole = datasets.Dataset.from_dict(
        {"pixel_values": pixels.numpy(), "labels": labels}, features=features
    )
    split = whole.train_test_split(
        test_size=NUM_TEST_IMAGES, seed=seed, stratify_by_column="labels"
    )
    if quick:
        split["train"] = split["train"].select(range(64))
    return split.with_format("torch")


def accuracy_metric(folder: Path) -> Any:
    """Return an `evaluate` metric that is defined here, so that nothing is fetched."""
    import datasets
    import evaluate

    class Accuracy(evaluate.Metric):
        def _info(self) -> Any:
            label = datasets.Value("int32")
            return evaluate.MetricInfo(
                description="Share of right answers.",
                citation="",
                inputs_description="predictions and references: class numbers",
                features=datasets.Features({"predictions": label, "references": label}),
            )

        def _compute(self, predictions: Any, references: Any) -> dict[str, float]:
            hits = sum(p == r for p, r in zip(predictions, references, strict=True))
            return {"accuracy": hits / len(references)}

    return Accuracy(keep_in_memory=True, cache_dir=str(folder))
