// The page: its state, and which part is shown.

import { listenToAttention, showAttention } from "/attention.js";
import { listenToChat, showChat } from "/chat.js";
import { showCompare } from "/compare.js";
import { listenToLens, showLens } from "/lens.js";
import { showLoss } from "/loss.js";
import { ask, byId, cancel, debounced, el, report, stream } from "/page.js";
import { showRuns } from "/runs.js";
import { sampling, seed, showSampling } from "/sampling.js";
import { showSide, showTokens } from "/tokens.js";

const TYPING_MILLISECONDS = 60;
const LOOK_MILLISECONDS = 5000; // between looks for new checkpoints

const TABS = {
  loss: ["Loss", showLoss],
  sampling: ["Sampling", showSampling],
  attention: ["Attention", showAttention],
  lens: ["Logit lens", showLens],
  compare: ["Compare", showCompare],
  chat: ["Chat", showChat],
  curves: ["Curves", showRuns],
};

const EMPTY = { ids: [], text: "", tokens: [], next: null, scores: null, windows: [] };
const state = { model: "", facts: null, read: EMPTY, selected: 0, tab: "loss", edits: 0 };
let entries = [];

// --- what is shown

function show() {
  showTokens(state);
  showSide(state);
  return showTab();
}

async function showTab() {
  const [, view] = TABS[state.tab];
  const reason = state.facts.absent[state.tab];
  for (const name of Object.keys(TABS)) byId(`view-${name}`).hidden = name !== state.tab || Boolean(reason);
  for (const button of byId("tabs").children) {
    button.ariaSelected = String(button.dataset.tab === state.tab);
    button.className = state.facts.absent[button.dataset.tab] ? "absent" : "";
  }
  byId("absent").hidden = !reason;
  byId("absent").textContent = reason ?? "";
  if (!reason) await guarded(() => view(state));
}

/** Run something that may fail, and tell the user. */
async function guarded(action) {
  try {
    await action();
    report(null);
  } catch (error) {
    report(error);
  }
}

// --- reading

async function read(given) {
  const { edits } = state;
  document.body.dataset.state = "reading";
  await guarded(async () => {
    const found = await ask("read", { model: state.model, ...given });
    // What was typed meanwhile is not replaced.
    if (!found || (given.ids && state.edits !== edits)) return;
    const atEnd = state.selected >= state.read.tokens.length;
    state.read = found;
    if (atEnd || state.selected > found.tokens.length) state.selected = found.tokens.length;
    if (given.ids) byId("text").value = found.text;
    await show();
    document.body.dataset.state = "ready";
  });
}

const readTyped = debounced(() => read({ text: byId("text").value }), TYPING_MILLISECONDS);

function select(n) {
  state.selected = n;
  return show();
}

/** Put a token at the chosen place, without what follows. */
function continueFrom(id) {
  edit();
  const ids = [...state.read.ids.slice(0, state.selected), id];
  state.selected = state.read.tokens.length; // goes along with the end of the text
  return read({ ids });
}

// --- generating

async function generate() {
  const given = { model: state.model, ids: state.read.ids, sampling: sampling(), seed: seed() };
  const count = Number(byId("new-tokens").value);
  byId("generate").hidden = true;
  byId("stop").hidden = false;
  byId("ended").textContent = "";
  const edits = state.edits;
  // A line that was on its way when the text was edited is not added.
  const add = (line) => state.edits === edits && addGenerated(line);
  await guarded(() => stream("generate", { ...given, max_new_tokens: count }, add));
  byId("generate").hidden = false;
  byId("stop").hidden = true;
  // What was typed meanwhile, or put in place of a token, is read already.
  if (state.edits === edits) await read({ ids: state.read.ids });
}

function addGenerated(line) {
  if (line.end !== undefined) {
    byId("ended").textContent = line.end;
    return;
  }
  const { token, next, text } = line;
  state.read = { ids: [...state.read.ids, token.id], text, tokens: [...state.read.tokens, token], next, scores: state.read.scores, windows: [] };
  state.selected = state.read.tokens.length;
  byId("text").value = text;
  showTokens(state);
  showSide(state);
}

function stop() {
  cancel("generate");
}

/** End what is being generated, as the text becomes another one. */
function edit() {
  state.edits += 1;
  stop();
}

