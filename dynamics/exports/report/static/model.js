"use strict";
// The numbers of the page, and means over them. Everything else reads them through `model`.

async function decoded(element) {
  const packed = Uint8Array.from(atob(element.textContent.trim()), (c) => c.charCodeAt(0));
  const stream = new Blob([packed]).stream().pipeThrough(new DecompressionStream("gzip"));
  return JSON.parse(await new Response(stream).text());
}

const finite = (values) => values.filter(Number.isFinite);
const mean = (values) => (values.length ? values.reduce((a, b) => a + b, 0) / values.length : NaN);
const meanOf = (geometric) => (geometric ? (values) => Math.exp(mean(values.map(Math.log))) : mean);

// Four digits, as in the sentences: "1.15e-7" is 1.15·10⁻⁷.
function written(value, digits = 4) {
  if (value === null || value === undefined || Number.isNaN(value)) return "none";
  if (!Number.isFinite(value)) return value > 0 ? "∞" : "−∞";
  let text = Number(value).toPrecision(digits);
  if (text.includes("e")) {
    const [digitsOf, power] = text.split("e");
    if (Math.abs(value) >= 1 && Math.abs(value) < 1e6) text = String(Math.round(Number(text)));
    else return `${String(Number(digitsOf))}·10${raised(Number(power))}`.replace("-", "−");
  }
  if (text.includes(".")) text = text.replace(/\.?0+$/, "");
  return text.replace("-", "−");
}

function raised(power) {
  const signs = { "-": "⁻", 0: "⁰", 1: "¹", 2: "²", 3: "³", 4: "⁴", 5: "⁵", 6: "⁶", 7: "⁷", 8: "⁸", 9: "⁹" };
  return String(power).replace(/./g, (letter) => signs[letter]);
}

class Model {
  constructor(document) {
    Object.assign(this, document);
    this.numbers = new Map();
    this.modules = [...new Set(this.rows.map((row) => row.module))].filter(Boolean);
    this.rows.forEach((row) => (row.place = row.layer < 0 ? "" : `${row.stack} ${row.layer}`.trim()));
    const seeds = [...new Set(this.runs.map((run) => run.seed))];
    this.runs.forEach((run, r) => {
      run.group = this.groups.findIndex((group) => group.runs.includes(r));
      run.nth = Math.max(0, seeds.indexOf(run.seed));
    });
  }

  kind(name) {
    return this.kinds.findIndex((kind) => kind.name === name);
  }

  metric(name) {
    return this.metrics.find((metric) => metric.name === name);
  }

  // Numbers of a run and kind, step by step and row by row; null where none was measured.
  cells(metric, run, kind) {
    const key = `${metric}|${run}|${kind}`;
    if (!this.numbers.has(key)) {
      const given = this.values[metric]?.[run]?.[kind] ?? [];
      this.numbers.set(key, given.length ? Float64Array.from(given, asNumber) : null);
    }
    return this.numbers.get(key);
  }

  has(metric, kind) {
    const k = this.kind(kind);
    return k >= 0 && this.runs.some((_, r) => this.cells(metric, r, k));
  }

  // The rows that a choice of the module means; "" is the parameters of the layers.
  rowsOf(module) {
    const rows = this.rows.map((row, i) => ({ ...row, i }));
    return rows.filter((row) => (module ? row.module === module : row.inside)).map((row) => row.i);
  }

  // The layers of some rows, from the first to the last, stack by stack.
  layersOf(rows) {
    const found = rows.map((row) => this.rows[row]).sort((a, b) => a.stack.localeCompare(b.stack) || a.layer - b.layer);
    return [...new Set(found.map((row) => row.place))];
  }

  // Of each step: mean, least and largest of the rows; NaN where nothing is finite.
  // Condition numbers have geometric means: one that is huge would hide all others.
  overRows(metric, run, kind, rows) {
    const middle = meanOf(this.metric(metric)?.log);
    const cells = this.cells(metric, run, kind);
    return this.steps.map((_, t) => {
      const values = cells ? finite(rows.map((row) => cells[t * this.rows.length + row])) : [];
      return { mean: middle(values), lo: Math.min(...values), hi: Math.max(...values), n: values.length };
    });
  }

  logs(name, run) {
    return this.logged[name].values[run].map((v) => ({ mean: asNumber(v), lo: NaN, hi: NaN, n: 1 }));
  }

  // Means over runs with the 95 % interval of the mean, mean ± t·sd/√n; of logarithms, if geometric.
  overRuns(series, geometric = false) {
    if (geometric) {
      const logs = series.map((one) => one.map((value) => ({ mean: Math.log(value.mean) })));
      return this.overRuns(logs).map((value) => ({ mean: Math.exp(value.mean), lo: Math.exp(value.lo), hi: Math.exp(value.hi), n: value.n }));
    }
    return this.steps.map((_, t) => {
      const values = finite(series.map((one) => one[t].mean));
      const middle = mean(values), n = values.length;
      if (n < 2) return { mean: middle, lo: NaN, hi: NaN, n };
      const squares = values.reduce((sum, value) => sum + (value - middle) ** 2, 0);
      const half = (this.quantiles[n] ?? 1.98) * Math.sqrt(squares / (n - 1) / n);
      return { mean: middle, lo: middle - half, hi: middle + half, n };
    });
  }

  // Where the points of a run lie along x.
  along(axis, run) {
    if (axis !== "tokens" || !this.tokens) return this.steps;
    return this.tokens[run].map(asNumber);
  }

  merges(runs) {
    return [...new Set(runs.flatMap((run) => this.runs[run].merges))].sort((a, b) => a - b);
  }
}

function asNumber(value) {
  if (value === null) return NaN;
  return value === "inf" ? Infinity : value === "-inf" ? -Infinity : value;
}
