"""What is damaged or hostile in a run's files: the rest is reported, and what is missing said."""

from __future__ import annotations

import csv
import json
import math
import os
import re
import threading

import pytest
from report_runs import FALLING, LAYERS, alarm, calm, payload_of, small_maps, write_run

from hf_stable._whole_files import write_whole
from hf_stable.report import FORMATS, write_report
from hf_stable.report.map_lines import parse_map
from hf_stable.report.reading import read_run, read_runs
from hf_stable.report.sections import build_sections
from hf_stable.report.summary import summarise

BEYOND = 10**400
"""A number that no float can hold."""


def lines_of(folder):
    return [json.loads(line) for line in (folder / "stability.jsonl").open()]


def write_lines(folder, lines):
    text = "".join(json.dumps(line) + "\n" for line in lines)
    (folder / "stability.jsonl").write_text(text)


@pytest.fixture
def run(tmp_path):
    """A run with everything in it: probes with maps, rates, an alarm, a rollback."""
    probes = {step: calm(step) | small_maps(shift=step) for step in (10, 50, 90)}
    folder = write_run(tmp_path / "run", FALLING, probes, [("alarm", 50, alarm())])
    lines = lines_of(folder)
    for line in lines[:3]:
        line["effective_lr"] = {f"{layer}.fc1.weight": 1e-3 for layer in LAYERS}
    write_lines(folder, lines)
    return folder


def in_probe(*keys):
    """Where a value is put in the second probe."""
    return lambda lines: (lines[1], keys)


def in_alarm(key):
    return lambda lines: (lines[3], (key,))


FIELDS = {
    "a head's value that is a text": (in_probe("quantities", "entropy", LAYERS[0]), [1.0, "much"],
                                      f"entropy of {LAYERS[0]} at step 50"),
    "a head's value that is a list": (in_probe("quantities", "rank", LAYERS[0]), [[1.0], 1.0],
                                      f"rank of {LAYERS[0]} at step 50"),
    "a layer that is an object": (in_probe("quantities", "sigma_qk", LAYERS[1]), {"0": 1.0},
                                  f"sigma_qk of {LAYERS[1]} at step 50"),
    "a quantity that is a list": (in_probe("quantities", "sec"), [0.5], "sec at step 50"),
    "modes that are numbers": (in_probe("quantities", "mode", LAYERS[0]), [1, 2],
                               f"mode of {LAYERS[0]} at step 50"),
    "maps that are a list": (in_probe("quantities", "maps"), [[1.0]], "maps at step 50"),
    "quantities that are none": (in_probe("quantities"), "many", "quantities at step 50"),
    "rates that are a list": (in_probe("effective_lr"), [1e-3], "effective_lr at step 50"),
    "a loss that is a list": (in_probe("loss"), [1.0], "loss at step 50"),
    "a kind that is a list": (in_alarm("kind"), ["collapse"], "kind of an event at step 50"),
    "a layer that is a number": (in_alarm("layer"), 7, "layer of an event at step 50"),
    "a head below zero": (in_alarm("head"), -1, "head of an event at step 50"),
    "a head that is an object": (in_alarm("head"), {}, "head of an event at step 50"),
    "a value that is a list": (in_alarm("value"), [1.0], "value of an event at step 50"),
    "a reason that is an object": (in_alarm("reason"), {"a": 1}, "reason of an event at step 50"),
}  # fmt: skip


