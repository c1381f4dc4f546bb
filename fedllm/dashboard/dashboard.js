// The page. All that comes from runs' folders is put in as text (textContent), never as markup.
"use strict";
const view = document.getElementById("view");
const runs = new Map();      // id -> a run in full
let list = null, source = null, picked = new Set(), gone = new Set();

function h(tag, props = {}, ...children) {
  const node = document.createElement(tag);
  for (const [name, value] of Object.entries(props)) {
    if (name.startsWith("on")) node.addEventListener(name.slice(2), value);
    else if (name === "class") node.className = value;
    else node[name] = value;
  }
  node.append(...children.flat().filter((c) => c !== null && c !== undefined && c !== "").map((c) =>
    c instanceof Node ? c : document.createTextNode(String(c))));
  return node;
}

function size(n) {
  for (const unit of ["B", "kB", "MB", "GB"]) {
    if (n < 1000) return unit === "B" ? `${n} B` : `${n.toFixed(1)} ${unit}`;
    n /= 1000;
  }
  return `${n.toFixed(1)} TB`;
}
let SHARES = new Set();      // the figures that are told in percent
function figure(name, v) { return v === null || v === undefined ? "-" : SHARES.has(name) ? `${(100 * v).toFixed(1)} %` : v.toPrecision(4); }
function duration(s) {
  if (s === null || s === undefined) return "-";
  if (s < 60) return `${s.toFixed(1)} s`;
  const m = Math.round(s / 60);
  return m < 60 ? `${m} min` : `${Math.floor(m / 60)} h ${m % 60} min`;
}
function label(name) { return name.replaceAll("_", " "); }
function epsilon(e) { return e === null || e === undefined ? "-" : typeof e === "number" ? e.toPrecision(4) : e; }
function headline(test) { return Object.keys(test).find((n) => n !== "loss") ?? Object.keys(test)[0]; }
const BAD = ["damaged", "failed", "half written", "missing", "refused", "suspect", "left out", "no answer", "unfinished"];
function badge(state) { return h("span", { class: `badge ${BAD.includes(state) ? "bad" : state}` }, state); }
function address(id) { return `#/run/${id}`; }
function cells(kind, values) { return h("tr", {}, values.map((v) => v instanceof HTMLTableCellElement ? v : h(kind, {}, v))); }
function table(heads, rows, kind = "") {
  const named = heads.map((head) => head instanceof Node ? head.textContent : head).filter(Boolean).join(", ");
  return h("div", { class: `scroll ${kind}`, tabIndex: 0, role: "region", ariaLabel: named },
    h("table", {}, h("thead", {}, cells("th", heads)), h("tbody", {}, rows)));
}
function section(title, note, ...inner) {
  return h("section", {}, h("h2", {}, title), note ? h("p", { class: "note" }, note) : null, ...inner);
}
function say(text, good = false) {
  const said = document.getElementById("said");
  said.textContent = text;
  said.className = good ? "good" : "";
  said.hidden = !text;
}

// ---- the list -------------------------------------------------------------------------------------------------------
function listed(run) {
  const name = headline(run.test);
  const pick = h("input", { type: "checkbox", checked: picked.has(run.id), title: "side by side",
    ariaLabel: `side by side: ${run.name}`, onchange: (e) => { picked[e.target.checked ? "add" : "delete"](run.id); show(); } });
  const group = run.kind === "comparison" || run.kind === "stages";
  const inner = list.runs.filter((r) => r.within === run.id);
  const done = group ? inner.filter((r) => r.state === "finished").length : run.done;
  const all = group ? inner.length : run.rounds;
  const row = h("tr", { class: group ? "group" : "" },
    h("td", { class: "left" }, group ? "" : pick),
    h("td", { class: `left name ${run.within ? "within" : ""}` }, h("a", { href: address(run.id) }, run.name),
      run.within && !group ? null : h("span", { class: "sub" }, group ? `${run.kind}, ${run.label}` : run.label)),
    h("td", { class: "left" }, badge(run.state)),
    h("td", { class: "left" }, run.method),
    h("td", { class: "left" }, h("progress", { value: done, max: Math.max(1, all, done) }), `${done} of ${all}${group ? " runs" : ""}`),
    h("td", {}, figure("loss", run.loss)),
    h("td", {}, name ? figure(name, run.test[name]) : "-", name ? h("span", { class: "sub" }, label(name)) : null),
    h("td", {}, size(run.up)), h("td", {}, size(run.down)), h("td", {}, epsilon(run.epsilon)),
    h("td", { class: run.trouble ? "bad" : "" }, run.trouble || "-"));
  return row;
}

