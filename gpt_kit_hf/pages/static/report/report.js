"use strict";

// Draws the curves of the report, whose numbers are in the page itself.
(() => {
  const byId = id => document.getElementById(id);
  const run = JSON.parse(byId("curve-data").textContent);
  run.color = "var(--run-0)";
  RunCharts.addSeconds(run);
  RunCharts.create({loss: byId("loss"), others: byId("charts"), controls: byId("controls")}).draw([run]);
})();
