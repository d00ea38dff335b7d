"""The report's page in a real browser: headless Chromium, driven as a user would."""

from __future__ import annotations

import json
import math
import shutil
import time

import numpy as np
import pytest
from report_runs import (
    FALLING,
    alarm,
    calm,
    collapsing,
    deep_probe,
    going_back,
    small_maps,
    write_run,
)
from safetensors.numpy import save_file

from hf_stable._file_names import BATCH_FOLDER, BATCH_KEY
from hf_stable.monitor.log_file import StabilityLog
from hf_stable.report import write_report

selenium = pytest.importorskip("selenium", reason="needs the test extra")

pytestmark = [
    pytest.mark.browser,
    pytest.mark.skipif(
        not (shutil.which("chromium") and shutil.which("chromedriver")),
        reason="needs the packages chromium and chromium-driver",
    ),
]

SIZES = {"desktop": (1200, 900), "phone": (390, 800)}


@pytest.fixture(scope="module")
def page(tmp_path_factory):
    folder = tmp_path_factory.mktemp("report")

    probes = {s: calm(s) | small_maps(shift=s) for s in (1, 50, 99)}
    good = write_run(folder / "good", FALLING, probes)
    write_report([collapsing(folder / "bad"), good], folder / "report.html")
    return folder / "report.html"


@pytest.fixture(scope="module")
def pair(tmp_path_factory):
    """A run of two layers beside one of twelve that went back, both with maps and alarms."""
    folder = tmp_path_factory.mktemp("pair")
    probes = {s: calm(s) | small_maps(shift=s) for s in (10, 50, 90)}
    found = alarm("a head looks at one key only <b>", layer="a.long.name." * 6)
    shallow = write_run(folder / "shallow", FALLING, probes, [("alarm", 40, found)])
    write_report([shallow, going_back(folder / "deep")], folder / "report.html")
    return folder / "report.html"


@pytest.fixture(scope="module")
def driver():
    from selenium import webdriver
    from selenium.webdriver.chrome.service import Service

    options = webdriver.ChromeOptions()
    options.binary_location = shutil.which("chromium")
    for argument in ("--headless=new", "--no-sandbox", "--disable-gpu", "--disable-dev-shm-usage"):
        options.add_argument(argument)
    options.set_capability("goog:loggingPrefs", {"browser": "ALL"})
    chrome = webdriver.Chrome(options=options, service=Service(shutil.which("chromedriver")))
    yield chrome
    chrome.quit()


def wait(driver, condition, seconds=30):
    """Wait until a JavaScript expression is true."""
    deadline = time.monotonic() + seconds
    while not driver.execute_script(f"return Boolean({condition})"):
        assert time.monotonic() < deadline, f"never came true: {condition}"
        time.sleep(0.05)


def drawn(driver):
    wait(driver, "document.documentElement.dataset.state === 'ready'")


def open_page(driver, page, size="desktop", theme="light"):
    width, height = SIZES[size]
    metrics = dict(width=width, height=height, deviceScaleFactor=1, mobile=size == "phone")
    driver.execute_cdp_cmd("Emulation.setDeviceMetricsOverride", metrics)
    scheme = [{"name": "prefers-color-scheme", "value": theme}]
    driver.execute_cdp_cmd("Emulation.setEmulatedMedia", {"features": scheme})
    driver.get(page.as_uri())
    drawn(driver)


def count(driver, selector):
    return driver.execute_script("return document.querySelectorAll(arguments[0]).length", selector)


@pytest.mark.parametrize("theme", ["light", "dark"])
@pytest.mark.parametrize("size", SIZES)
def test_every_chart_is_drawn_and_nothing_is_wider_than_the_screen(driver, page, size, theme):
    open_page(driver, page, size, theme)
    assert [entry for entry in driver.get_log("browser") if entry["level"] == "SEVERE"] == []
    plots = "figure.chart:not([hidden]) .plot"
    assert count(driver, plots) == count(driver, f"{plots} svg.main-svg:first-child") > 8
    assert count(driver, f"{plots} path.js-line") > 20
    assert count(driver, "figure.map:not([hidden]) .plot .heatmaplayer image") == 1
    width = driver.execute_script("return document.documentElement.scrollWidth")
    assert width <= SIZES[size][0]
    assert driver.execute_script("return document.documentElement.dataset.theme") == theme


