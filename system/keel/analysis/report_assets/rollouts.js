"use strict";
// The browser of rollouts: filters, sorting, arrows, tokens colored by log-ratio, the same prompt along training.

const PAGE_ROWS = 25, STRONG_NATS = 3;

function rolloutRows(report) {
  return report.runs.flatMap((run, number) => run.rows.rows.map((row) => ({...row, number, run: run.name, texts: run.rows.token_texts})));
}

const COLUMNS = [
  {name: "run", value: (row) => row.run, wide: true, when: (rows) => rows.some((row) => row.number > 0)},
  {name: "source", value: (row) => row.source, wide: true},
  {name: "step", value: (row) => row.step, number: true},
  {name: "prompt", value: (row) => row.prompt, text: true},
  {name: "completion", value: (row) => row.completion, text: true, wide: true},
  {name: "reward", value: (row) => row.rewards.reward, number: true},
  {name: "gold", value: (row) => row.rewards.reward_gold, number: true, when: (rows) => rows.some((row) => known(row.rewards.reward_gold))},
  {name: "proxy - gold", value: (row) => row.gap, number: true, when: (rows) => rows.some((row) => known(row.gap))},
  {name: "KL (nats)", value: (row) => row.kl_nats, number: true, when: (rows) => rows.some((row) => known(row.kl_nats))},
  {name: "tokens", value: (row) => row.length_tokens, number: true, wide: true},
];

function rolloutBrowser(section, report) {
  const rows = rolloutRows(report);
  if (!rows.length) { section.append(make("p", {textContent: "The run directory holds no rollouts and no evaluations."})); return; }
  const columns = COLUMNS.filter((column) => !column.when || column.when(rows));
  const state = {rows, columns, list: rows, first: 0, selected: -1, sorted: null, descending: true};
  section.append(make("p", {className: "note", textContent: `${rows.length} rows are embedded, chosen as the last section says. Sort with the column heads; the arrow keys move in the list, Enter opens a row.`}));
  section.append(controls(state, report), table(state));
  state.detail = make("div", {className: "detail", hidden: true});
  state.detail.setAttribute("aria-live", "polite");
  section.append(state.detail);
  fill(state);
}

function choice(label, values, changed) {
  const select = make("select");
  for (const [value, text] of values) select.append(make("option", {value, textContent: visible(text)}));
  select.addEventListener("change", changed);
  return [make("label", {textContent: label}, select), select];
}

function controls(state, report) {
  const changed = () => filter(state);
  const [sourceLabel, source] = choice("Source", [["", "all"], ["evaluation", "evaluations"], ["training", "training"]], changed);
  const [runLabel, run] = choice("Run", [["", "all"], ...report.runs.map((item, number) => [String(number), item.name])], changed);
  const search = make("input", {type: "search", placeholder: "text in prompt or completion"});
  search.addEventListener("input", changed);
  Object.assign(state, {source, run, search, place: make("span", {className: "note"})});
  const back = make("button", {type: "button", textContent: "Previous"}), on = make("button", {type: "button", textContent: "Next"});
  back.addEventListener("click", () => turn(state, -PAGE_ROWS));
  on.addEventListener("click", () => turn(state, PAGE_ROWS));
  const items = [sourceLabel, report.runs.length > 1 ? runLabel : null, make("label", {textContent: "Search"}, search), back, on, state.place];
  return make("div", {className: "controls"}, ...items);
}

function table(state) {
  const head = make("tr");
  state.heads = state.columns.map((column) => {
    const button = make("button", {type: "button", textContent: column.name});
    const cell = make("th", {className: style(column)}, button);
    cell.setAttribute("scope", "col");
    cell.setAttribute("aria-sort", "none");
    button.addEventListener("click", () => sort(state, column));
    head.append(cell);
    return {cell, button, column};
  });
  state.body = make("tbody");
  state.body.addEventListener("keydown", (event) => move(state, event));
  const node = make("table", {id: "browser"}, make("thead", {}, head), state.body);
  return make("div", {className: "scroll"}, node);
}

function style(column) { return [column.number ? "number" : "", column.wide ? "wide" : "", column.text ? "text" : ""].join(" ").trim(); }

function filter(state) {
  const text = state.search.value.toLowerCase();
  state.list = state.rows.filter((row) => (!state.source.value || row.source === state.source.value) && (!state.run.value || String(row.number) === state.run.value)
    && (!text || row.prompt.toLowerCase().includes(text) || row.completion.toLowerCase().includes(text)));
  order(state);
}

function sort(state, column) {
  state.descending = state.sorted === column ? !state.descending : Boolean(column.number);
  state.sorted = column;
  order(state);
}

function order(state) {
  const {sorted, descending} = state;
  if (sorted) {
    const sign = descending ? -1 : 1;
    state.list = [...state.list].sort((one, other) => {
      const [a, b] = [sorted.value(one), sorted.value(other)];
      if (sorted.number) return known(a) && known(b) ? sign * (a - b) : known(b) - known(a);  // rows without a value last
      return sign * (a < b ? -1 : a > b ? 1 : 0);
    });
  }
  for (const {cell, button, column} of state.heads) {
    const direction = column !== sorted ? "none" : descending ? "descending" : "ascending";
    cell.setAttribute("aria-sort", direction);
    button.textContent = column.name + {none: "", descending: " ↓", ascending: " ↑"}[direction];
  }
  state.first = 0;
  state.selected = -1;
  fill(state);
}

