"use strict";
// Puts the charts into their figures: controls, drawing when they come into sight, the keyboard.

// What the controls of a kind of figure offer: name -> [label, options of the model].
const CONTROLS = {
  trajectories: {
    metric: ["Metric", metricOptions], kind: ["Kind", kindOptions], module: ["Module", moduleOptions],
    lines: ["Lines", linesOptions], run: ["Run", runOptions],
    x: ["Along", (model) => [["steps", "optimizer steps"], ...(model.tokens ? [["tokens", "tokens"]] : [])]],
  },
  spectra: {
    kind: ["Kind", (model) => spectrumChoices(model).kinds],
    matrix: ["Matrix", (model) => spectrumChoices(model).matrices],
  },
  maps: {
    metric: ["Metric", (model) => model.metrics.map((metric) => [metric.name, metric.label])],
    kind: ["Kind", kindOptions], module: ["Module", moduleOptions],
    run: ["Runs", (model) => [...(model.groups.length > 1 ? [["all", "one of each group"]] : []), ...runOptions(model)]],
  },
  differences: {
    baseline: ["Baseline", groupOptions], metric: ["Metric", metricOptions], kind: ["Kind", kindOptions],
    module: ["Module", moduleOptions],
  },
  numbers: { metric: ["Metric", (model) => model.metrics.map((metric) => [metric.name, metric.label])], kind: ["Kind", kindOptions] },
};
const DRAW = { trajectories, spectra, maps, differences };
const PAPER = 640; // pixels: as wide as the figures are on paper
const FOLLOWED = document.documentElement.dataset.follow;

class Figure {
  constructor(element, model) {
    this.element = element;
    this.model = model;
    this.kind = element.dataset.chart;
    this.state = { off: new Set(), ...JSON.parse(element.dataset.options || "{}") };
    for (const [name, [, options]] of Object.entries(CONTROLS[this.kind])) {
      const offered = options(model).map(([value]) => value);
      if (!offered.includes(this.state[name])) this.state[name] = offered[0];
    }
    this.restore();
    this.state.log ??= this.logarithmic();
    this.plot = element.querySelector(".plot");
    this.said = element.querySelector("output");
    this.caption = element.querySelector(".caption");
    this.controls();
    if (this.plot) this.listen();
  }

  // A page that follows a run is loaded again and again: choices stay.
  restore() {
    if (!FOLLOWED) return;
    const kept = JSON.parse(sessionStorage.getItem(this.element.id) || "null");
    if (kept) Object.assign(this.state, kept, { off: new Set(kept.off) });
  }

  keep() {
    if (FOLLOWED) sessionStorage.setItem(this.element.id, JSON.stringify({ ...this.state, off: [...this.state.off] }));
  }

  logarithmic() {
    return this.kind === "spectra" || Boolean(this.model.metric(this.state.metric)?.log);
  }

  controls() {
    const box = this.element.querySelector(".controls");
    if (!box) return;
    this.selects = {};
    if (this.element.dataset.fixed === undefined) {
      for (const [name, [text, options]] of Object.entries(CONTROLS[this.kind])) {
        const offered = options(this.model);
        if (offered.length < 2) continue;
        const select = document.createElement("select");
        select.name = name;
        select.append(...offered.map(([value, shown]) => new Option(shown, value)));
        select.value = this.state[name];
        select.addEventListener("change", () => this.choose(name, select.value));
        this.selects[name] = select;
        box.append(labelled(text, select));
      }
      if (this.kind === "spectra") box.append(this.slider());
    }
    if (this.kind !== "numbers") {
      const fixed = this.element.dataset.fixed !== undefined;
      this.logBox = document.createElement("input");
      this.logBox.type = "checkbox";
      this.logBox.checked = this.state.log;
      this.logBox.addEventListener("change", () => {
        this.state.log = this.logBox.checked;
        this.draw();
      });
      if (this.kind !== "differences" && !fixed) box.append(labelled("log scale", this.logBox));
      this.toggles = document.createElement("div");
      this.toggles.className = "toggles";
      this.toggles.setAttribute("role", "group");
      this.toggles.setAttribute("aria-label", "Lines that are shown");
      box.append(this.toggles);
    }
    this.enable();
  }

  slider() {
    this.range = document.createElement("input");
    this.range.type = "range";
    this.range.min = 0;
    this.rangeText = document.createElement("span");
    this.range.addEventListener("input", () => {
      this.state.step = Number(this.range.value);
      this.draw();
    });
    const box = labelled("Step", this.range);
    box.append(this.rangeText);
    return box;
  }

