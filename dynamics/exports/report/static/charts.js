"use strict";
// Charts as SVG, by Observable Plot. Each function returns the SVG and the points of each line, which
// the keyboard walks. Colours are variables of report.css: nothing is drawn anew for another theme.

const COLOURS = 4;
const colour = (i) => `var(--s${i % COLOURS})`;
const dashes = (i) => ["", "6,3", "2,2", "8,2,2,2"][Math.floor(i / COLOURS) % 4];
const shaded = (share) => d3.interpolateViridis(0.88 * share);
// Of layers: from dark to bright, and readable on either ground.
const graded = (share) => `color-mix(in oklab, ${shaded(share)} 68%, var(--ink))`;
const letters = (text) => 7 * text.length;

function shortened(text, most) {
  if (text.length <= most) return text;
  const end = Math.floor(most / 2);
  return `${text.slice(0, most - 1 - end)}…${text.slice(-end)}`;
}

function powers(domain) {
  const [low, high] = domain.map(Math.log10);
  return high - low >= 1.5 ? (value) => `10${raised(Math.round(Math.log10(value)))}` : (value) => written(value, 3);
}

// An axis of powers of ten shows these alone; one that spans less shows round numbers.
function logTicks(domain) {
  const [low, high] = domain.map(Math.log10);
  if (high - low < 1.5) return d3.ticks(...domain, 6).filter((value) => value > 0);
  const apart = Math.max(1, Math.ceil((high - low) / 7));
  return d3.range(Math.ceil(low / apart) * apart, high + 1e-9, apart).map((power) => 10 ** power);
}

// Steps are whole numbers: no ticks between them.
function axisOfSteps([low, high], count) {
  const ticks = d3.ticks(low, high, Math.max(3, Math.round(count))).filter(Number.isInteger);
  const tickFormat = (value) => (value >= 1e5 ? d3.format("~s")(value) : String(value));
  return { labelArrow: "none", labelAnchor: "center", ticks: ticks.length ? ticks : [low], tickFormat };
}

function tidied(svg) {
  // The figure's label speaks for it. Plot labels groups that may not have labels.
  svg.setAttribute("aria-hidden", "true");
  svg.removeAttribute("role");
  return svg;
}

// Where labels at the ends of lines stand: at the lines, pushed apart where they collide.
function spread(labels, scale, gap, low, high) {
  const placed = labels.map((each) => ({ ...each, at: scale(each.y) })).sort((a, b) => a.at - b.at);
  for (let round = 0; round < 60; round++) {
    let moved = false;
    for (let i = 1; i < placed.length; i++) {
      const close = gap - (placed[i].at - placed[i - 1].at);
      if (close > 0.01) {
        placed[i - 1].at -= close / 2;
        placed[i].at += close / 2;
        moved = true;
      }
    }
    placed.forEach((each) => (each.at = Math.min(Math.max(each.at, low), high)));
    if (!moved) break;
  }
  return placed;
}

// A mark of Plot that is drawn in pixels: the names of lines beside their ends.
function endLabels(placed, x) {
  return () =>
    d3.create("svg:g").attr("font-weight", 600).attr("text-anchor", "start").call((group) =>
      group.selectAll("text").data(placed).join("text")
        .attr("x", x).attr("y", (d) => d.at).attr("dy", "0.32em")
        .style("fill", (d) => d.colour).text((d) => d.label)).node();
}

