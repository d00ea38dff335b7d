"""Load the demo's folded model with transformers alone and test it on the held-out digits.

The demo copies this file beside the model and runs the copy in a new process.
"""

import json
import sys
from pathlib import Path

import torch
from safetensors.torch import load_file
from transformers import AutoModelForImageClassification


def main() -> None:
    """Print what was found as one line of JSON."""
    folder = Path(__file__).parent
    model, info = AutoModelForImageClassification.from_pretrained(
        folder / "model", output_loading_info=True
    )
    digits = load_file(folder / "test_digits.safetensors")
    with torch.no_grad():
        logits = model.eval()(pixel_values=digits["pixel_values"]).logits
    result = {
        "accuracy": (logits.argmax(-1) == digits["labels"]).float().mean().item(),
        "max_difference": (logits - digits["logits"]).abs().max().item(),
        "key_problems": sorted(map(str, [*info["missing_keys"], *info["unexpected_keys"]])),
        "imported_hf_stable": any(name.split(".")[0] == "hf_stable" for name in sys.modules),
    }
    print(json.dumps(result))


if __name__ == "__main__":
    main()
