// Two models on one text.

import { ask, bits, byId, el, number, percent, visible } from "/page.js";
import { tokenElement } from "/tokens.js";

const MOST_BITS = 6; // a difference that has the full colour

export async function showCompare(state) {
  const other = byId("other").value;
  if (!state.read.ids.length || !other) return;
  const names = [label("model"), label("other")];
  const found = await ask("compare", { model: state.model, other, text: state.read.text });
  if (!found) return;
  byId("totals").replaceChildren(
    el("tr", {}, ...["", "bits per byte", "loss (nats per token)", "tokens"].map((each) => el("th", {}, each))),
    ...found.totals.map((total, n) =>
      el("tr", { data: { loss: total.loss } }, el("th", {}, names[n]), ...[number(total.bits_per_byte, 3), number(total.loss, 3), String(total.tokens)].map((each) => el("td", {}, each))),
    ),
  );
  byId("likelier-a").textContent = `likelier for ${names[0]}`;
  byId("likelier-b").textContent = `likelier for ${names[1]}`;
  byId("pieces").replaceChildren(
    ...found.pieces.map((piece) => {
      const gain = (piece.b - piece.a) / Math.LN2;
      return tokenElement(piece.text, {
        className: `token ${gain < 0 ? "for-a" : "for-b"}`,
        title: `${visible(piece.text)}  ${names[0]}: ${number(bits(piece.a))} bits, ${names[1]}: ${number(bits(piece.b))} bits`,
        data: { a: piece.a, b: piece.b },
        css: { "--s": Math.min(1, Math.abs(gain) / MOST_BITS) },
      });
    }),
  );
  byId("most").replaceChildren(
    el("tr", {}, ...["text", `bits, ${names[0]}`, `bits, ${names[1]}`, "difference", `${names[0]} expected`, `${names[1]} expected`].map((each) => el("th", {}, each))),
    ...found.most.map(({ piece, difference, expected }) => {
      const { text, a, b } = found.pieces[piece];
      const numbers = [number(bits(a)), number(bits(b)), number(bits(difference))];
      return el(
        "tr",
        {},
        el("td", { className: "spelled" }, visible(text)),
        ...numbers.map((each) => el("td", {}, each)),
        ...expected.map((each) => el("td", { className: "spelled" }, each ? `${visible(each.top[0][1])} ${percent(Math.exp(each.top[0][2]))}` : "–")),
      );
    }),
  );
}

function label(id) {
  return byId(id).selectedOptions[0]?.textContent ?? "";
}
