// A conversation, and the prompt that its template makes.

import { ask, byId, cancel, el, number, bits, report, stream } from "/page.js";
import { sampling, seed } from "/sampling.js";
import { tokenElement } from "/tokens.js";

const ROLES = { system: "system", user: "user", assistant: "assistant", answer: "where the answer begins" };
let messages = [];
let isAnswering = false;

export async function showChat(state) {
  byId("turns").replaceChildren(...messages.map(({ role, content }) => el("div", { className: `turn ${role}` }, content)));
  byId("conversation").replaceChildren();
  byId("roles").replaceChildren();
  if (!messages.length || isAnswering) return;
  const found = await ask("conversation", { model: state.model, messages });
  if (!found) return;
  byId("conversation").replaceChildren(
    ...found.tokens.map((token) =>
      tokenElement(token.text, {
        className: `token${token.trained ? " trained" : ""}`,
        title: `${ROLES[token.role] ?? ""}${token.logprob === null ? "" : `, ${number(bits(token.logprob))} bits`}`,
        data: { role: token.role, trained: token.trained, logprob: token.logprob ?? "" },
      }),
    ),
  );
  const present = new Set(found.tokens.map(({ role }) => role));
  byId("roles").replaceChildren(
    ...Object.entries(ROLES).filter(([role]) => present.has(role)).map(([role, name]) => el("span", { className: "token", data: { role } }, ` ${name} `)),
  );
  byId("chat-note").textContent = found.marks_answers ? "" : "This template does not mark its answers, so it is not known which tokens were trained.";
}

async function answer(state) {
  const turn = { role: "assistant", content: "" };
  const asked = [...messages];
  messages.push(turn);
  isAnswering = true;
  const done = stream(
    "generate",
    { model: state.model, ids: [], messages: asked, sampling: sampling(), max_new_tokens: Number(byId("new-tokens").value), seed: seed() },
    (line) => {
      if (line.text !== undefined) turn.content = line.text;
      const shown = byId("turns").lastElementChild;
      if (shown) shown.textContent = turn.content || "…";
    },
  );
  await done.finally(() => (isAnswering = false));
}

export function listenToChat(state, update) {
  byId("say").addEventListener("submit", async (event) => {
    event.preventDefault();
    const content = byId("line").value;
    if (!content.trim()) return;
    byId("line").value = "";
    messages.push({ role: "user", content });
    try {
      const reply = answer(state);
      byId("turns").replaceChildren(...messages.map((each) => el("div", { className: `turn ${each.role}` }, each.content || "…")));
      await reply;
      report(null);
      await update();
    } catch (error) {
      messages = messages.slice(0, -2);
      report(error);
    }
  });
  byId("forget").addEventListener("click", () => {
    cancel("generate");
    messages = [];
    update();
  });
}