// series: [{name, colour, dash, points: [{x, y, lo, hi, text}], bound: [{x, y}], thin: points}]
function lineChart({ series, width, xLabel, yLabel, log, stairs, fromZero, merges = [], floors = [], zero }) {
  const height = width < 420 ? 270 : 320;
  const shown = series.filter((each) => each.points.length);
  const points = shown.flatMap((each) => each.points);
  const good = (value) => Number.isFinite(value) && (!log || value > 0);
  const heights = shown.flatMap((each) => [
    ...each.points.flatMap((p) => [p.y, p.lo, p.hi]),
    ...(each.bound ?? []).map((p) => p.y),
    ...(each.thin ?? []).map((p) => p.y),
  ]).concat(floors.map((each) => each.y)).filter(good);
  if (!heights.length) return null;
  let [low, high] = d3.extent(heights);
  if (fromZero && !log) low = Math.min(low, 0);
  if (zero) [low, high] = [Math.min(low, 0), Math.max(high, 0)];
  if (low === high) [low, high] = log ? [low / 2, high * 2] : [low - (Math.abs(low) || 1) * 0.05, high + (Math.abs(high) || 1) * 0.05];
  if (!log) high += (high - low) * 0.04;
  const y = { type: log ? "log" : "linear", domain: [low, high], grid: true, label: null, nice: !log };
  // A log axis labels some of its ticks only, unless it is a mark with texts.
  const ticks = log ? logTicks([low, high]) : null;
  const axis = log ? [Plot.gridY(ticks), Plot.axisY(ticks, { text: ticks.map(powers([low, high])), label: null })] : [];
  if (log) Object.assign(y, { axis: null, grid: false });
  else y.tickFormat = (value) => written(value, 4);
  const ends = shown.map((each) => ({ ...each.points[each.points.length - 1], name: each.name, colour: each.colour, at: 0 })).filter((each) => good(each.y));
  const few = ends.length <= 8 && (ends.length > 1 || shown[0].label);
  const most = Math.floor((width / 3 - 14) / 7);
  const named = ends.map((each, i) => ({ ...each, label: shortened(shown.length > 1 ? each.name : shown[i].label ?? each.name, most) }));
  const marginRight = few ? Math.min(width / 3, 14 + Math.max(...named.map((each) => letters(each.label)))) : 16;
  const marginTop = 14, marginBottom = 40;
  const marginLeft = 52;
  const scale = Plot.scale({ y: { ...y, range: [height - marginBottom, marginTop] } });
  const curve = stairs ? "step-before" : "linear";
  const at = (each) => ({ x: "x", y: "y", stroke: each.colour, curve });
  const lowest = floors.length ? Math.min(...floors.map((each) => each.y)) : null;
  const svg = Plot.plot({
    width, height, marginLeft, marginRight, marginTop, marginBottom,
    style: { background: "none", fontSize: "12px", fontFamily: "inherit", overflow: "visible" },
    x: { label: xLabel, ...axisOfSteps(d3.extent(shown.flatMap((each) => [...each.points, ...(each.thin ?? [])]), (point) => point.x), (width - marginRight) / 90) },
    y,
    marks: [
      ...axis,
      lowest && lowest > low ? Plot.rectY([0], { y1: low, y2: lowest, fill: "var(--noise)" }) : null,
      lowest && lowest > low ? Plot.text(["rounding"], { frameAnchor: "bottom-left", dx: 6, dy: -6, fill: "var(--muted)" }) : null,
      Plot.ruleX(merges, { stroke: "var(--muted)", strokeDasharray: "1,4" }),
      merges.length ? Plot.text([merges[0]], { x: (d) => d, frameAnchor: "top", text: () => "merge", textAnchor: "start", dx: 3, dy: -10, fill: "var(--muted)" }) : null,
      zero ? Plot.ruleY([0], { stroke: "var(--muted)" }) : null,
      ...shown.map((each) => each.bound?.length ? Plot.line(each.bound, { ...at(each), strokeWidth: 7, strokeOpacity: 0.25, filter: (d) => good(d.y) }) : null),
      ...shown.map((each) => Plot.areaY(each.points, { x: "x", y1: "lo", y2: "hi", fill: each.colour, fillOpacity: 0.18, curve, filter: (d) => good(d.lo) && good(d.hi) })),
      ...shown.map((each) => each.thin?.length ? Plot.line(each.thin, { x: "x", y: "y", stroke: each.colour, strokeWidth: 1, strokeOpacity: 0.65 }) : null),
      ...floors.map((each) => Plot.ruleY([each.y], { stroke: each.colour, strokeDasharray: "5,4", strokeOpacity: 0.8 })),
      ...shown.map((each) => Plot.line(each.points, { ...at(each), strokeWidth: 2, strokeDasharray: each.dash || undefined, filter: (d) => good(d.y) })),
      ...shown.map((each) => each.points.length === 1 ? Plot.dot(each.points, { x: "x", y: "y", fill: each.colour, r: 4 }) : null),
      ...shown.map((each) => each.cliff ? Plot.dot([each.cliff], { x: "x", y: "y", fill: each.colour, r: 4 }) : null),
      few ? endLabels(spread(named, scale.apply, 15, marginTop, height - marginBottom), width - marginRight + 8) : null,
      Plot.dot(points, Plot.pointer({ x: "x", y: "y", stroke: "currentColor", fill: "none", r: 5, filter: (d) => good(d.y) })),
      Plot.tip(points, Plot.pointer({ x: "x", y: "y", title: "text", filter: (d) => good(d.y), lineWidth: 24, fill: "var(--card)" })),
    ].filter(Boolean),
  });
  return { svg: tidied(svg), lines: shown.map((each) => each.points.filter((p) => good(p.y))) };
}

