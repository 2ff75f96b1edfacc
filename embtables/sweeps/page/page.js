"use strict";
// Draws the data of the page. Whatever comes from the sweep becomes text, never markup: `element` sets text content, and
// Plotly, which reads a little markup in labels, gets `label(…)`.

const data = JSON.parse(document.getElementById("data").textContent);
const byId = (id) => document.getElementById(id);
const SYMBOLS = ["circle", "square", "triangle-up", "diamond", "triangle-down", "cross", "x", "pentagon", "star", "hexagon",
  "triangle-left", "triangle-right"];
const DASHES = ["solid", "dash", "dot", "dashdot", "longdash"];
const DASH_ARRAYS = { solid: "", dash: "6 3", dot: "2 2", dashdot: "6 2 2 2", longdash: "9 3" };
const SLICES = ["head", "torso", "tail", "unseen"].filter((name) => data.metrics[`test_auc_${name}`]);
const KINDS = ["rows", "scales", "dense", "codes", "index", "weights", "padding"];
const PATTERNS = ["", "/", "x", "\\", "-", "|", "."];
const narrow = matchMedia("(max-width: 40rem)");
const dark = matchMedia("(prefers-color-scheme: dark)");

// ---- small things ----------------------------------------------------------------------------------------------------

function element(tag, attributes = {}, ...children) {
  const made = document.createElement(tag);
  for (const [name, value] of Object.entries(attributes)) {
    if (value === true) made.setAttribute(name, "");
    else if (value !== false && value !== null) made.setAttribute(name, value);
  }
  made.append(...children);
  return made;
}

