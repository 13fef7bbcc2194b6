// The logit lens as a table: layers by tokens.

import { ask, byId, el, percent, visible } from "/page.js";

export async function showLens(state) {
  const { ids } = state.read;
  if (!ids.length) return;
  const position = Math.min(state.selected, ids.length - 1);
  const found = await ask("lens", { model: state.model, ids, position });
  if (!found) return;
  const last = found.layers.length - 1;
  const head = el("tr", {}, el("th", {}, "after reading"), ...found.columns.map(({ text }) => el("th", { className: "spelled" }, visible(text))));
  const rows = found.layers.map((cells, layer) => {
    const name = layer === 0 ? "embedding" : layer === last ? `layer ${layer} = output` : `layer ${layer}`;
    return el("tr", {}, el("th", {}, name), ...cells.map((cell, n) => lensCell(cell, found.columns[n], layer)));
  });
  const next = el("tr", {}, el("th", {}, "in the text follows"), ...found.columns.map(({ next }) => el("th", { className: "spelled" }, next === null ? "?" : visible(next))));
  byId("lens").replaceChildren(el("thead", {}, head), el("tbody", {}, ...rows), el("tfoot", {}, next));
  byId("lens-cell").textContent = `Point at a cell for its five likeliest tokens. The last ${found.columns.length} tokens up to the chosen one are shown.`;
}

function lensCell(top, column, layer) {
  const [id, text, logprob] = top[0];
  const p = Math.exp(logprob ?? -Infinity);
  const listed = top.map(([, each, value]) => `${visible(each)} ${percent(Math.exp(value ?? -Infinity))}`).join("   ");
  return el(
    "td",
    { className: id === column.next_id ? "follows" : "", title: listed, data: { id, probability: p, layer, listed }, css: { "--s": p } },
    visible(text),
  );
}

export function listenToLens() {
  byId("lens").addEventListener("mouseover", (event) => {
    const { listed, layer } = event.target.dataset;
    if (listed) byId("lens-cell").textContent = `${layer === "0" ? "Embedding" : `Layer ${layer}`}: ${listed}`;
  });
}
