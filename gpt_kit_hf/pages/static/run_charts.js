"use strict";

// The charts of runs, for the pages that show them; needs curves.js. A run is {name, color, curves, facts, about}, as the
// server sends it, with all rows of its curves.
const RunCharts = (() => {
  const SMOOTHING = [0, 0.005, 0.02, 0.05, 0.1];
  const CHARTS = [
    {name: "bits_per_byte", group: "eval", title: "Bits per byte", unit: "held-out text", points: true},
    {name: "learning_rate", group: "train", title: "Learning rate"},
    {name: "grad_norm", group: "train", title: "Gradient norm", unit: "before clipping", smooth: true},
    {name: "tokens_per_second", group: "speed", title: "Speed", unit: "trained tokens per second"},
    {name: "memory_bytes", group: "speed", title: "Peak memory", format: Curves.bytes},
  ];

  function make(name, className = "", text = null) {
    const made = document.createElement(name);
    if (className) made.className = className;
    if (text !== null) made.textContent = text;
    return made;
  }

  function labelled(text, control, after = false) {
    const label = make("label");
    if (after) label.append(control, ` ${text}`);
    else label.append(`${text} `, control);
    return label;
  }

  // Time is measured at some steps only: adds the seconds at the steps of all rows.
  function addSeconds(run) {
    const {steps, series} = run.curves.speed;
    const timed = {steps, value: series.elapsed.value};
    for (const rows of Object.values(run.curves)) rows.seconds = Curves.secondsAt(rows.steps, timed);
  }

  function rowsOf(run, group, name) {
    const {steps, tokens, seconds, count, series} = run.curves[group];
    return {steps, tokens, seconds, count, ...series[name]};
  }

  function starOf(run) {
    const {best} = run.facts;
    const {steps, tokens, seconds} = run.curves.eval;
    const place = best ? steps.indexOf(best.step) : -1;
    if (place < 0) return [];
    const name = `${run.name}: best checkpoint, step ${best.step}`;
    const at = {steps: best.step, tokens: tokens[place], seconds: seconds && seconds[place]};
    return [{name, color: run.color, value: best.value, ...at}];
  }

  // Of the runs that share a baseline: one line, as they are of the same text.
  function levelsOf(runs, inBits) {
    const levels = new Map();
    for (const run of runs) {
      for (const [name, bits] of Object.entries(run.about.baselines)) {
        const value = inBits ? bits : bits * Math.LN2 * run.about.bytes_per_token;
        if (Number.isFinite(value)) levels.set(`${name} ${value.toFixed(3)}`, {name, value});
      }
    }
    return [...levels.values()];
  }

  class Charts {
    // `loss` and `others` are the elements that take the charts, `controls` the one that takes what chooses the view.
    constructor({loss, others, controls}) {
      this.range = null;
      const onZoom = range => {
        this.range = range;
        this.draw(this.runs);
      };
      this.loss = Curves.create(loss, {title: "Loss", unit: "nats per token", height: 360, onZoom});
      loss.prepend(this.loss.root);
      this.others = CHARTS.map(each => [each, Curves.create(others, {...each, onZoom})]);
      this.axis = make("select");
      this.axis.id = "axis";
      for (const [value, text] of [["steps", "steps"], ["tokens", "trained tokens"], ["seconds", "time"]]) {
        const choice = make("option", "", text);
        choice.value = value;
        this.axis.append(choice);
      }
      this.smoothing = make("input");
      this.smoothing.id = "smoothing";
      Object.assign(this.smoothing, {type: "range", min: 0, max: SMOOTHING.length - 1, value: 2});
      [this.logX, this.logY] = ["log-x", "log-y"].map(id => Object.assign(make("input"), {id, type: "checkbox"}));
      this.whole = make("button", "", "Show all steps");
      this.whole.hidden = true;
      controls.append(
        this.whole, labelled("Horizontal axis", this.axis), labelled("Smoothing", this.smoothing),
        labelled("logarithmic axis", this.logX, true), labelled("logarithmic loss", this.logY, true),
      );
      this.axis.addEventListener("input", () => onZoom(null));
      this.whole.addEventListener("click", () => onZoom(null));
      for (const each of [this.smoothing, this.logX, this.logY]) {
        each.addEventListener("input", () => this.draw(this.runs));
      }
    }

    draw(runs) {
      this.runs = runs;
      const smoothing = SMOOTHING[Number(this.smoothing.value)];
      const view = {axis: this.axis.value, logX: this.logX.checked, range: this.range};
      const lines = runs.flatMap(run => [
        {name: run.name, color: run.color, rows: rowsOf(run, "train", "loss"), raw: true},
        {name: `${run.name}, held-out`, color: run.color, rows: rowsOf(run, "eval", "eval_loss"), points: true},
      ]);
      const marks = runs.flatMap(starOf);
      this.loss.draw({...view, lines, marks, smoothing, levels: levelsOf(runs, false), logY: this.logY.checked});
      for (const [each, chart] of this.others) {
        const drawn = runs.map(run => ({
          name: run.name, color: run.color, rows: rowsOf(run, each.group, each.name), points: each.points, raw: true,
        }));
        const levels = each.name === "bits_per_byte" ? levelsOf(runs, true) : [];
        chart.draw({...view, lines: drawn, levels, smoothing: each.smooth ? smoothing : 0});
      }
      this.whole.hidden = this.range === null;
    }
  }

  return {create: places => new Charts(places), addSeconds, make};
})();