function showList() {
  if (!list) return view.replaceChildren(h("p", { class: "empty" }, "reading the folders"));
  const shown = [...picked].filter((id) => list.runs.some((r) => r.id === id));
  const go = h("button", { disabled: shown.length < 2, onclick: () => { location.hash = `#/side/${shown.join(",")}`; } },
    "Side by side");
  const running = list.runs.filter((r) => r.state === "running" && r.kind === "run").length;
  const body = list.runs.length ? [
    h("div", { class: "bar" }, go, h("span", { class: "note" }, shown.length < 2 ? "tick two runs or more" : `${shown.length} runs`)),
    table(["", h("th", { class: "left" }, "run"), h("th", { class: "left" }, "state"), h("th", { class: "left" }, "method"),
      h("th", { class: "left" }, "rounds"), "training loss", "global test", "up", "down", "epsilon", "trouble"],
      list.runs.map(listed), "list tight")] : [
    h("div", { class: "card empty" }, `No run lies in ${list.roots.join(", ")} yet. The first one that is begun there appears here by itself.`)];
  view.replaceChildren(h("header", {}, h("h1", {}, "Runs"),
    h("p", {}, `${list.runs.length} in ${list.roots.join(", ")}, ${running} running`)), h("section", {}, ...body));
}

// ---- one run --------------------------------------------------------------------------------------------------------
function act(run, what, sure) {
  return async () => {
    if (!confirm(sure)) return;
    const csrf = document.querySelector("meta[name=csrf]").content;
    try {
      const got = await fetch(`/api/run/${run.id}/${what}`, { method: "POST", headers: { "X-FedLLM-CSRF": csrf } });
      const text = await got.text();
      let told;
      try { told = JSON.parse(text); } catch { told = { error: text }; }
      say(told.says ?? told.error, got.ok);
    } catch { say("the dashboard does not answer: was it ended?"); }
  };
}

function headed(run) {
  const can = run.kind !== "";
  const stop = h("button", { id: "stop", disabled: run.state !== "running",
    onclick: act(run, "stop", `End ${run.name} in order? It keeps its last checkpoint and can be resumed.`) }, "Stop");
  const resume = h("button", { id: "resume", disabled: run.state !== "stopped" || !can || run.kind === "comparison",
    onclick: act(run, "resume", `Go on with ${run.name}, as a process of its own on this machine?`) }, "Resume");
  const said = [run.method, ...Object.entries(run.facts).map(([k, v]) => `${k} ${v}`), run.label].filter(Boolean);
  return h("header", {}, h("div", { class: "line" }, h("h1", {}, run.name), badge(run.state),
    h("div", { class: "acts" }, stop, resume)),
    h("p", {}, said.join(" · ")), run.why ? h("p", { class: BAD.includes(run.state) ? "bad" : "" }, run.why) : null,
    run.reading ? h("p", {}, `reading the record: ${size(run.reading)} left`) : null);
}

function figures(run) {
  const name = headline(run.test), left = run.round_seconds === null ? null : (run.rounds - run.done) * run.round_seconds;
  const up = run.state === "running" && left !== null && left > 0 ? `about ${duration(left)} left` : run.skipped ? `${run.skipped} skipped` : "";
  const cards = [["rounds done", `${run.done} of ${run.rounds}`, up], ["training loss", figure("loss", run.loss), "mean of the clients"],
    ...(name ? [[`global test, ${label(name)}`, figure(name, run.test[name]), ""]] : []),
    ["sent up", size(run.up), run.tested.up ? `tests: ${size(run.tested.up)}` : ""],
    ["sent down", size(run.down), run.tested.down ? `tests: ${size(run.tested.down)}` : ""],
    ["epsilon spent", epsilon(run.epsilon), run.privacy.layers.length ? privacy(run) : "no layer accounts for privacy"],
    ["trouble", run.trouble, run.resumed ? `resumed ${run.resumed} times` : ""]];
  return h("div", { class: "figures" }, cards.map(([t, v, s]) => h("div", { class: "figure" }, h("span", {}, t),
    h("strong", {}, v), h("small", {}, s))));
}
function privacy(run) {
  const of = run.privacy.layers.map((x) => `${x.layer}, one ${x.unit}${x.delta ? `, delta ${x.delta.toExponential(1)}` : ""}`).join("; ");
  return run.privacy.so_far ? `${of}; so far, by RDP, at the newest checkpoint` : of;
}