def test_concentration_stands_over_its_sizes(driver, page):
    open_page(driver, page)
    panel = "document.querySelector('#concentration figure.chart:not([hidden])')"
    assert count(driver, "#concentration figure.chart:not([hidden])") == 4
    # At step 1 there is no probe of the one run yet, at step 140 none of the other any more.
    lines = "#concentration figure.chart:not([hidden]) path.js-line"
    assert count(driver, lines) == 1 + 2 + 2 + 1
    ticks = driver.execute_script(
        f"return [...{panel}.querySelectorAll('.xtick text')].map((each) => each.textContent)"
    )
    assert ticks == ["1", "2", "4", "8", "16"]


def test_nothing_can_be_sent_anywhere(driver, page):
    open_page(driver, page)
    buttons = "[...document.querySelectorAll('.modebar-btn')].map((b) => b.dataset.title || '')"
    titles = driver.execute_script(f"return {buttons}")
    assert any("Zoom" in title for title in titles)
    assert not [title for title in titles if "Share" in title or "Cloud" in title]
    contexts = "[...document.querySelectorAll('.js-plotly-plot')].map((p) => p._context)"
    for context in driver.execute_script(
        f"return {contexts}.map((c) => [c.plotlyServerURL, c.showSendToCloud])"
    ):
        assert context == ["", False]


def test_buttons_cover_no_data(driver, page):
    open_page(driver, page)
    overlaps = driver.execute_script("""
      return [...document.querySelectorAll('figure:not([hidden]) .js-plotly-plot')].map((plot) => {
        const group = plot.querySelector('.modebar-group');
        if (!group) return 0;  // a small chart
        const dataBegins = plot.getBoundingClientRect().top + plot._fullLayout._size.t;
        return group.getBoundingClientRect().bottom - dataBegins;
      })""")
    assert len(overlaps) > 8 and max(overlaps) <= 0


def test_a_section_whose_run_is_hidden_says_so(driver, page):
    open_page(driver, page)
    assert count(driver, ".all-hidden:not([hidden])") == 0
    bad, good = driver.find_elements("css selector", "#run-legend button")
    good.click()
    drawn(driver)
    select = driver.find_element("css selector", "#terms select")
    options = [option.text for option in select.find_elements("tag name", "option")]
    assert options == ["All runs", "bad", "good"]
    driver.execute_script(
        "arguments[0].value = 'good'; arguments[0].dispatchEvent(new Event('change'))", select
    )
    wait(driver, "!document.querySelector('#terms .all-hidden').hidden")
    drawn(driver)
    good.click()
    wait(driver, "document.querySelector('#terms .all-hidden').hidden")


def test_the_slider_moves_the_map(driver, page):
    open_page(driver, page)
    caption = "document.querySelector('figure.map .mode').textContent"
    image = "document.querySelector('figure.map .heatmaplayer image').outerHTML"
    before = driver.execute_script(f"return [{caption}, {image}]")
    assert before[0].startswith("step 99")
    slider = driver.find_element("id", "map-step")
    slider.send_keys("\ue012")  # the left arrow: it is reached by the keyboard
    wait(driver, f"{caption}.startsWith('step 50')")
    drawn(driver)
    assert driver.execute_script(f"return {image}") != before[1]


def test_the_slider_reaches_the_maps_of_every_attempt(driver, pair):
    open_page(driver, pair)
    slider = driver.find_element("id", "map-step")
    assert (slider.get_attribute("min"), slider.get_attribute("max")) == ("0", "5")
    # What the slider says, and the captions of the run that never went back and of the other.
    expected = [
        ("step 90, after rollback 1", "step 90", "step 90, after rollback 1"),
        ("step 50, after rollback 1", "step 90", "step 50, after rollback 1"),
        ("step 90", "step 90", "step 50"),
        ("step 50", "step 50", "step 50"),
        ("step 30", "step 10", "step 30"),
        ("step 10", "step 10", "step 10"),
    ]
    texts = "[...document.querySelectorAll('figure.map .mode')].map((each) => each.textContent)"
    plots = "[...document.querySelectorAll('figure.map .plot')].map((each) => each.data[0].z)"
    maps = []
    for said, *captions in expected:
        wanted = [f"{caption}: normal, entropy at 90 % of its largest" for caption in captions]
        wait(driver, f"JSON.stringify({texts}) === JSON.stringify({json.dumps(wanted)})")
        assert slider.get_attribute("aria-valuetext") == said
        assert driver.find_element("id", "map-step-value").text == said.removeprefix("step ")
        maps.append(driver.execute_script(f"return {plots}")[1])
        slider.send_keys("\ue012")
    assert maps[2] == maps[3] and maps[1] != maps[2] != maps[4]