  choose(name, value) {
    this.state[name] = value;
    if (name === "metric") {
      this.state.log = this.logarithmic();
      if (this.logBox) this.logBox.checked = this.state.log;
    }
    if (name === "lines" || name === "run") this.state.off.clear();
    if (name === "kind" || name === "matrix") this.state.step = undefined;
    this.enable();
    this.draw();
  }

  // A choice that has no effect cannot be made.
  enable() {
    const logged = this.state.metric?.startsWith(LOGGED);
    for (const name of ["kind", "module"]) if (this.selects[name]) this.selects[name].disabled = Boolean(logged);
    if (this.kind === "trajectories" && this.selects.run) {
      this.selects.run.disabled = !["layers", "modules"].includes(this.state.lines);
    }
  }

  draw(given) {
    this.keep();
    this.drawn = true;
    if (this.kind === "numbers") return this.table();
    const width = given ?? Math.max(240, Math.floor(this.plot.clientWidth));
    this.width = width;
    if (this.range) this.showStep();
    const found = DRAW[this.kind](this.model, this.state, width);
    this.panels = found.panels ?? (found.svg ? [{ svg: found.svg, lines: found.lines, name: "" }] : []);
    this.at = { panel: 0, line: 0, point: -1 };
    const nothing = document.createElement("p");
    nothing.className = "nothing";
    nothing.textContent = "Nothing of this was measured.";
    this.plot.replaceChildren(found.svg ?? nothing);
    this.plot.setAttribute("aria-label", `Chart: ${found.title}. Arrow keys read its values.`);
    this.caption.textContent = found.caption;
    const heading = this.element.querySelector("[data-title]");
    if (heading) heading.textContent = found.title;
    this.said.textContent = "";
    for (const panel of this.panels) {
      panel.svg.addEventListener("input", () => {
        if (panel.svg.value) this.said.textContent = panel.svg.value.text;
      });
    }
    this.toggle(found.series);
  }

  showStep() {
    const steps = spectrumSteps(this.model, this.state);
    this.range.max = steps.length - 1;
    this.range.value = Math.min(this.state.step ?? steps.length - 1, steps.length - 1);
    this.range.hidden = steps.length < 2;
    const text = `${steps[this.range.value]}`;
    this.range.setAttribute("aria-valuetext", `step ${text}`);
    this.rangeText.textContent = text;
  }

  // A button for each line, which shows and hides it.
  toggle(series) {
    const kept = document.activeElement?.dataset?.series;
    const shown = series.filter((each) => each.points.length);
    this.toggles.hidden = shown.length < 2;
    this.toggles.replaceChildren(...shown.map((each) => {
      const button = document.createElement("button");
      button.type = "button";
      button.dataset.series = each.name;
      button.setAttribute("aria-pressed", String(!this.state.off.has(each.name)));
      const key = document.createElement("span");
      key.className = "key";
      key.style.background = each.colour;
      if (each.dash) key.classList.add("dashed");
      button.append(key, each.name);
      button.addEventListener("click", () => {
        const off = this.state.off;
        if (!off.delete(each.name)) off.add(each.name);
        this.draw();
      });
      return button;
    }));
    if (kept) [...this.toggles.children].find((button) => button.dataset.series === kept)?.focus();
  }

  listen() {
    this.plot.addEventListener("keydown", (event) => {
      const moves = { ArrowRight: [0, 1], ArrowLeft: [0, -1], ArrowDown: [1, 0], ArrowUp: [-1, 0], Home: [0, -1e9], End: [0, 1e9] };
      if (event.key === "Escape") return this.point(null);
      const move = moves[event.key];
      if (!move || !this.panels.length) return;
      event.preventDefault();
      this.walk(...move);
    });
    this.plot.addEventListener("blur", () => this.point(null));
  }

  walk(lines, points) {
    const at = this.at;
    const panel = () => this.panels[at.panel];
    at.line += lines;
    if (at.line >= panel().lines.length && at.panel + 1 < this.panels.length) Object.assign(at, { panel: at.panel + 1, line: 0 });
    else if (at.line < 0 && at.panel > 0) Object.assign(at, { panel: at.panel - 1, line: this.panels[at.panel - 1].lines.length - 1 });
    at.line = Math.min(Math.max(at.line, 0), panel().lines.length - 1);
    const line = panel().lines[at.line];
    if (!line?.length) return;
    at.point = at.point < 0 && !points ? line.length - 1 : Math.min(Math.max(at.point + points, 0), line.length - 1);
    this.point(panel().svg, line[at.point]);
    this.said.textContent = `${panel().name ? panel().name + ", " : ""}${line[at.point].text}`;
  }