function curves(many) {
  const one = many.length === 1, named = new Set(many.flatMap((r) => r.tests.flatMap((t) => Object.keys(t))));
  named.delete("round");
  const line = (r, i, key, of) => ({ name: one ? label(key) : r.name, color: COLORS[i % COLORS.length],
    x: of.map((p) => p.round), y: of.map((p) => p[key] ?? null) });
  const out = [["training loss", many.map((r, i) => line(r, i, "loss", r.curve)), "round", {}]];
  for (const name of named) {
    const have = many.map((r, i) => line(r, i, name, r.tests)).filter((l) => l.y.some((v) => v !== null));
    out.push([`global test: ${label(name)}`, have, "rounds done", { share: SHARES.has(name) }]);
  }
  out.push(["bytes so far", one ? ["up", "down"].map((k, i) => ({ ...line(many[0], i, k, many[0].curve), dash: ["solid", "dot"][i] })) :
    many.map((r, i) => ({ ...line(r, i, "up", r.curve), y: r.curve.map((p) => p.up + p.down) })), "round", { bytes: true }]);
  return out.filter(([, lines, , options]) => lines.some((l) => l.y.some((v) => options.bytes ? v > 0 : v !== null)));
}

function charts(many) {
  const all = curves(many);
  let grid = view.querySelector(".grid.charts");
  if (!grid || grid.children.length !== all.length) {
    grid = h("div", { class: "grid charts" }, all.map(() => h("div", { class: "card" }, h("div", { class: "chart" }))));
    for (const card of grid.children) widths.observe(card);
  }
  return [grid, () => all.forEach(([title, lines, axis, options], i) =>
    draw(grid.children[i].firstChild, lines, title, axis, options))];
}

function waiting(run, c) {
  if (c.state !== "asked") return c.why;
  if (run.state !== "running") return "no answer when the run ended";
  return c.since ? `at work for ${duration(Math.max(0, run.now - c.since))}` : "at work";
}
function clients(run) {
  const rows = run.clients.map((c) => h("tr", {}, h("td", { class: "left" }, c.id),
    h("td", { class: "left" }, badge(c.state)), h("td", {}, c.last ?? "-"), h("td", {}, c.asked), h("td", {}, c.answered),
    h("td", { class: c.missing ? "bad" : "" }, c.missing), h("td", { class: c.refused ? "bad" : "" }, c.refused),
    h("td", {}, size(c.up)), h("td", {}, size(c.down)), h("td", { class: "why" }, waiting(run, c))));
  const what = run.of_sites ? "Sites" : "Clients", shown = run.clients.length;
  const note = `${run.clients_in_all} that the record names${shown < run.clients_in_all ? `, the ${shown} most in need of a look` : ""}.`
    + (run.of_sites ? " Health is what the coordinator's record tells." : "");
  return section(what, note, rows.length ? table([h("th", { class: "left" }, run.of_sites ? "site" : "client"),
    h("th", { class: "left" }, "state"), "last round", "asked", "answered", "missing", "refused", "up", "down",
    h("th", { class: "why" }, "why")], rows, "high tight") : h("div", { class: "card empty" }, "Nobody has been asked yet."));
}

function news(run) {
  const rows = run.news.map((n) => h("tr", {}, h("td", { class: "left" }, n.round ?? ""), h("td", { class: `left ${n.bad ? "bad" : ""}` }, n.kind),
    h("td", { class: "left" }, n.client), h("td", { class: "why" }, n.why)));
  return section("What happened", "", rows.length ? table([h("th", { class: "left" }, "round"), h("th", { class: "left" }, "what"),
    h("th", { class: "left" }, "client"), h("th", { class: "why" }, "why")], rows, "high tight") :
    h("div", { class: "card empty" }, "Nothing but rounds and tests."));
}

function resumed(run) {
  const r = run.resume;
  if (!r || r.code === null || r.code === 0) return null;
  return section("fedllm resume ended without success", `Its exit code is ${r.code}; the end of what it said:`,
    h("div", { class: "card" }, h("pre", {}, r.said)));
}

function showRun(id) {
  const run = runs.get(id);
  if (gone.has(id) && !run) return view.replaceChildren(h("p", { class: "empty" }, "There is no such run here (any longer)."));
  if (!run) return view.replaceChildren(h("p", { class: "empty" }, "reading the run"));
  const open = view.querySelector("details")?.open ?? false;
  const parts = [headed(run)];
  let paint = () => {};
  if (run.kind === "comparison" || run.kind === "stages") {
    const inner = list ? list.runs.filter((r) => r.within === id) : [];
    if (run.says.length) parts.push(section("What it says", "", ...run.says.map((t) => h("p", {}, t))));
    parts.push(section("Its runs", "", table(["", h("th", { class: "left" }, "run"), h("th", { class: "left" }, "state"),
      h("th", { class: "left" }, "method"), h("th", { class: "left" }, "rounds"), "training loss", "global test", "up", "down",
      "epsilon", "trouble"], inner.map(listed), "list tight"),
      h("p", { class: "note" }, inner.length > 1 ? h("a", { href: `#/side/${inner.slice(0, 12).map((r) => r.id).join(",")}` },
        "side by side") : "")));
    parts.push(resumed(run));
  } else {
    const [grid, then] = charts([run]);
    paint = then;
    parts.push(resumed(run), figures(run), grid.children.length ? section("Learning", "", grid) : null, clients(run), news(run));
  }
  if (run.recipe) parts.push(section("Recipe", "", h("details", { open }, h("summary", {}, "recipe.yaml"), h("pre", {}, run.recipe))));
  keeping(() => view.replaceChildren(...parts.filter(Boolean)));
  paint();
}

