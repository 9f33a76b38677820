"use strict";
// Fills the page from its embedded numbers.

const report = JSON.parse(document.getElementById("numbers").textContent);
const hidden = new Set();  // places of arms that are not drawn

function section(name) { return document.getElementById(name); }

function words() {
  section("made").textContent = `${report.runs.map((run) => visible(run.name)).join(", ")}. Made by Keel ${report.version}, ${report.made}.`;
  document.title = `Keel report: ${report.runs.map((run) => visible(run.name)).join(", ")}`;
  const cards = make("div", {className: "cards"});
  for (const run of report.runs) {
    const list = make("ul");
    for (const sentence of run.sentences) list.append(make("li", {textContent: visible(sentence)}));
    const seed = run.seed === null ? "" : `, seed ${run.seed}`;
    cards.append(make("div", {}, make("h3", {textContent: visible(run.name) + seed}), list));
  }
  section("words").append(cards);
}

function armSwitches() {
  if (report.arms.length < 2) return;
  section("arms").hidden = false;
  report.arms.forEach((arm, number) => {
    const box = make("input", {type: "checkbox", checked: true}), swatch = make("span", {className: "swatch"});
    swatch.style.background = color(number);
    box.addEventListener("change", () => { if (box.checked) hidden.delete(number); else hidden.add(number); curves(); frontier(); });
    section("arms").append(make("label", {}, box, swatch, make("span", {textContent: visible(arm.name)})));
  });
}

function armsShown() { return report.arms.map((arm, number) => ({arm, number})).filter(({number}) => !hidden.has(number)); }

function marks() {
  return armsShown().flatMap(({arm}) => arm.runs.flatMap((place) => report.runs[place].events)).filter((event) => event.kind !== "other");
}

function curves() {
  const place = section("curves").querySelector(".charts");
  place.replaceChildren();
  for (const spec of report.charts) {
    const lines = armsShown().flatMap(({arm, number}) => {
      const {name} = spec, trained = arm.training[name], held = arm.evaluated[name], label = report.arms.length > 1 ? `${arm.name}, ` : "";
      const band = arm.runs.length > 1;
      return [
        trained ? {name: `${label}training`, number, kind: "line", x: trained.steps, y: trained.mean, low: trained.low, high: trained.high, band, faint: Boolean(held)} : null,
        held ? {name: `${label}evaluation`, number, kind: "points", x: held.steps, y: held.mean, low: held.low, high: held.high, band, joined: true, training: Boolean(trained)} : null,
      ].filter((line) => line && line.x.length);
    });
    if (lines.length) chart(place, {title: spec.title, unit: spec.unit, start: spec.start, xTitle: "step", whole: true, lines, marks: marks()});
  }
  if (!place.children.length) place.append(make("p", {textContent: "No step has been recorded yet."}));
}

function frontierLine(run, number, name, root, alone) {
  const axis = (value) => known(value) ? (root ? Math.sqrt(Math.max(value, 0)) : value) : null;
  const points = run.evaluations.filter((point) => point.values.kl_nats && known(point.values.kl_nats.mean) && point.values[name] && known(point.values[name].mean));
  const kl = points.map((point) => point.values.kl_nats), value = points.map((point) => point.values[name]);
  const best = run.best_by === name ? points.findIndex((point) => point.step === run.best_step) : -1;
  return {
    name: visible(run.name), number, kind: "points", joined: true, steps: points.map((point) => point.step), best, alone,
    x: kl.map((item) => axis(item.mean)), xLow: kl.map((item) => axis(item.low)), xHigh: kl.map((item) => axis(item.high)),
    y: value.map((item) => item.mean), low: value.map((item) => item.low), high: value.map((item) => item.high),
  };
}

