"""Reports on runs: what is read, written, and said about what is damaged."""

from __future__ import annotations

import csv
import json
import math
import re
import sys
import time
from pathlib import Path

import pytest
from report_runs import FALLING, LAYERS, calm, collapsing, deep_probe, payload_of, write_run
from tiny_models import tiny_model
from tiny_training import make_trainer

import hf_stable
from hf_stable._wording import short_names
from hf_stable.commands.conventions import BAD_INPUT, NO, SUCCESS
from hf_stable.commands.main import main
from hf_stable.monitor.log_file import StabilityLog, read_log
from hf_stable.report import FORMATS, write_report
from hf_stable.report.charts import thin
from hf_stable.report.images import draw_images
from hf_stable.report.map_lines import read_maps
from hf_stable.report.reading import name_runs, read_run
from hf_stable.report.rows import TIDY_COLUMNS, tidy_rows
from hf_stable.report.sections import build_sections
from hf_stable.report.summary import summarise


@pytest.fixture(scope="module")
def real_run(tmp_path_factory):
    """A real Trainer's folder, with every term, maps, AdamW2 and a patched model."""
    folder = tmp_path_factory.mktemp("runs") / "real"
    model = hf_stable.patch(tiny_model("vit"), "sigma_reparam")
    monitor = hf_stable.StabilityCallback(every=2, terms="all", maps=True)
    trainer = make_trainer(
        model, folder, callbacks=[monitor], max_steps=6, optim="adamw2", save_steps=3,
        eval_strategy="steps", eval_steps=3,
    )  # fmt: skip
    trainer.train()
    trainer.save_state()
    return folder


def probes_of(folder):
    """The probes of a run's log."""
    return [line for line in read_log(folder) if line["event"] == "probe"]


def test_a_real_run_fills_every_chart(real_run, tmp_path):
    written = write_report([real_run], tmp_path / "r.html")
    page = (tmp_path / "r.html").read_text()
    assert written.files == (tmp_path / "r.html",) and not written.notes
    assert (
        'class="missing"'
        not in page.split("<main>")[1].replace("<noscript>", "", 1).split("</noscript>")[1]
    )
    payload = payload_of(page)
    titles = re.findall(r"<figcaption>(.*?)</figcaption>", page)
    for part in ("Training loss", "Evaluation: loss", "Lowest head of each layer", "SEC",
                 "Stable rank", "\u2016x\u2016"):  # fmt: skip
        assert any(part in title for title in titles), part
    terms = [t for t in titles if t.startswith(("\u03c3\u2081(W", "\u2016"))]
    assert len(terms) >= 15
    assert sum(len(chart["curves"]) for chart in payload["charts"]) > 50
    maps = payload_of(page, "map-payload")
    assert len(maps[0]) == 4  # two layers of two heads
    assert [frame["step"] for frame in maps[0][0]["frames"]] == [1, 2, 4, 6]
    assert "http://" not in page.split("<script>")[0] and "<link rel=" in page  # nothing is fetched


def test_the_numbers_in_the_page_are_those_of_the_run(real_run, tmp_path):
    write_report([real_run], tmp_path / "r.html")
    payload = payload_of((tmp_path / "r.html").read_text())
    lines = probes_of(real_run)
    layer = next(iter(lines[0]["quantities"]["entropy"]))
    lowest = [min(line["quantities"]["entropy"][layer]) for line in lines]
    shown = [
        [curve["y"], payload["steps"][curve["x"]]]
        for chart in payload["charts"]
        for curve in chart["curves"]
        if chart["unit"] == "entropy (nats)" and curve["layer"] == 0
    ]
    assert shown[0][1] == [line["step"] for line in lines]
    assert shown[0][0] == pytest.approx(lowest, rel=1e-3)


def charts_of(page, section):
    """Title, variant and payload of each chart of a section."""
    html = page.split(f'<section id="{section}">')[1].split("</section>")[0]
    found = re.findall(
        r'data-chart="(\d+)" data-variant="(.*?)"><figcaption>(.*?)</figcaption>', html
    )
    charts = payload_of(page)["charts"]
    return [(title, variant, charts[int(number)]) for number, variant, title in found]


