"use strict";
// What each kind of figure shows: from the choices of its controls to lines, maps and a caption.

const STAIRS = ["displacement", "cycle_update", "update", "optimizer_update", "adapter", "accumulated_adapter"];
const RANKS = ["effective_rank", "effective_rank_above_floor", "numerical_rank", "numerical_rank_raw"];

// The metrics and what was logged, as options of a select.
const LOGGED = "logged:";

function metricOptions(model) {
  const logged = Object.keys(model.logged).map((name) => [LOGGED + name, `logged: ${model.logged[name].label}`]);
  return [...model.metrics.map((metric) => [metric.name, metric.label]), ...logged];
}

const kindOptions = (model) => model.kinds.map((kind) => [kind.name, kind.name]);
const moduleOptions = (model) => [["", "all matrices of the layers"], ...model.modules.map((module) => [module, module])];
const groupOptions = (model) => model.groups.map((group, g) => [String(g), group.name]);
const runOptions = (model) => model.runs.map((run, r) => [String(r), run.name]);

function linesOptions(model) {
  const options = model.groups.length < model.runs.length ? [["groups", "means over seeds"]] : [];
  if (model.runs.length > 1) options.push(["runs", "each run"]);
  return [...options, ["modules", "each module of one run"], ["layers", "each layer of one run"], ...(model.runs.length > 1 ? [] : [["runs", "the mean of all"]])];
}

function label(model, metric) {
  return metric.startsWith(LOGGED) ? model.logged[metric.slice(LOGGED.length)].label : model.metric(metric).label;
}

// The values of a run along steps, for a metric of matrices or something that was logged.
function ofRun(model, state, r, rows) {
  if (state.metric.startsWith(LOGGED)) return model.logs(state.metric.slice(LOGGED.length), r);
  return model.overRows(state.metric, r, model.kind(state.kind), rows);
}

function toPoints(model, state, values, name, r, band = true) {
  const along = model.along(state.x, r);
  return values
    .map((value, t) => ({
      x: along[t], y: value.mean, lo: band && value.n > 1 ? value.lo : NaN, hi: band && value.n > 1 ? value.hi : NaN,
      text: `${name}, ${state.x === "tokens" ? written(along[t], 3) + " tokens" : "step " + model.steps[t]}: ${written(value.mean)}` +
        (band && value.n > 1 && value.hi > value.lo ? ` (${written(value.lo)} to ${written(value.hi)})` : ""),
    }))
    .filter((point) => Number.isFinite(point.x) && Number.isFinite(point.y));
}

function trajectories(model, state, width) {
  const rows = model.rowsOf(state.module);
  const logged = state.metric.startsWith(LOGGED);
  const bounded = RANKS.includes(state.metric) && STAIRS.includes(state.kind) && model.metric("rank_bound") && !logged;
  const geometric = Boolean(model.metric(state.metric)?.log);
  const single = { ...state, metric: "rank_bound" };
  const bound = (runs) => bounded ? toPoints(model, state, model.overRuns(runs.map((r) => ofRun(model, single, r, rows))), "bound", runs[0], false) : [];
  let series, over;
  const counts = model.runs.map((_, r) => (logged ? 1 : Math.max(...ofRun(model, state, r, rows).map((v) => v.n))));
  const matrices = logged ? "" : `${geometric ? "Geometric mean" : "Mean"} of ${Math.max(...counts)} matrices. `;
  if (state.lines === "groups") {
    series = model.groups.map((group, g) => {
      const runs = group.runs.map((r) => ofRun(model, state, r, rows));
      const values = runs.length > 1 ? model.overRuns(runs, geometric) : runs[0];
      const band = runs.length > 1 || Boolean(state.module);
      return { name: group.name, colour: colour(g), dash: dashes(g), points: toPoints(model, state, values, group.name, group.runs[0], band), bound: bound(group.runs) };
    });
    const n = Math.max(...model.groups.map((group) => group.runs.length));
    over = `Bands are 95 % intervals of the mean over up to ${n} seeds (t = ${written(model.quantiles[n], 2)})`;
    if (state.module && model.groups.some((group) => group.runs.length === 1)) over += "; of a single run, the range of its layers";
  } else if (state.lines === "runs") {
    series = model.runs.map((run, r) => {
      const several = model.groups.length < model.runs.length;
      return { name: run.name, colour: colour(run.group), dash: several ? dashes(run.nth * COLOURS) : dashes(run.group), points: toPoints(model, state, ofRun(model, state, r, rows), run.name, r, Boolean(state.module)), bound: bound([r]) };
    });
    over = logged || !state.module ? "" : "Bands span the smallest to the largest layer; they are no error bars";
  } else {
    const r = Number(state.run), layers = state.lines === "layers";
    const keys = layers ? model.layersOf(rows) : [...new Set(rows.map((row) => model.rows[row].module))].sort();
    series = keys.map((key, i) => {
      const of = rows.filter((row) => (layers ? model.rows[row].place : model.rows[row].module) === key);
      const name = layers && key ? `layer ${key}` : key || "outside the layers";
      const look = layers ? { colour: graded(i / Math.max(1, keys.length - 1)), dash: "" } : { colour: colour(i), dash: dashes(i) };
      return { name, ...look, points: toPoints(model, state, ofRun(model, state, r, of), name, r, false) };
    });
    over = `One run: ${model.runs[r].name}`;
  }
  const shown = series.filter((each) => each.points.length && !state.off.has(each.name));
  const runs = state.lines === "layers" || state.lines === "modules" ? [Number(state.run)] : model.runs.map((_, r) => r);
  const stairs = state.metric === "numerical_rank" && STAIRS.includes(state.kind);
  const marks = [];
  if (bounded && shown.some((each) => each.bound?.length)) marks.push("A broad pale line is the bound that the rank cannot exceed.");
  const merges = state.x === "tokens" ? [] : model.merges(runs);
  if (merges.length) marks.push("Dotted: merges.");
  if (stairs) marks.push("A record counts what happened since the one before it, hence steps.");
  const chart = lineChart({
    series: shown, width, log: state.log, stairs, fromZero: stairs, merges,
    xLabel: state.x === "tokens" ? "tokens" : "optimizer step",
  });
  return { ...chart, series, caption: `${matrices}${over}${over ? ". " : ""}${marks.join(" ")}`, title: `${label(model, state.metric)}${logged ? "" : " of the " + state.kind}` };
}

