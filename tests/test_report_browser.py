"""The report's page in a real browser: headless Chromium, driven as a user would."""

from __future__ import annotations

import shutil
import time

import pytest
from report_runs import calm, collapsing, write_run

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

    def maps(step):
        rows = [[1.0 if j == (i + step) % 4 else 0.0 for j in range(4)] for i in range(4)]
        return {"maps": {"vit.layers.0": [rows, rows], "vit.layers.1": [rows, rows]}}

    losses = [2.0 * 0.98**s + 0.1 for s in range(100)]
    good = write_run(folder / "good", losses, {s: calm(s) | maps(s) for s in (1, 50, 99)})
    write_report([collapsing(folder / "bad"), good], folder / "report.html")
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
    # At step 1 there is no probe of the other run yet.
    assert count(driver, "#concentration figure.chart:not([hidden]) path.js-line") == 1 + 3 * 2
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


def test_the_theme_button_and_the_numbers_of_a_chart(driver, page):
    open_page(driver, page)
    theme = driver.find_element("id", "theme")
    theme.click()
    theme.click()
    wait(driver, "document.documentElement.dataset.theme === 'dark'")
    driver.find_element("css selector", "details.numbers summary").click()
    wait(driver, "document.querySelectorAll('details.numbers td').length > 3")


def test_verdict_table_and_alarms_are_there_without_scripts(driver, page):
    open_page(driver, page)
    driver.execute_cdp_cmd("Emulation.setScriptExecutionDisabled", {"value": True})
    driver.get(page.as_uri())
    text = driver.find_element("tag name", "main").text
    driver.execute_cdp_cmd("Emulation.setScriptExecutionDisabled", {"value": False})
    assert "after attention collapsed at step 60" in text and "Charts need JavaScript" in text
