// The loss of the text, by token.

import { bits, byId, el, number, percent, visible } from "/page.js";

const WORST = 8;

export function showLoss(state) {
  const { tokens, scores } = state.read;
  const tiles = scores
    ? [
        ["bits per byte", number(scores.bits_per_byte, 3)],
        ["loss (nats per token)", number(scores.loss, 3)],
        ["perplexity", number(scores.perplexity, 1)],
        ["tokens", scores.tokens.toLocaleString("en")],
        ["bytes", scores.bytes.toLocaleString("en")],
      ]
    : [];
  byId("scores").replaceChildren(...tiles.map(([name, value]) => el("div", {}, el("dt", {}, name), el("dd", {}, value))));
  if (scores) Object.assign(byId("scores").dataset, { loss: scores.loss, bitsPerByte: scores.bits_per_byte });
  const losses = tokens.map((token) => bits(token.logprob));
  const most = Math.max(1, ...losses.filter((each) => each !== null));
  byId("loss-bars").replaceChildren(
    ...tokens.map((token, n) =>
      el("i", {
        className: n === state.selected ? "selected" : "",
        title: `${visible(token.text)}  ${number(losses[n])} bits`,
        data: { n, bits: losses[n] ?? "" },
        css: { "--h": (losses[n] ?? 0) / most },
      }),
    ),
  );
  const worst = tokens.map((token, n) => ({ token, n })).filter(({ token }) => token.logprob !== null);
  worst.sort((one, other) => one.token.logprob - other.token.logprob);
  byId("surprises").replaceChildren(
    ...worst.slice(0, WORST).map(({ token, n }) => {
      const [, text, logprob] = token.expected.top[0];
      return el(
        "li",
        { data: { n } },
        el("span", { className: "spelled" }, visible(token.text)),
        ` ${number(bits(token.logprob), 1)} bits (${percent(Math.exp(token.logprob))}); expected was `,
        el("span", { className: "spelled" }, visible(text)),
        ` (${percent(Math.exp(logprob))})`,
      );
    }),
  );
}
