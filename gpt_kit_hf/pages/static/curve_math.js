"use strict";

// Numbers as text, ticks of axes, and smoothing, for curves.js.
const CurveMath = (() => {
  const NEAREST = 1 / 5; // of the distance to the first step: the window of smoothing there

  // ---- numbers

  const usable = value => value !== null && Number.isFinite(value);

  function trimmed(text) {
    return text.includes(".") ? text.replace(/\.?0+$/, "") : text;
  }

  // A number in few characters: 0.00012, 1.834, 950, 12.3k, 124M.
  function short(value) {
    if (!usable(value)) return "–";
    const size = Math.abs(value);
    if (size === 0) return "0";
    for (const [unit, name] of [[1e12, "T"], [1e9, "B"], [1e6, "M"], [1e4, "k"]]) {
      if (size >= 0.9995 * unit) {
        const scale = name === "k" ? 1e3 : unit;
        return trimmed((value / scale).toPrecision(Math.abs(value / scale) >= 999.5 ? 4 : 3)) + name;
      }
    }
    if (size >= 100) return trimmed(value.toFixed(size >= 1000 ? 0 : 1));
    if (size >= 1e-3) return trimmed(value.toPrecision(4));
    const [digits, power] = value.toExponential(2).split("e");
    return `${trimmed(digits)}e${Number(power)}`;
  }

  function duration(seconds) {
    if (!usable(seconds)) return "–";
    const whole = Math.round(seconds);
    if (whole < 60) return `${whole} s`;
    if (whole < 3600) return `${Math.floor(whole / 60)} min ${whole % 60} s`;
    return `${Math.floor(whole / 3600)} h ${Math.floor((whole % 3600) / 60)} min`;
  }

  function bytes(value) {
    if (!usable(value)) return "–";
    for (const [unit, name] of [[2 ** 40, "TiB"], [2 ** 30, "GiB"], [2 ** 20, "MiB"], [2 ** 10, "KiB"]]) {
      if (value >= unit) return `${trimmed((value / unit).toPrecision(value / unit >= 999.5 ? 4 : 3))} ${name}`;
    }
    return `${value} B`;
  }

  function ticksOf(low, high, wanted, log) {
    if (log) {
      const found = [];
      const wide = Math.log10(high / low) > 3;
      for (let power = Math.floor(Math.log10(low)); power <= Math.ceil(Math.log10(high)); power += 1) {
        for (const digit of wide ? [1] : [1, 2, 5]) {
          const value = digit * 10 ** power;
          if (value >= low * 0.9999 && value <= high * 1.0001) found.push(value);
        }
      }
      if (found.length > 1) return found;
    }
    const rough = (high - low) / Math.max(1, wanted);
    const base = 10 ** Math.floor(Math.log10(rough));
    const step = [1, 2, 5, 10].map(digit => digit * base).find(size => size >= rough * 0.9999);
    const found = [];
    for (let number = Math.ceil(low / step - 1e-9); number * step <= high + step * 1e-9; number += 1) {
      found.push(number * step);
    }
    return found;
  }

  // Of a time axis: seconds, minutes, hours.
  function timeTicks(high, wanted) {
    const sizes = [1, 2, 5, 10, 15, 30, 60, 120, 300, 600, 900, 1800, 3600, 7200, 14400, 28800, 43200, 86400];
    const step = sizes.find(size => high / size <= wanted) || 86400 * Math.ceil(high / 86400 / wanted);
    return Array.from({length: Math.floor(high / step) + 1}, (_, number) => number * step);
  }

  function timeLabel(seconds) {
    if (seconds < 60 || seconds % 60) return `${seconds} s`;
    if (seconds < 3600 || seconds % 3600) return `${trimmed((seconds / 60).toFixed(1))} min`;
    return `${seconds / 3600} h`;
  }

  // ---- smoothing

  // The value at each row of the line that fits the rows around it, each weighed by its count. The window reaches
  // `fraction` of the curve to each side, and less near the start, where a loss falls so fast that an average would
  // run above it. Rows without a value are passed over.
  function smoothed(rows, fraction) {
    const kept = rows.value.map((_, row) => row).filter(row => usable(rows.value[row]));
    const sums = [[0], [0], [0], [0], [0]];
    const places = [];
    let total = 0;
    const level = kept.reduce((sum, row) => sum + rows.value[row], 0) / Math.max(1, kept.length);
    for (const row of kept) {
      places.push(total + (rows.count[row] - 1) / 2);
      total += rows.count[row];
    }
    const middle = (total - 1) / 2;
    kept.forEach((row, index) => {
      const [weight, x, y] = [rows.count[row], places[index] - middle, rows.value[row] - level];
      [1, x, y, x * x, x * y].forEach((term, kind) => sums[kind].push(sums[kind][index] + weight * term));
    });
    const widest = Math.max(1, Math.round(total * fraction));
    const found = new Array(rows.value.length).fill(null);
    let first = 0;
    let end = 0;
    kept.forEach((row, index) => {
      const reach = Math.min(widest, Math.floor(places[index] * NEAREST));
      first = Math.min(first, index);
      while (places[first] < places[index] - reach) first += 1;
      while (first > 0 && places[first - 1] >= places[index] - reach) first -= 1;
      while (end < kept.length && places[end] <= places[index] + reach) end += 1;
      while (places[end - 1] > places[index] + reach) end -= 1;
      const [weight, x, y, xx, xy] = sums.map(sum => sum[end] - sum[first]);
      const spread = xx / weight - (x / weight) ** 2;
      const slope = end - first > 1 ? (xy / weight - (x / weight) * (y / weight)) / spread : 0;
      found[row] = y / weight + slope * (places[index] - middle - x / weight) + level;
    });
    return found;
  }

  // Seconds at steps, from the rows of the measured times; null where a run recorded none.
  function secondsAt(steps, timed) {
    if (!timed || !timed.steps.length) return null;
    const known = [0, ...timed.steps];
    const seconds = [0, ...timed.value];
    let place = 1;
    return steps.map(step => {
      while (place < known.length - 1 && known[place] < step) place += 1;
      const slope = (seconds[place] - seconds[place - 1]) / Math.max(1, known[place] - known[place - 1]);
      return Math.max(0, seconds[place] + slope * (step - known[place]));
    });
  }

  return {usable, short, duration, bytes, ticksOf, timeTicks, timeLabel, smoothed, secondsAt};
})();
