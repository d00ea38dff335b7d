"""Train a small vision transformer on scikit-learn's handwritten digits."""

from dataclasses import dataclass, field

import numpy as np
import torch
from sklearn.datasets import load_digits
from sklearn.model_selection import train_test_split
from transformers import (
    HfArgumentParser,
    Trainer,
    TrainingArguments,
    ViTConfig,
    ViTForImageClassification,
    set_seed,
)


@dataclass
class ModelArguments:
    hidden_size: int = field(default=32, metadata={"help": "Width of the model."})
    num_layers: int = field(default=2, metadata={"help": "Number of transformer blocks."})
    patch_size: int = field(default=2, metadata={"help": "Side of an image patch in pixels."})


class Digits(torch.utils.data.Dataset):
    def __init__(self, images, labels):
        self.images = torch.tensor(images / 8.0 - 1.0, dtype=torch.float32).unsqueeze(1)
        self.labels = torch.tensor(labels)

    def __len__(self):
        return len(self.labels)

    def __getitem__(self, index):
        return {"pixel_values": self.images[index], "labels": self.labels[index]}


def accuracy(prediction):
    return {"accuracy": float(np.mean(prediction.predictions.argmax(-1) == prediction.label_ids))}


def main():
    parser = HfArgumentParser((ModelArguments, TrainingArguments))
    model_args, training_args = parser.parse_args_into_dataclasses()
    set_seed(training_args.seed)

    digits = load_digits()
    train_images, test_images, train_labels, test_labels = train_test_split(
        digits.images, digits.target, test_size=0.2, random_state=0, stratify=digits.target
    )

    def model_init():
        config = ViTConfig(
            image_size=8,
            patch_size=model_args.patch_size,
            num_channels=1,
            hidden_size=model_args.hidden_size,
            num_hidden_layers=model_args.num_layers,
            num_attention_heads=2,
            intermediate_size=2 * model_args.hidden_size,
            num_labels=10,
        )
        return ViTForImageClassification(config)

    trainer = Trainer(
        model_init=model_init,
        args=training_args,
        train_dataset=Digits(train_images, train_labels),
        eval_dataset=Digits(test_images, test_labels),
        compute_metrics=accuracy,
    )
    if training_args.do_train:
        trainer.train(resume_from_checkpoint=training_args.resume_from_checkpoint)
        trainer.save_model()
    if training_args.do_eval:
        metrics = trainer.evaluate()
        trainer.log_metrics("eval", metrics)
        trainer.save_metrics("eval", metrics)


if __name__ == "__main__":
    main()
