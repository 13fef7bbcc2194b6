// What all parts of the page share. Text of a model only ever becomes text: nothing here parses HTML.

export const LN2 = Math.log(2);
const pageId = crypto.getRandomValues(new Uint32Array(2)).join("-");
const waiting = new Map(); // path -> AbortController of the newest request

export const byId = (id) => document.getElementById(id);

/** Return a new element: el("span", {className: "token"}, "text", child). */
export function el(tag, properties = {}, ...children) {
  const made = document.createElement(tag);
  const { data = {}, css = {}, ...others } = properties;
  Object.assign(made, others);
  Object.assign(made.dataset, data);
  for (const [name, value] of Object.entries(css)) made.style.setProperty(name, value);
  made.append(...children);
  return made;
}

/** POST a request and return its JSON; null if a newer request of the same path replaced it. Raises Error. */
export async function ask(path, body) {
  const answer = await send(path, body);
  return answer && answer.json();
}

/** POST a request whose answer is lines of JSON; call `onLine` for each. */
export async function stream(path, body, onLine) {
  const answer = await send(path, body);
  if (!answer) return;
  const reader = answer.body.pipeThrough(new TextDecoderStream()).getReader();
  let rest = "";
  try {
    for (;;) {
      const { done, value } = await reader.read();
      if (done) return;
      const lines = (rest + value).split("\n");
      rest = lines.pop();
      for (const line of lines) onLine(JSON.parse(line));
    }
  } catch (error) {
    if (error.name !== "AbortError") throw error;
  }
}

export function cancel(path) {
  waiting.get(path)?.abort();
}

async function send(path, body) {
  cancel(path);
  const control = new AbortController();
  waiting.set(path, control);
  let answer;
  try {
    answer = await fetch(`/${path}`, {
      method: "POST",
      headers: { "Content-Type": "application/json" },
      body: JSON.stringify({ page: pageId, ...body }),
      signal: control.signal,
    });
  } catch (error) {
    if (error.name === "AbortError") return null;
    throw new Error("The server does not answer. Is gpt-kit play still running?");
  }
  if (answer.status === 409) return null;
  if (!answer.ok) throw new Error((await answer.json()).error);
  return answer;
}

/** Show an error to the user until the next success. */
export function report(error) {
  byId("message").hidden = !error;
  byId("message").textContent = error ? error.message : "";
}

/** Return a function that calls `action` once it has not been called for some milliseconds. */
export function debounced(action, milliseconds) {
  let timer;
  return (...given) => {
    clearTimeout(timer);
    timer = setTimeout(() => action(...given), milliseconds);
  };
}

export const bits = (logprob) => (logprob === null ? null : -logprob / LN2);

export function percent(p) {
  if (p === null || p === undefined) return "–";
  const value = 100 * p;
  if (value >= 10) return `${value.toFixed(1)}%`;
  if (value === 0) return "0%";
  if (value < 1e-5) return "<0.00001%";
  const digits = value < 0.01 ? 1 : 2;
  return `${value.toLocaleString("en", { minimumSignificantDigits: digits, maximumSignificantDigits: digits })}%`;
}

export const number = (value, digits = 2) => (value === null || value === undefined ? "–" : value.toFixed(digits));

/** Return a token as it can be seen: blanks and line ends have signs. */
export function visible(text) {
  const shown = text.replaceAll("\n", "↵").replaceAll("\t", "⇥").replaceAll("\r", "␍");
  return shown.replace(/^ +| +$/g, (blanks) => "·".repeat(blanks.length)) || "∅";
}