@pytest.mark.parametrize("place, value, said", FIELDS.values(), ids=FIELDS)
def test_one_bad_field_is_said_and_left_out(place, value, said, run, tmp_path):
    whole = {format: write_report([run], tmp_path / f"w-{format}", format=format)
             for format in ("html", "csv", "json")}  # fmt: skip
    assert not whole["json"].notes
    lines = lines_of(run)
    content, (*keys, last) = place(lines)
    for key in keys:
        content = content[key]
    content[last] = value
    write_lines(run, lines)
    for format, before in whole.items():
        written = write_report([run], tmp_path / f"d-{format}", format=format)
        ((_, note),) = written.notes
        assert note.startswith("1 value in stability.jsonl") and note.endswith(f"first {said}.")
        assert written.summaries[0].verdict.state == before.summaries[0].verdict.state
    rows = {tuple(row) for row in csv.reader((tmp_path / "d-csv").open())}
    before = {tuple(row) for row in csv.reader((tmp_path / "w-csv").open())}
    # All else is there: of the other probes, and of this one.
    lost = before - rows
    assert {row[2] for row in lost} <= {"50"} and len(lost) < len(before) / 6
    page = (tmp_path / "d-html").read_text()
    assert said in page and len(payload_of(page)["charts"]) >= 20


@pytest.mark.parametrize("format", FORMATS)
def test_numbers_beyond_every_float_are_gaps(format, run, tmp_path):
    lines = lines_of(run)
    for line in lines[:3]:
        line["quantities"]["entropy"][LAYERS[0]] = [BEYOND, -BEYOND]
        line["quantities"]["sigma_qk"][LAYERS[0]] = [1e308, -1e308]
        line["effective_lr"][f"{LAYERS[0]}.fc1.weight"] = BEYOND
        line["sharpness"] = BEYOND
    lines[3]["value"] = BEYOND
    write_lines(run, lines)
    state = json.loads((run / "trainer_state.json").read_text())
    for record in state["log_history"]:
        record["grad_norm"] = BEYOND
        record["eval_strange"] = {"a": [1]}
    (run / "trainer_state.json").write_text(json.dumps(state))
    written = write_report([run], tmp_path / "out", format=format)
    assert all(path.exists() for path in written.files)
    found = read_run(run)
    assert all(math.isnan(value) for _, _, value in found.probed("entropy", LAYERS[0]))
    assert all(value == 2.5 for _, _, value in found.probed("entropy", LAYERS[1]))
    assert "values in trainer_state.json are no numbers" in " ".join(found.notes)


def test_maps_may_be_tiny():
    assert parse_map([[5e-324, 0.0], [0.0, 5e-324]]).levels == bytes(4)
    assert parse_map([[1e-290, 0.0], [0.0, 5e-291]]).levels == bytes([255, 0, 0, 128])
    assert parse_map([[-1.0]]).levels == bytes(1) and parse_map([[0.25]]).levels == bytes([255])
    for broken in ([], [[]], [[1.0, 2.0]], [[math.nan]], [["a"]], [[None]], "map", [[BEYOND]]):
        assert parse_map(broken) is None


@pytest.mark.parametrize("heads", [[-1, -2], [0, -5], ["a", "b"], [True, 1.5], [10**30, 1]])
def test_numbers_of_heads_that_are_none_are_counted_anew(heads, run, tmp_path):
    state = json.loads((run / "trainer_state.json").read_text())
    state["stateful_callbacks"]["StabilityCallback"]["args"]["maps"] = heads
    (run / "trainer_state.json").write_text(json.dumps(state))
    write_report([run], tmp_path / "r.html")
    ((first, *_),) = payload_of((tmp_path / "r.html").read_text(), "map-payload")
    if heads == [True, 1.5]:
        return  # a step may be written as 1.5, and true is no number: both are as before
    assert first["label"] == "layer 0, head 0" and first["frames"][0]["share"] == 0.9


@pytest.mark.parametrize("name", [b"gr\xf6\xdfe", b"half \xed\xa0\x80 a character", b"a\x1b[2Jb"])
def test_folders_may_have_any_name(name, run, tmp_path, capsys):
    folder = os.path.join(os.fsencode(tmp_path), name)
    os.rename(run, folder)
    for format in FORMATS:
        written = write_report([os.fsdecode(folder)], tmp_path / f"o-{format}", format=format)
        (summary,) = written.summaries
        assert "\ufffd" in summary.run and not re.search("[\x00-\x1f\ud800-\udfff]", summary.run)
        assert all(path.exists() for path in written.files)
    written = write_report([os.fsdecode(folder)])
    assert written.files[0].exists()