def test_concentration_is_drawn_against_its_size(real_run, tmp_path):
    write_report([real_run], tmp_path / "r.html")
    page = (tmp_path / "r.html").read_text()
    lines = probes_of(real_run)
    charts = charts_of(page, "concentration")
    assert [title for title, *_ in charts] == [f"step {line['step']}" for line in lines]
    for (_, _, chart), line in zip(charts, lines, strict=True):
        recorded = line["quantities"]["sec_curve"]
        assert [curve["y"] for curve in chart["curves"]] == [
            pytest.approx(values, rel=1e-3) for values in recorded.values()
        ]
        sizes = [2**i for i in range(len(next(iter(recorded.values()))))]
        assert chart["axis"]["ticks"] == sizes and chart["axis"]["name"] == "s"
        assert payload_of(page)["steps"][chart["curves"][0]["x"]] == sizes
        assert chart["marks"] == [] and chart["limits"] == [0, 1.02]
    first, last = (chart["curves"][0]["y"] for _, _, chart in (charts[0], charts[-1]))
    assert first != last
    others = [chart for chart in payload_of(page)["charts"] if not chart["axis"]["ticks"]]
    assert len(others) > 20 and all(chart["axis"]["name"] == "step" for chart in others)


def test_concentration_of_a_collapse_beside_other_runs(tmp_path):
    losses = [2.0 * 0.98**s + 0.1 for s in range(140)]
    every = range(10, 141, 10)
    good = write_run(tmp_path / "good", losses, {s: calm(s) for s in every})
    spread = {s: calm(s, sec=math.nan) if s > 60 else calm(s) for s in every}
    for step in (70, 80):
        spread[step]["sec_curve"]["vit.layers.1"] = [None] * 5
    lost = write_run(tmp_path / "lost", losses, spread)
    short = write_run(tmp_path / "short", losses, {s: calm(s) for s in (10, 20)})
    old = write_run(tmp_path / "old", losses, {10: {"sec": calm(10)["sec"]}})
    write_report([collapsing(tmp_path / "bad"), good, lost, short, old], tmp_path / "r.html")
    page = (tmp_path / "r.html").read_text()
    by_name = {}
    for title, variant, chart in charts_of(page, "concentration"):
        values = {curve["label"]: curve["y"] for curve in chart["curves"]}
        by_name.setdefault(variant, {})[title] = values
    assert list(by_name) == ["All runs", "bad", "good", "lost", "short", "old"]
    compared = by_name["All runs"]
    assert list(compared)[0].startswith("step 10") and len(compared) == 4
    assert compared["step 10, most concentrated layer"].keys() == {"bad", "good", "lost", "short"}
    last = compared["step 140, most concentrated layer"]
    assert last["bad"] == [0.597, 0.796, 0.995, 0.9975, 1] and last["good"][2] == 0.5
    # What had ended by then, or was NaN in the most concentrated layer, is not drawn as it was.
    assert last.keys() == {"bad", "good", "lost"}
    dead = compared["step 80, most concentrated layer"]
    assert dead.keys() == {"bad", "good"}
    # The step of its alarm is among them.
    assert by_name["bad"]["step 80"]["layer 0"][2] == 0.995
    assert by_name["bad"]["step 10"]["layer 0"][2] == 0.5
    assert by_name["lost"]["step 140 (1 of 2 layers not finite)"].keys() == {"layer 1"}
    assert list(by_name["old"].values()) == [{}]
    html = page.split('<section id="concentration">')[1].split("</section>")[0]
    assert "old did not record sec_curve" in html


def test_the_most_concentrated_layer_is_one_layer(tmp_path):
    probe = calm(1)
    probe["sec_curve"] = {
        "vit.layers.0": [0.9, 0.91, 0.92, 0.95, 1.0],
        "vit.layers.1": [0.3, 0.6, 0.99, 0.995, 1.0],
    }
    runs = [write_run(tmp_path / name, FALLING, {1: probe}) for name in "ab"]
    write_report(runs, tmp_path / "r.html")
    (_, _, chart), *_ = charts_of((tmp_path / "r.html").read_text(), "concentration")
    assert chart["curves"][0]["y"] == [0.3, 0.6, 0.99, 0.995, 1]