function showSide(ids) {
  const many = ids.map((id) => runs.get(id)).filter(Boolean);
  if (!many.length) return view.replaceChildren(h("p", { class: "empty" }, "reading the runs"));
  const [grid, paint] = charts(many);
  const rows = [["state", (r) => badge(r.state)], ["method", (r) => r.method], ["rounds", (r) => `${r.done} of ${r.rounds}`],
    ["training loss", (r) => figure("loss", r.loss)],
    ...[...new Set(many.flatMap((r) => Object.keys(r.test)))].map((n) => [`global test, ${label(n)}`, (r) => figure(n, r.test[n])]),
    ["sent up", (r) => size(r.up)], ["sent down", (r) => size(r.down)], ["epsilon spent", (r) => epsilon(r.epsilon)],
    ["seconds a round", (r) => duration(r.round_seconds)],
    ["clients without an answer", (r) => r.clients.filter((c) => BAD.includes(c.state)).length], ["trouble", (r) => r.trouble]];
  const body = rows.map(([name, of]) => h("tr", {}, h("th", {}, name), many.map((r) => h("td", {}, of(r)))));
  keeping(() => view.replaceChildren(h("header", {}, h("h1", {}, "Side by side"), h("p", {}, `${many.length} runs`)),
    section("Learning", "", grid), section("Figures", "", table(["", ...many.map((r) => h("th", {}, h("a", { href: address(r.id) }, r.name)))], body, "side"))));
  paint();
}

// The page is put together afresh with each change; where its reader had scrolled to, and what the keyboard is at, stays.
const AT = "a, button, input, summary, .scroll";
function named(node) {
  return `${node.tagName} ${node.id || node.getAttribute("href") || node.ariaLabel || node.textContent}`;
}
function keeping(change) {
  const at = [...view.querySelectorAll(".scroll")].map((s) => [s.scrollLeft, s.scrollTop]);
  const held = view.contains(document.activeElement) && document.activeElement.matches(AT) ? named(document.activeElement) : "";
  const y = scrollY;
  change();
  [...view.querySelectorAll(".scroll")].forEach((s, i) => at[i] && ([s.scrollLeft, s.scrollTop] = at[i]));
  if (held) [...view.querySelectorAll(AT)].find((node) => named(node) === held)?.focus({ preventScroll: true });
  scrollTo(0, y);
}

// ---- where we are ---------------------------------------------------------------------------------------------------
function where() {
  const [, what, rest] = location.hash.split("/");
  return { what: what || "list", ids: rest ? rest.split(",").slice(0, 12) : [] };
}
function show() {
  const { what, ids } = where();
  const of = what === "run" ? runs.get(ids[0])?.name : what === "side" ? "Side by side" : "";
  document.title = of ? `${of} - fedllm dashboard` : "fedllm dashboard";
  if (what === "run") showRun(ids[0]);
  else if (what === "side") showSide(ids);
  else keeping(showList);
}
function follow() {
  source?.close();
  const { ids } = where();
  source = new EventSource("/api/stream?" + ids.map((id) => `run=${encodeURIComponent(id)}`).join("&"));
  const link = document.getElementById("link");
  source.onopen = () => { link.textContent = "live"; link.className = ""; };
  source.onerror = () => { link.textContent = "not connected: is the dashboard running?"; link.className = "off"; };
  source.addEventListener("runs", (e) => { list = JSON.parse(e.data); SHARES = new Set(list.shares); if (where().what !== "side") show(); });
  source.addEventListener("run", (e) => { const run = JSON.parse(e.data); runs.set(run.id, run); gone.delete(run.id); show(); });
  source.addEventListener("gone", (e) => { const { id } = JSON.parse(e.data); runs.delete(id); gone.add(id); show(); });
}
addEventListener("hashchange", () => { say(""); view.replaceChildren(); follow(); show(); scrollTo(0, 0); });
matchMedia("(prefers-color-scheme: dark)").addEventListener("change", show);
addEventListener("pagehide", () => source?.close());
follow();
show();