HOSTILE = (
    "=HYPERLINK(1)", "-2+3", "@sum", "+1", "<a href='http://x'>a link</a>", "$\\frac{1}{$",
    "a\x1b]0;title\x07b", "\ud800half", "<script>alert(1)</script>", "\u202egnp.exe", "_hidden",
    "{{ 7 * 7 }}", "{% for %}", "a\nb", "", "x" * 5000,
)  # fmt: skip


@pytest.mark.parametrize("format", FORMATS)
def test_names_that_attack_are_texts(format, tmp_path):
    probe = calm(1)
    for name in HOSTILE:
        probe[name] = {layer: [1.0, 2.0] for layer in HOSTILE}
        probe["entropy"] |= {name: [1.0, 2.0]}
    rates = {f"{name}.weight": 1e-3 for name in HOSTILE}
    events = [("alarm", 2, alarm(name, layer=name, kind=name, advice=name)) for name in HOSTILE]
    folder = write_run(tmp_path / "run", FALLING[:9], {1: probe, 5: probe}, events)
    lines = lines_of(folder)
    lines[0]["effective_lr"] = lines[1]["effective_lr"] = rates
    write_lines(folder, lines)
    state = json.loads((folder / "trainer_state.json").read_text())
    state["log_history"] += [{"step": 9, f"eval_{name}": 1.0} for name in HOSTILE]
    (folder / "trainer_state.json").write_text(json.dumps(state))
    written = write_report([folder], tmp_path / "out", format=format)
    assert all(path.exists() for path in written.files)
    if format == "png":
        return
    text = (tmp_path / "out").read_text()
    assert not re.search("[\x00-\x08\x0e-\x1f\ud800-\udfff\u202e]", text.split("<script>")[0])
    assert "x" * 1001 not in text
    if format == "html":
        shown = text.split("<script>")[0]
        assert "<a href='http" not in shown and "<script>alert" not in text
        assert "{{ 7 * 7 }}" in shown and "&lt;script&gt;alert(1)&lt;/script&gt;" in shown
    elif format == "csv":
        cells = [cell for row in csv.reader((tmp_path / "out").open()) for cell in row]
        texts = [cell for cell in cells if cell[:1] in ("=", "+", "-", "@")]
        assert not [cell for cell in texts if not math.isfinite(float(cell))]
        assert "'=HYPERLINK(1)" in cells and "'-2+3" in cells and "'@sum" in cells


def test_a_log_that_is_no_file_hangs_nothing(run, tmp_path):
    (run / "stability.jsonl").unlink()
    os.mkfifo(run / "stability.jsonl")
    (run / "eval_results.json").symlink_to("/dev/zero")
    written = write_report([run], tmp_path / "r.html")
    assert "attention was not watched" in " ".join(note for _, note in written.notes)


def test_more_layers_than_can_be_drawn_are_chosen_from_and_it_is_said(tmp_path):
    count = 20_000
    probes = {s: calm(s, count, 1, entropy_normalised=0.1, sigma_qk=50.0) for s in (1, 9)}
    folder = write_run(tmp_path / "run", FALLING[:9], probes)
    (run,) = read_runs([folder])
    drawn = list(run.drawn_layers.values())
    assert len(run.layers) == count and len(drawn) <= 128 and drawn == sorted(drawn)
    assert {0, count - 1} <= set(drawn)
    assert max(b - a for a, b in zip(drawn, drawn[1:], strict=False)) < count / 20
    said = "run has 20,000 layers: "
    for section in build_sections([run]):
        of_layers = [c for chart in section.charts for c in chart.curves if c.layer is not None]
        assert len({curve.layer for curve in of_layers}) <= 128
        assert bool(of_layers) == any(each.startswith(said) for each in section.left_out)
    write_report([folder], tmp_path / "r.html")
    assert said in (tmp_path / "r.html").read_text()
    # Nothing is left out of what counts: the verdict and the table have seen every layer.
    assert summarise(run).verdict.headline.endswith(
        f"of {count} heads sparse from the first probe on"
    )


