// Where the tokens look: one head as a heat map and on the text, all heads of the layer as small maps.

import { ask, byId, el, number, visible } from "/page.js";
import { tokenElement } from "/tokens.js";

let shown = null; // the last answer
let row = null; // the token whose attention is shown on the text
let margin = 0; // of the map, for the names of its rows

const MAP_PIXELS = 420;
const LABEL_PIXELS = 90;

export async function showAttention(state) {
  if (!state.read.ids.length) return;
  fill(byId("layer"), state.facts.layers);
  const ids = state.read.ids;
  const found = await ask("attention", { model: state.model, ids, layer: Number(byId("layer").value), head: Number(byId("head").value) });
  if (!found) return;
  shown = found;
  fill(byId("layer"), found.layers);
  fill(byId("head"), found.heads);
  const offset = found.tokens.length + found.left_out - ids.length; // 1 if there is a start token
  row = Math.min(state.selected + offset, found.tokens.length - 1);
  showHeads();
  showMap();
  showRow();
  byId("attention-note").textContent = found.left_out
    ? `Shown are the first ${found.tokens.length} tokens. The ${found.left_out} after them do not change what these look at.`
    : "Much attention on the first token often means that a head has found nothing to look for.";
}

function fill(select, n) {
  if (select.options.length !== n) {
    const kept = Math.min(Number(select.value) || 0, n - 1);
    select.replaceChildren(...Array.from({ length: n }, (_, each) => el("option", { value: each }, String(each + 1))));
    select.value = kept;
  }
}

function colour(name) {
  return getComputedStyle(document.documentElement).getPropertyValue(name).trim();
}

/** Draw T x T values from 0 to 1 as squares of `side` pixels, with a margin on the left. */
function draw(canvas, size, value, side = 1, margin = 0) {
  canvas.width = margin + size * side;
  canvas.height = size * side;
  const context = canvas.getContext("2d");
  context.fillStyle = colour("--blue");
  for (let y = 0; y < size; y++) {
    for (let x = 0; x <= y; x++) {
      context.globalAlpha = Math.sqrt(value(y, x)); // small weights stay visible
      context.fillRect(margin + x * side, y * side, side, side);
    }
  }
  context.globalAlpha = 1;
}

function showHeads() {
  const size = shown.tokens.length;
  const steps = Uint8Array.from(atob(shown.overview), (each) => each.charCodeAt(0)); // (H, T, T)
  const chosen = Number(byId("head").value);
  byId("heads").replaceChildren(
    ...Array.from({ length: shown.heads }, (_, head) => {
      const canvas = el("canvas");
      draw(canvas, size, (y, x) => steps[(head * size + y) * size + x] / 255);
      return el("button", { className: head === chosen ? "selected" : "", data: { head } }, canvas, `head ${head + 1}`);
    }),
  );
}

function showMap() {
  const size = shown.tokens.length;
  const side = Math.max(3, Math.floor(MAP_PIXELS / size));
  const hasLabels = side >= 10;
  margin = hasLabels ? LABEL_PIXELS : 0;
  const canvas = byId("attention-map");
  draw(canvas, size, (y, x) => shown.weights[y][x], side, margin);
  if (!hasLabels) return;
  const context = canvas.getContext("2d");
  context.font = `${Math.min(13, side)}px monospace`;
  context.fillStyle = colour("--quiet");
  context.textAlign = "right";
  context.textBaseline = "middle";
  shown.tokens.forEach((text, n) => context.fillText(shortened(visible(text)), margin - 6, (n + 0.5) * side, margin - 6));
}

function shortened(text) {
  return text.length > 11 ? `${text.slice(0, 10)}…` : text;
}

function showRow() {
  const weights = shown.weights[row];
  byId("attention-title").textContent = `“${visible(shown.tokens[row])}” looks at:`;
  byId("attention-tokens").replaceChildren(
    ...shown.tokens.map((text, n) =>
      tokenElement(text, {
        className: `token${n === row ? " selected" : ""}`,
        title: n > row ? "comes later: cannot be seen" : `${visible(text)}  ${number(weights[n], 3)}`,
        data: { n, weight: weights[n] ?? "" },
        css: { "--s": n > row ? 0 : Math.sqrt(weights[n]) },
      }),
    ),
  );
}

/** Return the row and column under the mouse. */
function cell({ currentTarget: canvas, clientX, clientY }) {
  const box = canvas.getBoundingClientRect();
  const size = shown.tokens.length;
  const scale = canvas.width / box.width; // a narrow page shows it smaller
  const side = canvas.height / size;
  const at = (pixels) => Math.min(size - 1, Math.max(0, Math.floor(pixels / side)));
  return [at((clientY - box.top) * scale), at((clientX - box.left) * scale - margin)];
}

export function listenToAttention(state, update) {
  byId("layer").addEventListener("change", update);
  byId("head").addEventListener("change", update);
  byId("heads").addEventListener("click", (event) => {
    const button = event.target.closest("button");
    if (!button) return;
    byId("head").value = button.dataset.head;
    update();
  });
  byId("attention-map").addEventListener("mousemove", (event) => {
    if (!shown) return;
    const [y, x] = cell(event);
    byId("attention-cell").textContent = x > y ? "" : `“${visible(shown.tokens[y])}” → “${visible(shown.tokens[x])}”: ${number(shown.weights[y][x], 3)}`;
  });
  byId("attention-map").addEventListener("click", (event) => {
    if (!shown) return;
    [row] = cell(event);
    showRow();
  });
  byId("attention-tokens").addEventListener("click", (event) => {
    if (!shown || !event.target.dataset.n) return;
    row = Number(event.target.dataset.n);
    showRow();
  });
}