function frontier() {
  section("frontier").hidden = report.runs.every((run) => run.command !== "train");  // a stage has none
  const place = section("frontier").querySelector(".charts"), root = section("root").checked;
  place.replaceChildren();
  for (const spec of report.charts.filter((item) => item.name === "reward" || item.name.startsWith("reward_"))) {
    const lines = armsShown().flatMap(({arm, number}) => arm.runs.map((run) => frontierLine(report.runs[run], number, spec.name, root, arm.runs.length === 1))).filter((line) => line.x.length);
    if (lines.length) chart(place, {title: spec.title, unit: spec.unit, start: "free", xTitle: root ? "square root of the KL (nats^1/2)" : "KL to the reference (nats)", xStart: "zero", lines});
  }
  if (!place.children.length) place.append(make("p", {textContent: "No evaluation has a KL: the run has no reference, or no evaluation yet."}));
}

function plainTable(heads, rows) {
  const head = make("tr"), body = make("tbody");
  for (const text of heads) head.append(make("th", {textContent: visible(text), scope: "col"}));
  for (const row of rows) {
    const line = make("tr");
    row.forEach((value, place) => line.append(make("td", {className: "text", dir: "auto"}, place ? visible(value) : make("code", {textContent: visible(value)}))));
    body.append(line);
  }
  return make("div", {className: "scroll"}, make("table", {}, make("thead", {}, head), body));
}

function events() {
  const rows = report.runs.flatMap((run) => run.events.map((event) => [event.name, run.name, String(event.step), event.time ? new Date(event.time * 1000).toISOString().slice(0, 19).replace("T", " ") : "", event.detail]));
  section("events").append(rows.length ? plainTable(["event", "run", "step", "time (UTC)", "what"], rows) : make("p", {textContent: "Nothing but routine events was recorded."}));
  for (const run of report.runs) {
    const counts = Object.entries(run.event_counts).map(([name, count]) => `${count} x ${name}`).join(", ");
    section("events").append(make("p", {className: "note", textContent: visible(`All events of ${run.name}: ${counts || "none"}.`)}));
  }
}

function settings() {
  const place = section("settings"), names = report.runs.map((run) => run.name);
  if (report.runs.length > 1) {
    const rows = report.differences.map((row) => [row.setting, ...row.values.map((value) => value === null ? "–" : value)]);
    place.append(rows.length ? plainTable(["setting", ...names], rows) : make("p", {textContent: "The runs have the same settings."}));
  }
  for (const run of report.runs) {
    const fold = make("details", {}, make("summary", {textContent: visible(`All settings of ${run.name}`)}));
    fold.addEventListener("toggle", () => { if (fold.children.length < 2) fold.append(plainTable(["setting", "value"], Object.entries(run.settings))); });
    place.append(fold);
  }
}

function environment() {
  const names = [...new Set(report.runs.flatMap((run) => Object.keys(run.environment)))];
  section("environment").append(plainTable(["", ...report.runs.map((run) => run.name)], names.map((name) => [name, ...report.runs.map((run) => run.environment[name] || "–")])));
}

function notes() {
  const list = make("ul");
  for (const note of report.notes) list.append(make("li", {textContent: visible(note)}));
  section("notes").append(list);
}

function markLegend() {
  const kinds = [...new Set(report.runs.flatMap((run) => run.events.map((event) => event.kind)))].filter((kind) => kind !== "other");
  const note = section("curves").querySelector(".note");
  for (const kind of kinds) {
    const swatch = make("span", {className: "swatch"});
    swatch.style.background = `var(--${kind})`;
    note.append(" ", swatch, ` ${NAMES[kind]}`);
  }
}

function follow() {  // of a page that keel report --live serves: a new page when the files changed, unless a row is being read
  if (!document.body.dataset.live) return;
  const [seconds, state] = document.body.dataset.live.split(" "), bar = section("newer");
  bar.querySelector("button").addEventListener("click", () => location.reload());
  setInterval(async () => {
    const answer = await fetch("state").catch(() => null);  // the server may have ended; the page stays
    if (!answer || !answer.ok || await answer.text() === state) return;
    if (document.querySelector(".detail:not([hidden])") || document.activeElement.closest("input, select, #browser")) bar.hidden = false;
    else location.reload();
  }, 1000 * Number(seconds));
}

words();
markLegend();
armSwitches();
frontier();
curves();
rolloutBrowser(section("rollouts"), report);
events();
settings();
environment();
notes();
section("root").addEventListener("change", frontier);
follow();
