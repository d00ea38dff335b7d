"""Run recipes one after the other on every process of a launcher, and tell what each one saw.

    torchrun --nproc-per-node 2 train_recipes.py SETTINGS FOLDER

SETTINGS is a JSON file of settings by name. FOLDER/rank0.json and so on get, by name, a sum of the
weights in the end and of what stands in the batches.
"""

import json
import os
import sys
from pathlib import Path
from typing import Any

from transformers import TrainerCallback

from recipes.run import run
from recipes.settings import Settings


class Telling(TrainerCallback):
    """Sums up what a process trained on, and what it ended with."""

    def __init__(self) -> None:
        """Have seen nothing."""
        self.examples = self.weights = 0.0

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Look at what the model is given in training."""
        kwargs["model"].register_forward_pre_hook(self._see, with_kwargs=True)

    def on_train_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Add up the weights."""
        self.weights = sum(each.double().sum().item() for each in kwargs["model"].parameters())

    def _see(self, model: Any, args: Any, kwargs: dict[str, Any]) -> None:
        if model.training:
            labels = kwargs["labels"].flatten().tolist()
            self.examples += sum(place * label for place, label in enumerate(labels, start=1))


found = {}
for name, given in json.loads(Path(sys.argv[1]).read_text()).items():
    telling = Telling()
    run(Settings(**given), callbacks=[telling])
    found[name] = {"weights": telling.weights, "examples": telling.examples}
path = Path(sys.argv[2]) / f"rank{os.environ['RANK']}.json"
path.write_text(json.dumps(found))
