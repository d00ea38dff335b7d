"""What a report's charts, maps and files show, and what they cost on the page."""

from __future__ import annotations

import json
import math

import pytest
from report_runs import (
    FALLING,
    alarm,
    calm,
    deep_probe,
    going_back,
    payload_of,
    small_maps,
    write_run,
)

from hf_stable.monitor.log_file import StabilityLog
from hf_stable.report import write_report
from hf_stable.report.charts import choose_steps
from hf_stable.report.images import draw_images
from hf_stable.report.maps import choose_maps
from hf_stable.report.reading import read_run, read_runs
from hf_stable.report.sections import build_sections


def test_steps_are_spread_over_the_whole_run():
    steps, alarms = list(range(1, 1001)), [7, 20, 31, 40, 55, 60]
    chosen = choose_steps(steps, alarms, 24)
    assert len(chosen) == 24 and {0, 999, *(step - 1 for step in alarms)} <= set(chosen)
    assert max(b - a for a, b in zip(chosen, chosen[1:], strict=False)) <= 60
    assert choose_steps(steps, [], 5) == [0, 249, 499, 749, 999]
    assert choose_steps(steps, [], 2) == [0, 999]


def test_as_many_steps_are_chosen_as_there_is_room_for():
    for length in (1, 2, 7, 24, 25, 26, 60):
        once = list(range(0, 10 * length, 10))
        for steps in (once, once[: length // 2 + 1] + once[: length - length // 2 - 1]):
            for alarms in ([], [5], [0, 30, 31, 32, 33, 900]):
                for count in (3, 4, 6, 24):
                    chosen = choose_steps(steps, alarms, count)
                    assert len(chosen) == min(count, length)
                    assert chosen == sorted(set(chosen))
                    assert chosen[0] == 0 and chosen[-1] == length - 1


def test_an_alarm_has_the_map_of_its_own_attempt(tmp_path):
    steps = (range(1, 61), range(2, 91))
    run = read_run(going_back(tmp_path, steps=steps, alarm_at=(1, 17), num_layers=1))
    ((series, _),) = choose_maps([run])
    shown = [(frame.attempt, frame.step) for frame in series.frames]
    assert len(shown) == 24 and shown == sorted(shown)
    assert {(0, 1), (1, 17), (1, 90)} <= set(shown)
    assert sum(attempt for attempt, _ in shown) > 8


def test_images_of_maps_say_the_attempt(tmp_path):
    run = read_run(going_back(tmp_path / "run"))
    ((_, figure),) = draw_images([run], [], choose_maps([run]))
    titles = [" ".join(panel.get_title().split()) for panel in figure.axes if panel.get_title()]
    assert titles == [
        "step 10: normal", "step 30: normal", "step 50: normal",
        "step 50, after rollback 1: normal", "step 90, after rollback 1: normal",
    ]  # fmt: skip


def test_no_image_takes_the_file_of_another(tmp_path):
    names = ("Base", "base", "base-2", "lr=0.1", "lr-0.1", "all runs")
    probes = {step: calm(step) | small_maps() for step in (1, 2)}
    runs = read_runs([write_run(tmp_path / name, FALLING[:2], probes) for name in names])
    titles = {}
    for file, figure in draw_images(runs, build_sections(runs), choose_maps(runs)):
        assert file not in titles
        titles[file] = figure._suptitle.get_text().replace("\n", " ")
    files = ("base", "base-2", "base-2-2", "lr-0.1", "lr-0.1-2", "all-runs-2")
    for name, file in zip(names, files, strict=True):
        assert titles[f"maps-{file}"].startswith(f"Attention maps: {name}, ")
        assert titles[f"terms-{file}"].endswith(f": {name}")
    assert titles["terms-all-runs"].endswith(": All runs")


def test_two_dozen_runs_have_lines_of_their_own(tmp_path):
    runs = read_runs([write_run(tmp_path / f"run{i}", FALLING[:3]) for i in range(24)])
    figures = dict(draw_images(runs, build_sections(runs), [[]] * len(runs)))
    lines = figures["loss"].axes[0].get_lines()
    assert len({(line.get_color(), str(line._dash_pattern)) for line in lines}) == len(lines) == 24


def colours_by_label(figure):
    """The colours of the lines of each label, and of its entry in the legend."""
    found = {}
    for panel in figure.axes:
        for line in panel.get_lines():
            found.setdefault(line.get_label(), set()).add(line.get_color())
    for legend in figure.legends:
        for line, text in zip(legend.get_lines(), legend.get_texts(), strict=True):
            found[text.get_text()].add(line.get_color())
    return found


def test_a_layer_has_one_colour_in_runs_of_any_depth(tmp_path):
    shallow = write_run(tmp_path / "shallow", FALLING[:2], {s: calm(s, 2) for s in (1, 2)})
    deep = write_run(tmp_path / "deep", FALLING[:2], {s: calm(s, 12) for s in (1, 2)})
    runs = read_runs([shallow, deep])
    sections = [section for section in build_sections(runs) if section.key == "entropy"]
    ((_, figure),) = draw_images(runs, sections, [[], []])
    layers = {k: v for k, v in colours_by_label(figure).items() if k.startswith("layer ")}
    assert len(layers) == 12 and all(len(colours) == 1 for colours in layers.values())
    assert len(set.union(*layers.values())) == 12


def test_layers_are_ordered_by_depth_though_a_run_saw_some_only(tmp_path):
    def some(step):
        every = calm(step, 12)
        return {
            name: {layer: values[layer] for layer in ("vit.layers.0", "vit.layers.11")}
            for name, values in every.items()
        }

    watched = write_run(tmp_path / "some", FALLING[:2], {s: some(s) for s in (1, 2)})
    every = write_run(tmp_path / "every", FALLING[:2], {s: calm(s, 12) for s in (1, 2)})
    write_report([watched, every], tmp_path / "r.html")
    layers = payload_of((tmp_path / "r.html").read_text())["layers"]
    assert layers == [f"layer {i}" for i in range(12)]


@pytest.fixture
def watched_run(tmp_path):
    """A run of twelve layers with every section of a report."""
    losses = [2.0 * 0.995**s + 0.01 * math.sin(s) for s in range(600)]
    folder = write_run(tmp_path / "run", losses)
    log = StabilityLog(folder)
    weights = ("q_proj", "k_proj", "v_proj", "o_proj", "fc1", "fc2")
    rates = {f"vit.layers.{i}.{name}.weight": 1e-3 for i in range(12) for name in weights}
    for step in range(10, 601, 10):
        log.write("probe", 0, step, {"quantities": deep_probe(step, 4), "effective_lr": rates})
    return folder


def test_many_alarms_leave_the_page_small(watched_run, tmp_path):
    write_report([watched_run], tmp_path / "calm.html")
    log = StabilityLog(watched_run)
    before = log.path.stat().st_size
    for number in range(300):
        log.write("alarm", 0, 1 + 2 * number, alarm(f"reason number {number} of all"))
    added = log.path.stat().st_size - before
    write_report([watched_run], tmp_path / "r.html")
    page = (tmp_path / "r.html").read_text()
    assert len(page.encode()) < 6e6
    # Sixty of three hundred are in the table, and with their run.
    assert len(page) - len((tmp_path / "calm.html").read_text()) < added
    payload = payload_of(page)
    assert json.dumps(payload).count("reason number 0 of all") == 1
    steps = [mark["step"] for mark in payload["runs"][0]["marks"]]
    assert len(steps) == 60 and (steps[0], steps[-1]) == (1, 599)
    assert len(payload["charts"]) > 25 and not any(c["marks"] for c in payload["charts"])


def test_gaps_are_marked_in_their_own_charts(tmp_path):
    losses = [*FALLING[:5], math.nan, *FALLING[6:9]]
    events = [("alarm", 6, alarm(kind="nan")), ("stop", 9, {"reason": "enough"})]
    folder = write_run(tmp_path / "run", losses, {s: calm(s) for s in (1, 9)}, events)
    write_report([folder], tmp_path / "r.html")
    payload = payload_of((tmp_path / "r.html").read_text())
    kinds = [mark["kind"] for mark in payload["runs"][0]["marks"]]
    assert kinds == ["nan", "stop"]
    marks = [chart["marks"] for chart in payload["charts"]]
    assert [json.dumps(each) for each in marks if each] == [
        json.dumps(
            [{"kind": "nan", "step": 6, "run": 0, "text": "run: not a finite number from step 6"}]
        )
    ]