def test_a_press_in_the_legend_hides_a_run_everywhere_and_brings_it_back(driver, page):
    open_page(driver, page)
    lines = "document.querySelectorAll('figure.chart:not([hidden]) path.js-line').length"
    before = driver.execute_script(f"return {lines}")
    button = driver.find_element("css selector", "#run-legend button")
    assert button.text.strip() == "bad"
    button.click()
    drawn(driver)
    assert button.get_attribute("aria-pressed") == "false"
    assert 0 < driver.execute_script(f"return {lines}") < before
    driver.execute_script("arguments[0].focus()", button)
    button.send_keys(" ")
    wait(driver, f"{lines} === {before}")


def test_the_focus_stays_on_the_button_that_hides_all_layers(driver, pair):
    open_page(driver, pair)
    driver.find_element("css selector", "#layer-details summary").click()
    everything, nothing, *layers = driver.find_elements("css selector", "#layer-legend button")
    assert [everything.text, nothing.text, len(layers)] == ["all", "none", 12]
    lines = "document.querySelectorAll('#terms figure.chart:not([hidden]) path.js-line').length"
    entropy = "document.querySelectorAll('#entropy figure.chart:not([hidden]) path.js-line').length"
    before = driver.execute_script(f"return [{lines}, {entropy}]")
    for button, pressed in ((nothing, "false"), (everything, "true")):
        driver.execute_script("arguments[0].focus()", button)
        driver.switch_to.active_element.send_keys(" ")
        drawn(driver)
        assert driver.switch_to.active_element == button
        assert {layer.get_attribute("aria-pressed") for layer in layers} == {pressed}
        after = driver.execute_script(f"return [{lines}, {entropy}]")
        assert (after == before) == (pressed == "true")
    layers[0].click()
    drawn(driver)
    assert [layer.get_attribute("aria-pressed") for layer in layers] == ["false"] + 11 * ["true"]


LAYER_COLOURS = """
  const colours = {};
  for (const button of document.querySelectorAll('#layer-legend button[aria-pressed]')) {
    colours[button.textContent] = [button.querySelector('line').getAttribute('stroke')];
  }
  for (const plot of document.querySelectorAll('figure.chart .js-plotly-plot')) {
    for (const curve of plot.data) {
      const label = curve.name.split(':')[0];
      if (label in colours) colours[label].push(curve.line.color);
    }
  }
  return colours"""


def test_a_layer_has_the_colour_of_the_legend_in_runs_of_any_depth(driver, pair):
    open_page(driver, pair)
    by_theme = []
    for theme in ("light", "dark"):
        wait(driver, f"document.documentElement.dataset.theme === '{theme}'")
        drawn(driver)
        colours = driver.execute_script(LAYER_COLOURS)
        assert len(colours) == 12 and all(len(found) > 3 for found in colours.values())
        assert all(len(set(found)) == 1 for found in colours.values())
        by_theme.append(colours)
        driver.find_element("id", "theme").click()
        driver.find_element("id", "theme").click()
    assert by_theme[0] != by_theme[1]


MARKS = """
  const plots = document.querySelectorAll('figure.chart:not([hidden]) .js-plotly-plot');
  return [...plots].map((plot) => {
    const events = plot.data.find((trace) => trace.name === 'events');
    return {
      section: plot.closest('section').id,
      runs: [...new Set(plot.data.map((trace) => trace.name))],
      lines: plot.layout.shapes.map((shape) => shape.x0),
      marks: events ? events.x : [], texts: events ? events.text : [],
    };
  })"""


def test_alarms_are_marked_in_the_charts_over_steps_of_their_runs(driver, pair):
    open_page(driver, pair)
    charts = driver.execute_script(MARKS)
    assert {chart["section"] for chart in charts} > {"loss", "entropy", "spectra", "terms"}
    of_both, large = [40, 50, 50], ("loss", "entropy", "spectra")
    for chart in charts:
        if chart["section"] == "concentration":
            assert chart["lines"] == chart["marks"] == []
        elif "shallow" in chart["runs"]:
            assert chart["lines"] == of_both
            assert chart["marks"] == (of_both if chart["section"] in large else [])
        else:
            assert chart["lines"] in ([40], [50, 50])
    loss = charts[0]
    # Long texts are broken into lines, and what is in them is no markup.
    assert loss["texts"][0].startswith("shallow: collapse in<br>a.long.name.")
    assert "a head looks at one key only &lt;b>" in loss["texts"][0].replace("<br>", " ")
    assert loss["texts"][1].startswith("deep: collapse in vit.layers.0, head 0: because")
    driver.find_elements("css selector", "#run-legend button")[1].click()
    drawn(driver)
    assert driver.execute_script(MARKS)[0]["lines"] == [40]