  // Plot shows its tip where a pointer is: the keyboard puts one there.
  point(svg, datum) {
    for (const panel of this.panels ?? []) if (panel.svg !== svg) panel.svg.dispatchEvent(new PointerEvent("pointerleave", { pointerType: "mouse" }));
    if (!svg) return;
    const box = svg.getBoundingClientRect(), zoom = box.width / svg.viewBox.baseVal.width;
    const x = box.left + svg.scale("x").apply(datum.x) * zoom, y = box.top + svg.scale("y").apply(datum.y) * zoom;
    for (const type of ["pointerenter", "pointermove"]) svg.dispatchEvent(new PointerEvent(type, { clientX: x, clientY: y, pointerType: "mouse", bubbles: true }));
  }

  table() {
    const { model, state } = this, k = model.kind(state.kind);
    const several = model.groups.length > 1;
    const columns = ["matrix", "layer", "module", "shape"];
    for (const group of model.groups) for (const what of ["first", "last", "change"]) columns.push(several ? `${group.name}: ${what}` : what);
    const rows = [];
    model.rows.forEach((row, i) => {
      const line = [row.name, row.layer < 0 ? "" : row.layer, row.module, row.shape];
      let any = false;
      for (const group of model.groups) {
        const series = group.runs.map((r) => model.overRows(state.metric, r, k, [i]));
        const values = finite((series.length > 1 ? model.overRuns(series, model.metric(state.metric).log) : series[0]).map((value) => value.mean));
        any ||= values.length > 0;
        line.push(...(values.length ? [values[0], values.at(-1), Number((values.at(-1) - values[0]).toPrecision(4))] : [NaN, NaN, NaN]));
      }
      if (any) rows.push(line);
    });
    const caption = `${label(model, state.metric)} of the ${state.kind}: first and last record`;
    this.element.querySelector(".numbers").replaceChildren(numbersTable(caption, columns, rows));
  }
}

function labelled(text, control) {
  const box = document.createElement("label");
  const name = document.createElement("span");
  name.textContent = text;
  if (control.type === "checkbox") box.append(control, name);
  else box.append(name, control);
  return box;
}

// A page that a server shows is loaded again when the server has a newer one.
function follow() {
  if (!FOLLOWED || !location.protocol.startsWith("http")) return;
  const kept = sessionStorage.getItem("scroll");
  if (kept) scrollTo(0, Number(kept));
  setInterval(async () => {
    try {
      const version = await (await fetch("version", { cache: "no-store" })).text();
      if (version === FOLLOWED) return;
      sessionStorage.setItem("scroll", String(scrollY));
      location.reload();
    } catch {
      document.querySelector("#live").textContent = "The server has ended; this is its last page.";
    }
  }, 2000);
}

async function start() {
  const began = performance.now();
  const model = new Model(await decoded(document.querySelector("#data")));
  const figures = [...document.querySelectorAll("[data-chart]")].map((element) => new Figure(element, model));
  const seen = new IntersectionObserver((entries) => {
    for (const entry of entries) {
      const figure = figures.find((each) => each.element === entry.target);
      if (entry.isIntersecting && !figure.drawn) figure.draw();
    }
    document.documentElement.dataset.drawn ??= String(Math.round(performance.now()));
  }, { rootMargin: "200px" });
  figures.forEach((figure) => seen.observe(figure.element));
  let waiting;
  addEventListener("resize", () => {
    clearTimeout(waiting);
    waiting = setTimeout(() => figures.filter((each) => each.drawn && each.plot && each.plot.clientWidth !== each.width).forEach((each) => each.draw()), 120);
  });
  addEventListener("beforeprint", () => {
    figures.forEach((each) => each.draw(PAPER));
    document.querySelectorAll("details:not([open])").forEach((each) => {
      each.open = true;
      each.dataset.printed = "";
    });
  });
  addEventListener("afterprint", () => {
    figures.forEach((each) => each.draw());
    document.querySelectorAll("[data-printed]").forEach((each) => {
      each.open = false;
      delete each.dataset.printed;
    });
  });
  document.querySelectorAll("main > section .table, main > section details .table").forEach((box) => {
    if (!box.querySelector(".tools")) enlivened(box);
  });
  document.documentElement.dataset.ready = String(Math.round(performance.now() - began));
  follow();
}

start();
