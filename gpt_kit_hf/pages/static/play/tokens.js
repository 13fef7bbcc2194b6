// The text as coloured tokens, and what was expected at the chosen one.

import { bits, byId, el, number, percent, visible } from "/page.js";

const MOST_BITS = 12; // a probability of 1/4096 has the full colour

const LEGENDS = {
  probability: ["expected", "surprising", "The probability that the model gave each token, from the tokens before it. Full colour is 1/4096 or less."],
  entropy: ["sure", "undecided", "Entropy: how undecided the model was before each token, in bits. h bits are as undecided as 2^h equally likely tokens."],
  rank: ["first choice", "far down the list", "Rank: the token's place when all tokens are ordered by their probability; 1 is the likeliest."],
};

/** Return how strongly a token is coloured, from 0 to 1. */
export function strength(token, by, vocabulary) {
  if (token.logprob === null) return token.rank ? 1 : 0;
  if (by === "entropy") return Math.min(1, token.expected.entropy / Math.log(vocabulary));
  if (by === "rank") return Math.log(token.rank) / Math.log(vocabulary);
  return Math.min(1, bits(token.logprob) / MOST_BITS);
}

/** Return the element of a token; a line end is shown, and ends the line. */
export function tokenElement(text, properties = {}) {
  const shown = text.replaceAll("\n", "↵\n").replaceAll("\t", "⇥\t");
  return el("span", properties, shown);
}

export function showTokens(state) {
  const by = byId("colour").value;
  const { tokens } = state.read;
  const restarts = new Set(state.read.windows);
  const made = tokens.map((token, n) =>
    tokenElement(token.text, {
      className: ["token", token.special && "special", n === state.selected && "selected", restarts.has(n) && "window"].filter(Boolean).join(" "),
      title: token.logprob === null ? visible(token.text) : `${visible(token.text)}  ${percent(Math.exp(token.logprob))}, rank ${token.rank}`,
      tabIndex: 0,
      data: { n, id: token.id, logprob: token.logprob ?? "", rank: token.rank ?? "", entropy: token.expected?.entropy ?? "" },
      css: { "--s": strength(token, by, state.facts.vocabulary) },
    }),
  );
  const start = state.facts.start === null ? [] : [el("span", { className: "token start", title: "The token that begins each text" }, state.facts.start)];
  const next = el("span", { className: `token next${state.selected === tokens.length ? " selected" : ""}`, tabIndex: 0, title: "What comes next", data: { n: tokens.length } }, "?");
  byId("tokens").replaceChildren(...start, ...made, ...(state.read.next ? [next] : []));
  const [low, high, caption] = LEGENDS[by];
  byId("legend").firstElementChild.textContent = low;
  byId("legend").lastElementChild.textContent = high;
  byId("legend-text").textContent = caption;
  const isLong = state.facts.context !== null && state.read.ids.length + start.length > state.facts.context;
  byId("windows").hidden = !isLong;
  byId("windows").textContent = isLong
    ? `The text is longer than the model's context of ${state.facts.context} tokens. It is read in windows of that length, as gpt-kit evaluate reads it: the first tokens after a bar are expected from few tokens. Nothing can be generated after it.`
    : "";
}

export function showSide(state) {
  const { tokens, next } = state.read;
  const token = tokens[state.selected];
  const expected = token ? token.expected : next;
  byId("side-title").textContent = token ? `At “${visible(token.text)}”` : "What comes next?";
  byId("candidates").replaceChildren();
  byId("side-facts").replaceChildren();
  if (!expected) {
    byId("side-facts").append(el("dd", { className: "wide" }, token ? "Nothing comes before this token, so the model was not asked." : "Write a text first."));
    return;
  }
  const facts = [];
  if (token) facts.push(["probability", percent(Math.exp(token.logprob ?? -Infinity))], ["loss", `${number(bits(token.logprob))} bits`], ["rank", token.rank.toLocaleString("en")]);
  const entropy = bits(-expected.entropy);
  facts.push(["entropy", `${number(entropy)} bits`]);
  for (const [name, value] of facts) byId("side-facts").append(el("dt", {}, name), el("dd", {}, value));
  const equal = 2 ** entropy;
  byId("side-facts").append(el("dd", { className: "wide" }, `as undecided as ${equal < 10 ? equal.toFixed(1) : Math.round(equal).toLocaleString("en")} equally likely tokens`));
  const rows = expected.top.map(([id, text, logprob]) => candidate(id, text, logprob, token?.id === id));
  if (token && !expected.top.some(([id]) => id === token.id)) rows.push(candidate(token.id, token.text, token.logprob, true));
  byId("candidates").append(...rows);
}

function candidate(id, text, logprob, isActual) {
  const p = logprob === null ? 0 : Math.exp(logprob);
  const button = el(
    "button",
    { title: "Continue from this token", data: { id, probability: p } },
    el("span", { className: "spelled" }, visible(text)),
    el("span", { className: "bar" }, el("i", { css: { "--p": p } })),
    el("span", { className: "number" }, percent(p)),
  );
  return el("li", { className: isActual ? "actual" : "" }, button);
}