@pytest.mark.parametrize("theme", ["light", "dark"])
def test_alarms_can_be_read_on_a_phone(driver, pair, theme):
    open_page(driver, pair, "phone", theme)
    box = driver.find_element("css selector", "#alarms .scroll")
    wide, room = driver.execute_script(
        "return [arguments[0].scrollWidth, arguments[0].clientWidth]", box
    )
    assert wide <= room
    rows = driver.find_elements("css selector", "#alarms tbody tr")
    assert [row.text.splitlines()[0] for row in rows] == ["shallow", "deep", "deep"]
    for row in rows:
        what = row.find_elements("css selector", "td")[-1]
        assert what.rect["width"] > 0.95 * room
        assert row.rect["height"] < 250
    open_page(driver, pair)
    head = driver.find_element("css selector", "#alarms thead").rect
    assert head["x"] >= 0 and head["width"] > 900


def test_the_theme_button_and_the_numbers_of_a_chart(driver, page):
    open_page(driver, page)
    theme = driver.find_element("id", "theme")
    theme.click()
    theme.click()
    wait(driver, "document.documentElement.dataset.theme === 'dark'")
    driver.find_element("css selector", "details.numbers summary").click()
    wait(driver, "document.querySelectorAll('details.numbers td').length > 3")


def test_what_runs_are_called_makes_no_link_in_a_chart(driver, tmp_path):
    name = "<a href='http://x'>a link</a>"
    probe = calm(1) | {"entropy": {f"{name}.{i}": [1.0, 2.0] for i in (0, 1)}}
    folder = write_run(tmp_path / "run", FALLING[:9], {1: probe, 9: probe})
    state = json.loads((folder / "trainer_state.json").read_text())
    state["log_history"].append({"step": 9, f"eval_{name}": 1.0})
    (folder / "trainer_state.json").write_text(json.dumps(state))
    write_report([folder], tmp_path / "r.html")
    open_page(driver, tmp_path / "r.html")
    assert count(driver, "figure a") == 0
    titles = "[...document.querySelectorAll('.ytitle')].map((each) => each.textContent)"
    assert name in driver.execute_script(f"return {titles}")


def test_a_page_that_is_loaded_anew_keeps_what_was_chosen(driver, tmp_path):
    from hf_stable.report.reading import read_runs
    from hf_stable.report.writing import write_runs

    probes = {s: calm(s) | small_maps(shift=s) for s in (1, 50, 99)}
    runs = read_runs([collapsing(tmp_path / "bad"), write_run(tmp_path / "good", FALLING, probes)])
    page = tmp_path / "live.html"
    write_runs(runs, page, "html", refresh=2.0)
    open_page(driver, page)
    # In one go: the page may be loaded anew between two.
    driver.execute_script("""
      window.isOld = true;
      document.querySelector('#run-legend button').click();
      document.getElementById('theme').click();
      const select = document.querySelector('#terms select');
      select.value = 'good';
      select.dispatchEvent(new Event('change'));
      Plotly.relayout(document.querySelector('#loss .js-plotly-plot'), {'xaxis.range': [20, 40]});
      document.getElementById('map-step').value = '0';
      scrollTo(0, 700);""")
    wait(driver, "window.isOld !== true && document.documentElement.dataset.state === 'ready'")
    found = driver.execute_script("""
      return {
        pressed: document.querySelector('#run-legend button').getAttribute('aria-pressed'),
        theme: document.getElementById('theme').textContent,
        variant: document.querySelector('#terms select').value,
        zoom: document.querySelector('#loss .js-plotly-plot')._fullLayout.xaxis.range,
        step: document.getElementById('map-step').value, y: scrollY,
        said: document.querySelector('.live').textContent,
      }""")
    assert "loaded anew every 2.0 s" in found.pop("said")
    assert found == {
        "pressed": "false", "theme": "Theme: light", "variant": "good", "zoom": [20, 40],
        "step": "0", "y": 700,
    }  # fmt: skip
    # A page of runs that have ended stays.
    write_runs(runs, page, "html")
    open_page(driver, page)
    driver.execute_script("window.isOld = true")
    time.sleep(2.5)
    assert driver.execute_script("return window.isOld") and count(driver, ".live") == 0


