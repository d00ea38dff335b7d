"""Virtual environments of a test's own, and the wheel in them."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import hf_stable

ROOT = Path(__file__).resolve().parents[2]


def make_environment(path: Path, *requirements: str) -> Path:
    """Create a virtual environment, install the requirements one after another, return python."""
    subprocess.run([sys.executable, "-m", "venv", path], check=True)
    python = path / "bin" / "python"
    for requirement in requirements:
        install(python, *requirement.split())
    return python


def install(python: Path, *requirements: str) -> None:
    """Install requirements; modules that are never imported need not be compiled."""
    command = [python, "-m", "pip", "install", "--quiet", "--no-compile", *requirements]
    subprocess.run(command, check=True)


def check_wheel(python: Path, folder: Path) -> None:
    """Build the wheel, install it with what it declares, and use it from outside the checkout."""
    subprocess.run(
        [sys.executable, "-m", "build", "--wheel", "--outdir", folder, ROOT],
        check=True,
        capture_output=True,
    )
    (wheel,) = folder.glob("*.whl")
    install(python, str(wheel))
    script = "import hf_stable, pathlib; p = pathlib.Path(hf_stable.__file__); " + (
        "print(hf_stable.__version__, 'site-packages' in p.parts, (p.parent / 'py.typed').exists())"
    )
    result = subprocess.run(
        [python, "-c", script], check=True, capture_output=True, text=True, cwd=folder
    )
    assert result.stdout.split() == [hf_stable.__version__, "True", "True"]
    command = [python.parent / "hf-stable", "--version"]
    shown = subprocess.run(command, check=True, capture_output=True, text=True, cwd=folder)
    assert hf_stable.__version__ in shown.stdout