def test_what_was_recorded_and_never_finite_is_said_to_be_so(tmp_path):
    probes = {s: calm(s) | {"stable_rank": {"vit.layers.0": [None, None]}} for s in (1, 9)}
    for probe in probes.values():
        for name in ("sec", "sec_curve"):
            probe[name] = {layer: [None] * len(v) for layer, v in probe[name].items()}
    write_report([write_run(tmp_path / "dead", FALLING, probes)], tmp_path / "r.html")
    page = (tmp_path / "r.html").read_text()
    assert "sec of dead was at no probe a finite number" in page
    assert page.count("the weights of no layer were finite") == 2
    assert "dead did not record sec " not in page
    assert "dead did not record sigma_wq" in page


def test_the_time_is_that_of_all_legs(tmp_path):
    folder = write_run(tmp_path / "run", FALLING, {1: calm(1)})
    assert summarise(read_run(folder)).seconds == 83  # as the Trainer measured
    log = StabilityLog(folder)
    for attempt, step, seconds in ((0, 50, 20.5), (1, 100, 40.0)):
        log.write("end", attempt, step, {"seconds": seconds})
    run = read_run(folder)
    assert summarise(run).seconds == 60.5 and not run.events
    assert "1 line" not in " ".join(run.notes)


def test_several_runs_are_compared(real_run, tmp_path, capsys):
    bad = collapsing(tmp_path / "bad")
    assert main(["report", str(real_run), str(bad), "--output", str(tmp_path / "r.html")]) == NO
    printed = capsys.readouterr().out
    assert "bad: Failed: the loss was lost at step 81" in printed and "real" in printed
    page = (tmp_path / "r.html").read_text()
    assert len(payload_of(page)["runs"]) == 2 and page.count('class="verdict ') == 2
    assert main(["report", str(real_run), "--output", str(tmp_path / "r.html")]) == SUCCESS


def test_png_json_and_csv_hold_the_main_figures_and_every_number(real_run, tmp_path):
    images = write_report([real_run], tmp_path / "figures", format="png").files
    names = {path.name for path in images}
    assert {"loss.png", "entropy.png", "spectra.png", "concentration.png"} <= names
    assert any(name.startswith("maps") for name in names)
    assert all(path.read_bytes().startswith(b"\x89PNG") for path in images)

    write_report([real_run], tmp_path / "r.csv", format="csv")
    rows = list(csv.DictReader((tmp_path / "r.csv").open()))
    assert tuple(rows[0]) == TIDY_COLUMNS
    lines = probes_of(real_run)
    sizes = [row["quantity"] for row in rows if row["quantity"].startswith("sec_")]
    curves = [value for line in lines for value in line["quantities"]["sec_curve"].values()]
    assert sorted(sizes) == sorted(f"sec_{2**i}" for curve in curves for i in range(len(curve)))
    for name in ("entropy", "sigma_w2w1", "gamma", "effective_lr"):
        expected = sum(
            len(value) if isinstance(value, list) else 1
            for line in lines
            for value in {**line["quantities"], **line}[name].values()
        )
        assert sum(row["quantity"] == name for row in rows) == expected, name

    write_report([real_run], tmp_path / "r.json", format="json")
    content = json.loads((tmp_path / "r.json").read_text())
    assert content["columns"] == list(TIDY_COLUMNS) and len(content["rows"]) == len(rows)
    assert content["runs"][0]["verdict"]["state"] in ("trained", "warned", "failed")


def test_legends_titles_and_ticks_of_images_have_room(tmp_path):
    from matplotlib.backends.backend_agg import FigureCanvasAgg

    probes = {
        step: calm(step, 12, 2, sigma_qk=10.0 ** (step % 4)) | {
            "entropy_bound": {f"vit.layers.{i}": [0.1] * 2 for i in range(12)},
            "sigma_wq": {f"vit.layers.{i}": 1 + 0.01 * i + step / 100 for i in range(12)},
            "sigma_wk": {f"vit.layers.{i}": 10.0 ** (step + i) for i in range(12)},
        }
        for step in range(1, 9)
    }  # fmt: skip
    name = "a-run-with-quite-a-long-name-as-they-come-from-sweeps-lr-0.001-seed-0"
    run = read_run(write_run(tmp_path / name, FALLING[:8], probes))
    other = read_run(write_run(tmp_path / "b", FALLING[:8], probes))
    drawn = {}
    shown = ("entropy", "terms", "concentration")
    sections = [s for s in build_sections([run, other]) if s.key in shown]
    for name, figure in draw_images([run, other], sections, [[], []]):
        canvas = FigureCanvasAgg(figure)
        canvas.draw()
        renderer, page = canvas.get_renderer(), figure.bbox
        drawn[name] = len(figure.axes)
        texts = [panel.title for panel in figure.axes] + [figure._suptitle, *figure.legends]
        for extent in (text.get_window_extent(renderer) for text in texts):
            assert page.x0 <= extent.x0 <= extent.x1 <= page.x1, name
            assert page.y0 <= extent.y0 <= extent.y1 <= page.y1, name
        for panel in figure.axes:
            labels = [t for t in panel.get_yticklabels(which="both") if t.get_text()]
            extents = sorted((t.get_window_extent(renderer) for t in labels), key=lambda e: e.y0)
            assert all(a.y1 <= b.y0 for a, b in zip(extents, extents[1:], strict=False)), name
    assert drawn["entropy"] == 4 and any(name.startswith("terms") for name in drawn)


