// What temperature, top-k and top-p make of the distribution of the next token.

import { ask, bits, byId, el, number, percent, visible } from "/page.js";

/** Return the settings as the server takes them. */
export function sampling() {
  const topK = Math.floor(Number(byId("top-k").value));
  return { temperature: Number(byId("temperature").value), top_k: topK > 0 ? topK : null, top_p: Number(byId("top-p").value) };
}

export function seed() {
  const given = byId("seed").value;
  return given === "" ? null : Math.max(0, Math.floor(Number(given)));
}

export async function showSampling(state) {
  for (const id of ["temperature", "top-p"]) byId(id).nextElementSibling.textContent = Number(byId(id).value).toFixed(2);
  if (!state.read.next) return;
  const found = await ask("sampling", { model: state.model, ids: state.read.ids, sampling: sampling() });
  if (!found) return;
  const most = Math.max(...found.bars.flatMap(([, , before, after]) => [before, after]));
  byId("sampling-facts").textContent =
    `${found.kept.toLocaleString("en")} of ${found.vocabulary.toLocaleString("en")} tokens can be drawn. ` +
    `Cut is ${percent(found.cut)} of the model's probability. ` +
    `Entropy ${number(bits(-found.entropy_before))} → ${number(bits(-found.entropy_after))} bits.`;
  byId("sampling-bars").replaceChildren(
    ...found.bars.map(([id, text, before, after]) =>
      el(
        "div",
        { className: after === 0 ? "cut" : "", data: { id, before, after } },
        el("span", { className: "spelled" }, visible(text)),
        el(
          "span",
          { className: "pair" },
          el("i", { className: "before", css: { "--p": before / most } }),
          el("i", { className: after === 0 ? "after none" : "after", css: { "--p": after / most } }),
        ),
        el("span", { className: "number quiet" }, percent(before)),
        el("span", { className: "number" }, after === 0 ? "cut" : percent(after)),
      ),
    ),
  );
}
