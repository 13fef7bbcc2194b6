"use strict";

// The page of `gpt-kit watch`: asks for what is new, and draws it.
(() => {
  const COLORS = 8;
  const SHOWN_AT_FIRST = 8;
  const WAIT = {running: 2000, idle: 5000};
  const GROUPS = {
    train: ["loss", "learning_rate", "grad_norm"],
    eval: ["eval_loss", "bits_per_byte"],
    speed: ["tokens_per_second", "memory_bytes", "elapsed"],
  };
  const byId = id => document.getElementById(id);
  const runs = new Map(); // by id: {id, name, state, shown, color, curves, samples, about, facts, version}

  const {make} = RunCharts;
  const shownRuns = () => [...runs.values()].filter(run => run.shown && run.curves);
  const charts = RunCharts.create({loss: byId("loss"), others: byId("charts"), controls: byId("controls")});

  // ---- what is new

  function emptyCurves() {
    const curves = {};
    for (const [group, names] of Object.entries(GROUPS)) {
      curves[group] = {steps: [], tokens: [], count: [], series: {}};
      for (const name of names) curves[group].series[name] = {value: [], low: [], high: []};
    }
    return curves;
  }

  function replaceFrom(column, from, values) {
    column.length = from;
    for (const value of values) column.push(value);
  }

  function take(run, news) {
    run.facts = news.facts;
    run.error = news.error;
    if (run.version !== news.version) {
      run.curves = emptyCurves();
      run.samples = [];
      run.version = news.version;
    }
    for (const [group, rows] of Object.entries(news.curves)) {
      const kept = run.curves[group];
      for (const name of ["steps", "tokens", "count"]) replaceFrom(kept[name], rows.from, rows[name]);
      for (const [name, columns] of Object.entries(rows.series)) {
        for (const kind of ["value", "low", "high"]) replaceFrom(kept.series[name][kind], rows.from, columns[kind]);
      }
    }
    replaceFrom(run.samples, news.samples.from, news.samples.new);
    if (news.about.options) run.about = news.about;
    RunCharts.addSeconds(run);
  }

  function seenOf(run) {
    if (!run.curves) return {};
    return {
      version: run.version,
      about: run.about.digest,
      train: run.curves.train.steps.length,
      eval: run.curves.eval.steps.length,
      speed: run.curves.speed.steps.length,
      samples: run.samples.length,
    };
  }

  async function ask() {
    const seen = {};
    for (const run of runs.values()) if (run.shown) seen[run.id] = seenOf(run);
    const answer = await fetch("/update", {
      method: "POST",
      headers: {"Content-Type": "application/json"},
      body: JSON.stringify({runs: seen}),
    });
    const content = await answer.json();
    if (!answer.ok) throw new Error(content.error);
    return content;
  }

  function learn(content) {
    let found = false;
    for (const news of content.runs) {
      let run = runs.get(news.id);
      if (!run) {
        run = {id: news.id, shown: runs.size < SHOWN_AT_FIRST, color: `var(--run-${runs.size % COLORS})`};
        runs.set(news.id, run);
        found = found || run.shown;
      }
      Object.assign(run, {name: news.name, state: news.state, error: news.error || null});
      if (news.curves) take(run, news);
    }
    byId("waiting").textContent = content.waiting.map(place => `${place}: no run has begun there yet`).join("\n");
    byId("waiting").hidden = !content.waiting.length;
    return found;
  }

  async function update() {
    let wait = WAIT.idle;
    try {
      if (!document.hidden) {
        if (learn(await ask())) learn(await ask());
        say(null);
        draw();
      }
      if ([...runs.values()].some(run => run.state === "running")) wait = WAIT.running;
      byId("live").textContent = wait === WAIT.running ? "live" : "waiting for changes";
    } catch (error) {
      say(`gpt-kit watch does not answer (${error.message}). Start it again to go on.`);
      byId("live").textContent = "not connected";
    }
    clearTimeout(update.timer);
    update.timer = setTimeout(update, wait);
  }

  function say(text) {
    byId("message").textContent = text || "";
    byId("message").hidden = !text;
  }

  // ---- the table of runs

  function runRow(run) {
    const row = make("tr");
    row.dataset.run = run.name;
    const name = make("label", "run-name");
    const box = make("input");
    box.type = "checkbox";
    box.checked = run.shown;
    box.addEventListener("change", () => {
      run.shown = box.checked;
      draw();
      update();
    });
    const swatch = make("span", "chart-swatch");
    swatch.style.backgroundColor = run.color;
    name.append(box, swatch, make("span", "", run.name));
    const first = make("td");
    first.append(name);
    if (run.error) first.append(make("div", "error", run.error));
    const state = make("td");
    state.append(make("span", `state ${run.state}`, run.state));
    row.append(first, state);
    const cells = run.shown && run.facts ? factCells(run) : Array.from({length: 10}, () => ["", ""]);
    for (const [kind, text, extra] of cells) {
      const cell = make("td", kind, text);
      if (extra) cell.append(extra);
      row.append(cell);
    }
    return row;
  }

  function factCells(run) {
    const {facts, about} = run;
    const {last, best} = facts;
    const whole = value => (value === null ? "–" : value.toLocaleString("en"));
    let bar = null;
    if (facts.planned) {
      bar = make("span", "bar");
      const done = make("i");
      done.style.width = `${Math.min(100, (100 * facts.step) / facts.planned)}%`;
      bar.append(done);
    }
    const fixed = value => (value === null ? "–" : value.toFixed(4));
    return [
      ["number", facts.planned ? `${whole(facts.step)} / ${whole(facts.planned)}` : whole(facts.step), bar],
      ["number", Curves.short(facts.trained_tokens)],
      ["number", fixed(last.loss), facts.skipped ? make("div", "error", `${facts.skipped} skipped`) : null],
      ["number", fixed(about.results.loss ?? last.eval_loss)],
      ["number", fixed(about.results.bits_per_byte ?? last.bits_per_byte)],
      ["", best ? `step ${whole(best.step)}, ${best.value.toFixed(4)}` : "–"],
      ["number", last.tokens_per_second === null ? "–" : Curves.short(last.tokens_per_second)],
      ["number", Curves.bytes(last.memory_bytes)],
      ["number", Curves.duration(last.elapsed)],
      ["number", facts.left === null ? "–" : Curves.duration(facts.left)],
    ];
  }

  // ---- samples

  function drawSamples() {
    const shown = shownRuns().filter(run => run.samples.length);
    byId("samples").hidden = !shown.length;
    if (!shown.length) return;
    const steps = [...new Set(shown.flatMap(run => run.samples.map(sample => sample.step)))].sort((a, b) => a - b);
    const slider = byId("sample-step");
    const atEnd = slider.value === slider.max;
    slider.max = steps.length - 1;
    if (atEnd) slider.value = slider.max;
    const step = steps[Number(slider.value)];
    byId("sample-at").textContent = step.toLocaleString("en");
    const texts = byId("sample-texts");
    texts.replaceChildren();
    for (const run of shown) {
      const sample = run.samples.filter(each => each.step <= step).pop();
      if (!sample) continue;
      const head = make("h3");
      const swatch = make("span", "chart-swatch");
      swatch.style.backgroundColor = run.color;
      head.append(swatch, make("span", "", `${run.name}, step ${sample.step.toLocaleString("en")}`));
      const text = make("pre");
      const begins = sample.text.startsWith(sample.prompt) ? sample.prompt : "";
      text.append(make("span", "prompt", begins), make("span", "", sample.text.slice(begins.length)));
      const block = make("div", "sample");
      block.append(head, text);
      texts.append(block);
    }
  }

  // ---- options

  function drawOptions() {
    const shown = shownRuns();
    const several = shown.length > 1;
    byId("options").hidden = !shown.length;
    byId("differences-choice").hidden = !several;
    const names = [...new Set(shown.flatMap(run => Object.keys(run.about.options)))];
    const told = (run, name) => (name in run.about.options ? JSON.stringify(run.about.options[name]) : "");
    const differs = name => new Set(shown.map(run => told(run, name))).size > 1;
    const ignored = name => name === "training.output_dir"; // differs between all runs, and says nothing
    const only = several && byId("differences").checked;
    const listed = names.filter(name => !only || (differs(name) && !ignored(name)));
    const head = make("tr");
    head.append(make("th", "", "Option"), ...shown.map(run => make("th", "", run.name)));
    byId("option-heads").replaceChildren(head);
    byId("option-rows").replaceChildren(
      ...listed.map(name => {
        const row = make("tr", differs(name) && !only ? "differs" : "");
        row.append(make("td", "", name), ...shown.map(run => make("td", "", told(run, name))));
        return row;
      }),
    );
    byId("option-note").textContent = only && !listed.length ? "The options of these runs are equal." : "";
  }

  let tableText = "";

  function draw() {
    const rows = [...runs.values()].map(runRow);
    const text = rows.map(row => row.outerHTML).join("");
    if (text !== tableText) byId("run-rows").replaceChildren(...rows); // else the focus stays where it is
    tableText = text;
    charts.draw(shownRuns());
    drawSamples();
    drawOptions();
    const first = shownRuns()[0];
    document.title = first ? `${first.name} ${first.facts.step} – gpt-kit watch` : "gpt-kit watch";
  }

  byId("sample-step").addEventListener("input", drawSamples);
  byId("differences").addEventListener("input", drawOptions);
  document.addEventListener("visibilitychange", () => document.hidden || update());
  update();
})();