def test_rates_after_a_rollback_begin_a_new_line(tmp_path):
    folder = write_run(tmp_path / "run", FALLING[:9])
    log = StabilityLog(folder)
    name = "vit.layers.0.attention.q_proj.weight"
    for attempt, step, rate in ((0, 3, 1e-3), (0, 6, 1e-3), (1, 6, 5e-4), (1, 9, 4e-4)):
        values = {"quantities": calm(step), "effective_lr": {name: rate}}
        log.write("probe", attempt, step, values)
        if (attempt, step) == (0, 6):
            log.write("rollback", 0, 6, {"to_step": 3, "lr_scale": 0.5})
    sections = {section.key: section for section in build_sections([read_run(folder)])}
    (chart,) = sections["rates"].charts
    used, scheduled = chart.curves
    steps, rates = zip(*used.points, strict=True)
    assert steps == (3, 6, 5.5, 6, 9) and scheduled.label == "scheduled"
    assert math.isnan(rates[2]) and rates[:2] + rates[3:] == (1e-3, 1e-3, 5e-4, 4e-4)
    assert [mark.kind for mark in chart.marks] == ["rollback"]
    titles = [chart.title for chart in sections["concentration"].charts]
    assert titles == ["step 3", "step 6", "step 6, after rollback 1", "step 9, after rollback 1"]


def test_a_checkpoint_stands_for_the_run_up_to_it(real_run):
    run = read_run(real_run / "checkpoint-3")
    assert run.num_steps == 3 and [probe.step for probe in run.probes] == [1, 2]
    assert [probe.step for probe in read_run(real_run).probes] == [1, 2, 4, 6]


def damage_state(folder):
    (folder / "trainer_state.json").write_text('{"global_step": 3, "log_hist')


def damage_log(folder):
    path = folder / "stability.jsonl"
    path.write_text(path.read_text()[:-40] + "\n{}\nnull\n[1]\n\x00\n")