const label = (text) => String(text).replace(/&/g, "&amp;").replace(/</g, "&lt;").replace(/>/g, "&gt;");
const pieces = (text) => text.split(/(?<=[ ,(])/);
const short = (text, width) => (text.length > width ? `${text.slice(0, width - 1)}…` : text);

/** Lines of at most so many characters, broken behind commas, brackets and spaces where that is possible. */
function broken(text, width) {
  const found = [""];
  for (const piece of pieces(text).flatMap((each) => each.match(new RegExp(`.{1,${width}}`, "gsu")) || [])) {
    if (found.at(-1).length + piece.trimEnd().length > width) found.push("");
    found[found.length - 1] += piece;
  }
  return found;
}

const wrapped = (text, width) => broken(text, width).map(label).join("<br>");
/** A text that may be broken behind commas and brackets. */
const breakable = (text) => pieces(text).flatMap((piece) => [piece, element("wbr")]);

function bytesText(size) {
  if (size === null) return "–";
  let value = size;
  for (const unit of ["B", "kB", "MB"]) {
    if (value < 1000) return unit === "B" ? `${size} B` : `${Number(value.toPrecision(3))} ${unit}`;
    value /= 1000;
  }
  return value < 1000 ? `${Number(value.toPrecision(3))} GB` : `${Math.round(value).toLocaleString("en")} GB`;
}

const isNumber = (value) => value !== null && value !== undefined;
const fixed = (value, digits = 4) => (isNumber(value) ? value.toFixed(digits) : "–");
const signed = (value) => (isNumber(value) ? (value < 0 ? "−" : "+") + Math.abs(value).toFixed(4) : "–");
const percent = (share) => (isNumber(share) ? `${Number((100 * share).toPrecision(3))} %` : "–");
const mean = (point, name) => (point.values[name] ? point.values[name][0] : null);
const method = (point) => data.methods[point.method];
const done = (point) => point.bytes !== null;
const title = (point) => method(point).name + (point.budget ? ` at ${point.budget}` : "");
const color = (name) => getComputedStyle(document.documentElement).getPropertyValue(`--${name}`).trim();

function rangeText(point, name) {
  const found = point.values[name];
  if (!found) return "–";
  const [value, low, high] = found;
  return low === high ? fixed(value) : `${fixed(value)} (seeds ${fixed(low)} to ${fixed(high)})`;
}

/** What there is to say of a point, a line each. */
function lines(point) {
  const found = [`${bytesText(point.bytes)}, ${percent(point.share)} of full, seeds ${point.seeds}`];
  for (const name of ["test_auc", "test_logloss", "test_normalized_entropy", "test_calibration"]) {
    if (point.values[name]) found.push(`${data.metrics[name]} ${rangeText(point, name)}`);
  }
  if (point.values.lookup_latency_us) found.push(`lookup ${fixed(mean(point, "lookup_latency_us"), 1)} µs`);
  if (point.taken) found.push(`recommended within ${point.taken}`);
  return found;
}

/** What points say when the pointer or a key is on them: a heading and lines for each, as markup and as text. */
function hover(told) {
  return {
    hoverinfo: "text",
    hovertext: told.map(([heading, ...rest]) => [`<b>${wrapped(heading, 38)}</b>`, ...rest.map((line) => wrapped(line, 48))].join("<br>")),
    customdata: told.map((texts) => texts.filter(Boolean).join("; ")),
  };
}

/** A table with a caption; the first cell of a row is its heading. */
function table(caption, header, rows, numeric = []) {
  const cell = (value, i) => {
    if (i === 0) return element("th", { scope: "row" }, value);
    return element("td", { class: numeric.includes(i) ? "number" : null }, value);
  };
  return element("table", {},
    element("caption", {}, caption),
    element("thead", {}, element("tr", {}, ...header.map((name) => element("th", { scope: "col" }, name)))),
    element("tbody", {}, ...rows.map((row) => element("tr", {}, ...row.map(cell)))));
}

// ---- how a method looks ----------------------------------------------------------------------------------------------

/** Full tables in the color of the text, baselines in gray, the others each in a color, and all by symbol and dashes. */
function look(number) {
  const { kind, baseline } = data.methods[number];
  const others = data.methods.slice(0, number).filter((other) => !other.baseline).length;
  return {
    color: color(kind === "full" ? "fg" : baseline ? "muted" : `s${others % 8}`),
    symbol: SYMBOLS[number % SYMBOLS.length],
    dash: DASHES[number % DASHES.length],
  };
}

const SVG = "http://www.w3.org/2000/svg";
const SHAPES = {
  circle: "M4,0A4,4 0 1 1 -4,0A4,4 0 1 1 4,0Z", square: "M-4,-4H4V4H-4Z", "triangle-up": "M0,-5L5,4H-5Z",
  diamond: "M0,-5L5,0L0,5L-5,0Z", "triangle-down": "M0,5L5,-4H-5Z",
  cross: "M-5,-2H-2V-5H2V-2H5V2H2V5H-2V2H-5Z", x: "M-5,-3L-3,-5L0,-2L3,-5L5,-3L2,0L5,3L3,5L0,2L-3,5L-5,3L-2,0Z",
  pentagon: "M0,-5L5,-1L3,4H-3L-5,-1Z", star: "M0,-6L1.5,-2H6L2.5,1L4,5L0,2.5L-4,5L-2.5,1L-6,-2H-1.5Z",
  hexagon: "M-5,0L-2.5,-4.5H2.5L5,0L2.5,4.5H-2.5Z", "triangle-left": "M-5,0L4,-5V5Z", "triangle-right": "M5,0L-4,-5V5Z",
};

function swatch(number) {
  const { color: stroke, symbol, dash } = look(number);
  const svg = document.createElementNS(SVG, "svg");
  const line = document.createElementNS(SVG, "path");
  const mark = document.createElementNS(SVG, "path");
  const set = (node, attributes) => Object.entries(attributes).forEach((each) => node.setAttribute(...each));
  set(svg, { width: 36, height: 14, viewBox: "-18 -7 36 14", "aria-hidden": "true" });
  set(line, { d: "M-18,0H18", stroke, "stroke-width": 2, "stroke-dasharray": DASH_ARRAYS[dash] });
  set(mark, { d: SHAPES[symbol], fill: stroke });
  svg.append(line, mark);
  return svg;
}

// ---- figures ---------------------------------------------------------------------------------------------------------

const figures = {};

/**
 * A figure: `make()` gives traces, layout, a sentence for those who do not see it, notes and its table, or a sentence
 * in its place where there is nothing to draw.
 */
function figure(id, make) {
  const holder = byId(id);
  const plot = element("div", { class: "plot", id: `${id}-plot`, tabindex: 0, role: "img" });
  const readout = element("p", { class: "readout", "aria-live": "polite" });
  const note = element("p", { class: "note" });
  const body = element("div", { class: "scroll", tabindex: 0, role: "region", "aria-label": "numbers of the figure" });
  const details = element("details", {}, element("summary", {}, "The numbers of this figure as a table"), body);
  const none = element("p", { hidden: true });
  holder.append(none, plot, readout, note, details);
  let current = null;
  let place = -1;

  const fill = () => details.open && current && current.table && body.replaceChildren(table(...current.table));
  details.addEventListener("toggle", fill);
  const tell = (number, trace) => { readout.textContent = trace.customdata[number]; };
  plot.addEventListener("keydown", (event) => {
    const steps = { ArrowRight: 1, ArrowDown: 1, ArrowLeft: -1, ArrowUp: -1 };
    if (!(event.key in steps) || !current || !current.traces || !window.Plotly) return;
    event.preventDefault();
    const all = current.traces.flatMap((trace, curveNumber) =>
      (trace.hoverinfo === "text" ? trace.hovertext.map((_, pointNumber) => ({ curveNumber, pointNumber })) : []));
    if (!all.length) return;
    place = (place + steps[event.key] + all.length) % all.length;
    const { curveNumber, pointNumber } = all[place];
    if (current.traces[curveNumber].type !== "treemap") window.Plotly.Fx.hover(plot, [all[place]]);
    tell(pointNumber, current.traces[curveNumber]);
  });

  figures[id] = () => {
    current = make();
    place = -1;
    readout.textContent = "";
    const isText = typeof current === "string";
    none.hidden = !isText;
    [plot, readout, note, details].forEach((part) => { part.hidden = isText; });
    if (isText) {
      none.textContent = current;
      return;
    }
    plot.setAttribute("aria-label", `${current.sentence} Arrow keys go from point to point; the table below has the numbers.`);
    note.textContent = current.note || "";
    fill();
    if (!window.Plotly) {
      plot.hidden = true;
      return;
    }
    if (current.height) plot.style.height = `${current.height}px`;
    const layout = {
      autosize: true, showlegend: false, hovermode: "closest",
      dragmode: narrow.matches ? false : "zoom",
      paper_bgcolor: color("bg"), plot_bgcolor: color("bg"),
      font: { family: "system-ui, sans-serif", size: 13, color: color("fg") },
      margin: { l: narrow.matches ? 52 : 68, r: 14, t: 12, b: 56 },
      hoverlabel: { align: "left", bgcolor: color("panel"), bordercolor: color("edge"), font: { color: color("fg"), size: 12 } },
      ...current.layout,
    };
    for (const name of ["xaxis", "yaxis"]) {
      layout[name] = { gridcolor: color("line"), zerolinecolor: color("edge"), linecolor: color("edge"), automargin: true,
        ...layout[name] };
    }
    window.Plotly.react(plot, current.traces, layout, { displayModeBar: false, responsive: true, doubleClick: "autosize" });
    if (!plot.dataset.bound) {
      plot.dataset.bound = "yes";
      plot.on("plotly_hover", (event) => {
        const [found] = event.points;
        tell(found.pointNumber, current.traces[found.curveNumber]);
      });
    }
  };
}

/** Points joined to a line, with the range of the seeds. */
function trace(points, number, x, name, more = {}) {
  const style = look(number);
  const values = points.map((point) => point.values[name]);
  return {
    type: "scatter", mode: "lines+markers", x: points.map(x), y: values.map(([value]) => value),
    name: label(data.methods[number].name),
    ...hover(points.map((point) => [title(point), ...lines(point)])),
    error_y: {
      type: "data", symmetric: false, thickness: 1.2, width: 3,
      array: values.map(([value, , high]) => high - value), arrayminus: values.map(([value, low]) => value - low),
    },
    line: { color: style.color, dash: style.dash, width: 1.8 },
    marker: { color: style.color, symbol: style.symbol, size: 9, line: { color: color("bg"), width: 0.8 } },
    ...more,
  };
}

// ---- what is chosen --------------------------------------------------------------------------------------------------

const shown = new Set(data.methods.flatMap((each, number) => (each.shown ? [number] : [])));
const precisions = [...new Set(data.methods.map((each) => each.precision))];
const shownPrecisions = new Set(precisions);
const variant = () => (data.variants.length ? byId("variant").value : "");
const metric = () => byId("metric").value;
const ofVariant = (point) => point.variant === variant();
const isShown = (number) => shown.has(number) && shownPrecisions.has(data.methods[number].precision);
const fullOf = () => data.full.map((number) => data.points[number]).find(ofVariant);

/** The finished points of the methods that are chosen, by method, from the smallest up. */
function chosen(test = () => true) {
  const found = new Map();
  for (const point of data.points) {
    if (done(point) && ofVariant(point) && isShown(point.method) && test(point)) {
      if (!found.has(point.method)) found.set(point.method, []);
      found.get(point.method).push(point);
    }
  }
  for (const points of found.values()) points.sort((one, other) => one.bytes - other.bytes);
  return [...found].sort(([one], [other]) => one - other);
}

const NONE = "No method that is chosen above has a result here.";

// ---- accuracy for bytes ----------------------------------------------------------------------------------------------

function sizeAxis() {
  const kind = byId("axis").value;
  const log = kind !== "share";
  const x = (point) => (kind === "bytes" ? point.bytes : isNumber(point.share) ? 100 * point.share : null);
  const axis = { type: log ? "log" : "linear", title: { text: kind === "bytes" ? "bytes of the served tables" : "% of the full tables" } };
  return { log, x, axis, kind };
}

function sizeTicks(kind, values) {
  if (kind !== "bytes" || !values.length) return {};
  const [low, high] = [Math.log10(Math.min(...values)), Math.log10(Math.max(...values))];
  const factors = high - low < 2.5 ? [1, 2, 5] : [1];
  const tickvals = [];
  for (let power = Math.floor(low) - 1; power <= Math.ceil(high) + 1; power += 1) {
    for (const factor of factors) tickvals.push(factor * 10 ** power);
  }
  return { tickvals, ticktext: tickvals.map((value) => (value < 1 ? "" : bytesText(value))) };
}

/**
 * The values of a metric that are shown: all, or those around the best of each budget, so that what nobody would take
 * does not squeeze what is to be told apart.
 */
function valueRange(points, name) {
  const sign = /logloss|entropy/.test(name) ? -1 : 1;
  const ends = points.flatMap((point) => point.values[name].slice(1)).map((value) => sign * value);
  let low = Math.min(...ends);
  const high = Math.max(...ends);
  if (!byId("whole").checked && name !== "test_calibration") {
    const best = new Map();
    for (const point of points) best.set(point.budget, Math.max(best.get(point.budget) ?? -Infinity, sign * mean(point, name)));
    const worst = Math.min(...best.values());
    low = Math.max(low, worst - 0.5 * (high - worst));
  }
  const room = 0.06 * (high - low) || 0.01;
  return [sign * (low - room), sign * (high + room)].sort((one, other) => one - other);
}

function drawCurve() {
  const name = metric();
  const { log, x, axis, kind } = sizeAxis();
  const all = chosen((point) => point.values[name] && isNumber(x(point)));
  const drawable = all.map(([number, points]) => [number, points.filter((point) => !log || x(point) > 0)])
    .filter(([, points]) => points.length);
  const points = drawable.flatMap(([, own]) => own);
  if (!points.length) return NONE;
  const range = valueRange(points, name);
  const full = fullOf();
  const traces = drawable.map(([number, own]) => trace(own, number, x, name));
  const rings = points.filter((point) => point.taken);
  if (rings.length) {
    traces.push({
      type: "scatter", mode: "markers", x: rings.map(x), y: rings.map((point) => mean(point, name)), hoverinfo: "skip",
      marker: { symbol: "circle-open", size: 20, color: color("fg"), line: { width: 2, color: color("fg") } },
    });
  }
  const shapes = [];
  if (full && full.values[name]) {
    const [value, low, high] = full.values[name];
    const across = { xref: "paper", x0: 0, x1: 1, layer: "below" };
    shapes.push({ type: "rect", ...across, y0: low, y1: high, fillcolor: color("fg"), opacity: 0.1, line: { width: 0 } });
    shapes.push({ type: "line", ...across, y0: value, y1: value, line: { color: color("fg"), width: 1.2, dash: "dot" } });
    range[0] = Math.min(range[0], low);
    range[1] = Math.max(range[1], high);
  }
  const outside = points.filter((point) => mean(point, name) < range[0] || mean(point, name) > range[1]);
  const empty = all.flatMap(([, own]) => own).filter((point) => log && !(x(point) > 0));
  const notes = ["Marks are means over seeds, bars their range."];
  if (shapes.length) notes.push("The dotted line and the band are full tables.");
  if (rings.length) notes.push("A ring is around what is recommended.");
  if (outside.length) notes.push(`${outside.length} of ${points.length} marks lie outside.`);
  if (empty.length) notes.push(`Without a byte: ${empty.map((point) => `${title(point)} (${fixed(mean(point, name))})`).join(", ")}.`);
  return {
    traces,
    layout: {
      shapes,
      xaxis: { ...axis, ...(log ? sizeTicks(kind, points.map(x)) : {}) },
      yaxis: { title: { text: label(data.metrics[name]) }, range },
    },
    sentence: `${data.metrics[name]} of ${drawable.length} methods against the bytes of the served tables.`,
    note: notes.join(" "),
    table: [`${data.metrics[name]} against bytes`, ["method", "bytes", "of full", data.metrics[name], "lowest", "highest"],
      all.flatMap(([, own]) => own.map((point) => [title(point), bytesText(point.bytes), percent(point.share),
        ...point.values[name].map((value) => fixed(value))])), [1, 2, 3, 4, 5]],
  };
}

// ---- where the bytes go ----------------------------------------------------------------------------------------------

function drawBytes() {
  const point = data.points[byId("cell").value];
  if (!point) return "No run of this sweep has its plan beside its results, so it is not known here where the bytes go.";
  if (!point.parts.length) return `${title(point)} serves no table.`;
  const tables = [...new Set(point.parts.map(([name]) => name))];
  const total = point.parts.reduce((sum, [, , size]) => sum + size, 0);
  const nodes = [{ id: "all", label: "all tables", parent: "", value: total, kind: null }];
  for (const name of tables) {
    const own = point.parts.filter((part) => part[0] === name);
    const sum = own.reduce((value, part) => value + part[2], 0);
    nodes.push({ id: `t/${name}`, label: name, parent: "all", value: sum, kind: null });
    for (const [, kind, size] of own) nodes.push({ id: `k/${name}/${kind}`, label: kind, parent: `t/${name}`, value: size, kind });
  }
  const sizes = nodes.map((node) => `${bytesText(node.value)}, ${percent(node.value / total)}`);
  const kinds = KINDS.map((kind) => [kind, point.parts.reduce((sum, part) => sum + (part[1] === kind ? part[2] : 0), 0)])
    .filter(([, size]) => size).map(([kind, size]) => `${kind} ${bytesText(size)}`).join(", ");
  const colors = nodes.map((node) => (node.kind ? color(`s${KINDS.indexOf(node.kind)}`) : color("panel")));
  return {
    traces: [{
      type: "treemap", branchvalues: "total", ids: nodes.map((node) => node.id), parents: nodes.map((node) => node.parent),
      labels: nodes.map((node) => label(short(node.label, 40))), values: nodes.map((node) => node.value), text: sizes,
      textinfo: "label+text", tiling: { pad: 2 }, pathbar: { visible: false },
      ...hover(nodes.map((node, i) => [node.kind ? node.id.slice(2) : node.label, sizes[i]])),
      insidetextfont: { color: nodes.map((node) => color(node.kind ? "bg" : "fg")) }, outsidetextfont: { color: color("fg") },
      marker: {
        colors, line: { color: color("bg"), width: 1 }, cornerradius: 2,
        pattern: { shape: nodes.map((node) => (node.kind ? PATTERNS[KINDS.indexOf(node.kind)] : "")), bgcolor: colors,
          solidity: 0.08, fgcolor: nodes.map(() => color("bg")) },
      },
    }],
    layout: { margin: { l: 2, r: 2, t: 2, b: 2 } },
    sentence: `The ${bytesText(total)} of ${title(point)} by table and kind.`,
    note: `${title(point)}: ${bytesText(total)}, ${kinds}. A click on a table shows it alone, another one all of them.`,
    table: [`Bytes of ${title(point)}`, ["table", "kind", "bytes", "share"],
      point.parts.map(([name, kind, size]) => [name, kind, size.toLocaleString("en"), percent(size / total)]), [2, 3]],
  };
}

// ---- head, torso, tail, unseen ---------------------------------------------------------------------------------------

function atBudget(id) {
  const budget = byId(id).value;
  return (point) => point.budget === budget || point.budget === "";
}

function drawSlices() {
  if (!SLICES.length) return "The results hold no AUC by frequency of ids.";
  const names = SLICES.map((name) => `test_auc_${name}`);
  const found = chosen(atBudget("slices-budget")).filter(([, [point]]) => names.some((name) => point.values[name]));
  if (!found.length) return NONE;
  const traces = found.map(([number, [point]]) => {
    const own = names.filter((name) => point.values[name]);
    const made = trace(own.map(() => point), number, () => "", own[0]);
    const values = own.map((name) => point.values[name]);
    return {
      ...made, x: own.map((name) => name.replace("test_auc_", "")), y: values.map(([value]) => value),
      error_y: { ...made.error_y, array: values.map(([value, , high]) => high - value),
        arrayminus: values.map(([value, low]) => value - low) },
      ...hover(own.map((name) => [title(point), `${data.metrics[name]} ${rangeText(point, name)}`])),
    };
  });
  return {
    traces,
    layout: { xaxis: { type: "category", title: { text: "ids" } }, yaxis: { title: { text: "test AUC" } } },
    sentence: `Test AUC by frequency of the ids, of ${found.length} methods.`,
    note: "",
    table: ["Test AUC by frequency of the ids", ["method", ...SLICES],
      found.map(([, [point]]) => [title(point), ...names.map((name) => fixed(mean(point, name)))]), SLICES.map((_, i) => i + 1)],
  };
}

// ---- seeds and differences -------------------------------------------------------------------------------------------

function drawSeeds() {
  const found = chosen((point) => atBudget("seeds-budget")(point) && point.differences.length).map(([, [point]]) => point);
  const known = data.points.some((point) => point.differences.some(([, , low]) => low !== null));
  byId("seeds-text").textContent = `A mark is the test AUC of one seed minus that of full tables with the same seed. ${known
    ? "Its bar is the 95 % interval over resampled test rows (paired bootstrap): a bar that does not touch the line at 0 is more than the choice of test rows explains."
    : "Intervals over test rows need the scores of the cells, which are not beside these results."}`;
  if (!found.length) return "There are no differences to full tables here: full tables, or what is chosen above, have no result.";
  const average = (point) => point.differences.reduce((sum, [, value]) => sum + value, 0) / point.differences.length;
  found.sort((one, other) => average(one) - average(other));
  const rows = found.flatMap((point, row) => point.differences.map(([seed, value, low, high], i) => {
    const offset = point.differences.length > 1 ? 0.36 * (0.5 - i / (point.differences.length - 1)) : 0;
    return { point, seed, value, low, high, at: row + offset };
  }));
  const traces = found.map((point) => {
    const own = rows.filter((row) => row.point === point);
    const style = look(point.method);
    return {
      type: "scatter", mode: "markers", x: own.map((row) => row.value), y: own.map((row) => row.at),
      ...hover(own.map((row) => [title(row.point), `seed ${row.seed}: ${signed(row.value)}`,
        ...(row.low === null ? [] : [`95 %: ${signed(row.low)} to ${signed(row.high)}`])])),
      error_x: { type: "data", symmetric: false, thickness: 1.4, width: 3,
        array: own.map((row) => (row.high === null ? 0 : row.high - row.value)),
        arrayminus: own.map((row) => (row.low === null ? 0 : row.value - row.low)) },
      marker: { color: style.color, symbol: style.symbol, size: 8 },
    };
  });
  const names = found.map((point) => broken(method(point).name, narrow.matches ? 18 : 46));
  const tallest = Math.max(2, ...names.map((each) => each.length));
  return {
    traces,
    height: 110 + (6 + 15 * tallest) * found.length,
    layout: {
      xaxis: { title: { text: narrow.matches ? "difference" : "test AUC minus that of full tables" }, zeroline: true, zerolinewidth: 2 },
      yaxis: { tickvals: found.map((_, i) => i), ticktext: names.map((each) => each.map(label).join("<br>")), tickfont: { size: 12 },
        range: [-0.7, found.length - 0.3], zeroline: false },
    },
    sentence: `Differences of test AUC to full tables, seed by seed, of ${found.length} methods.`,
    note: "",
    table: ["Differences to full tables", ["method", "seed", "difference", "95 % from", "to"],
      rows.map((row) => [title(row.point), String(row.seed), signed(row.value), signed(row.low), signed(row.high)]), [1, 2, 3, 4]],
  };
}

// ---- latency ---------------------------------------------------------------------------------------------------------

function drawLatency() {
  const name = metric();
  const found = chosen((point) => point.values.lookup_latency_us && point.values[name]);
  if (!found.length) return "No method that is chosen above has a latency here.";
  const points = found.flatMap(([, own]) => own);
  return {
    traces: found.map(([number, own]) => trace(own, number, (point) => mean(point, "lookup_latency_us"), name, { mode: "markers" })),
    layout: { xaxis: { type: "log", title: { text: "µs for the lookup of a batch, logarithmic" } },
      yaxis: { title: { text: label(data.metrics[name]) }, range: valueRange(points, name) } },
    sentence: `${data.metrics[name]} against the latency of a lookup, of ${found.length} methods.`,
    note: "",
    table: [`${data.metrics[name]} and latency`, ["method", "lookup µs", data.metrics[name]],
      points.map((point) => [title(point), fixed(mean(point, "lookup_latency_us"), 1), fixed(mean(point, name))]), [1, 2]],
  };
}

// ---- learning curves -------------------------------------------------------------------------------------------------

function drawLearning() {
  const said = byId("said");
  said.replaceChildren();
  const point = data.points[byId("trained").value];
  if (!point) return "No run of this sweep has its evaluations (cells/NAME/validation.csv) beside its results.";
  const measure = byId("measure").value;
  const full = fullOf();
  const traces = [];
  const rows = [];
  const add = (owner, ink, width) => owner.cells.forEach((name, i) => {
    const { curve, best, seed } = data.runs[name];
    if (!curve) return;
    const columns = measure === "valid_logloss" ? ["valid_logloss", "train_loss"] : [measure];
    for (const column of columns) {
      const what = `${title(owner)}, seed ${seed}, ${column === "train_loss" ? "training" : "validation"}`;
      traces.push({
        type: "scatter", mode: "lines+markers", x: curve.epoch, y: curve[column],
        ...hover(curve.epoch.map((epoch, j) => [what, `epoch ${epoch}: ${fixed(curve[column][j])}${epoch === best ? ", kept" : ""}`])),
        line: { color: ink, width, dash: column === "train_loss" ? "dot" : owner === point ? "solid" : "dash" },
        marker: { color: ink, symbol: curve.epoch.map((epoch) => (epoch === best ? "star" : SYMBOLS[i % 4])),
          size: curve.epoch.map((epoch) => (epoch === best ? 14 : 5)) },
      });
      curve.epoch.forEach((epoch, j) => rows.push([what, String(epoch), fixed(curve[column][j]), epoch === best ? "kept" : ""]));
    }
  });
  if (full && full !== point) add(full, color("muted"), 1.4);
  add(point, color("s0"), 2);
  for (const name of point.cells) {
    for (const text of [data.runs[name].overfitting, ...data.runs[name].remarks]) {
      if (text) said.append(element("li", {}, `Seed ${data.runs[name].seed}: ${text}`));
    }
  }
  if (!traces.length) return "These runs have no evaluations beside their results.";
  const other = full && full !== point ? ` Gray, with dashes: ${title(full)}.` : "";
  return {
    traces,
    layout: { xaxis: { title: { text: "epoch" } }, yaxis: { title: { text: measure === "valid_auc" ? "validation AUC" : "log loss" } } },
    sentence: `Learning curves of ${title(point)}.`,
    note: `In color: ${title(point)}, a line a seed; a star is the epoch whose model is kept.${
      measure === "valid_logloss" ? " Dotted: training." : ""}${other}`,
    table: [`Learning curves of ${title(point)}`, ["training", "epoch", measure === "valid_auc" ? "validation AUC" : "log loss", ""],
      rows, [1, 2]],
  };
}

// ---- all rows --------------------------------------------------------------------------------------------------------

function copy(code, button) {
  const tell = (text) => { byId("copied").textContent = text; };
  const name = button.getAttribute("aria-label").replace("Copy ", "");
  const select = () => {
    code.closest("details").open = true;
    getSelection().selectAllChildren(code);
    tell("The command is selected: copy it by Ctrl-C.");
  };
  if (!navigator.clipboard) select();
  else navigator.clipboard.writeText(code.textContent).then(() => tell(`Copied: ${name}.`), select);
}

function drawRows() {
  const heading = data.header.indexOf("method");
  const names = [...data.header.slice(0, -1), "norm. entropy", "lookup µs", data.header.at(-1)];
  names.splice(heading + 2, 0, "command"); // behind the budget
  const rows = data.points.map((point) => {
    const code = element("code", {}, point.command);
    const button = element("button", { type: "button", "aria-label": `Copy the command of ${title(point)}` }, "copy");
    button.addEventListener("click", () => copy(code, button));
    const command = point.command ? [button, element("details", {}, element("summary", {}, "show"), code)] : ["–"];
    const taken = point.taken ? `RECOMMENDED within ${point.taken}. ` : "";
    const cells = point.line.slice(0, -1).map((text, i) => (i === heading
      ? element("th", { scope: "row" }, ...breakable(text)) : element("td", { class: i > heading + 1 ? "number" : null }, text)));
    cells.splice(heading + 2, 0, element("td", {}, ...command));
    return element("tr", {}, ...cells,
      element("td", { class: "number" }, fixed(mean(point, "test_normalized_entropy"))),
      element("td", { class: "number" }, fixed(mean(point, "lookup_latency_us"), 1)),
      element("td", { class: "text" }, ...breakable(taken + point.line.at(-1))));
  });
  byId("rows").append(element("table", {},
    element("caption", {}, "By budget, the best first. Means over seeds ± their standard deviation."),
    element("thead", {}, element("tr", {}, ...names.map((name) => element("th", { scope: "col" }, name)))),
    element("tbody", {}, ...rows)));
  const texts = data.points.map((point) => [...point.line, point.taken && "recommended"].join(" ").toLowerCase());
  byId("filter").addEventListener("input", (event) => {
    const wanted = event.target.value.toLowerCase().split(/\s+/).filter(Boolean);
    rows.forEach((row, i) => { row.hidden = !wanted.every((word) => texts[i].includes(word)); });
  });
}

// ---- controls --------------------------------------------------------------------------------------------------------

function options(select, entries) {
  select.replaceChildren(...entries.map(([value, text]) => element("option", { value }, text)));
}

/** Draws figures, those far below only when somebody comes near. */
function render(...ids) {
  for (const id of ids.length ? ids : Object.keys(figures)) {
    if (near.has(id)) figures[id]();
    else stale.add(id);
  }
}

const near = new Set();
const stale = new Set();
const observer = new IntersectionObserver((entries) => {
  for (const { target, isIntersecting } of entries) {
    if (!isIntersecting) near.delete(target.id);
    else if (near.add(target.id) && stale.delete(target.id)) figures[target.id]();
  }
}, { rootMargin: "300px" });
addEventListener("beforeprint", () => [...stale].forEach((id) => stale.delete(id) && figures[id]()));

function drawMethods() {
  const places = byId("methods").querySelector(".choices");
  places.replaceChildren(...data.methods.map((each, number) => {
    const box = element("input", { type: "checkbox", checked: shown.has(number) });
    box.addEventListener("change", () => {
      if (box.checked) shown.add(number); else shown.delete(number);
      render("curve", "slices", "seeds", "latency");
    });
    return element("label", {}, box, swatch(number), element("span", {}, ...breakable(each.name)));
  }));
}

/** The rows of which there is a plan, and those of which there are curves. */
function runChoices() {
  const own = data.points.map((point, i) => [i, point]).filter(([, point]) => ofVariant(point));
  const named = ([i, point]) => [i, `${title(point)}, ${bytesText(point.bytes)}${point.taken ? " (recommended)" : ""}`];
  const first = (list) => { // what is recommended comes first
    const sorted = [...list].sort(([, one], [, other]) => Boolean(other.taken) - Boolean(one.taken));
    return sorted.map(named);
  };
  options(byId("cell"), first(own.filter(([, point]) => point.parts)));
  options(byId("trained"), first(own.filter(([, point]) => point.cells.some((name) => data.runs[name].curve))));
  for (const id of ["cell", "trained"]) byId(id).closest("p").hidden = !byId(id).options.length;
}

function controls() {
  options(byId("metric"), Object.entries(data.metrics));
  options(byId("variant"), data.variants.map((name) => [name, name]));
  byId("variant-label").hidden = !data.variants.length;
  document.querySelectorAll("select.budget").forEach((select) => {
    options(select, data.budgets.map((budget) => [budget, budget]));
    select.closest("p").hidden = !data.budgets.length;
  });
  byId("precisions").hidden = precisions.length < 2;
  for (const name of precisions) {
    const box = element("input", { type: "checkbox", checked: true });
    box.addEventListener("change", () => {
      if (box.checked) shownPrecisions.add(name); else shownPrecisions.delete(name);
      render("curve", "slices", "seeds", "latency");
    });
    byId("precisions").append(element("label", {}, box, name || "that of the training configuration"));
  }
  document.querySelectorAll("[data-show]").forEach((button) => button.addEventListener("click", () => {
    shown.clear();
    data.methods.forEach((each, number) => {
      if (button.dataset.show === "all" || (button.dataset.show === "best" && each.best)) shown.add(number);
    });
    drawMethods();
    render("curve", "slices", "seeds", "latency");
  }));
  const redraw = (id, ...ids) => byId(id).addEventListener("change", () => render(...ids));
  redraw("metric", "curve", "latency");
  redraw("axis", "curve");
  redraw("whole", "curve", "latency");
  redraw("cell", "bytes");
  redraw("slices-budget", "slices");
  redraw("seeds-budget", "seeds");
  redraw("trained", "learning");
  redraw("measure", "learning");
  byId("variant").addEventListener("change", () => { runChoices(); render(); });
  runChoices();
}

function theme() {
  document.documentElement.dataset.theme = byId("theme").value || (dark.matches ? "dark" : "light");
  drawMethods(); // the swatches have the colors of the theme
  render();
}

async function inflate(id) {
  const text = atob(byId(id).textContent);
  const bytes = new Uint8Array(text.length);
  for (let i = 0; i < text.length; i += 1) bytes[i] = text.charCodeAt(i); // Uint8Array.from takes ten times as long
  return new Response(new Blob([bytes]).stream().pipeThrough(new DecompressionStream("gzip"))).text();
}

async function start() {
  controls();
  figure("curve", drawCurve);
  figure("bytes", drawBytes);
  figure("slices", drawSlices);
  figure("seeds", drawSeeds);
  figure("latency", drawLatency);
  figure("learning", drawLearning);
  drawRows();
  try {
    document.head.append(Object.assign(document.createElement("script"), { textContent: await inflate("plotly") }));
  } catch (error) {
    byId("curve").before(element("p", { role: "alert" }, "This browser cannot unpack the figures, which needs " +
      "DecompressionStream (Chrome 80, Firefox 113, Safari 16.4 or later): the tables hold the same numbers."));
  }
  theme();
  byId("theme").addEventListener("change", theme);
  dark.addEventListener("change", theme);
  narrow.addEventListener("change", () => render());
  document.querySelectorAll(".figure").forEach((holder) => observer.observe(holder));
  document.documentElement.dataset.ready = "yes";
}

start();