@pytest.mark.slow
def test_a_page_of_a_long_deep_run_is_small_and_opens_at_once(driver, tmp_path):
    """100,000 steps, 48 layers, all terms: the time until the screen is full is printed."""
    losses = [
        3 + 5 * math.exp(-step / 2e4) + 0.05 * math.sin(1.7 * step) for step in range(100_000)
    ]
    folder = write_run(tmp_path / "run", losses)
    log = StabilityLog(folder)
    weights = ("q_proj", "k_proj", "v_proj", "o_proj", "fc1", "fc2")
    with log.path.open("w") as lines:
        for step in range(250, 100_001, 250):
            rates = {f"vit.layers.{i}.{weight}.weight": 1e-3 * abs(math.sin(step + i))
                     for i in range(48) for weight in weights}  # fmt: skip
            quantities = deep_probe(step, 2, 48, 4)
            probe = {"event": "probe", "attempt": 0, "step": step, "loss": losses[step - 1]}
            lines.write(json.dumps(probe | {"quantities": quantities, "effective_lr": rates}))
            lines.write("\n")
    write_report([folder], tmp_path / "r.html")
    assert (tmp_path / "r.html").stat().st_size < 10e6
    times = []
    for _ in range(3):
        open_page(driver, tmp_path / "r.html")
        times.append(int(driver.execute_script("return document.documentElement.dataset.opened")))
    print(f"opened in {times} ms, {(tmp_path / 'r.html').stat().st_size / 1e6:.1f} MB")
    assert sorted(times)[1] < 3000
    assert count(driver, "#entropy path.js-line") == 48 + 48 + 1  # and bounds, and the ceiling


@pytest.fixture(scope="module")
def kept(tmp_path_factory):
    """A run that kept a batch of pictures, with texts that attack the page."""
    folder = tmp_path_factory.mktemp("kept")
    run = write_run(folder / "run", FALLING, {1: calm(1)}, [("alarm", 50, alarm())])
    (run / BATCH_FOLDER).mkdir()
    name = "step-49-attempt-0-rank-0-micro-0.safetensors"
    texts = ["<img src=x onerror=document.title='broken-in'>", "w" * 900, "plain"]
    about = {
        "step": 49,
        "sample_losses": [3.0, None, 1.0],
        "previews": texts,
        "positions": [7, 8, 9],
    }
    save_file(
        {"pixel_values": np.arange(3 * 64, dtype=np.float32).reshape(3, 1, 8, 8)},
        run / BATCH_FOLDER / name,
        {BATCH_KEY: json.dumps(about)},
    )
    StabilityLog(run).write("batches", 0, 50, {"kind": "spike", "steps": [49], "files": [name]})
    write_report([run], folder / "report.html")
    return folder / "report.html", texts


@pytest.mark.parametrize("size", SIZES)
def test_kept_samples_stand_worst_first_with_pictures_and_their_texts_are_texts(driver, kept, size):
    page, texts = kept
    open_page(driver, page, size)
    assert [entry for entry in driver.get_log("browser") if entry["level"] == "SEVERE"] == []
    rows = driver.execute_script(
        "return [...document.querySelectorAll('#batches tbody tr')].map((row) => ["
        "row.cells[0].innerText, row.cells[2].innerText, "
        "row.querySelector('.sample-text').textContent, "
        "[...row.querySelectorAll('img')].map((picture) => picture.naturalWidth)])"
    )
    assert rows == [
        ["not finite", "8", texts[1], [8]], ["3", "7", texts[0], [8]], ["1", "9", texts[2], [8]],
    ]  # fmt: skip
    assert driver.title != "broken-in"
    assert driver.execute_script("return document.documentElement.scrollWidth") <= SIZES[size][0]


def test_verdict_table_and_alarms_are_there_without_scripts(driver, page):
    open_page(driver, page)
    driver.execute_cdp_cmd("Emulation.setScriptExecutionDisabled", {"value": True})
    driver.get(page.as_uri())
    text = driver.find_element("tag name", "main").text
    driver.execute_cdp_cmd("Emulation.setScriptExecutionDisabled", {"value": False})
    assert "after attention collapsed at step 60" in text and "Charts need JavaScript" in text