// What a spectrum can be shown of.
function spectrumChoices(model) {
  const kinds = [...new Set(model.spectra.map((each) => each.kind))].sort((a, b) => a - b).map((k) => [model.kinds[k].name, model.kinds[k].name]);
  const matrices = [...new Set(model.spectra.map((each) => each.matrix))].map((name) => [name, name]);
  return { kinds, matrices };
}

function spectrumSteps(model, state) {
  const of = model.spectra.filter((each) => model.kinds[each.kind].name === state.kind && each.matrix === state.matrix);
  return [...new Set(of.flatMap((each) => each.steps))].sort((a, b) => a - b);
}

function spectra(model, state, width) {
  const all = spectrumSteps(model, state);
  const step = all[Math.min(state.step ?? all.length - 1, all.length - 1)];
  const of = model.spectra.filter((each) => model.kinds[each.kind].name === state.kind && each.matrix === state.matrix);
  const floors = [], series = [], runs = [];
  let thinned = false;
  for (const each of of) {
    const at = each.steps.findLastIndex((one) => one <= step);
    if (at < 0) continue;
    const run = model.runs[each.run], group = model.groups[run.group];
    const name = group.name;
    runs.push(run.name);
    const floor = each.floors[at], rank = each.ranks[at];
    const points = each.index.map((x, i) => ({ x, y: asNumber(each.s[at][i]), lo: NaN, hi: NaN })).filter((point) => point.y > 0);
    points.forEach((point) => (point.text = `${run.name}, singular value ${point.x} at step ${each.steps[at]}: ${written(point.y)}${point.y > floor ? "" : ", below the noise floor"}`));
    const above = points.filter((point) => !(point.y <= floor)), below = points.filter((point) => point.y <= floor);
    thinned ||= each.index.at(-1) > each.index.length;
    const line = { name, colour: colour(run.group), dash: "", points: above.length ? above : below, thin: above.length && below.length ? [above.at(-1), ...below] : [], cliff: below.length && above.length ? above.at(-1) : null };
    line.label = `rank ${rank}`;
    line.ending = `${name}: ${rank}`;
    series.push(line);
    if (floor > 0 && !state.off.has(name)) floors.push({ y: floor, colour: line.colour });
  }
  const shown = series.filter((each) => !state.off.has(each.name));
  const low = Math.min(...shown.flatMap((each) => [...each.points, ...each.thin]).map((point) => point.y));
  const chart = lineChart({
    series: shown.map((each) => ({ ...each, name: each.ending })), width, log: state.log, xLabel: "index of the singular value",
    floors: floors.filter((floor) => floor.y > low / 1e3),
  });
  return {
    ...chart, series,
    caption: `The ${state.kind} of ${state.matrix} at step ${step}, of ${shortList(runs)}. The number behind a name is the numerical rank. Dashed: the noise floor. What lies below it (thin) cannot be told from rounding.${thinned ? " Not every index is drawn." : ""}`,
    title: "singular values",
  };
}