@pytest.mark.slow
@pytest.mark.timeout(120)
def test_images_of_many_layers_are_bounded(tmp_path):
    probes = {s: calm(s, 20_000, 1, entropy_normalised=0.1) for s in (1, 9)}
    folder = write_run(tmp_path / "run", FALLING[:9], probes)
    files = write_report([folder], tmp_path / "figures", format="png").files
    assert {path.stem for path in files} >= {"loss", "entropy", "spectra"}
    assert sum(path.stat().st_size for path in files) < 5e6


# Files


def test_two_reports_at_once_do_not_trip_each_other(run, tmp_path):
    target, failures = tmp_path / "r.csv", []

    def write():
        try:
            write_report([run], target, format="csv")
        except Exception as error:
            failures.append(error)

    threads = [threading.Thread(target=write) for _ in range(6)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not failures
    alone = write_report([run], tmp_path / "alone.csv", format="csv").files[0]
    assert target.read_text() == alone.read_text()
    assert not [path for path in tmp_path.iterdir() if path.suffix == ".tmp"]
    # Two that write in turns are two files until one of them is finished, and the last one stays.
    with write_whole(target) as first, write_whole(target) as second:
        first.write("first")
        second.write("second")
        assert target.read_text() == alone.read_text()
        assert len(list(tmp_path.glob(".r.csv.*.tmp"))) == 2
    assert target.read_text() == "first"


def test_a_file_that_cannot_be_finished_does_not_replace_the_old_one(run, tmp_path, monkeypatch):
    target = write_report([run], tmp_path / "r.csv", format="csv").files[0]
    before = target.read_text()

    def full(run):
        yield from rows(run)
        raise OSError(28, "No space left on device")

    from hf_stable.report import writing

    rows = writing.tidy_rows
    monkeypatch.setattr(writing, "tidy_rows", full)
    with pytest.raises(OSError, match="No space left.*r.csv"):
        write_report([run], target, format="csv")
    assert target.read_text() == before and before.count("\n") > 20
    assert [path.name for path in tmp_path.iterdir() if path.is_file()] == ["r.csv"]


def test_links_are_not_followed(run, tmp_path):
    secret = tmp_path / "secret"
    secret.write_text("mine")
    (tmp_path / "r.json").symlink_to(secret)
    write_report([run], tmp_path / "r.json", format="json")
    assert secret.read_text() == "mine" and not (tmp_path / "r.json").is_symlink()
    # Its mode is what the umask makes of any new file.
    assert (tmp_path / "r.json").stat().st_mode == secret.stat().st_mode


@pytest.mark.parametrize("name", ["trainer_state.json", "stability.jsonl", "eval_results.json"])
def test_a_report_takes_the_place_of_no_record(name, run):
    before = {path.name: path.read_bytes() for path in run.iterdir()}
    with pytest.raises(ValueError, match=rf"{name} has the name of a record of a run"):
        write_report([run], run / name, format="csv")
    assert {path.name: path.read_bytes() for path in run.iterdir()} == before


def test_images_follow_no_links_and_need_a_folder(run, tmp_path):
    secret = tmp_path / "secret"
    secret.write_text("mine")
    with pytest.raises(NotADirectoryError, match="secret is a file; give the name of a folder"):
        write_report([run], secret, format="png")
    (tmp_path / "figures").mkdir()
    (tmp_path / "figures" / "loss.png").symlink_to(secret)
    files = write_report([run], tmp_path / "figures", format="png").files
    assert secret.read_text() == "mine" and tmp_path / "figures" / "loss.png" in files
    assert all(path.read_bytes().startswith(b"\x89PNG") for path in files)
    assert sorted(files) == sorted((tmp_path / "figures").iterdir())
