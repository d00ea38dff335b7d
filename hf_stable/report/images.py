"""The main figures of a report as image files, for papers and model cards. Needs matplotlib."""

from __future__ import annotations

import math
import textwrap
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from hf_stable._whole_files import unfinished
from hf_stable._wording import extra_needed
from hf_stable.report.charts import Chart, Curve, Section, layer_label, order_layers
from hf_stable.report.maps import MapSeries
from hf_stable.report.payload import RUN_COLOURS
from hf_stable.report.run_records import RunRecords
from hf_stable.report.values import evenly

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

__all__ = ["draw_images", "require_matplotlib", "write_images"]

DPI = 200

PANEL = (4.2, 2.8)
"""Width and height of a panel in inches."""

SMALL_PANEL = (2.4, 1.8)

MAX_MAPS = 6

DASHES = ("-", "--", ":", "-.", (0, (8, 3)), (0, (8, 3, 1, 3)))
"""As many as on the page, where eight colours come with them: 24 runs look different."""

TITLE_SIZE, LEGEND_SIZE = 10, 7

MOST_LABELS = 64
"""Entries of a legend."""

LABEL_WIDTH = 40
"""Characters of a line in the legend."""


def write_images(
    runs: Sequence[RunRecords],
    sections: Sequence[Section],
    maps: Sequence[Sequence[MapSeries]],
    folder: Path,
) -> list[Path]:
    """Write one PNG per section, of small multiples one per run, and one with the maps.

    Returns:
        The files.

    Raises:
        OSError: if the folder cannot be written, or is a file.
    """
    if folder.is_file():
        raise NotADirectoryError(f"{folder} is a file; give the name of a folder for the figures")
    folder.mkdir(parents=True, exist_ok=True)
    files = []
    for name, figure in draw_images(runs, sections, maps):
        path = folder / f"{name}.png"
        with unfinished(path) as partial:
            figure.savefig(partial, dpi=DPI, format="png")
        files.append(path)
    return files


def require_matplotlib() -> None:
    """Raise ModuleNotFoundError, saying what to install, where there is no matplotlib."""
    try:
        import matplotlib  # noqa: F401
    except ModuleNotFoundError as error:
        raise extra_needed("an image", "report", error) from error


def draw_images(
    runs: Sequence[RunRecords],
    sections: Sequence[Section],
    maps: Sequence[Sequence[MapSeries]],
) -> Iterator[tuple[str, Figure]]:
    """Yield the name and the figure of each file, one after the other."""
    variants = [variant for section in sections for variant in section.variants]
    suffixes = _file_names([*variants, *(run.name for run in runs)])
    layers = order_layers(chart for section in sections for chart in section.charts)
    for section in sections:
        for variant in section.variants:
            charts = [c for c in section.charts if c.variant == variant and c.curves]
            if charts:
                suffix = f"-{suffixes[variant]}" if len(section.variants) > 1 else ""
                yield f"{section.key}{suffix}", _draw(section, variant, charts, layers)
    for run, series in zip(runs, maps, strict=True):
        if series:
            suffix = f"-{suffixes[run.name]}" if len(runs) > 1 else ""
            yield f"maps{suffix}", _draw_maps(run, series)


def _file_names(names: Iterable[str]) -> dict[str, str]:
    """Return what stands for each in the names of files: numbered where two would be the same."""
    found: dict[str, str] = {}
    for name in dict.fromkeys(names):
        # Some file systems take capitals for small letters.
        plain = "".join(c if c.isalnum() or c in "._" else "-" for c in name.lower()).strip("-")
        number, numbered = 1, plain
        while numbered in found.values():
            number += 1
            numbered = f"{plain}-{number}"
        found[name] = numbered
    return found


def _draw(section: Section, variant: str, charts: Sequence[Chart], layers: Sequence[str]) -> Figure:
    # Not pyplot: no window system is asked for, and no figure outlives its file.
    from matplotlib.figure import Figure

    columns = min(len(charts), 5 if section.small else 2)
    rows = math.ceil(len(charts) / columns)
    width, height = SMALL_PANEL if section.small else PANEL
    figure = Figure((columns * width, rows * height + 0.5), layout="constrained")
    title = (
        f"{section.title}: {variant}" if variant and len(section.variants) > 1 else section.title
    )
    said = "\n".join(_wrapped(each, columns * width, TITLE_SIZE)
                     for each in (title, *section.left_out))  # fmt: skip
    figure.suptitle(said, fontsize=TITLE_SIZE)
    panels = figure.subplots(rows, columns, squeeze=False).ravel()
    for panel, chart in zip(panels, charts, strict=False):
        _draw_chart(panel, chart, layers, small=section.small)
    for panel in panels[len(charts) :]:
        panel.set_axis_off()
    _add_legend(figure, list(panels[: len(charts)]))
    return figure


def _draw_chart(panel: Axes, chart: Chart, layers: Sequence[str], *, small: bool) -> None:
    size = 6 if small else 8
    for curve in chart.curves:
        steps, values = zip(*curve.points, strict=True)
        panel.plot(steps, values, label=_literal(curve.label), **_line(curve, layers))
    for mark in chart.marks:
        colour = RUN_COLOURS[mark.run % len(RUN_COLOURS)]
        if mark.kind == "nan":
            panel.plot(
                [mark.step], [0.03], "x", color=colour, transform=panel.get_xaxis_transform()
            )
        else:
            panel.axvline(mark.step, color=colour, linewidth=0.7, linestyle=":")
    if chart.log and any(value > 0 for curve in chart.curves for _, value in curve.points):
        _make_logarithmic(panel)
    if chart.axis.ticks:
        panel.set_xscale("log", base=2)
        panel.set_xticks(chart.axis.ticks, [str(tick) for tick in chart.axis.ticks])
    if chart.limits:
        panel.set_ylim(chart.limits)
    width, _ = SMALL_PANEL if small else PANEL
    panel.set_title(_wrapped(chart.title, width, size), fontsize=size)
    panel.set_xlabel(chart.axis.title, fontsize=size)
    panel.set_ylabel(_literal(chart.unit), fontsize=size)
    panel.tick_params(labelsize=size - 1)
    panel.grid(alpha=0.3)