// One heat map. panel: {name, rows: [label], steps, cells: [row][step], merges}; domain: of all panels.
function heatMap({ panel, width, domain, log, xLabel, tall }) {
  const { rows, steps, cells } = panel;
  const high = Math.max(5, Math.min(tall ? 56 : 26, 230 / rows.length));
  const marginTop = 6, marginBottom = 38, marginRight = 10;
  const marginLeft = 40 + 7 * Math.max(...rows.map((row) => row.length));
  const height = marginTop + marginBottom + Math.max(60, high * rows.length);
  const edges = steps.map((step, t) => (t ? (steps[t - 1] + step) / 2 : step - ((steps[1] ?? step + 1) - step) / 2));
  edges.push(steps.length > 1 ? steps.at(-1) + (steps.at(-1) - steps.at(-2)) / 2 : steps[0] + 0.5);
  const share = shareOf(domain, log);
  const points = rows.map((row, r) =>
    steps.map((step, t) => ({ x: step, y: r, value: cells[r][t], text: `layer ${row}, step ${step}: ${written(cells[r][t])}` })));
  const every = Math.max(1, Math.ceil(rows.length / 12));
  const svg = Plot.plot({
    width, height, marginTop, marginBottom, marginLeft, marginRight,
    style: { background: "none", fontSize: "12px", fontFamily: "inherit", overflow: "visible" },
    x: { domain: [edges[0], edges.at(-1)], label: xLabel, ...axisOfSteps([steps[0], steps.at(-1)], width / 110) },
    y: { domain: [-0.5, rows.length - 0.5], label: "layer", labelArrow: "none", labelAnchor: "center", ticks: d3.range(0, rows.length, every), tickFormat: (r) => rows[r] },
    marks: [
      cellsMark(edges, cells, share),
      Plot.ruleX(panel.merges, { stroke: "white", strokeDasharray: "3,3", strokeOpacity: 0.9 }),
      Plot.dot(points.flat(), Plot.pointer({ x: "x", y: "y", r: 4, fill: "white", stroke: "black" })),
      Plot.tip(points.flat(), Plot.pointer({ x: "x", y: "y", title: "text", fill: "var(--card)" })),
    ],
  });
  return { svg: tidied(svg), lines: points };
}

function shareOf([low, high], log) {
  if (log) [low, high] = [Math.log(low), Math.log(high)];
  return (value) => (high > low ? Math.min(1, Math.max(0, ((log ? Math.log(value) : value) - low) / (high - low))) : 0.5);
}

// Cells are painted on a canvas that becomes a picture in the SVG: tens of thousands of them would
// be slow as shapes.
function cellsMark(edges, cells, share) {
  return (index, { x, y }) => {
    const left = x(edges[0]), right = x(edges.at(-1)), top = y(cells.length - 0.5), bottom = y(-0.5);
    const canvas = document.createElement("canvas");
    const fine = 2;
    canvas.width = Math.max(1, Math.round((right - left) * fine));
    canvas.height = Math.max(1, Math.round((bottom - top) * fine));
    const paint = canvas.getContext("2d");
    cells.forEach((row, r) => row.forEach((value, t) => {
      if (!Number.isFinite(value)) return;
      const x0 = Math.floor((x(edges[t]) - left) * fine), x1 = Math.ceil((x(edges[t + 1]) - left) * fine);
      const y0 = Math.floor((y(r + 0.5) - top) * fine), y1 = Math.ceil((y(r - 0.5) - top) * fine);
      paint.fillStyle = shaded(share(value));
      paint.fillRect(x0, y0, x1 - x0, y1 - y0);
    }));
    return d3.create("svg:g").call((group) => {
      group.append("rect").attr("x", left).attr("y", top).attr("width", right - left).attr("height", bottom - top).style("fill", "var(--none)");
      group.append("image").attr("x", left).attr("y", top).attr("width", right - left).attr("height", bottom - top)
        .attr("preserveAspectRatio", "none").attr("href", canvas.toDataURL());
    }).node();
  };
}

function colourBar(domain, log, label) {
  const svg = Plot.plot({
    width: 260, height: 44, marginTop: 4, marginBottom: 26, marginLeft: 10, marginRight: 30,
    style: { background: "none", fontSize: "12px", fontFamily: "inherit", overflow: "visible" },
    x: { type: log ? "log" : "linear", domain, label: null, ticks: log ? logTicks(domain) : 4, tickFormat: log ? powers(domain) : (value) => written(value, 3) },
    y: { axis: null, domain: [0, 1] },
    marks: [
      Plot.rect(d3.range(64), {
        x1: (i) => between(domain, log, i / 64), x2: (i) => between(domain, log, (i + 1.05) / 64),
        y1: 0, y2: 1, fill: (i) => shaded(i / 63), clip: true,
      }),
    ],
    color: { type: "identity" },
  });
  const bar = document.createElement("div");
  bar.className = "colour-bar";
  bar.setAttribute("role", "img");
  bar.setAttribute("aria-label", `Colours: ${label}, ${written(domain[0])} to ${written(domain[1])}`);
  const text = document.createElement("span");
  text.textContent = label;
  bar.append(tidied(svg), text);
  return bar;
}

function between([low, high], log, share) {
  return log ? Math.exp(Math.log(low) + share * Math.log(high / low)) : low + share * (high - low);
}
