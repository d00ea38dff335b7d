/* Draws the charts of the page from its payload, and lets runs and layers be hidden. */
"use strict";
(() => {
  const read = (id) => JSON.parse(document.getElementById(id).textContent);
  const payload = read("payload"), maps = read("map-payload");
  const root = document.documentElement;
  const figures = [...document.querySelectorAll("figure.chart")];
  // What was chosen before the page loaded itself anew: see "Following a run".
  const before = (history.state && history.state.chosen) || {};
  const numbersOf = (names) => payload.runs.flatMap((run, i) => ((names || []).includes(run.name) ? [i] : []));
  const hidden = { runs: new Set(numbersOf(before.runs)), layers: new Set(before.layers) };
  const touch = matchMedia("(pointer: coarse)").matches;

  // Colours: runs have their own; layers go along viridis, its far ends left out where the page
  // would swallow them.
  const VIRIDIS = [
    [68, 1, 84], [72, 40, 120], [62, 73, 137], [49, 104, 142], [38, 130, 142],
    [31, 158, 137], [53, 183, 121], [110, 206, 88], [181, 222, 43], [253, 231, 37],
  ];
  const BUTTONS = 40;  // height kept free for plotly's buttons, which would cover data
  const SYMBOLS = {
    collapse: "triangle-down", spike: "triangle-up", nonfinite: "x", nan: "x",
    rollback: "triangle-left", stop: "square",
  };

  const depths = new Map(payload.layers.map((label, position) => [label, position]));

  function layerColour(label) {
    const share = depths.size > 1 ? depths.get(label) / (depths.size - 1) : 0;
    const at = (isDark() ? 0.28 + 0.72 * share : 0.84 * share) * (VIRIDIS.length - 1);
    const low = Math.min(Math.floor(at), VIRIDIS.length - 2);
    const mixed = VIRIDIS[low].map((v, i) => Math.round(v + (at - low) * (VIRIDIS[low + 1][i] - v)));
    return `rgb(${mixed.join(",")})`;
  }

  const isDark = () => root.dataset.theme === "dark";
  const css = (name) => getComputedStyle(root).getPropertyValue(name).trim();
  const layerLabel = (curve) => curve.label.split(":")[0];
  const isShown = (curve) =>
    !hidden.runs.has(curve.run) && (curve.layer === null || !hidden.layers.has(layerLabel(curve)));

  // Charts

  // Alarms are kept with their runs; of its own a chart has where its curves have gaps.
  function marksOf(chart) {
    const shown = new Set(chart.axis.name === "step" ? chart.curves.map((curve) => curve.run) : []);
    const ofRuns = payload.runs.flatMap((run, number) => (shown.has(number) ? run.marks : []));
    return [...ofRuns, ...chart.marks].filter((mark) => !hidden.runs.has(mark.run));
  }

  function traces(chart, small) {
    const single = new Set(chart.curves.map((curve) => curve.run)).size === 1;
    const drawn = chart.curves.map((curve) => {
      const run = payload.runs[curve.run];
      const isLayer = curve.layer !== null;
      const plain = curve.style === "line";
      const colour = isLayer ? layerColour(layerLabel(curve)) : plain ? run.colour : css("--soft");
      const few = curve.y.length <= 40;
      return {
        type: "scatter", x: payload.steps[curve.x], y: curve.y, name: literal(curve.label),
        mode: few && plain ? "lines+markers" : "lines", connectgaps: false,
        marker: { size: small ? 3 : 4 },
        line: {
          color: colour, width: plain ? (small ? 1.4 : 1.9) : 1.3,
          dash: curve.style === "dashed" ? "dash" : curve.style === "dotted" ? "dot"
            : isLayer || single ? "solid" : run.dash,
        },
        hovertemplate: `${literal(chart.axis.name)} %{x}: %{y:.4g}<extra>%{fullData.name}</extra>`,
        visible: isShown(curve),
      };
    });
    const marks = marksOf(chart);
    if (marks.length && !small) {
      drawn.push({
        type: "scatter", mode: "markers", yaxis: "y2", name: "events", showlegend: false,
        x: marks.map((mark) => mark.step),
        y: marks.map((mark) => (mark.kind === "nan" ? 0.03 : 0.96)),
        text: marks.map((mark) => wrapped(`${payload.runs[mark.run].name}: ${mark.text}`)),
        marker: {
          size: 11, symbol: marks.map((mark) => SYMBOLS[mark.kind] || "diamond"),
          color: marks.map((mark) => payload.runs[mark.run].colour),
          line: { width: 1, color: css("--text") },
        },
        hovertemplate: "step %{x}<br>%{text}<extra></extra>",
      });
    }
    return drawn;
  }

  // plotly takes some markup in all texts, links among it: what runs say is none.
  const literal = (text) => text.replace(/&/g, "&amp;").replace(/</g, "&lt;");

  function wrapped(text) {
    return literal(text).replace(/(.{1,60})(\s|$)/g, "$1<br>");
  }

  function layout(chart, small) {
    const axis = {
      gridcolor: css("--grid"), linecolor: css("--line"), zeroline: false, automargin: true,
      exponentformat: "power", tickfont: { size: small ? 10 : 12 },
    };
    const shapes = marksOf(chart)
      .filter((mark) => mark.kind !== "nan")
      .map((mark) => ({
        type: "line", x0: mark.step, x1: mark.step, y0: 0, y1: 1, yref: "paper",
        line: { color: payload.runs[mark.run].colour, width: 1, dash: "dot" }, layer: "below",
      }));
    return {
      paper_bgcolor: "rgba(0,0,0,0)", plot_bgcolor: "rgba(0,0,0,0)", showlegend: false,
      font: { color: css("--text"), family: "system-ui, sans-serif", size: 12 },
      margin: small ? { l: 8, r: 6, t: 6, b: 8 } : { l: 10, r: 12, t: BUTTONS, b: 10 },
      xaxis: {
        ...axis, title: { text: literal(small ? chart.axis.name : chart.axis.title), font: { size: small ? 10 : 12 }, standoff: 4 },
        ...(chart.axis.ticks.length ? { type: "log", tickvals: chart.axis.ticks }
          : { rangemode: "tozero", nticks: small ? 4 : 8 }),
        exponentformat: "none",
      },
      yaxis: {
        ...axis, type: chart.log ? "log" : "linear", nticks: small ? 5 : 8,
        title: { text: literal(chart.unit), font: { size: small ? 10 : 12 }, standoff: 6 },
        dtick: chart.log && spansDecades(chart) ? 1 : undefined,
        range: chart.limits || undefined,
      },
      yaxis2: { overlaying: "y", range: [0, 1], visible: false, fixedrange: true },
      shapes, hovermode: "closest", dragmode: touch ? false : "zoom",
      hoverlabel: { align: "left" }, uirevision: "keep", modebar: modebar(),
    };
  }

  const modebar = () => ({ bgcolor: "rgba(0,0,0,0)", color: css("--soft"), activecolor: css("--text") });

  function spansDecades(chart) {
    const values = chart.curves.flatMap((curve) => curve.y).filter((y) => y > 0);
    const low = values.reduce((a, b) => Math.min(a, b), Infinity);
    const high = values.reduce((a, b) => Math.max(a, b), 0);
    return high / low > 100;
  }

  // Nothing leaves the page: no button that uploads a chart, and no address to upload it to.
  const CONFIG = {
    responsive: true, displaylogo: false, showSendToCloud: false, plotlyServerURL: "",
    modeBarButtonsToRemove: ["select2d", "lasso2d", "autoScale2d"],
  };

  const chartOf = (figure) => payload.charts[Number(figure.dataset.chart)];
  const isSmall = (figure) => figure.parentElement.classList.contains("small");

  async function draw(figure) {
    const plot = figure.querySelector(".plot");
    if (!plot || figure.hidden) return;
    const chart = chartOf(figure), small = isSmall(figure);
    const config = { ...CONFIG, displayModeBar: small ? false : touch ? true : "hover" };
    const planned = layout(chart, small), zoom = (before.zoom || {})[keyOf(figure)];
    for (const axis of zoom && !figure.dataset.drawn ? ["xaxis", "yaxis"] : []) {
      if (zoom[axis]) Object.assign(planned[axis], { range: zoom[axis], autorange: false });
    }
    await Plotly.react(plot, traces(chart, small), planned, config);
    figure.dataset.drawn = "yes";
  }

  // What stays the same when a run goes on.
  const keyOf = (figure) => [figure.closest("section").id, figure.dataset.variant,
    figure.querySelector("figcaption").textContent].join("|");

  function showFigures() {
    for (const figure of figures) {
      const select = figure.closest("section").querySelector("select.variant");
      const runs = chartOf(figure).curves.map((curve) => curve.run);
      const other = select !== null && figure.dataset.variant !== select.value;
      const owner = payload.runs.findIndex((run) => run.name === figure.dataset.variant);
      figure.hidden = other || hidden.runs.has(owner)
        || (runs.length > 0 && runs.every((run) => hidden.runs.has(run)));
    }
    for (const note of document.querySelectorAll(".all-hidden")) {
      note.hidden = note.parentElement.querySelector("figure.chart:not([hidden])") !== null;
    }
    for (const figure of document.querySelectorAll("figure.map")) {
      figure.hidden = hidden.runs.has(Number(figure.dataset.run));
    }
  }

  // How long it took until a reader has all of the screen, in milliseconds.
  function noteOpened() {
    root.dataset.opened ??= String(Math.round(performance.now()));
  }

  let round = 0;
  async function drawAll() {
    const mine = ++round;
    root.dataset.state = "drawing";
    showFigures();
    const isInSight = (figure) => figure.getBoundingClientRect().top < innerHeight
      && figure.getBoundingClientRect().bottom > 0;
    const inSight = figures.filter((figure) => !figure.hidden && isInSight(figure));
    for (const figure of [...inSight, ...figures.filter((each) => !inSight.includes(each))]) {
      if (mine !== round) return;  // something was pressed meanwhile: a newer round draws all
      await draw(figure);
      if (figure === inSight[inSight.length - 1]) noteOpened();
      await new Promise((resume) => setTimeout(resume));  // lets the page answer in between
    }
    noteOpened();
    await drawMaps();
    if (mine === round) root.dataset.state = "ready";
  }

  function fillNumbers(details) {
    if (details.querySelector("div")) return;
    const chart = chartOf(details.closest("figure"));
    const rows = chart.curves.map((curve) => {
      const steps = payload.steps[curve.x];
      const known = curve.y.map((y, i) => [y, steps[i]]).filter(([y]) => y !== null);
      const low = known.reduce((a, b) => (b[0] < a[0] ? b : a), known[0]);
      const high = known.reduce((a, b) => (b[0] > a[0] ? b : a), known[0]);
      const last = curve.y[curve.y.length - 1];
      const at = (pair) => (pair ? `${pair[0]} at ${chart.axis.name} ${pair[1]}` : "-");
      return [curve.label, at(low), at(high), last === null ? "not finite" : String(last)];
    });
    const table = element("table");
    for (const [number, cells] of [["curve", "smallest", "largest", "last"], ...rows].entries()) {
      const row = element("tr");
      row.append(...cells.map((cell, i) => element(number === 0 || i === 0 ? "th" : "td", cell)));
      table.append(row);
    }
    const box = element("div");
    box.tabIndex = 0;
    box.append(table);
    details.append(box);
  }

  function element(tag, text) {
    const made = document.createElement(tag);
    if (text !== undefined) made.textContent = text;
    return made;
  }

  // Legend: buttons, so that a keyboard reaches them and all charts follow at once

  function swatch(colour, dash) {
    const pattern = { solid: "", dash: "7 4", dot: "2 3", dashdot: "7 3 2 3", longdash: "11 4", longdashdot: "11 3 2 3" };
    const box = element("span");
    box.innerHTML = `<svg width="26" height="8" aria-hidden="true"><line x1="0" x2="26" y1="4" y2="4" stroke="${colour}" stroke-width="3" stroke-dasharray="${pattern[dash]}"/></svg>`;
    return box.firstChild;
  }

  function legendButton(text, colour, dash, set, key) {
    const button = element("button", text);
    button.type = "button";
    button.prepend(swatch(colour, dash));
    button.setAttribute("aria-pressed", String(!set.has(key)));
    button.addEventListener("click", () => {
      set.has(key) ? set.delete(key) : set.add(key);
      button.setAttribute("aria-pressed", String(!set.has(key)));
      drawAll();
    });
    return button;
  }

  const layerButtons = payload.layers.map((label) =>
    legendButton(label, layerColour(label), "solid", hidden.layers, label));

  // The buttons stay, whatever is pressed: one that is replaced loses the keyboard's focus.
  function allLayersButton(text, hide) {
    const button = element("button", text);
    button.type = "button";
    button.addEventListener("click", () => {
      for (const label of payload.layers) hide ? hidden.layers.add(label) : hidden.layers.delete(label);
      for (const each of layerButtons) each.setAttribute("aria-pressed", String(!hide));
      drawAll();
    });
    return button;
  }

  function fillLegends() {
    const runs = payload.runs.map((run, number) =>
      legendButton(run.name, run.colour, payload.runs.length > 1 ? run.dash : "solid", hidden.runs, number));
    document.getElementById("run-legend").append(...runs);
    document.getElementById("layer-legend")
      .append(allLayersButton("all", false), allLayersButton("none", true), ...layerButtons);
    document.getElementById("layer-details").hidden = layerButtons.length === 0;
  }

  function colourLayers() {
    for (const [position, button] of layerButtons.entries()) {
      button.querySelector("line").setAttribute("stroke", layerColour(payload.layers[position]));
    }
  }

  // Maps

  const head = document.getElementById("map-head");
  const slider = document.getElementById("map-step");

  // After a rollback steps come again: time is the attempt, then its step.
  const inTime = (a, b) => a.attempt - b.attempt || a.step - b.step;
  const when = (time) => (time.attempt ? `${time.step}, after rollback ${time.attempt}` : `${time.step}`);
  const mapTimes = maps.flat().flatMap((series) => series.frames).sort(inTime)
    .filter((frame, i, all) => i === 0 || inTime(all[i - 1], frame) < 0);

  function frameAt(series, time) {
    const past = series.frames.filter((frame) => inTime(frame, time) <= 0);
    return past.length ? past[past.length - 1] : series.frames[0];
  }

  function rows(frame) {
    const bytes = Uint8Array.from(atob(frame.levels), (c) => c.charCodeAt(0));
    const scale = frame.largest / 255;
    return Array.from({ length: frame.size }, (_, i) =>
      Array.from(bytes.subarray(i * frame.size, (i + 1) * frame.size), (level) => level * scale));
  }

  async function drawMaps() {
    if (!slider) return;
    const time = mapTimes[Number(slider.value)];
    document.getElementById("map-step-value").value = when(time);
    slider.setAttribute("aria-valuetext", `step ${when(time)}`);
    for (const figure of document.querySelectorAll("figure.map")) {
      if (figure.hidden) continue;
      const series = maps[Number(figure.dataset.run)].find((s) => s.label === head.value);
      const caption = figure.querySelector(".mode"), plot = figure.querySelector(".plot");
      const frame = series && frameAt(series, time);
      if (!frame || frame.largest === null) {
        caption.textContent = frame ? `step ${when(frame)}: the map is damaged or not finite` : "not recorded";
        Plotly.purge(plot);
        continue;
      }
      const share = frame.share === null ? "" : `, entropy at ${Math.round(100 * frame.share)} % of its largest`;
      caption.textContent = `step ${when(frame)}: ${frame.mode}${share}`;
      const axis = { constrain: "domain", showgrid: false, zeroline: false, ticks: "outside", automargin: true };
      await Plotly.react(plot, [{
        type: "heatmap", z: rows(frame), zmin: 0, zmax: frame.largest || 1, colorscale: "Cividis",
        colorbar: { title: { text: "attention", side: "right" }, thickness: 12, exponentformat: "power" },
        hovertemplate: "query %{y}, key %{x}: %{z:.3g}<extra></extra>",
      }], {
        paper_bgcolor: "rgba(0,0,0,0)", plot_bgcolor: "rgba(0,0,0,0)", margin: { l: 10, r: 10, t: BUTTONS, b: 10 },
        font: { color: css("--text"), family: "system-ui, sans-serif", size: 12 },
        xaxis: { ...axis, title: { text: "key" } },
        yaxis: { ...axis, title: { text: "query" }, autorange: "reversed", scaleanchor: "x" },
        dragmode: touch ? false : "zoom", modebar: modebar(),
      }, { ...CONFIG, displayModeBar: "hover" });
      figure.dataset.drawn = "yes";
    }
  }

  if (slider) {
    slider.max = mapTimes.length - 1;
    slider.value = before.mapStep ?? mapTimes.length - 1;
    if ([...head.options].some((option) => option.value === before.head)) head.value = before.head;
    slider.addEventListener("input", drawMaps);
    head.addEventListener("change", drawMaps);
  }

  // Theme

  const system = matchMedia("(prefers-color-scheme: dark)");
  const themes = ["automatic", "light", "dark"];
  let theme = before.theme || 0;
  function applyTheme() {
    const dark = themes[theme] === "dark" || (theme === 0 && system.matches);
    root.dataset.theme = dark ? "dark" : "light";
    root.style.colorScheme = root.dataset.theme;
    document.getElementById("theme").textContent = `Theme: ${themes[theme]}`;
    colourLayers();
    drawAll();
  }
  document.getElementById("theme").addEventListener("click", () => {
    theme = (theme + 1) % themes.length;
    applyTheme();
  });
  system.addEventListener("change", applyTheme);

  for (const select of document.querySelectorAll("select.variant")) {
    select.addEventListener("change", drawAll);
  }
  for (const details of document.querySelectorAll("details.numbers")) {
    details.addEventListener("toggle", () => fillNumbers(details));
  }

  // Following a run: the page loads itself anew, and what a reader has chosen is kept meanwhile in
  // the history of the tab, where a page without a server may keep something.

  function chosen() {
    const zoom = {};
    for (const figure of figures) {
      const plot = figure.querySelector(".js-plotly-plot");
      if (!plot) continue;
      const moved = (axis) => plot.layout[axis].autorange === false && plot.layout[axis].range;
      const y = chartOf(figure).limits ? false : moved("yaxis");
      if (moved("xaxis") || y) zoom[keyOf(figure)] = { xaxis: moved("xaxis"), yaxis: y };
    }
    const selects = [...document.querySelectorAll("select.variant")];
    const isLast = slider && Number(slider.value) === mapTimes.length - 1;
    return {
      theme, zoom, runs: [...hidden.runs].map((number) => payload.runs[number].name),
      layers: [...hidden.layers], head: head && head.value,
      variants: Object.fromEntries(selects.map((each) => [each.closest("section").id, each.value])),
      mapStep: slider && !isLast ? slider.value : undefined,
      open: document.getElementById("layer-details").open, scroll: [scrollX, scrollY],
    };
  }

  for (const [id, value] of Object.entries(before.variants || {})) {
    const select = document.querySelector(`#${id} select.variant`);
    if (select && [...select.options].some((option) => option.value === value)) select.value = value;
  }
  document.getElementById("layer-details").open = Boolean(before.open);

  const seconds = Number(root.dataset.refresh);
  if (seconds > 0) {
    history.scrollRestoration = "manual";
    let isHeld = false;  // a reader is at something: it is not taken from under the hand
    addEventListener("pointerdown", () => { isHeld = true; });
    addEventListener("pointerup", () => { isHeld = false; });
    setInterval(() => {
      if (isHeld || document.hidden) return;
      history.replaceState({ chosen: chosen() }, "");
      location.reload();
    }, 1000 * seconds);
  }
  fillLegends();
  applyTheme();
  if (before.scroll) scrollTo(...before.scroll);
})();