function maps(model, state, width) {
  const log = state.log, k = model.kind(state.kind);
  const of = state.run === "all" ? model.groups.map((group) => group.runs[0]) : [Number(state.run)];
  const rows = model.rowsOf(state.module).filter((row) => model.rows[row].layer >= 0);
  const layers = model.layersOf(rows);
  const panels = of.map((r) => {
    const cells = layers.map((layer) => model.overRows(state.metric, r, k, rows.filter((row) => model.rows[row].place === layer)).map((value) => value.mean));
    const there = model.steps.map((_, t) => t).filter((t) => cells.some((row) => Number.isFinite(row[t])));
    return { name: model.runs[r].name, rows: layers, steps: there.map((t) => model.steps[t]), cells: cells.map((row) => there.map((t) => row[t])), merges: model.merges([r]) };
  }).filter((panel) => panel.steps.length);
  const values = panels.flatMap((panel) => panel.cells.flat()).filter((value) => Number.isFinite(value) && (!log || value > 0));
  const title = `${label(model, state.metric)} of the ${state.kind}`;
  if (!values.length) return { title, series: [], caption: "Nothing of this was measured in the layers." };
  const domain = d3.extent(values);
  const wide = panels.length > 1 && width > 700 ? (width - 24) / 2 : width;
  const box = document.createElement("div");
  box.className = wide < width ? "panels two" : "panels";
  const lines = [];
  for (const panel of panels) {
    const one = heatMap({ panel, width: wide, domain, log, xLabel: "optimizer step", tall: panels.length === 1 });
    const cell = document.createElement("div");
    const name = document.createElement("p");
    name.className = "panel-name";
    name.textContent = panel.name;
    cell.append(name, one.svg);
    box.append(cell);
    lines.push({ svg: one.svg, lines: one.lines, name: panel.name });
  }
  box.append(colourBar(domain, log, title));
  const what = state.module || `the mean of the matrices of each layer`;
  const one = panels.length > 1 ? "All panels have one colour scale. " : "";
  const merged = panels.some((panel) => panel.merges.length) ? " White dashes: merges." : "";
  return { svg: box, panels: lines, series: [], title, caption: `${one}Shown is ${what}. A column is as wide as the steps between records.${merged}` };
}

function differences(model, state, width) {
  const base = Number(state.baseline), rows = model.rowsOf(state.module);
  const of = model.groups[base];
  const series = [];
  let paired = true;
  model.groups.forEach((group, g) => {
    if (g === base) return;
    const partners = group.runs.map((r) => of.runs.find((other) => model.runs[other].seed === model.runs[r].seed));
    const pairs = partners.every((each) => each !== undefined) && group.runs.length === of.runs.length;
    let values;
    if (pairs) {
      const each = group.runs.map((r, i) => less(ofRun(model, state, r, rows), ofRun(model, state, partners[i], rows)));
      values = each.length > 1 ? model.overRuns(each) : each[0];
    } else {
      paired = false;
      values = less(model.overRuns(group.runs.map((r) => ofRun(model, state, r, rows))), model.overRuns(of.runs.map((r) => ofRun(model, state, r, rows))));
    }
    series.push({ name: group.name, colour: colour(g), dash: dashes(g), points: toPoints(model, state, values, `${group.name} less ${of.name}`, group.runs[0]) });
  });
  const shown = series.filter((each) => each.points.length && !state.off.has(each.name));
  const chart = lineChart({ series: shown, width, xLabel: "optimizer step", merges: model.merges(model.runs.map((_, r) => r)), zero: true });
  const n = of.runs.length;
  const bands = !paired ? "Differences of means, because the runs are no pairs." : n > 1 ? `Mean of the differences seed by seed; bands are 95 % intervals over ${n} seeds. Where a band holds 0, the seeds do not tell the two apart.` : "One run each: there is no interval.";
  return { ...chart, series, title: `${label(model, state.metric)}${state.metric.startsWith(LOGGED) ? "" : " of the " + state.kind}, less ${of.name}`, caption: bands };
}

function less(ours, theirs) {
  return ours.map((value, t) => ({ mean: value.mean - theirs[t].mean, lo: NaN, hi: NaN, n: 1 }));
}

const shortList = (names) => names.slice(0, 4).join(", ") + (names.length > 4 ? ` and ${names.length - 4} more` : "");
