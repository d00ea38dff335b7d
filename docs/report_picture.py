"""The picture of a report that README.md shows: the page in headless Chromium, as a PNG.

hf-stable demo
python docs/report_picture.py demo-output/runs/plain demo-output/runs/sigmareparam
"""

from __future__ import annotations

import argparse
import shutil
import subprocess
import tempfile
from pathlib import Path

from hf_stable.report import write_report

PICTURE = Path(__file__).resolve().parent / "images" / "report.png"

WIDTH, HEIGHT = 1180, 1560
"""Of the window in pixels: the verdicts, the table of runs and the first charts."""


def photograph(runs: list[Path], picture: Path) -> None:
    """Write a report on runs and a picture of its page.

    Raises:
        FileNotFoundError: if a run, or Chromium, is not there.
        RuntimeError: if Chromium made no picture.
    """
    browser = shutil.which("chromium") or shutil.which("google-chrome")
    if browser is None:
        raise FileNotFoundError("the picture needs Chromium: install the package chromium")
    with tempfile.TemporaryDirectory() as folder:
        page = Path(folder) / "report.html"
        write_report(runs, page)
        picture.unlink(missing_ok=True)
        command = [
            browser, "--headless=new", "--no-sandbox", "--disable-gpu", "--hide-scrollbars",
            f"--user-data-dir={folder}/profile", f"--window-size={WIDTH},{HEIGHT}",
            "--virtual-time-budget=20000",  # until the charts are drawn
            f"--screenshot={picture}", page.as_uri(),
        ]  # fmt: skip
        done = subprocess.run(command, capture_output=True, text=True)
    if not picture.is_file():
        raise RuntimeError(f"Chromium made no picture: {done.stderr[-500:]}")


def main() -> None:
    """Take the picture."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("runs", nargs="+", type=Path, help="output folders of the Trainer")
    parser.add_argument("--output", type=Path, default=PICTURE, help="PNG to write")
    options = parser.parse_args()
    photograph(options.runs, options.output.resolve())


if __name__ == "__main__":
    main()
