// The curves of the runs, by the charts of curves.js.

/* global Curves */
import { byId, el } from "/page.js";

const SMOOTHING = 0.02; // of the steps
const charts = new Map(); // by unit
let runs = [];

/** Ask for the curves, and draw them. */
export async function showRuns() {
  const answer = await fetch("/curves");
  if (!answer.ok) throw new Error((await answer.json()).error);
  runs = await answer.json();
  const readable = runs.filter((run) => run.curves);
  draw("nats per token", "Loss", readable, "eval_loss", true);
  draw("bits per byte", "Held-out text", readable, "bits_per_byte", false);
  const names = readable.map((run, n) => el("span", {}, el("i", { className: "chart-swatch", css: { "background-color": colour(n) } }), ` ${run.name} (${run.state})`));
  const failed = runs.filter((run) => run.error).map((run) => el("span", {}, `${run.name}: ${run.error}`));
  byId("curves-note").replaceChildren(...names, ...failed);
}

const colour = (n) => `var(--run-${n % 8})`;

function draw(unit, title, readable, score, withTraining) {
  if (!charts.has(unit)) charts.set(unit, Curves.create(byId("curves"), { title, unit, height: 240 }));
  const lines = [];
  const marks = [];
  readable.forEach((run, n) => {
    const color = colour(n);
    if (withTraining) lines.push({ name: run.name, color, rows: rows(run, "train", "loss"), raw: true });
    lines.push({ name: `${run.name}, held-out`, color, rows: rows(run, "eval", score), points: true });
    const place = run.best ? run.curves.eval.steps.indexOf(run.best.step) : -1;
    if (place < 0) return;
    const value = run.curves.eval.series[score].value[place];
    marks.push({ name: `${run.name}: best checkpoint, step ${run.best.step}`, color, value, steps: run.best.step });
  });
  charts.get(unit).draw({ lines, marks, smoothing: SMOOTHING });
}

function rows(run, group, name) {
  const { steps, tokens, count, series } = run.curves[group];
  return { steps, tokens, count, seconds: null, ...series[name] };
}
