"use strict";

// Charts of a run's curves, as SVG; needs curve_math.js. Text only enters a page by textContent.
//
//   const chart = Curves.create(element, {title: "Loss", unit: "nats per token", onZoom: range => ...});
//   chart.draw({lines, levels, marks, axis: "steps", logX: false, logY: false, smoothing: 0.02, range: null});
//
// A line is {name, color, rows, raw, points}: rows has columns of equal length, in the order of steps: `steps`, `tokens`,
// `seconds` (or null), and `value`, `low`, `high`, `count` of the values that a row stands for. `raw: true` also draws
// the values themselves where a line is smoothed, `points: true` draws a dot for each row and smooths nothing.
// A level is {name, value}, a horizontal line; a mark is {name, color, steps, tokens, seconds, value}, a star.
const Curves = (() => {
  const SVG = "http://www.w3.org/2000/svg";
  const AXES = {steps: "step", tokens: "trained tokens", seconds: "time"};
  const MARGIN = {top: 8, right: 14, bottom: 34, left: 58};
  const {usable, short, ticksOf, timeTicks, timeLabel, smoothed} = CurveMath;

  function element(name, attributes = {}, text = null) {
    const made = document.createElementNS(SVG, name);
    for (const [key, value] of Object.entries(attributes)) made.setAttribute(key, value);
    if (text !== null) made.textContent = text;
    return made;
  }

  function html(name, className, text = null) {
    const made = document.createElement(name);
    made.className = className;
    if (text !== null) made.textContent = text;
    return made;
  }

  // ---- the chart

  class Chart {
    constructor(parent, {title, unit = "", height = 220, format = short, onZoom = null}) {
      this.height = height;
      this.format = format;
      this.onZoom = onZoom;
      this.root = html("figure", "chart");
      const head = html("figcaption", "chart-title", title);
      if (unit) head.append(html("span", "chart-unit", unit));
      this.svg = element("svg", {role: "img", "aria-label": title, height});
      this.tip = html("div", "chart-tip");
      this.tip.hidden = true;
      this.empty = html("p", "chart-empty", "nothing recorded yet");
      const frame = html("div", "chart-frame");
      frame.append(this.svg, this.tip, this.empty);
      this.root.append(head, frame);
      parent.append(this.root);
      this.svg.addEventListener("pointermove", event => this.#hover(event));
      this.svg.addEventListener("pointerleave", () => this.#leave());
      this.svg.addEventListener("pointerdown", event => this.#press(event));
      this.svg.addEventListener("pointerup", event => this.#release(event));
      this.svg.addEventListener("dblclick", () => this.onZoom && this.onZoom(null));
      new ResizeObserver(() => this.spec && this.svg.clientWidth !== this.width && this.draw(this.spec)).observe(frame);
    }

    draw(spec) {
      this.spec = {axis: "steps", logX: false, logY: false, smoothing: 0, range: null, levels: [], marks: [], ...spec};
      this.width = Math.max(240, this.svg.clientWidth);
      this.lines = this.spec.lines
        .map(line => ({...line, x: line.rows[this.spec.axis], y: line.rows.value}))
        .filter(line => line.x && line.y.some(usable));
      for (const line of this.lines) {
        line.smooth = this.spec.smoothing && !line.points ? smoothed(line.rows, this.spec.smoothing) : null;
      }
      this.svg.replaceChildren();
      this.empty.hidden = this.lines.length > 0;
      if (!this.lines.length) return;
      this.#scale();
      this.#grid();
      const clip = `clip-${Chart.number++}`;
      const area = element("clipPath", {id: clip});
      area.append(element("rect", {x: MARGIN.left, y: 0, width: this.width - MARGIN.left, height: this.height - MARGIN.bottom + 1}));
      const body = element("g", {"clip-path": `url(#${clip})`});
      this.svg.append(area, body);
      this.#levels(body);
      for (const line of this.lines) this.#line(body, line);
      this.#marks(body);
      this.guide = element("line", {class: "chart-guide", y1: MARGIN.top, y2: this.height - MARGIN.bottom});
      this.brush = element("rect", {class: "chart-brush", y: MARGIN.top, height: this.height - MARGIN.top - MARGIN.bottom});
      for (const each of [this.guide, this.brush]) each.setAttribute("visibility", "hidden");
      this.svg.append(this.guide, this.brush);
    }

    #scale() {
      const {axis, logX, logY, range} = this.spec;
      this.inner = this.width - MARGIN.left - MARGIN.right;
      let last = 1;
      let first = Infinity;
      for (const line of this.lines) {
        last = Math.max(last, line.x[line.x.length - 1]);
        first = Math.min(first, line.x.find(x => x > 0) || Infinity);
      }
      this.logX = logX && axis !== "seconds" && first < last;
      [this.left, this.right] = range || [this.logX ? first : 0, last];
      if (this.logX) this.left = Math.max(this.left, first);
      if (this.right <= this.left) this.right = this.left + 1;
      let [low, high, positive] = [Infinity, -Infinity, Infinity];
      const see = value => {
        if (!usable(value)) return;
        low = Math.min(low, value);
        high = Math.max(high, value);
        if (value > 0) positive = Math.min(positive, value);
      };
      for (const line of this.lines) {
        line.x.forEach((x, row) => {
          if (x < this.left || x > this.right) return;
          if (line.smooth && !line.raw) see(line.smooth[row]);
          else [line.rows.low[row], line.rows.high[row]].forEach(see);
        });
      }
      if (!usable(low)) [low, high] = [0, 1];
      this.logY = logY && usable(positive) && positive < high;
      if (this.logY) {
        const space = (high / positive) ** 0.05;
        [this.low, this.high] = [positive / space, high * space];
      } else {
        const space = (high - low || Math.abs(high) || 1) * 0.06;
        [this.low, this.high] = [low >= 0 ? Math.max(0, low - space) : low - space, high + space];
      }
    }

    #toX(x) {
      const part = this.logX
        ? Math.log(Math.max(x, 1e-9) / this.left) / Math.log(this.right / this.left)
        : (x - this.left) / (this.right - this.left);
      return MARGIN.left + part * this.inner;
    }

    #fromX(place) {
      const part = Math.min(1, Math.max(0, (place - MARGIN.left) / this.inner));
      return this.logX ? this.left * (this.right / this.left) ** part : this.left + part * (this.right - this.left);
    }

    #toY(y) {
      const part = this.logY
        ? Math.log(Math.max(y, 1e-300) / this.low) / Math.log(this.high / this.low)
        : (y - this.low) / (this.high - this.low);
      return this.height - MARGIN.bottom - part * (this.height - MARGIN.top - MARGIN.bottom);
    }

    #grid() {
      const bottom = this.height - MARGIN.bottom;
      for (const value of ticksOf(this.low, this.high, 5, this.logY)) {
        const y = this.#toY(value).toFixed(1);
        this.svg.append(
          element("line", {class: "chart-grid", x1: MARGIN.left, x2: MARGIN.left + this.inner, y1: y, y2: y}),
          element("text", {class: "chart-tick", x: MARGIN.left - 7, y, dy: "0.32em", "text-anchor": "end"},
            this.format(value)),
        );
      }
      const wanted = Math.max(2, Math.floor(this.inner / 90));
      const isTime = this.spec.axis === "seconds";
      const ticks = isTime
        ? timeTicks(this.right, wanted).filter(value => value >= this.left)
        : ticksOf(this.left, this.right, wanted, this.logX);
      let end = 0; // of the last label: none may touch the next
      for (const value of ticks) {
        const x = this.#toX(value);
        if (x < end) continue;
        end = x + 44;
        const label = isTime ? timeLabel(value) : short(value);
        this.svg.append(
          element("line", {class: "chart-axis", x1: x, x2: x, y1: bottom, y2: bottom + 4}),
          element("text", {class: "chart-tick", x, y: bottom + 16, "text-anchor": "middle"}, label),
        );
      }
      const line = {class: "chart-axis", x1: MARGIN.left, x2: MARGIN.left + this.inner, y1: bottom, y2: bottom};
      const label = {class: "chart-tick", x: MARGIN.left + this.inner, y: this.height - 4, "text-anchor": "end"};
      this.svg.append(element("line", line), element("text", label, AXES[this.spec.axis]));
    }

    #path(line, values) {
      let path = "";
      let pen = "M";
      line.x.forEach((x, row) => {
        if (!usable(values[row])) return;
        path += `${pen}${this.#toX(x).toFixed(1)},${this.#toY(values[row]).toFixed(1)}`;
        pen = "L";
      });
      return path;
    }

    // Where a row stands for several values, the path goes through the lowest and the highest of them.
    #rawPath(line) {
      const {low, high} = line.rows;
      let path = "";
      let pen = "M";
      line.x.forEach((x, row) => {
        if (!usable(low[row])) return;
        const place = this.#toX(x).toFixed(1);
        path += `${pen}${place},${this.#toY(low[row]).toFixed(1)}`;
        if (high[row] !== low[row]) path += `L${place},${this.#toY(high[row]).toFixed(1)}`;
        pen = "L";
      });
      return path;
    }

    #line(body, line) {
      const style = {fill: "none", stroke: line.color, "data-name": line.name};
      if (line.smooth) {
        if (line.raw) body.append(element("path", {...style, class: "chart-raw", d: this.#rawPath(line)}));
        body.append(element("path", {...style, class: "chart-line", d: this.#path(line, line.smooth)}));
        return;
      }
      const kind = line.points ? "chart-scores" : "chart-line";
      body.append(element("path", {...style, class: kind, d: this.#rawPath(line)}));
      if (!line.points && line.x.length > 1) return;
      const dots = line.x.map((x, row) => [x, line.y[row]]).filter(([, y]) => usable(y));
      if (dots.length > 400) return; // the line shows them
      for (const [x, y] of dots) {
        body.append(element("circle", {cx: this.#toX(x).toFixed(1), cy: this.#toY(y).toFixed(1), r: 2.6, fill: line.color}));
      }
    }

    #levels(body) {
      for (const {name, value} of this.spec.levels) {
        if (!(value > this.low && value < this.high)) continue;
        const y = this.#toY(value).toFixed(1);
        const right = MARGIN.left + this.inner;
        body.append(
          element("line", {class: "chart-level", x1: MARGIN.left, x2: right, y1: y, y2: y}),
          element("text", {class: "chart-tick", x: right - 4, y: y - 4, "text-anchor": "end"},
            `${name} ${this.format(value)}`),
        );
      }
    }

    #marks(body) {
      for (const mark of this.spec.marks) {
        const at = mark[this.spec.axis];
        if (!usable(at) || !usable(mark.value) || at < this.left || at > this.right) continue;
        const [x, y] = [this.#toX(at), this.#toY(mark.value)];
        const corners = Array.from({length: 10}, (_, number) => {
          const radius = number % 2 ? 3.2 : 7.5;
          const angle = (number * Math.PI) / 5;
          return `${(x + radius * Math.sin(angle)).toFixed(1)},${(y - radius * Math.cos(angle)).toFixed(1)}`;
        });
        const star = element("polygon", {class: "chart-star", points: corners.join(" "), fill: mark.color});
        star.append(element("title", {}, mark.name));
        body.append(star);
      }
    }

    // ---- the pointer

    #row(line, x) {
      let [low, high] = [0, line.x.length - 1];
      while (low < high) {
        const middle = (low + high) >> 1;
        if (line.x[middle] < x) low = middle + 1;
        else high = middle;
      }
      return low > 0 && x - line.x[low - 1] < line.x[low] - x ? low - 1 : low;
    }

    #place(event) {
      return event.clientX - this.svg.getBoundingClientRect().left;
    }

    #hover(event) {
      if (!this.lines || !this.lines.length) return;
      const place = Math.min(MARGIN.left + this.inner, Math.max(MARGIN.left, this.#place(event)));
      if (this.pressed !== undefined) {
        this.brush.setAttribute("visibility", "visible");
        this.brush.setAttribute("x", Math.min(place, this.pressed));
        this.brush.setAttribute("width", Math.abs(place - this.pressed));
      }
      this.guide.setAttribute("visibility", "visible");
      this.guide.setAttribute("x1", place);
      this.guide.setAttribute("x2", place);
      const x = this.#fromX(place);
      this.tip.replaceChildren();
      const nearest = this.lines.map(line => [line, this.#row(line, x)]);
      const steps = nearest.map(([line, row]) => line.rows.steps[row]);
      const same = steps.every(step => step === steps[0]);
      if (same) this.tip.append(html("div", "chart-tip-step", `step ${steps[0].toLocaleString("en")}`));
      for (const [line, row] of nearest) this.tip.append(this.#tipLine(line, row, same));
      this.tip.hidden = false;
      const left = place > this.width * 0.6;
      this.tip.style.left = left ? "auto" : `${place + 14}px`;
      this.tip.style.right = left ? `${this.width - place + 14}px` : "auto";
    }

    #tipLine(line, row, sameStep) {
      const entry = html("div", "chart-tip-line");
      const swatch = html("span", "chart-swatch");
      swatch.style.backgroundColor = line.color;
      const {low, high, count} = line.rows;
      let value = this.format(line.y[row]);
      if (count[row] > 1) value += ` (${this.format(low[row])} to ${this.format(high[row])})`;
      if (line.smooth) value += `, smoothed ${this.format(line.smooth[row])}`;
      entry.append(swatch, html("span", "chart-tip-name", line.name), html("span", "chart-tip-value", value));
      if (!sameStep) entry.append(html("span", "chart-tip-at", `at step ${line.rows.steps[row].toLocaleString("en")}`));
      return entry;
    }

    #leave() {
      this.pressed = undefined;
      this.tip.hidden = true;
      for (const each of [this.guide, this.brush]) if (each) each.setAttribute("visibility", "hidden");
    }

    #press(event) {
      if (this.onZoom && this.lines && this.lines.length && event.button === 0) {
        this.pressed = Math.max(MARGIN.left, this.#place(event));
        event.preventDefault();
      }
    }

    #release(event) {
      const [from, to] = [this.pressed, this.#place(event)];
      this.pressed = undefined;
      if (from === undefined) return;
      this.brush.setAttribute("visibility", "hidden");
      if (Math.abs(to - from) > 8) this.onZoom([from, to].sort((a, b) => a - b).map(place => this.#fromX(place)));
    }
  }
  Chart.number = 0;

  return {...CurveMath, create: (parent, options) => new Chart(parent, options)};
})();