function turn(state, rows) {
  const next = state.first + rows;
  if (next >= 0 && next < state.list.length) { state.first = next; fill(state); }
}

function fill(state) {
  const part = state.list.slice(state.first, state.first + PAGE_ROWS);
  state.body.replaceChildren(...part.map((row, place) => {
    const line = make("tr", {tabIndex: place === 0 ? 0 : -1});
    line.addEventListener("click", () => select(state, state.first + place));
    for (const column of state.columns) {
      const value = column.value(row);
      const cell = make("td", {className: style(column), textContent: column.number ? shown(value) : visible(value).replace(/\s+/g, " ").slice(0, 200)});
      if (column.text) cell.dir = "auto";
      line.append(cell);
    }
    return line;
  }));
  const last = Math.min(state.first + PAGE_ROWS, state.list.length);
  state.place.textContent = state.list.length ? `rows ${state.first + 1} to ${last} of ${state.list.length}` : "no row";
  mark(state);
}

function mark(state) {
  [...state.body.children].forEach((line, place) => line.setAttribute("aria-selected", String(state.first + place === state.selected)));
}

function move(state, event) {
  const now = state.first + [...state.body.children].indexOf(event.target.closest("tr")), end = state.list.length - 1;
  const target = {ArrowDown: now + 1, ArrowUp: now - 1, Home: 0, End: end, PageDown: now + PAGE_ROWS, PageUp: now - PAGE_ROWS}[event.key];
  if (event.key === "Enter" || event.key === " ") { event.preventDefault(); select(state, now); return; }
  if (target === undefined) return;
  event.preventDefault();
  focusRow(state, Math.min(Math.max(target, 0), end));
}

function focusRow(state, place) {
  const first = Math.floor(place / PAGE_ROWS) * PAGE_ROWS;
  if (first !== state.first) { state.first = first; fill(state); }
  const line = state.body.children[place - state.first];
  for (const other of state.body.children) other.tabIndex = other === line ? 0 : -1;
  line.focus();
}

function select(state, place) {
  state.selected = place;
  mark(state);
  detail(state, state.list[place]);
}

function detail(state, row) {
  const scores = Object.entries(row.rewards).map(([name, value]) => `${name} ${shown(value)}`);
  const facts = [`${row.run}, ${row.source}, step ${row.step}`, ...scores, known(row.gap) ? `proxy - gold ${shown(row.gap)}` : null,
    known(row.kl_nats) ? `KL ${shown(row.kl_nats)} nats` : null, `${row.length_tokens} tokens, ended by ${row.finish_reason}`];
  state.detail.replaceChildren(...[
    make("h3", {textContent: "Prompt"}), make("p", {className: "answer", dir: "auto", textContent: visible(row.prompt)}),
    make("h3", {textContent: "Completion"}), plain(row), tokens(row), ...(row.log_ratios.length ? [scale()] : []),
    make("p", {className: "note", textContent: visible(facts.filter(Boolean).join("; "))}), ...along(state, row)].filter(Boolean));
  state.detail.hidden = false;
}

function plain(row) {  // the text itself, where tokens do not show it
  if (row.log_ratios.length && row.texts) return null;
  return make("p", {className: "answer", dir: "auto", textContent: visible(row.completion)});
}

function tokens(row) {
  if (!row.log_ratios.length) return null;
  const node = make("p", {className: "answer", dir: "auto"});
  if (!row.texts) node.append("Tokens by id, as no checkpoint holds a tokenizer: ");
  row.log_ratios.forEach((nats, place) => {
    const token = make("span", {className: "token", textContent: visible(row.pieces[place]) || "·", title: `log-ratio ${nats} nats`});
    const strength = Math.min(Math.abs(nats) / STRONG_NATS, 1) * 0.55;
    token.style.backgroundColor = `rgba(var(${nats > 0 ? "--more" : "--less"}), ${strength.toFixed(2)})`;
    node.append(token);
  });
  if (row.log_ratios.length < row.length_tokens) node.append(` [... ${row.length_tokens - row.log_ratios.length} tokens more]`);
  return node;
}

function scale() {
  return make("div", {className: "scale"}, make("span", {textContent: `token likelier under the reference (-${STRONG_NATS} nats)`}), make("i"),
    make("span", {textContent: `under the policy (+${STRONG_NATS} nats)`}));
}

function along(state, row) {
  const same = state.rows.filter((other) => other.number === row.number && other.prompt_id === row.prompt_id && other.prompt === row.prompt && other.source === row.source);
  if (same.length < 2) return [];
  const buttons = same.sort((a, b) => a.step - b.step).map((other) => {
    const button = make("button", {type: "button", textContent: `step ${other.step}: reward ${shown(other.rewards.reward)}` + (known(other.rewards.reward_gold) ? `, gold ${shown(other.rewards.reward_gold)}` : "")});
    button.setAttribute("aria-current", String(other === row));
    button.addEventListener("click", () => { detail(state, other); state.detail.querySelector('.along [aria-current="true"]').focus(); });
    return button;
  });
  return [make("h3", {textContent: "The same prompt along training"}), make("div", {className: "along"}, ...buttons)];
}