// --- models

async function look() {
  if (document.hidden) return;
  const answer = await fetch("/models").catch(() => null);
  if (!answer?.ok) return;
  entries = await answer.json();
  for (const id of ["model", "other"]) {
    const kept = byId(id).value;
    byId(id).replaceChildren(...entries.map(({ key, label }) => el("option", { value: key }, label)));
    if (entries.some(({ key }) => key === kept)) byId(id).value = kept;
    else if (id === "other" && entries.length > 1) byId(id).value = another(entries).key;
    else if (kept) byId(id).prepend(el("option", { value: kept, selected: true }, `${state.facts?.label ?? kept} (deleted since)`));
  }
  offerNewer();
  if (state.tab === "curves" && state.facts) await showTab();
}

/** Return what to compare the first entry with: a model of another place, else the checkpoint before it. */
function another([first, ...others]) {
  return others.find(({ key }) => key.split("/")[0] !== first.key.split("/")[0]) ?? others[0];
}

/** Offer the newest model of the same run, while it trains. */
function offerNewer() {
  const [place, step] = state.model.split("/");
  const newest = entries.find(({ key }) => key.split("/")[0] === place);
  const isNewer = Boolean(step && newest && newest.key !== state.model && state.followed);
  byId("newer").hidden = !isNewer;
  if (isNewer) Object.assign(byId("newer"), { textContent: `Use the newer ${newest.label}`, value: newest.key });
}

async function open(key) {
  edit();
  document.body.dataset.state = "loading";
  byId("facts").textContent = "loading …";
  await guarded(async () => {
    const facts = await ask("open", { model: key });
    if (!facts) return;
    state.model = key;
    state.facts = facts;
    // A checkpoint that was the newest when it was chosen is followed; an older one was chosen on purpose.
    state.followed = entries.find((each) => each.key.split("/")[0] === key.split("/")[0])?.key === key;
    byId("model").value = key;
    const context = facts.context ? ` · context ${facts.context.toLocaleString("en")}` : "";
    byId("facts").textContent = `${facts.kind} · ${millions(facts.parameters)} parameters · ${facts.layers} ${facts.layers === 1 ? "layer" : "layers"}${context}`;
    offerNewer();
    await read({ text: byId("text").value });
  });
}

function millions(n) {
  return n >= 1e6 ? `${(n / 1e6).toPrecision(3)}M` : n.toLocaleString("en");
}

// --- the start

function listen() {
  byId("text").addEventListener("input", () => {
    edit();
    state.selected = Infinity;
    readTyped();
  });
  byId("model").addEventListener("change", () => open(byId("model").value));
  byId("newer").addEventListener("click", () => open(byId("newer").value));
  byId("generate").addEventListener("click", generate);
  byId("stop").addEventListener("click", stop);
  byId("colour").addEventListener("change", () => showTokens(state));
  byId("candidates").addEventListener("click", (event) => {
    const button = event.target.closest("button");
    if (button) continueFrom(Number(button.dataset.id));
  });
  for (const id of ["tokens", "loss-bars", "surprises"]) {
    const choose = (event) => {
      const chosen = event.target.closest("[data-n]");
      if (chosen) select(Number(chosen.dataset.n));
    };
    byId(id).addEventListener("click", choose);
    byId(id).addEventListener("keydown", (event) => event.key === "Enter" && choose(event));
  }
  const changed = debounced(showTab, TYPING_MILLISECONDS);
  for (const id of ["temperature", "top-k", "top-p"]) byId(id).addEventListener("input", changed);
  byId("other").addEventListener("change", showTab);
  listenToAttention(state, showTab);
  listenToLens();
  listenToChat(state, showTab);
  byId("tabs").append(
    ...Object.entries(TABS).map(([tab, [label]]) => el("button", { role: "tab", data: { tab } }, label)),
  );
  byId("tabs").addEventListener("click", (event) => {
    if (!event.target.dataset.tab) return;
    state.tab = event.target.dataset.tab;
    showTab();
  });
}

listen();
await guarded(async () => {
  await look();
  await open(entries[0]?.key ?? "");
});
setInterval(look, LOOK_MILLISECONDS);
window.addEventListener("focus", look);
