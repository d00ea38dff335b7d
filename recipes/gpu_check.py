"""What a GPU has to show, in one run of at most eight minutes that installs nothing.

    PYTHONPATH=. python recipes/gpu_check.py --output gpu    # from a checkout
    PYTHONPATH=. python recipes/gpu_check.py --output tried --device cpu --tiny

First the tests marked `gpu`, then the benchmarks on the device, whose JSON files go to the folder:
AdamW2 by torch and by the Triton kernels against fused AdamW, sigmaReparam against the plain model
and torch's spectral_norm, the monitor against eager attention with maps. Each part ends when its
share of the time is over, and has then written no figures: `summary.json` says which. The exit code
is that of the tests.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import time
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
MINUTES = 8.0


@dataclass(frozen=True)
class Part:
    """A part of the check.

    Attributes:
        name: of its log.
        share: of the whole time, at most.
        arguments: after `python`.
        kernels: what HF_STABLE_KERNELS says.
    """

    name: str
    share: float
    arguments: tuple[str, ...]
    kernels: str = ""


def parts(output: Path, device: str, *, tiny: bool = False) -> list[Part]:
    """Return the parts in their order, the tests first: figures of what is wrong are none."""
    tests = ("-m", "pytest", "-q", "-p", "no:cacheprovider", "-m", "gpu")

    def bench(name: str, *more: str, rounds: int, kernels: str = "") -> Part:
        label = f"{name}-{kernels}" if kernels else name
        command = ["-m", "hf_stable.commands.main", "bench", name, *more]
        command += ["--device", device, "--rounds", str(1 if tiny else rounds)]
        command += ["--tiny"] * tiny + ["--output", f"{output / label}.json"]
        return Part(label, 0.15, tuple(command), kernels)

    return [
        Part("tests", 0.4, (*tests, "tests/contracts/test_gpu.py", "tests/kernels/test_triton.py")),
        bench("adamw2", "--only", "step alone", rounds=10),
        bench("adamw2", "--only", "step alone", rounds=10, kernels="triton"),
        bench("sigma", rounds=10),
        bench("monitor", rounds=5),
    ]


def run(part: Part, seconds: float, output: Path) -> dict[str, object]:
    """Run a part; return its name, exit code (None where its time was over) and seconds."""
    environment = os.environ | {
        "PYTHONPATH": os.pathsep.join(filter(None, (str(ROOT), os.environ.get("PYTHONPATH", "")))),
        "HF_STABLE_KERNELS": part.kernels,
    }
    start = time.monotonic()
    with (output / f"{part.name}.log").open("w") as log:
        try:
            code: int | None = subprocess.run(
                [sys.executable, *part.arguments], cwd=ROOT, env=environment, stdout=log,
                stderr=subprocess.STDOUT, timeout=seconds, check=False,
            ).returncode  # fmt: skip
        except subprocess.TimeoutExpired:
            code = None
    return {"part": part.name, "code": code, "seconds": round(time.monotonic() - start, 1)}


def main(arguments: list[str] | None = None) -> int:
    """Run all parts and write what became of them."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--output", type=Path, required=True, help="folder for logs and figures")
    parser.add_argument("--device", default="cuda", help="cuda, or cpu to try the script itself")
    parser.add_argument("--tiny", action="store_true", help="small models: to try the script")
    parser.add_argument("--minutes", type=float, default=MINUTES, help="for all parts together")
    options = parser.parse_args(arguments)
    options.output.mkdir(parents=True, exist_ok=True)
    output = options.output.resolve()
    results = []
    for part in parts(output, options.device, tiny=options.tiny):
        results.append(run(part, 60 * options.minutes * part.share, output))
        print(json.dumps(results[-1]), flush=True)
        (output / "summary.json").write_text(json.dumps(results, indent=1) + "\n")
    return 0 if results[0]["code"] == 0 else 1


if __name__ == "__main__":
    sys.exit(main())