def holes(folder):
    lines = [json.loads(line) for line in (folder / "stability.jsonl").open()]
    lines[0]["quantities"] = None
    lines[1]["quantities"]["entropy"][LAYERS[0]] = [None, "nan"]
    lines[2]["quantities"]["sigma_qk"] = [1, 2]
    lines[3]["quantities"]["rank"] = {LAYERS[0]: "x"}
    lines[4]["quantities"]["maps"] = {LAYERS[0]: [[[1.0]], None, [["a"]]]}
    (folder / "stability.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))


def huge_numbers(folder):
    lines = [json.loads(line) for line in (folder / "stability.jsonl").open()]
    lines[0]["step"] = float("inf")
    lines[1]["step"] = 10**400
    lines[2]["quantities"]["entropy"][LAYERS[0]] = [10**400, 1]
    lines[2]["quantities"]["entropy_normalised"][LAYERS[0]] = [10**400, 1]
    lines[2]["effective_lr"] = {f"{LAYERS[0]}.q.weight": 10**400}
    text = "".join(json.dumps(line) + "\n" for line in lines).replace("Infinity", "1e999")
    (folder / "stability.jsonl").write_text(text)
    state = json.loads((folder / "trainer_state.json").read_text())
    state |= {"global_step": 10**400, "max_steps": 10**400}
    state["log_history"][0] |= {"step": 10**400}
    state["log_history"][1] |= {"loss": 10**400}
    (folder / "trainer_state.json").write_text(json.dumps(state))


def deep_nesting(folder):
    deep = "[" * 100_000
    (folder / "trainer_state.json").write_text(deep)
    with (folder / "stability.jsonl").open("a") as file:
        file.write(deep + "\n" + '{"event": "probe", "quantities": ' + '{"a": ' * 100_000 + "\n")


DAMAGES = {
    "huge numbers": (huge_numbers, "2 lines of stability.jsonl could not be read"),
    "deep nesting": (deep_nesting, "trainer_state.json is damaged (nested too deep)"),
    "half a state": (damage_state, "trainer_state.json is damaged"),
    "no state": (lambda f: (f / "trainer_state.json").unlink(), "There is no trainer_state.json"),
    "half a log": (damage_log, "5 lines of stability.jsonl could not be read"),
    "no log": (lambda f: (f / "stability.jsonl").unlink(), "attention was not watched"),
    "an empty log": (lambda f: (f / "stability.jsonl").write_text(""), "holds no probe"),
    "holes": (holes, None),
}


@pytest.mark.parametrize("format", ["html", "csv", "json"])
@pytest.mark.parametrize("damage, note", DAMAGES.values(), ids=DAMAGES)
def test_what_is_damaged_is_said_and_the_rest_is_shown(damage, note, format, tmp_path):
    folder = collapsing(tmp_path / "run")
    damage(folder)
    if damage in (holes, huge_numbers) and format == "csv":
        assert write_report([folder], tmp_path / "figures", format="png").files
    written = write_report([folder], tmp_path / "out", format=format)
    assert all(path.exists() for path in written.files)
    notes = " ".join(text for _, text in written.notes)
    assert (note or "") in notes
    if format == "html" and note:
        assert note in (tmp_path / "out").read_text()


SPELLINGS = {"bare": ("NaN", "Infinity"), "texts": ('"nan"', '"inf"'), "strict": ("null", "null")}


@pytest.mark.parametrize("spelling", SPELLINGS)
def test_every_spelling_of_what_is_not_finite_is_read(spelling, tmp_path):
    """Logs of before 0.1.0 have NaN and Infinity as Python writes them, or as texts."""
    nan, inf = SPELLINGS[spelling]
    quantities = {"entropy": {"a.0": ["NAN", 1.5]}, "sigma_qk": {"a.0": ["INF", 2.0]}}
    alarm = {"kind": "nonfinite", "quantity": "loss", "value": "NAN", "threshold": "INF"}
    lines = [
        {"event": "probe", "attempt": 0, "step": 1, "loss": 2.0, "quantities": quantities},
        {"event": "probe", "attempt": 0, "step": 2, "loss": "NAN", "quantities": quantities},
        {"event": "alarm", "attempt": 0, "step": 2, **alarm},
    ]
    text = "".join(json.dumps(line) + "\n" for line in lines)
    text = text.replace('"NAN"', nan).replace('"INF"', inf)
    (tmp_path / "stability.jsonl").write_text(text)
    assert spelling == "bare" or '"loss": NaN' not in text
    run = read_run(tmp_path)
    assert [note for note in run.notes if "stability.jsonl" in note] == []
    assert [value for _, value in run.losses][0] == 2 and math.isnan(run.losses[1][1])
    values = {row["quantity"]: row["value"] for row in tidy_rows(run) if row["head"] != 1}
    assert not any(map(math.isfinite, (values["entropy"], values["sigma_qk"])))
    assert [v for _, _, v in run.probed("entropy", "a.0")] == [1.5, 1.5]
    for format in ("html", "csv", "json"):
        written = write_report([tmp_path], tmp_path / "out", format=format)
        assert written.summaries[0].verdict.state == "failed"
        assert written.summaries[0].verdict.divergence_step == 2
    rows = json.loads((tmp_path / "out").read_text(), parse_constant=pytest.fail)["rows"]
    assert {row[-2] for row in rows if row[3] == "entropy"} == {None, 1.5}


def test_a_report_that_nobody_named_goes_beside_its_runs(tmp_path, monkeypatch, capsys):
    (tmp_path / "here").mkdir()
    monkeypatch.chdir(tmp_path / "here")
    first, second = (collapsing(tmp_path / "runs" / name) for name in ("first", "second"))
    for given, place in (
        ([first], first),
        ([first, second], tmp_path / "runs"),
        ([Path("../runs/second")], second),
    ):
        for more in ([], ["--json"]):
            assert main(["report", *map(str, given), *more]) == NO
            printed = capsys.readouterr().out
            assert (place / "report.html").is_file()
            written = json.loads(printed)["files"] if more else printed.splitlines()[-1:]
            assert [Path(name).resolve() for name in written] == [place / "report.html"]
            (place / "report.html").unlink()
    # A checkpoint is no place for it: the Trainer deletes old ones.
    (first / "checkpoint-100").mkdir()
    state = json.loads((first / "trainer_state.json").read_text())
    (first / "checkpoint-100" / "trainer_state.json").write_text(json.dumps(state))
    assert main(["report", str(first / "checkpoint-100"), "--format", "csv"]) == NO
    assert (first / "report.csv").is_file()
    assert not list((tmp_path / "here").iterdir())
    assert {path.name for path in second.iterdir()} == {"trainer_state.json", "stability.jsonl"}


def test_runs_of_different_lengths_and_nan_curves(tmp_path):
    runs = [
        collapsing(tmp_path / "long"),
        write_run(tmp_path / "short", FALLING[:5], {1: calm(1)}),
        write_run(tmp_path / "nan", [math.nan] * 30, {s: calm(s, sec=math.nan) for s in (1, 9)}),
    ]
    for format in FORMATS:
        written = write_report(runs, tmp_path / f"out-{format}", format=format)
        states = [summary.verdict.state for summary in written.summaries]
        assert states == ["failed", "trained", "failed"]
    page = (tmp_path / "out-html").read_text()
    assert [run["name"] for run in payload_of(page)["runs"]] == ["long", "short", "nan"]


def test_names_cannot_break_the_page(tmp_path):
    name = "<script>alert(1)<{{SCRIPT}}>"
    folder = write_run(tmp_path / name, FALLING, {1: calm(1)})
    write_report([folder], tmp_path / "r.html")
    page = (tmp_path / "r.html").read_text()
    assert "<script>alert(1)" not in page and "&lt;script&gt;alert(1)" in page
    assert payload_of(page)["runs"][0]["name"] == name


def test_a_long_run_of_a_deep_model_is_small_and_quick(tmp_path, monkeypatch):
    """10,000 steps, 12 layers of 12 heads, every term, rates and maps: the time is printed."""
    steps = range(50, 10_001, 50)
    weights = ("q_proj", "k_proj", "v_proj", "o_proj", "fc1", "fc2", "norm1", "norm2")
    names = [f"vit.layers.{i}.{weight}.weight" for i in range(12) for weight in weights]
    losses = [2.0 * 0.9995**s + 0.01 * math.sin(s) for s in range(10_000)]
    folder = write_run(tmp_path / "run", losses)
    log = StabilityLog(folder)
    for step in steps:
        rates = {name: 1e-3 * abs(math.sin(step + i)) for i, name in enumerate(names)}
        values = {"quantities": deep_probe(step, 8), "effective_lr": rates}
        log.write("probe", 0, step, values)
    parsed = []

    def counting(log, offset):
        parsed.append(offset)
        return read_maps(log, offset)

    monkeypatch.setattr("hf_stable.report.maps.read_maps", counting)
    started = time.perf_counter()
    write_report([folder], tmp_path / "r.html")
    print(f"written in {time.perf_counter() - started:.1f} s")
    page = (tmp_path / "r.html").read_text()
    assert len(page.encode()) < 6e6
    (heads,) = payload_of(page, "map-payload")
    shown = {frame["step"] for series in heads for frame in series["frames"]}
    assert {50, 10_000} < shown and len(heads) == 144
    # The first and the last once more, to see how much there is.
    assert len(set(parsed)) == len(shown) < len(steps) / 4
    assert len(parsed) == len(shown) + 2
    titles = re.findall(r"<figcaption>(.*?)</figcaption>", page)
    assert "fc2" in titles and page.count('class="missing"') == 1  # of a browser without scripts


def test_many_large_maps_leave_the_page_small(tmp_path):
    probes = {step: deep_probe(step, 64, 2, 6) for step in range(1, 9)}
    folder = write_run(tmp_path / "run", FALLING[:8], probes)
    write_report([folder], tmp_path / "r.html")
    (heads,) = payload_of((tmp_path / "r.html").read_text(), "map-payload")
    assert 1 <= len(heads) < 12 and {f["size"] for s in heads for f in s["frames"]} == {64}
    assert (tmp_path / "r.html").stat().st_size < 6e6


def test_more_curves_are_drawn_coarser(tmp_path, monkeypatch):
    probes = {step: calm(step, sec=abs(math.sin(step))) for step in range(1, 301)}
    run = read_run(write_run(tmp_path, FALLING * 3, probes))

    def lengths():
        charts = [chart for section in build_sections([run]) for chart in section.charts]
        return [len(c.points) for chart in charts for c in chart.curves if c.style == "line"]

    assert max(lengths()) == 300
    monkeypatch.setattr("hf_stable.report.sections.MOST_POINTS", 1)
    assert 0 < max(lengths()) <= 64 + 16  # one gap of each stretch may stay


def test_maps_that_are_damaged_are_said_to_be(tmp_path):
    probes = {step: deep_probe(step, 4, 1, 1) for step in range(1, 4)}
    folder = write_run(tmp_path / "run", FALLING[:3], probes)
    lines = (folder / "stability.jsonl").read_text().splitlines()
    lines[1] = re.sub(
        r'"maps": \{"vit.layers.0": \[\[', '"maps": {"vit.layers.0": [[nonsense', lines[1]
    )
    (folder / "stability.jsonl").write_text("\n".join(lines) + "\n")
    write_report([folder], tmp_path / "r.html")
    ((series,),) = payload_of((tmp_path / "r.html").read_text(), "map-payload")
    assert [frame["largest"] is None for frame in series["frames"]] == [False, True, False]


def test_thinning_keeps_spikes_and_gaps():
    points = [(float(s), 0.0) for s in range(5000)]
    points[1234], points[4321] = (1234.0, 9.0), (4321.0, math.nan)
    kept = thin(points, 400)
    assert len(kept) <= 520 and (1234.0, 9.0) in kept
    assert any(math.isnan(value) for _, value in kept)
    assert kept[0] == points[0] and kept[-1] == points[-1]
    assert thin(points[:100], 400) == points[:100]


def test_short_names_tell_layers_and_runs_apart(tmp_path):
    assert list(short_names(["vit.layers.0", "vit.layers.1"]).values()) == ["0", "1"]
    swin = ["s.layers.0.blocks.0", "s.layers.0.blocks.1", "s.layers.1.blocks.0"]
    assert len(set(short_names(swin).values())) == 3
    assert name_runs([tmp_path / "a" / "run", tmp_path / "b" / "run"]) == ["a/run", "b/run"]
    assert name_runs([tmp_path / "a", tmp_path / "a"]) == ["a (1)", "a (2)"]


def test_bad_input_is_one_line(tmp_path, capsys):
    (tmp_path / "empty").mkdir()
    cases = [
        ([str(tmp_path / "nowhere")], "does not exist"),
        ([str(tmp_path / "empty")], "holds neither trainer_state.json nor stability.jsonl"),
        ([str(collapsing(tmp_path / "run")), "--format", "pdf"], "choose one of html, png, json"),
        ([str(tmp_path / "run"), "--output", str(tmp_path / "empty")], "is a folder"),
    ]
    for arguments, message in cases:
        assert main(["report", *arguments]) == BAD_INPUT
        error = capsys.readouterr().err
        assert message in error and error.count("\n") == 1
    (tmp_path / "outer" / "inner").mkdir(parents=True)
    (tmp_path / "outer" / "inner" / "stability.jsonl").touch()
    assert main(["report", str(tmp_path / "outer")]) == BAD_INPUT
    assert "its subfolders do: inner" in capsys.readouterr().err


def test_without_plotly_it_says_what_to_install(tmp_path, monkeypatch, capsys):
    for name in ("plotly", "plotly.offline"):
        monkeypatch.setitem(sys.modules, name, None)
    folder = collapsing(tmp_path / "run")
    assert main(["report", str(folder), "--output", str(tmp_path / "r.html")]) == BAD_INPUT
    assert 'pip install "hf-stable[report]"' in capsys.readouterr().err
    assert main(["report", str(folder), "--format", "csv", "--output", str(tmp_path / "c")]) == NO
