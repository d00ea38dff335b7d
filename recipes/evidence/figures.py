"""Figures of the evidence, drawn from what is committed. Needs matplotlib."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from recipes.evidence.claim import Figure

FOLDER = Path(__file__).resolve().parent / "figures"

PANEL = (3.4, 2.5)
"""Width and height of a panel in inches."""

COLOURS = ("#c0392b", "#2470a0", "#3b8a4a", "#8e5ea2")

ALL_BLOCKS = "blocks"
"""Key of a panel that has a line for each block instead of one for each run."""


def draw(key: str, figure: Figure, courses: Mapping[str, Mapping[str, Any]]) -> Path:
    """Write `figures/claimKEY.svg`, the same bytes from the same courses and matplotlib.

    Args:
        key: of the claim.
        figure: what is drawn.
        courses: what `records.course` returned, by variant.

    Returns:
        The file.
    """
    import matplotlib
    from matplotlib.figure import Figure as Canvas

    width, height = PANEL
    rows, columns = len(figure.rows), len(figure.panels)
    with matplotlib.rc_context(
        {"svg.hashsalt": "hf-stable", "svg.fonttype": "none", "font.size": 8}
    ):
        size = (width * columns, height * rows)
        canvas = Canvas(figsize=size)
        # Margins by hand: a layout that is solved for takes seconds.
        margins = dict(
            left=0.5 / size[0], right=1 - 0.1 / size[0], bottom=0.4 / size[1],
            top=1 - 0.3 / size[1], wspace=0.22, hspace=0.42,
        )  # fmt: skip
        grid = canvas.subplots(rows, columns, squeeze=False, gridspec_kw=margins)
        for axes, names in zip(grid, figure.rows, strict=True):
            for panel, what in zip(axes, figure.panels, strict=True):
                for name, colour in zip(names, COLOURS, strict=False):
                    _plot(panel, name, courses[name], what.key, colour)
                panel.set_title(what.title)
                panel.set_xlabel("optimizer step")
                if figure.log_steps:
                    panel.set_xscale("log")
                if what.log:
                    panel.set_yscale("log")
            axes[0].legend(frameon=False)
        FOLDER.mkdir(exist_ok=True)
        path = FOLDER / f"claim{key}.svg"
        canvas.savefig(path, metadata={"Date": None})
    # matplotlib ends lines of paths with spaces.
    lines = path.read_text().splitlines()
    path.write_text("\n".join(line.rstrip() for line in lines) + "\n")
    return path


def _plot(panel: Any, name: str, course: Mapping[str, Any], key: str, colour: str) -> None:
    if key != ALL_BLOCKS:
        panel.plot(course["step"], _numbers(course[key]), color=colour, label=name, linewidth=1.2)
        return
    blocks = [part for part in course if part.startswith("block ")]
    for index, block in enumerate(blocks):
        label = {0: f"{name}: first block", len(blocks) - 1: "last block"}.get(index)
        panel.plot(
            course["step"], _numbers(course[block]), color=colour, label=label, linewidth=1.0,
            alpha=1 - 0.8 * index / len(blocks),
        )  # fmt: skip


def _numbers(values: list[float | None]) -> list[float]:
    return [float("nan") if value is None else value for value in values]