def _wrapped(text: str, width: float, size: float) -> str:
    """Break a title into lines that fit a width in inches."""
    # A letter is little more than half as wide as its type is high, in points of 1/72 inch.
    return _literal(textwrap.fill(text, max(12, int(0.9 * width * 72 / (0.6 * size)))))


def _literal(text: str) -> str:
    """Return a text that matplotlib shows as it is: between dollar signs it expects formulas."""
    return text.replace("$", r"\$")


def _make_logarithmic(panel: Axes) -> None:
    from matplotlib.ticker import FuncFormatter, LogLocator, MaxNLocator, NullFormatter

    panel.set_yscale("log", nonpositive="mask")
    low, high = panel.get_ylim()
    axis = panel.yaxis
    if high > 30 * low:
        axis.set_major_locator(LogLocator(numticks=5))
    else:  # powers of ten would be one or none
        axis.set_major_locator(MaxNLocator(4))
        axis.set_major_formatter(FuncFormatter(lambda value, position: f"{value:.3g}"))
    axis.set_minor_formatter(NullFormatter())


def _line(curve: Curve, layers: Sequence[str]) -> dict[str, Any]:
    from matplotlib import colormaps

    if curve.layer is not None:
        depth = layers.index(layer_label(curve)) / max(1, len(layers) - 1)
        colour: Any = colormaps["viridis"](0.85 * depth)
    else:
        colour = RUN_COLOURS[curve.run % len(RUN_COLOURS)] if curve.style == "line" else "0.4"
    own = "-" if curve.layer is not None else DASHES[curve.run % len(DASHES)]
    dash = {"dashed": "--", "dotted": ":"}.get(curve.style, own)
    width = 1.2 if curve.style == "line" else 0.9
    marker = "." if len(curve.points) <= 40 and curve.style == "line" else ""
    return {
        "color": colour, "linestyle": dash, "linewidth": width, "marker": marker, "markersize": 3,
    }  # fmt: skip


def _add_legend(figure: Figure, panels: Sequence[Axes]) -> None:
    """Add one legend for all panels: each label once."""
    seen: dict[str, Any] = {}
    for panel in panels:
        for handle, label in zip(*panel.get_legend_handles_labels(), strict=True):
            seen.setdefault(label, handle)
    if not seen:
        return
    from matplotlib.backends.backend_agg import FigureCanvasAgg

    renderer = FigureCanvasAgg(figure).get_renderer()
    # Colours go on evenly between those that are named.
    seen = {label: seen[label] for label in evenly(list(seen), MOST_LABELS)}
    labels = [textwrap.fill(label, LABEL_WIDTH) for label in seen]
    for columns in range(min(6, len(seen)), 0, -1):
        legend = figure.legend(
            list(seen.values()), labels, loc="outside lower center", ncols=columns,
            fontsize=LEGEND_SIZE,
        )  # fmt: skip
        extent = legend.get_window_extent(renderer)
        if columns == 1 or extent.width <= figure.bbox.width:
            break
        legend.remove()
    width, height = figure.get_size_inches()
    figure.set_size_inches(width, height + extent.height / figure.dpi)


def _draw_maps(run: RunRecords, series: Sequence[MapSeries]) -> Figure:
    """Draw the maps of the head whose entropy fell lowest, at steps from first to last."""
    from matplotlib.figure import Figure

    def lowest(one: MapSeries) -> float:
        return min((f.share for f in one.frames if math.isfinite(f.share)), default=1.0)

    worst = min(series, key=lowest)
    frames = [frame for frame in worst.frames if frame.content is not None]
    chosen = sorted({round(i * (len(frames) - 1) / (MAX_MAPS - 1)) for i in range(MAX_MAPS)})
    shown = [frames[i] for i in chosen if 0 <= i < len(frames)]
    width = 2.2 * max(2, len(shown))
    figure = Figure((width, 2.8), layout="constrained")
    title = f"Attention maps: {run.name}, {worst.label}"
    figure.suptitle(_wrapped(title, width, TITLE_SIZE), fontsize=TITLE_SIZE)
    panels = figure.subplots(1, max(1, len(shown)), squeeze=False).ravel()
    for panel, frame in zip(panels, shown, strict=False):
        content = frame.content
        assert content is not None
        scale, size = content.largest / 255, content.size
        rows = [
            [level * scale for level in content.levels[i * size : (i + 1) * size]]
            for i in range(size)
        ]
        image = panel.imshow(rows, cmap="cividis", vmin=0)
        panel.set_title(_wrapped(f"{frame.when}: {frame.mode}", 2.0, 7), fontsize=7)
        panel.set_xlabel("key", fontsize=7)
        panel.set_ylabel("query", fontsize=7)
        panel.tick_params(labelsize=6)
        figure.colorbar(image, ax=panel, shrink=0.6).ax.tick_params(labelsize=6)
    return figure
